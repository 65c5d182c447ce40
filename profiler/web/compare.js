// Compare: both sides of a comparison, the verdict, and the list of changes.
//
// One test per function decides (profiler/comparison/verdict.py). This module puts the responses of
// /api/v1/diff and /api/v1/diff/top into words, with their intervals.

import { changeColour, changeSign } from "./colour.js";
import { SelectorInput } from "./combobox.js";
import { button, el } from "./dom.js";
import { fullNameOf } from "./describe.js";
import {
  coresPerHost,
  counted,
  growth,
  namesOf,
  number,
  place,
  safeName,
  share,
} from "./format.js";
import { RangePicker } from "./menu.js";
import { rowName } from "./table.js";
import { formatWindow } from "./times.js";
import { CHANGED } from "./tree.js";

const EARLIER = [
  ["", "", "Right before"],
  ["-1d", "", "Same time yesterday"],
  ["-7d", "", "Same time a week ago"],
];
const UNCERTAIN = "Largest differences, not certain yet";
const VERDICTS = ["more", "less", "new", "gone", "moved", "unchanged", "too little data"];
const HEADLINES = {
  regression: ["↑", "Regression"],
  improvement: ["↓", "Improvement"],
  unchanged: ["=", "No certain change"],
  inconclusive: ["?", "Too little data for a verdict"],
};
const NOISE = {
  history: (count) =>
    `estimated from ${counted(count, "earlier pair")} of windows of the same length, on the same hosts`,
  within: (count) =>
    `estimated from ${counted(count, "comparison")} of parts of the time before and after, and of hosts, and from what is usual`,
  fleet: (count) =>
    `what is usual for functions of ${counted(count, "other service")} on the host, as there are no data to estimate it from`,
  prior: () => "what is usual for functions of services, as there are no data to estimate it from",
  hosts: (count) => `estimated from the differences between ${counted(count, "host")}`,
  groups: (count) => `estimated from the differences between ${counted(count, "group")} of hosts`,
  replicates: (count) => `estimated from the differences between ${counted(count, "run")}`,
};

/** Pass the colours of verdicts to the style sheet, for use outside the graph. */
export function publishColours({ style }) {
  for (const verdict of VERDICTS.slice(0, 6)) {
    const [light, dark] = [changeColour(verdict, false), changeColour(verdict, true)];
    style.setProperty(`--${verdict}`, `light-dark(${light.fill}, ${dark.fill})`);
    style.setProperty(`--${verdict}-line`, `light-dark(${light.line}, ${dark.line})`);
  }
}

/** Return a swatch that looks like the graph's boxes with this verdict. */
function swatch(verdict) {
  return el("i", {
    class: `change ${verdict.replaceAll(" ", "-")}`,
    "aria-hidden": "true",
    text: changeSign(verdict),
  });
}

/** Return the mark of a difference that is no finding: hollow, in no colour of one. */
function hollowMark() {
  return el("i", { class: "change uncertain", "aria-hidden": "true", text: "?" });
}

/** Fill the legend of colours and marks. */
export function showLegend(list) {
  const words = {
    more: "costs more",
    less: "costs less",
    new: "new",
    gone: "gone",
    moved: "moved",
    unchanged: "no change detected",
  };
  list.replaceChildren(
    ...Object.entries(words).map(([verdict, text]) =>
      el(
        "li",
        { title: verdict === "moved" ? "Costs the same as before, but under other callers" : null },
        swatch(verdict),
        text,
      ),
    ),
  );
}

/** Both sides of a comparison. The before side is edited here, the after side is the page's selection. */
export class Sides {
  /**
   * Callbacks: onWindow(from, until) and onQuery(text) for the before side, onSwap(), onEnd();
   * `suggest` is as in SelectorInput.
   */
  constructor(container, { suggest, onWindow, onQuery, onSwap, onEnd }) {
    const find = (id) => container.querySelector(`#${id}`);
    this.selector = new SelectorInput(find("before-selector"), { suggest, onCommit: onQuery });
    this.range = new RangePicker(find("before-menu"), {
      label: "Time range of the before side",
      presets: EARLIER,
      onRange: onWindow,
    });
    this.query = find("after-query");
    this.window = find("after-window");
    this.facts = [find("before-facts"), find("after-facts")];
    find("swap").addEventListener("click", onSwap);
    find("compare-end").addEventListener("click", onEnd);
  }

  /** `before` and `after` are {query, from, until} in ms, the state has the preset. */
  show(before, after, { before_from: from, before_until: until, tz }) {
    const text = formatWindow(before.from, before.until, tz);
    const preset = EARLIER.find((each) => each[0] === from);
    this.selector.show(before.query);
    this.range.show({
      from,
      until,
      tz,
      window: before,
      name: preset ? `${preset[2]}: ${text}` : text,
    });
    this.query.textContent = safeName(after.query) || "everything";
    this.window.textContent = formatWindow(after.from, after.until, tz);
  }

  /** Show versions, hosts and samples of both sides of a response; null clears them. */
  showFacts(response) {
    this.facts.forEach((facts, i) => {
      facts.textContent = response ? sideText(i === 0 ? response.before : response.after) : "";
    });
  }
}

function sideText({ versions, hosts, samples, cores }) {
  const shown = versions.slice(0, 3).map(safeName).join(", ");
  return [
    versions.length
      ? `version ${shown}${versions.length > 3 ? ` and ${versions.length - 3} more` : ""}`
      : "",
    counted(hosts.length, "host"),
    counted(samples, "sample"),
    coresPerHost(cores),
  ]
    .filter(Boolean)
    .join(" · ");
}

/** The verdict as a headline, its evidence, and what to try when there is none. */
export class Verdict {
  constructor(container) {
    this.container = container;
    this.headline = el("p", { class: "headline", role: "status" });
    this.body = el("div", { class: "grounds" });
    container.append(this.headline, this.body);
  }

  /** Show a response of /api/v1/diff, and the functions of /api/v1/diff/top, null until they arrive. */
  show(response, functions, actions) {
    const { verdict, noise, common_change: common, warnings } = response;
    const [sign, word] = Object.hasOwn(HEADLINES, verdict) ? HEADLINES[verdict] : ["?", verdict];
    this.container.dataset.verdict = verdict;
    const headline = headlineOf(response, word, functions);
    this.container.toggleAttribute("data-provisional", response.provisional);
    this.#setHeadline(
      sign,
      response.provisional ? `Provisional: ${lowerFirst(headline)}` : headline,
    );
    const grounds = [
      [
        "Noise",
        Object.hasOwn(NOISE, noise.source)
          ? NOISE[noise.source](noise.positions)
          : "unknown: there are no data to estimate it from",
      ],
      ["Load change", loadText(common)],
    ];
    if (response.provisional)
      grounds.push(["Provisional", "with more data it becomes final, or is withdrawn"]);
    this.body.replaceChildren(
      el(
        "dl",
        {},
        grounds.map(([term, text]) => el("div", {}, el("dt", { text: term }), el("dd", { text }))),
      ),
      warnings.length
        ? el(
            "ul",
            { class: "warnings", "aria-label": "Warnings" },
            warnings.map((text) => el("li", { text: safeName(text) })),
          )
        : "",
      ...(actions.length ? [el("div", { class: "row next" }, actions)] : []),
    );
  }

  /** Show a text in place of a verdict. */
  clear(text) {
    delete this.container.dataset.verdict;
    this.#setHeadline("", text);
    this.body.replaceChildren();
  }

  #setHeadline(sign, text) {
    if (this.headline.textContent === sign + text) return; // a screen reader reads every change
    this.headline.replaceChildren(
      ...(sign ? [el("i", { class: "sign", "aria-hidden": "true", text: sign })] : []),
      el("span", { text }),
    );
  }
}

function headlineOf({ verdict, before, after }, word, functions) {
  const found = functions ? outcomeOf(verdict, word, functions) : word;
  return before.cores > 0
    ? `${found}; service ${growth(after.cores / before.cores - 1)} CPU`
    : found;
}

function lowerFirst(text) {
  return text.charAt(0).toLowerCase() + text.slice(1);
}

function outcomeOf(verdict, word, functions) {
  const changed = functions.filter((each) => CHANGED.has(each.verdict));
  const failing = functions.filter((each) => each.fails);
  if (verdict === "regression") return `${word}: ${mostOf(failing)}`;
  if (verdict === "improvement") return `${word}: ${mostOf(changed)}`;
  if (verdict === "unchanged" && changed.length)
    return `No regression: ${counted(changed.length, "function")} changed, but within the limits of the gate`;
  const open = functions.find((each) => each.needs);
  if (verdict === "inconclusive" && open)
    return `${word}; largest difference: ${safeName(namesOf(open)[0])} ${growthText(open)}, not certain yet`;
  return word;
}

/** Name the first of some functions, with its growth, and say how many there are. */
function mostOf([first, ...others]) {
  if (!first) return "";
  const more = others.length ? ` and ${number(others.length)} more` : "";
  return `${safeName(namesOf(first)[0])} ${growthText(first)}${more}`;
}

function loadText({ relative, low, high, verdict }) {
  const isCertain = verdict === "more" || verdict === "less";
  const parts = [
    low === null || high === null ? "" : `${growth(low)} to ${growth(high)}`,
    isCertain ? "" : "not certain",
  ].filter(Boolean);
  return `${growth(relative)}${parts.length ? ` (${parts.join(", ")})` : ""}; subtracted from each function`;
}

/** The columns of the table of changes, for responses of /api/v1/diff/top. */
export const CHANGES = {
  id: "changes-filter",
  label: "Functions by change",
  noun: "function",
  hint: "Filter functions and modules",
  none: "No function changed. “Show unchanged” lists all functions, with their normal variation.",
  columns: [
    { key: "verdict", title: "Change", class: "verdict-cell" },
    {
      key: "growth",
      title: "Growth",
      class: "num pair",
      hint: "Growth of self time, without the load change, and its 95 % interval",
    },
    {
      key: "share",
      title: "Share",
      class: "num pair narrow-less",
      hint: "Share of self time, before and after",
    },
    { key: "name", title: "Function and reason", class: "name" },
  ],
  heading(row, previous) {
    if (isUncertain(row)) return previous && isUncertain(previous) ? "" : UNCERTAIN;
    return previous && isUncertain(previous) ? "Other functions" : "";
  },
  /** `before` and `after` are the sides of the response, `scale` turns values of rows into cores. */
  cells(row, { before, after, scale }) {
    const { module } = row;
    const isOpen = isUncertain(row);
    const verdict = isOpen ? "uncertain" : verdictOf(row);
    const shares = [
      share(row.self.before * scale.before, before.cores),
      share(row.self.after * scale.after, after.cores),
    ];
    const why = safeName(isOpen ? row.needs : row.because);
    return [
      el(
        "td",
        { class: "verdict-cell" },
        isOpen ? hollowMark() : swatch(verdict),
        el("span", { text: verdict }),
      ),
      el(
        "td",
        { class: "num pair" },
        el("b", { text: growthText(row) }),
        el("small", { text: intervalText(row) }),
      ),
      el(
        "td",
        { class: "num pair narrow-less" },
        el("b", { text: shares.join(" → ").replace(" % →", " →") }),
        el("small", {
          text: certainty(row),
          title: CHANGED.has(row.verdict) ? probability(row.q) : null,
        }),
      ),
      el(
        "td",
        { class: "name" },
        el(
          "div",
          { class: "of-module" },
          rowName(row),
          el("small", { class: "narrow-less", text: safeName(module) }),
        ),
        el("small", { text: why, title: why }),
      ),
    ];
  },
};

/** Return whether a row is one of the largest differences that are no findings. */
function isUncertain({ verdict, moved, needs }) {
  return needs !== "" && !moved && !CHANGED.has(verdict);
}

function verdictOf({ verdict, moved }) {
  return moved && !CHANGED.has(verdict) ? "moved" : verdict;
}

/**
 * Return the rows of a response of /api/v1/diff/top that pass the filter: findings, then the largest
 * differences that are not certain, then the others, if they are asked for.
 */
export function changesShown({ functions }, { filter, changes }) {
  const text = filter.toLowerCase();
  const passing = functions.filter(
    (each) =>
      namesOf(each)[0].toLowerCase().includes(text) || each.module.toLowerCase().includes(text),
  );
  const isFinding = (each) => CHANGED.has(each.verdict) || each.moved;
  const others = passing.filter((each) => !isFinding(each) && !isUncertain(each));
  return [
    ...passing.filter(isFinding),
    ...passing.filter(isUncertain),
    ...(changes === "all" ? others : []),
  ];
}

function growthText({ verdict, relative }) {
  return verdict === "new" || verdict === "gone" ? verdict : growth(relative[0]);
}

function intervalText({ verdict, relative: [, low, high] }) {
  const isBounded = low !== null && high !== null && verdict !== "new" && verdict !== "gone";
  return isBounded ? `${growth(low)} to ${growth(high)}` : "";
}

/** Say how certain a finding is. */
function certainty({ verdict, q }) {
  if (!CHANGED.has(verdict)) return "";
  return q < 0.001 ? "very certain" : "certain";
}

function probability(q) {
  return q < 0.001 ? "q <0.001" : `q ${q.toFixed(3)}`;
}

/** Return the tooltip of a box: its cost on both sides. `response` is that of /api/v1/diff. */
export function tooltipOf(box, row, response) {
  const rows = sideRows(box, response);
  if (box.verdict && !box.isRest)
    rows.push(["Verdict", `${changeSign(box.verdict)} ${box.verdict}`.trim(), ""]);
  const isOpen = row !== null && isUncertain(row);
  if (row && (CHANGED.has(box.verdict) || isOpen))
    rows.push([isOpen ? "Not certain yet" : "Growth", growthText(row), intervalText(row)]);
  if (box.isRest) return { rows };
  return { rows, hint: box.cause ? `Mostly due to ${fullNameOf(box.cause)}` : "" };
}

function sideRows({ before, after }, response) {
  return [
    ["Before", "before"],
    ["After", "after"],
  ].map(([title, side]) => {
    const value = side === "before" ? before : after;
    return [title, coresPerHost(value * response.scale[side]), share(value, response.totals[side])];
  });
}

/** Return the facts of a box or a function for the panel: [[term, text], ...]. */
export function changeFacts({ frame, before, after, verdict, cause }, row, response) {
  const isFunction = frame.kind !== "label";
  const hasOwn = isFunction && row !== null && row.self.before + row.self.after > 0; // only these have a verdict
  const facts = [
    [
      "Verdict",
      [verdictText(verdict, row), cause ? `mostly due to ${fullNameOf(cause)}` : ""]
        .filter(Boolean)
        .join(", "),
    ],
  ];
  if (hasOwn)
    facts.push(["Growth of the function", withInterval(growthText(row), intervalText(row))]);
  for (const [title, cores, part] of sideRows({ before, after }, response))
    facts.push([title, `${part} · ${cores}`]);
  if (hasOwn)
    facts.push(
      ["Change in cores", coresText(row.cores)],
      [
        "Why",
        [safeName(row.because), certainty(row), probability(row.q)].filter(Boolean).join("; "),
      ],
      ...(isUncertain(row) ? [["Not certain yet", safeName(row.needs)]] : []),
    );
  if (isFunction)
    facts.push(["Module", `${safeName(frame.module) || "unknown"} · ${safeName(frame.kind)}`]);
  const where = place(frame.file, frame.line);
  if (where) facts.push(["Source", safeName(where)]);
  return facts;
}

function verdictText(verdict, row) {
  const text = verdict || "sum of boxes";
  const sign = changeSign(verdict);
  return `${sign ? `${sign} ` : ""}${text}${row?.fails && CHANGED.has(verdict) ? " (fails the gate)" : ""}`;
}

function coresText([estimate, low, high]) {
  const signed = (value) =>
    `${value < 0 ? "−" : "+"}${coresPerHost(Math.abs(value)).replace(" cores per host", "")}`;
  const interval = low === null || high === null ? "" : `${signed(low)} to ${signed(high)}`;
  return withInterval(`${signed(estimate)} cores per host`, interval);
}

function withInterval(text, interval) {
  return interval ? `${text} (${interval})` : text;
}

/** Return buttons to try when a comparison is inconclusive. */
export function nextSteps(response, { onHalve, onAll, onYesterday }) {
  const shorter = button({
    text: "Half as long",
    label: "Compare windows half as long: more of them fit into the history",
    class: "small",
    click: onHalve,
  });
  const other = button({
    text: "Same time yesterday",
    label: "Compare with the same time yesterday",
    class: "small",
    click: onYesterday,
  });
  const all = button({ text: "Show all functions", class: "small", click: onAll });
  if (response.verdict === "inconclusive") return [shorter, other, all];
  return [];
}
