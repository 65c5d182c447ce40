// State: everything that is selected, and the address that holds it. Pure.
//
// The address is the only store, so every view is a link and Back undoes. It omits defaults. An
// unknown value is read as the default, so that links from other versions still open.

import { parseTime, resolveWindow } from "./times.js";

/** The before side has the same selector; no selector looks like this. */
export const SAME = "=";

/** The state of a page without any parameters, and the order of the parameters in the address. */
export const DEFAULTS = Object.freeze({
  q: "", // the selector
  from: "now-1h",
  until: "now",
  // compare: this selection is the after side, the next three are the before side; services,
  // versions, modules or functions: a list of those of the whole fleet in place of a flame graph
  mode: "",
  before_query: SAME,
  before_from: "", // empty: right before the other window; -1d: a day before it; else a time
  before_until: "",
  side: "", // before, after: how wide boxes are; empty: as wide as both sides on average
  changes: "", // all: also the functions that did not change
  over: "", // the timeline's own window, `from..until`, where it is wider than the chosen one
  series: "service", // the label whose values are the timeline's layers
  by: "service", // labels as frames above the root, a comma list
  group: "function",
  invert: false,
  callers: "", // the function whose callers are shown
  focus: [], // functions: only stacks with all of them
  hide: [], // functions: taken out of the stacks
  python_native: false, // with what the Python interpreter adds to stacks
  node: "", // the id of the box zoomed to
  select: "", // the id of the selected box
  row: "", // the row selected in the table: function, newline, module
  search: "",
  color: "kind",
  view: "icicle",
  tab: "", // graph, table or both; empty: what the screen has room for
  sort: "self",
  order: "", // of a list of the fleet; empty: largest first
  split: "", // labels that tell the functions or modules of the fleet apart, a comma list
  filter: "", // of the table
  rows: 200, // of the table
  tz: "utc",
});

/** The lists of the fleet. */
export const LISTS = ["services", "versions", "modules", "functions"];

const CHOICES = {
  mode: ["", "compare", ...LISTS],
  side: ["", "before", "after"],
  changes: ["", "all"],
  group: ["function", "line", "file", "module"],
  color: ["kind", "module", "self"],
  view: ["icicle", "flame"],
  tab: ["", "graph", "table", "both"],
  sort: ["self", "total", "name", "module"],
  order: ["", "total", "growth", "hosts", "name"],
  tz: ["utc", "local"],
  rows: [200, 1000, 5000],
};

const ID = /^[0-9a-f]{16}$/;
const EARLIER = /^-\d{1,9}[smhdw]$/;
const LABEL = /^[A-Za-z_][A-Za-z0-9_.]*$/;

/** Changes of these are not a step that Back undoes. */
const REFINEMENTS = new Set(["search", "filter", "select", "row", "rows", "tz"]);

/** A change of these makes node ids invalid. */
const OTHER_TREE = ["by", "group", "invert", "callers", "hide", "python_native"];

/** What chooses stacks, boxes and rows of one flame graph, and means nothing in another. */
const OF_A_GRAPH = ["callers", "focus", "hide", "node", "select", "row", "search", "over"];

/** Read the part of an address behind the `?`. */
export function parseState(search) {
  const params = new URLSearchParams(search);
  const state = { ...DEFAULTS };
  for (const [name, fallback] of Object.entries(DEFAULTS)) {
    if (!params.has(name)) continue;
    const texts = params.getAll(name);
    state[name] = parseValue(name, fallback, texts);
  }
  return state;
}

/** Write a state as the part of an address from the `?` on; empty for the defaults. */
export function printState(state) {
  const params = new URLSearchParams();
  for (const [name, fallback] of Object.entries(DEFAULTS)) {
    const value = state[name];
    if (Array.isArray(value)) for (const each of value) params.append(name, each);
    else if (value !== fallback) params.set(name, value === true ? "1" : String(value));
  }
  const text = params.toString();
  return text ? `?${text}` : "";
}

/** Return the state after a change, with values that it makes invalid reset. */
export function changeState(state, change) {
  const next = { ...state, ...change };
  const isOther = OTHER_TREE.some((name) => String(next[name]) !== String(state[name]));
  if (isOther && change.node === undefined) next.node = "";
  if (change.select && change.row === undefined) next.row = "";
  if (change.row && change.select === undefined) next.select = "";
  if ((isOther || next.node !== state.node) && change.select === undefined) next.select = "";
  if (next.mode !== state.mode && (isFleet(state) || isFleet(next))) {
    // Another table: what was typed for the first does not fit it.
    if (change.filter === undefined) next.filter = "";
    if (change.rows === undefined) next.rows = DEFAULTS.rows;
  }
  const isMoved = next.from !== state.from || next.until !== state.until;
  if (isMoved && change.over === undefined) next.over = "";
  return next;
}

/** Return whether the change from one state to the next is a step that Back undoes. */
export function isStep(state, next) {
  return Object.keys(DEFAULTS).some(
    (name) => !REFINEMENTS.has(name) && String(next[name]) !== String(state[name]),
  );
}

/** Return the change that selects a part of the timeline's window; the timeline stays. */
export function narrowTo(state, window) {
  const [from, until] = outerWindow(state);
  return { from: String(window.from), until: String(window.until), over: `${from}..${until}` };
}

/** Return whether two selections are compared. */
export function isComparison(state) {
  return state.mode === "compare";
}

/** Return whether a list of the fleet is shown. */
export function isFleet(state) {
  return LISTS.includes(state.mode);
}

/** Return the change that shows a flame graph with nothing chosen in it. */
export function freshGraph() {
  const chosen = Object.fromEntries(OF_A_GRAPH.map((name) => [name, DEFAULTS[name]]));
  return { ...endComparison(), ...chosen };
}

/** Return the window of the before side; both windows are in ms. */
export function beforeWindow(state, window, nowMs) {
  const { before_from: from, before_until: until } = state;
  const preceding = { from: 2 * window.from - window.until, until: window.from };
  if (from === "") return preceding;
  if (!EARLIER.test(from)) return resolveWindow(from, until, nowMs) ?? preceding;
  const earlier = (ms) => parseTime(`now${from}`, ms);
  const moved = { from: earlier(window.from), until: earlier(window.until) };
  return moved.from === null || moved.until === null ? preceding : moved;
}

/** Return the selector of the before side. */
export function beforeQuery({ q, before_query: query }) {
  return query === SAME ? q : query;
}

/** Return the change that compares two selections, {query, from, until} each, with times in ms. */
export function compare(before, after) {
  return {
    mode: "compare",
    q: after.query,
    from: String(after.from),
    until: String(after.until),
    before_query: before.query === after.query ? SAME : before.query,
    before_from: String(before.from),
    before_until: String(before.until),
  };
}

/** Return the change that ends a comparison; the after side stays. */
export function endComparison() {
  const { before_query, before_from, before_until, side, changes } = DEFAULTS;
  return { mode: "", before_query, before_from, before_until, side, changes };
}

/** Return the change that goes back to the timeline's whole window. */
export function widen(state) {
  const [from, until] = outerWindow(state);
  return { from, until, over: "" };
}

/** Return the timeline's window as two texts; it may be wider than the selected one. */
export function outerWindow(state) {
  const [from, until] = state.over.split("..");
  return from && until ? [from, until] : [state.from, state.until];
}

/** Return the state with absolute times, for a link. */
export function freezeState(state, window, outer, before) {
  const over = state.over ? `${outer.from}..${outer.until}` : "";
  const frozen = { ...state, from: String(window.from), until: String(window.until), over };
  if (!isComparison(state)) return frozen;
  return { ...frozen, before_from: String(before.from), before_until: String(before.until) };
}

/** The parameters that flamegraph, top and export share; `window` is in ms. */
export function queryParams(state, window) {
  return [
    ["query", state.q],
    ["from", String(window.from)],
    ["until", String(window.until)],
    ["by", state.by],
    ...state.focus.map((each) => ["focus", each]),
    ...state.hide.map((each) => ["hide", each]),
    ["python_native", state.python_native ? "1" : ""],
  ].filter(([name, value]) => value !== "" || name === "by");
}

function parseValue(name, fallback, texts) {
  const text = texts[0];
  if (Array.isArray(fallback)) return [...new Set(texts.filter(Boolean))];
  if (typeof fallback === "boolean") return text === "1" || text === "true";
  if (name === "node" || name === "select") return ID.test(text) ? text : fallback;
  if (name === "series") return LABEL.test(text) ? text : fallback;
  if (name in CHOICES) {
    const value = typeof fallback === "number" ? Number(text) : text;
    return CHOICES[name].includes(value) ? value : fallback;
  }
  return name === "from" || name === "until" ? text || fallback : text;
}
