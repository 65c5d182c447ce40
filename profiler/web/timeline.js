// Timeline: CPU cores over time as stacked bars, with marks at deployments. Pointer or keys select a
// part of it.
//
// Steps without a profile are hatched, not zero. For assistive software the chart is a slider: its text
// has the selected steps and the cores used in them. Marks are buttons.

import { el, svg } from "./dom.js";
import { cores, share, span } from "./format.js";
import { Marks } from "./marks.js";
import * as scale from "./scale.js";
import { colourClass, labelOf, seriesName } from "./scale.js";
import { formatWindow } from "./times.js";
import { byUrgency, verdictData } from "./verdicts.js";

const HEIGHT_PX = 142;
const MARGIN = { top: 20, right: 1, bottom: 20, left: 40 };
const DRAG_PX = 4;
const TOOLTIP_ROWS = 7;

export class TimelineView {
  #container;
  #callbacks;
  #shown = null;
  #geometry = null;
  #selection = null;
  #drag = null;

  /**
   * `onApply(window)`: a part was selected, {from, until} in ms. `onMark(deployments)`: a mark was
   * pressed, of one deployment or of several close together.
   */
  constructor(container, callbacks) {
    this.#container = container;
    this.#callbacks = callbacks;
    this.chart = el("div", {
      class: "chart",
      tabindex: "0",
      role: "slider",
      "aria-label":
        "Timeline of CPU cores used. Arrow keys select a step, with Shift a range, Enter shows it",
      "aria-valuemin": "0",
      on: {
        keydown: (event) => this.#onKey(event),
        pointerdown: (event) => this.#onDown(event),
        pointermove: (event) => this.#onMove(event),
        pointerup: () => this.#onUp(),
        pointercancel: () => this.#select(null),
        pointerleave: () => this.#hover(null),
        blur: () => this.#drag || this.#select(null),
      },
    });
    this.tooltip = el("div", { class: "tooltip", hidden: true });
    this.message = el("p", { class: "muted chart-message", hidden: true });
    this.marks = new Marks({
      onMark: (deployments) => this.#callbacks.onMark(deployments),
      onTooltip: (lines, x) => this.#showMarkTooltip(lines, x),
    });
    container.append(this.chart, this.marks.element, this.tooltip, this.message);
    new ResizeObserver(() => this.#draw()).observe(container);
  }

  /**
   * Show a response of /api/v1/timeline. `chosen` are the parts that the rest of the page shows:
   * [{from, until, name}], empty for all, with names if there are two. The layers are the values of
   * `label`, `colours` has their numbers, `deployments` those of /api/v1/deployments.
   */
  show(timeline, { chosen, label, zone, colours, deployments }) {
    this.#shown = {
      timeline,
      chosen,
      label,
      zone,
      colours,
      deployments,
      ...scale.stackSeries(timeline),
    };
    this.#selection = null;
    this.message.hidden = true;
    this.chart.classList.remove("stale");
    this.#draw();
  }

  /** Show why there is no timeline, or no new one. */
  fail(text) {
    this.message.textContent = text;
    this.message.hidden = false;
    this.chart.classList.add("stale");
  }

  focus() {
    this.chart.focus();
  }

  get #count() {
    return this.#shown?.isGap.length ?? 0;
  }

  #draw() {
    const width = Math.floor(this.#container.clientWidth);
    if (!this.#shown || width < 80) return;
    const { timeline, layers, isGap, max, chosen } = this.#shown;
    const { from_ms: from, until_ms: until } = timeline.window;
    const ticks = scale.valueTicks(max, 4);
    const bottom = HEIGHT_PX - MARGIN.bottom;
    const right = width - MARGIN.right;
    const time = scale.linear([from, until], [MARGIN.left, right]);
    const clamp = (px) => Math.min(right, Math.max(MARGIN.left, px));
    const x = (step) => clamp(time(timeline.start_ms + step * timeline.step_ms));
    const y = scale.linear([0, ticks.at(-1)], [bottom, MARGIN.top]);
    this.#geometry = { time, x, bottom, right };

    const hatch = svg(
      "pattern",
      {
        id: "gap-hatch",
        width: 6,
        height: 6,
        patternUnits: "userSpaceOnUse",
        patternTransform: "rotate(45)",
      },
      svg("line", { x1: 0, y1: 0, x2: 0, y2: 6, class: "hatch" }),
    );
    const parts = [svg("defs", {}, hatch)];
    for (const value of ticks) {
      const line = Math.round(y(value)) + 0.5;
      parts.push(
        svg("line", {
          class: value === 0 ? "axis" : "grid",
          x1: MARGIN.left,
          x2: right,
          y1: line,
          y2: line,
        }),
      );
      parts.push(
        svgText(value.toLocaleString("en-US"), {
          class: "tick end",
          x: MARGIN.left - 6,
          y: line + 3.5,
        }),
      );
    }
    for (const [start, end] of scale.runs(isGap)) {
      parts.push(
        svg("rect", {
          class: "gap",
          x: x(start),
          y: MARGIN.top,
          width: Math.max(0, x(end) - x(start)),
          height: bottom - MARGIN.top,
          fill: "url(#gap-hatch)",
        }),
      );
    }
    layers.forEach((layer, i) => {
      parts.push(
        svg("path", {
          class: `layer ${this.#colourOf(i)}`,
          d: scale.layerPath(layer, isGap, x, y),
        }),
      );
    });
    for (const { ms, label } of scale.timeTicks(
      from,
      until,
      Math.floor(width / 84),
      this.#shown.zone,
    )) {
      const at = Math.round(time(ms)) + 0.5;
      if (at < MARGIN.left + 14 || at > right - 4 * label.length) continue;
      parts.push(svg("line", { class: "axis", x1: at, x2: at, y1: bottom, y2: bottom + 4 }));
      parts.push(svgText(label, { class: "tick middle", x: at, y: bottom + 15 }));
    }
    if (chosen.length)
      parts.push(
        ...drawChosen(
          chosen.map((part) => ({
            ...part,
            left: clamp(time(part.from)),
            right: clamp(time(part.until)),
          })),
          { right, bottom },
        ),
      );
    const deployments = this.#deployments;
    // The most urgent one is drawn last, over others of that time.
    for (const deployment of byUrgency(deployments).reverse()) {
      const at = Math.round(time(deployment.first_ms)) + 0.5;
      const place = { x1: at, x2: at, y1: MARGIN.top - 2, y2: bottom };
      parts.push(svg("line", { class: "deployment", ...place, ...verdictData(deployment) }));
    }
    this.cursor = svg("line", { class: "cursor", y1: 0, y2: bottom, visibility: "hidden" });
    this.brush = svg("rect", { class: "brush", y: 0, height: bottom, visibility: "hidden" });
    parts.push(this.cursor, this.brush);
    this.chart.replaceChildren(
      svg("svg", { width, height: HEIGHT_PX, "aria-hidden": "true" }, ...parts),
    );
    this.chart.setAttribute("aria-valuemax", String(Math.max(0, this.#count - 1)));
    this.#select(this.#selection);
    this.marks.draw(deployments, { time, right, zone: this.#shown.zone });
  }

  /** The deployments that began in the window, earliest first. */
  get #deployments() {
    const { timeline, deployments } = this.#shown;
    const { from_ms: from, until_ms: until } = timeline.window;
    const inside = deployments.filter(({ first_ms: ms }) => ms >= from && ms < until);
    return inside.sort((one, other) => one.first_ms - other.first_ms);
  }

  #showMarkTooltip(lines, x) {
    this.tooltip.hidden = lines === null;
    if (lines === null) return;
    this.tooltip.replaceChildren(...lines);
    this.#placeTooltip(x);
  }

  #placeTooltip(x) {
    const width = this.tooltip.offsetWidth;
    const isLeft = x + width + 18 > this.#container.clientWidth;
    this.tooltip.style.left = `${Math.max(0, isLeft ? x - width - 12 : x + 12)}px`;
  }

  #colourOf(layer) {
    const { timeline, label, colours } = this.#shown;
    const series = timeline.series[layer];
    return colourClass(series.rest ? undefined : colours.get(labelOf(series, label)));
  }

  #onKey(event) {
    if (event.key === "Enter" && this.#selection) {
      event.preventDefault();
      this.#apply();
    } else if (event.key === "Escape" && this.#selection) {
      event.preventDefault();
      event.stopPropagation();
      this.#select(null);
    } else if (!event.ctrlKey && !event.metaKey && !event.altKey) {
      const moved = scale.moveSelection(this.#selection, event.key, event.shiftKey, this.#count);
      if (!moved) return;
      event.preventDefault();
      event.stopPropagation();
      this.#select(moved);
      this.#hover(moved.head);
    }
  }

  #onDown(event) {
    if (event.button !== 0 || !this.#shown) return;
    const step = this.#stepAt(event);
    if (step === null) return;
    this.chart.setPointerCapture(event.pointerId);
    this.#drag = { step, x: event.clientX, isMoved: false };
    this.#selection = null;
  }

  #onMove(event) {
    if (!this.#shown) return;
    const step = this.#stepAt(event);
    if (this.#drag && step !== null) {
      this.#drag.isMoved ||= Math.abs(event.clientX - this.#drag.x) >= DRAG_PX;
      if (this.#drag.isMoved) this.#select({ anchor: this.#drag.step, head: step });
    }
    this.#hover(step, event);
  }

  #onUp() {
    const isMoved = this.#drag?.isMoved;
    this.#drag = null;
    if (isMoved && this.#selection) this.#apply();
  }

  #apply() {
    const window = scale.selectionWindow(this.#selection, this.#shown.timeline);
    this.#select(null);
    this.#hover(null);
    this.#callbacks.onApply(window);
  }

  #stepAt(event) {
    if (!this.#geometry || this.#count === 0) return null;
    const { timeline } = this.#shown;
    const ms = this.#geometry.time.invert(event.clientX - this.chart.getBoundingClientRect().left);
    const step = Math.floor((ms - timeline.start_ms) / timeline.step_ms);
    return Math.min(this.#count - 1, Math.max(0, step));
  }

  #select(selection) {
    this.#selection = selection;
    if (!selection) this.#drag = null;
    if (!this.brush) return;
    const text = selection ? this.#describe(selection) : "nothing selected";
    this.chart.setAttribute("aria-valuenow", String(selection?.head ?? 0));
    this.chart.setAttribute("aria-valuetext", text);
    this.brush.setAttribute("visibility", selection ? "visible" : "hidden");
    if (!selection) return;
    const [low, high] = [
      Math.min(selection.anchor, selection.head),
      Math.max(selection.anchor, selection.head),
    ];
    const left = this.#geometry.x(low);
    this.brush.setAttribute("x", left);
    this.brush.setAttribute("width", Math.max(1, this.#geometry.x(high + 1) - left));
  }

  #describe(selection) {
    const { timeline, layers, isGap, zone } = this.#shown;
    const window = scale.selectionWindow(selection, timeline);
    const steps = [
      Math.min(selection.anchor, selection.head),
      Math.max(selection.anchor, selection.head) + 1,
    ];
    const there = isGap.slice(...steps).filter((gap) => !gap).length;
    const used =
      layers
        .at(-1)
        ?.upper.slice(...steps)
        .reduce((sum, value) => sum + value, 0) ?? 0;
    const cost = there ? `${(used / there).toFixed(2)} cores` : "no data";
    return `${formatWindow(window.from, window.until, zone)}, ${cost}`;
  }

  /** Show the cores used in a step; null hides them. */
  #hover(step, event) {
    if (!this.cursor) return;
    this.tooltip.hidden = step === null;
    this.cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step === null) return;
    const { timeline } = this.#shown;
    const at = this.#geometry.time(timeline.start_ms + (step + 0.5) * timeline.step_ms);
    const x = event ? event.clientX - this.chart.getBoundingClientRect().left : at;
    const line = Math.min(this.#geometry.right, Math.max(MARGIN.left, x));
    this.cursor.setAttribute("x1", line);
    this.cursor.setAttribute("x2", line);
    this.tooltip.replaceChildren(...this.#tooltipLines(step));
    this.#placeTooltip(line);
  }

  #tooltipLines(step) {
    const { timeline, isGap, zone, label } = this.#shown;
    const selection = this.#selection ?? { anchor: step, head: step };
    const window = scale.selectionWindow(selection, timeline);
    const head = `${formatWindow(window.from, window.until, zone)} (${span(window.until - window.from)})`;
    const lines = [el("div", { class: "tooltip-head", text: head })];
    if (isGap[step]) return [...lines, el("div", { class: "muted", text: "no profile here" })];
    const rows = timeline.series
      .map((series, i) => ({
        ns: series.values[step] ?? 0,
        name: seriesName(series, label),
        colour: this.#colourOf(i),
      }))
      .filter((row) => row.ns > 0)
      .sort((one, other) => other.ns - one.ns);
    const total = rows.reduce((sum, row) => sum + row.ns, 0);
    lines.push(
      el(
        "div",
        { class: "tooltip-row" },
        el("b", { text: "all" }),
        el("span", { text: cores(total, timeline.covered_ns[step] / 1e6) }),
      ),
    );
    for (const row of rows.slice(0, TOOLTIP_ROWS)) {
      lines.push(
        el(
          "div",
          { class: "tooltip-row" },
          el("span", {}, el("i", { class: `swatch ${row.colour}` }), row.name),
          el("span", {
            text: `${cores(row.ns, timeline.covered_ns[step] / 1e6)} · ${share(row.ns, total)}`,
          }),
        ),
      );
    }
    if (rows.length > TOOLTIP_ROWS)
      lines.push(el("div", { class: "muted", text: `and ${rows.length - TOOLTIP_ROWS} more` }));
    return lines;
  }
}

/** Draw the selected parts, each with an edge and its name; the rest is faded. */
function drawChosen(chosen, { right, bottom }) {
  const parts = [];
  let from = MARGIN.left;
  for (const each of chosen.toSorted((one, other) => one.left - other.left)) {
    if (each.left > from)
      parts.push(
        svg("rect", {
          class: "outside",
          x: from,
          y: MARGIN.top,
          width: each.left - from,
          height: bottom - MARGIN.top,
        }),
      );
    from = Math.max(from, each.right);
  }
  if (from < right)
    parts.push(
      svg("rect", {
        class: "outside",
        x: from,
        y: MARGIN.top,
        width: right - from,
        height: bottom - MARGIN.top,
      }),
    );
  for (const { left, right: end, name } of chosen) {
    const width = Math.max(1, end - left);
    parts.push(
      svg("rect", {
        class: `chosen ${name ?? ""}`,
        x: left + 0.5,
        y: MARGIN.top,
        width: Math.max(1, width - 1),
        height: bottom - MARGIN.top,
      }),
    );
    if (name && width > 8 * name.length)
      parts.push(svgText(name, { class: `chosen-name ${name}`, x: left + 6, y: MARGIN.top + 14 }));
  }
  return parts;
}

function svgText(text, attributes) {
  const element = svg("text", attributes);
  element.textContent = text;
  return element;
}
