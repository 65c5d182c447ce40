// Marks: the deployments on the timeline, as buttons with their verdicts. Those close together are
// one mark.

import { deploymentText } from "./deployments.js";
import { el } from "./dom.js";
import { formatTime, zoneName } from "./times.js";
import { badge, byUrgency, verdictOf, verdictText } from "./verdicts.js";

const MARK_PX = 24; // what a finger needs, too
const LETTER_PX = 6.5; // of a mark's word, on average
const GLYPHS = { rollout: "▲", rollback: "▼", canary: "◆" };
const TOOLTIP_ROWS = 7;

export class Marks {
  #callbacks;

  /**
   * `onMark(deployments)`: a mark was pressed. `onTooltip(lines, x)`: it is pointed at or has the
   * focus; without lines, no longer.
   */
  constructor(callbacks) {
    this.#callbacks = callbacks;
    this.element = el("div", { class: "marks", role: "group", "aria-label": "Deployments" });
  }

  /** Draw deployments, earliest first; `time` turns ms into pixels, `right` is the last one. */
  draw(deployments, { time, right, zone }) {
    const groups = [];
    for (const deployment of deployments) {
      const x = Math.min(right - MARK_PX / 2, time(deployment.first_ms));
      const last = groups.at(-1);
      if (last && x - last.x < MARK_PX) last.deployments.push(deployment);
      else groups.push({ x, deployments: [deployment] });
    }
    const focused = [...this.element.children].indexOf(document.activeElement);
    const marks = groups.map((group, i) => {
      const next = groups[i + 1]?.x ?? right + MARK_PX / 2;
      return this.#mark(group, next - group.x - MARK_PX, zone);
    });
    this.element.replaceChildren(...marks);
    this.element.hidden = groups.length === 0;
    this.element.children[focused]?.focus();
  }

  /** Make a mark that has room for a word of so many pixels. */
  #mark({ x, deployments }, roomPx, zone) {
    const texts = deployments.map((each) => describe(each, zone));
    const isOne = deployments.length === 1;
    const act = isOne ? (deployments[0].compare ? "Compare before and after" : "") : "Select one";
    const shown = byUrgency(deployments)[0];
    const word = isOne ? fittingWord(verdictOf(shown), roomPx) : "";
    const showTooltip = () => this.#callbacks.onTooltip(tooltipLines(texts, act), x);
    const hideTooltip = () => this.#callbacks.onTooltip(null);
    const mark = el(
      "button",
      {
        type: "button",
        class: `mark ${deployments.some((each) => each.compare) ? "" : "bare"}`,
        "aria-label": [...texts.flat(), act].filter(Boolean).join(". "),
        on: {
          click: () => this.#callbacks.onMark(deployments),
          pointerenter: showTooltip,
          focus: showTooltip,
          pointerleave: hideTooltip,
          blur: hideTooltip,
        },
      },
      el("span", {
        class: "mark-kind",
        text: isOne ? (GLYPHS[deployments[0].kind] ?? "▲") : String(deployments.length),
      }),
      badge(shown),
      word ? el("span", { class: "mark-word", text: word }) : null,
    );
    mark.style.left = `${x}px`;
    return mark;
  }
}

/** Return [what was deployed and when, its verdict]. */
function describe(deployment, zone) {
  const when = `${formatTime(deployment.first_ms, zone, { hasDate: false })} ${zoneName(zone)}`;
  return [`${deploymentText(deployment)}, ${when}`, verdictText(deployment)];
}

function fittingWord({ name, word }, roomPx) {
  const words = name === "pending" || name === "none" ? [] : [word, name];
  return words.find((each) => each.length * LETTER_PX + 8 <= roomPx) ?? "";
}

function tooltipLines(texts, act) {
  const lines = texts
    .slice(0, TOOLTIP_ROWS)
    .flatMap(([what, verdict]) => [
      el("div", { class: "tooltip-head", text: what }),
      verdict ? el("div", { class: "tooltip-verdict", text: verdict }) : null,
    ])
    .filter(Boolean);
  if (texts.length > TOOLTIP_ROWS)
    lines.push(el("div", { class: "muted", text: `and ${texts.length - TOOLTIP_ROWS} more` }));
  if (act) lines.push(el("div", { class: "muted", text: act }));
  return lines;
}
