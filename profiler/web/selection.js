// Selection: what a state selects at a moment, and the requests for it. Pure.

import * as selector from "./selector.js";
import {
  beforeQuery,
  beforeWindow,
  compare,
  freezeState,
  freshGraph,
  isComparison,
  isFleet,
  narrowTo,
  outerWindow,
  queryParams,
} from "./state.js";
import { resolveWindow } from "./times.js";
import { ROOT_ID } from "./tree.js";

const HOUR_MS = 3_600_000;
/** From this width on there is room for both graph and table; below the other one, never. */
const WIDE_PX = 1200;
const NARROW_PX = 900;
/** Functions that a comparison requests, changes first; the others cost next to nothing. */
const CHANGES_LIMIT = 1000;
/** The parameters of the after side. */
const SIDE = ["query", "from", "until"];
/** Lists of the fleet whose rows are services. */
const SERVICE_LISTS = ["services", "versions"];
const WEEK_BEFORE = "-7d";
/** The timeline shows this share of the compared range more at each end. */
const CONTEXT = 0.15;

export class Selection {
  /** Relative times count from `nowMs`, so that all panels show the same window. */
  constructor(state, nowMs) {
    this.state = state;
    this.nowMs = nowMs;
  }

  get window() {
    const { from, until } = this.state;
    const usual = { from: this.nowMs - HOUR_MS, until: this.nowMs };
    return resolveWindow(from, until, this.nowMs) ?? usual;
  }

  get windowMs() {
    return this.window.until - this.window.from;
  }

  get before() {
    return beforeWindow(this.state, this.window, this.nowMs);
  }

  /** The timeline's window; in a comparison it contains both sides. */
  get outer() {
    const own = resolveWindow(...outerWindow(this.state), this.nowMs) ?? this.window;
    if (!this.isComparison) return own;
    const windows = [own, this.window, this.before];
    const from = Math.min(...windows.map((each) => each.from));
    const until = Math.max(...windows.map((each) => each.until));
    if (this.state.over) return { from, until };
    const more = Math.round((until - from) * CONTEXT);
    return { from: from - more, until: Math.max(until, Math.min(until + more, this.nowMs)) };
  }

  get isComparison() {
    return isComparison(this.state);
  }

  /** Whether a list of the fleet is shown in place of a flame graph. */
  get isFleet() {
    return isFleet(this.state);
  }

  /** Whether the graph is zoomed into a node below the overall root. */
  get isZoomed() {
    return Boolean(this.state.node) && this.state.node !== ROOT_ID;
  }

  /** The panel whose response the graph is drawn from. */
  get graphPanel() {
    return this.isComparison ? "diff" : "flame";
  }

  /** The panel whose response is most of what the page shows. */
  get mainPanel() {
    return this.isFleet ? "fleet" : this.graphPanel;
  }

  get matchers() {
    try {
      return selector.parse(this.state.q);
    } catch {
      return []; // the service reports the error
    }
  }

  /** The matchers; in a comparison those that both sides have, which the timeline shows. */
  get sharedMatchers() {
    const matchers = this.matchers;
    if (!this.isComparison) return matchers;
    try {
      const before = selector.parse(beforeQuery(this.state));
      return matchers.filter((each) => selector.has(before, each));
    } catch {
      return [];
    }
  }

  /** Return the panes that a page of this width shows: "graph", "table" or "both". */
  tabAt(widthPx) {
    const { tab } = this.state;
    if (this.isComparison) return tab || "both"; // the list explains the colours
    if (tab === "both" && widthPx < NARROW_PX) return "graph";
    return tab || (widthPx >= WIDE_PX ? "both" : "graph");
  }

  /** Return the request of each panel, [path, parameters]; null if it is not shown. */
  requests({ graphPx, pagePx }) {
    const { state } = this;
    const common = queryParams(state, this.window);
    const range = times(this.outer);
    const shared = this.isComparison ? selector.print(this.sharedMatchers) : state.q;
    const query = shared ? [["query", shared]] : [];
    const width = ["width", String(graphPx)];
    const others = this.sharedMatchers.filter((each) => each.name !== "service");
    const rest = others.length ? [["query", selector.print(others)]] : [];
    const around = {
      timeline: ["timeline", [...query, ...range, ["by", state.series]]],
      services: ["labels/service/values", [...rest, ...times(this.window)]],
      deployments: ["deployments", [...query, ...range]],
    };
    if (this.isFleet) {
      const { timeline, deployments } = around;
      return { timeline, deployments, ...this.#fleetRequests() };
    }
    if (this.isComparison) {
      const after = common.filter(([name]) => SIDE.includes(name));
      const limit = ["limit", String(CHANGES_LIMIT)];
      return {
        diff: ["diff", [...this.viewParams(), width]],
        changes: ["diff/top", [...after, ...this.#beforeParams(), limit]],
        ...around,
      };
    }
    const search = state.search ? [["search", state.search]] : [];
    const filter = state.filter ? [["search", state.filter]] : [];
    const top = [...common, ["sort", state.sort], ["limit", String(state.rows)], ...filter];
    return {
      flame: ["flamegraph", [...this.viewParams(), width, ...search]],
      ...around,
      // The details of a selected row come from it even if the table is not shown.
      top: this.tabAt(pagePx) === "graph" && !state.row ? null : ["top", top],
    };
  }

  /** How the list of the fleet is sorted, as the service names it. */
  get fleetSort() {
    const { mode, order } = this.state;
    const isOfServices = SERVICE_LISTS.includes(mode);
    const largest = isOfServices ? "cores" : "self";
    if (order === "total") return mode === "functions" ? order : largest;
    if (order === "hosts") return isOfServices ? order : largest;
    return order || largest;
  }

  /** The list, and with its trend again: that takes longer, because it needs a second window. */
  #fleetRequests() {
    const { mode, split, filter, rows, q } = this.state;
    const isOfServices = SERVICE_LISTS.includes(mode);
    const by = isOfServices ? (mode === "versions" ? "version" : "") : split;
    const sort = this.fleetSort;
    const path = isOfServices ? "fleet/services" : "fleet/top";
    const params = [
      ...(q ? [["query", q]] : []),
      ...times(this.window),
      ...(by ? [["by", by]] : []),
      ...(mode === "modules" ? [["group", "module"]] : []),
      ["sort", sort],
      ["limit", String(rows)],
      ...(filter ? [["search", filter]] : []),
    ];
    if (sort === "growth") return { fleet: [path, params], trend: null };
    return { fleet: [path, [...params, ["trend", "0"]]], trend: [path, params] };
  }

  /** Return the parameters that the graph and downloads have in common. */
  viewParams() {
    const { state } = this;
    return [
      ...queryParams(state, this.window),
      ...(state.invert ? [["invert", "1"]] : []),
      ["group", state.group],
      ...(this.isZoomed ? [["node", state.node]] : []),
      ...(state.callers ? [["callers", state.callers]] : []),
      ...(this.isComparison ? this.#beforeParams() : []),
    ];
  }

  #beforeParams() {
    const [from, until] = times(this.before);
    return [
      ["before_query", beforeQuery(this.state)],
      ["before_from", from[1]],
      ["before_until", until[1]],
    ];
  }

  /** Return the state with fixed times, as a link keeps them. */
  frozen() {
    return freezeState(this.state, this.window, this.outer, this.before);
  }

  // Changes of the state, for changeState()

  /** Add a matcher to the selector, or remove it. */
  toggled(matcher, isChosen) {
    const change = isChosen ? selector.remove : selector.add;
    return { q: selector.print(change(this.matchers, matcher)) };
  }

  /** Show a list of the whole fleet, whatever service is selected. */
  ofFleet(mode) {
    const others = this.matchers.filter((each) => !["service", "version"].includes(each.name));
    return { ...freshGraph(), mode, q: selector.print(others) };
  }

  /** Show the flame graph of a row of the fleet: of its labels, and of its function if it has one. */
  graphOf(row) {
    const q = this.#queryOf(row);
    const { function: name, module } = row;
    if (this.state.mode === "modules") return { mode: "functions", q, filter: module };
    const focus = name ? { focus: [name], row: `${name}\n${module}` } : {};
    return { ...freshGraph(), ...focus, mode: "", q };
  }

  /** Compare a row of the fleet with the same time a week before. */
  trendOf(row) {
    const { function: name, module } = row;
    const marked = name ? { row: `${name}\n${module}` } : {};
    const filter = this.state.mode === "modules" ? { filter: module } : {};
    const before = { mode: "compare", before_from: WEEK_BEFORE };
    return { ...freshGraph(), ...marked, ...filter, ...before, q: this.#queryOf(row) };
  }

  /** The labels that tell the rows of the list of the fleet apart. */
  get fleetLabels() {
    const { mode, split } = this.state;
    if (mode === "services") return ["service"];
    if (mode === "versions") return ["service", "version"];
    return split.split(",").filter(Boolean);
  }

  #queryOf({ labels }) {
    const matchers = this.fleetLabels.reduce(
      (kept, name) => selector.add(kept, { name, operator: "=", value: labels[name] ?? "" }),
      this.matchers,
    );
    return selector.print(matchers);
  }

  /** Swap the sides of a comparison. */
  swapped() {
    const { q, over } = this.state;
    const after = { ...this.window, query: q };
    const before = { ...this.before, query: beforeQuery(this.state) };
    return { ...compare(after, before), over: over && this.#outerText() };
  }

  /** Halve both windows of a comparison, towards each other. */
  halved() {
    const [before, after] = [this.before, this.window];
    const half = (window) => Math.round((window.until - window.from) / 2);
    return compare(
      { query: beforeQuery(this.state), from: before.until - half(before), until: before.until },
      { query: this.state.q, from: after.from, until: after.from + half(after) },
    );
  }

  /** Change what one side of a comparison selects: {query}, or {from, until} as texts. */
  sideChanged(side, { query, from, until }) {
    const isBefore = side === "before";
    if (query === undefined) {
      return isBefore ? { before_from: from, before_until: until } : { from, until };
    }
    return isBefore ? { before_query: query } : { q: query, before_query: beforeQuery(this.state) };
  }

  /** Select a part of the timeline, in a comparison for one side; the timeline stays. */
  narrowedTo(window, side) {
    if (!this.isComparison) return narrowTo(this.state, window);
    const part = { from: String(window.from), until: String(window.until) };
    return { ...this.sideChanged(side, part), over: this.#outerText() };
  }

  /** Compare before and after a deployment, with both on the timeline. */
  comparing({ before, after }) {
    const [one, other] = [before, after].map((each) => ({
      query: each.query,
      from: each.from_ms,
      until: each.until_ms,
    }));
    const { from, until } = this.outer;
    const over = `${Math.min(from, one.from)}..${Math.max(until, other.until)}`;
    return { ...compare(one, other), over, node: "", select: "", row: "" };
  }

  /** Show data nearby ({from_ms, until_ms}), in a window at least as long as the current one. */
  movedTo({ from_ms: from, until_ms: until }) {
    const more = Math.max(0, this.windowMs - (until - from)) / 2;
    return {
      from: String(Math.floor(from - more)),
      until: String(Math.ceil(until + more)),
      over: "",
    };
  }

  #outerText() {
    const { from, until } = this.outer;
    return `${from}..${until}`;
  }
}

function times({ from, until }) {
  return [
    ["from", String(from)],
    ["until", String(until)],
  ];
}
