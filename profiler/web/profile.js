// Profile: the flame graph, the table of functions, and the details of the selected one. In a
// comparison the graph shows both sides, and the table lists the changes.

import { changeFacts, CHANGES, changesShown, showLegend, tooltipOf } from "./compare.js";
import * as controls from "./controls.js";
import { CoverageStrip } from "./coverage.js";
import { findBox, fullNameOf, labelNameOf, narrowText, wideText } from "./describe.js";
import { changeTracker, el } from "./dom.js";
import { namesOf } from "./format.js";
import { FlameGraphView } from "./graph.js";
import { DetailPanel } from "./panel.js";
import * as selector from "./selector.js";
import { COSTS, Table } from "./table.js";
import { formatWindow, isRelative } from "./times.js";
import { asFrame, viewOf } from "./tree.js";

const WIDTH_STEP_PX = 200;
const ROOT = ["all"];

const byId = (id) => document.getElementById(id);

export class Profile {
  #page;
  #isNew = changeTracker();
  /** What the graph shows: {response, view, colour}. */
  #drawn = null;
  #drawnTop = null;
  #graphPx = 1200;

  /** `page` has state, selection and loader, and applies changes (page.js). */
  constructor(page) {
    this.#page = page;
    showLegend(byId("changes-legend"));
    this.coverage = new CoverageStrip(byId("coverage"));
    this.#makeGraph();
    this.#makeTables();
    this.#makePanel();
  }

  #makeGraph() {
    const { change } = this.#page;
    this.search = new controls.SearchBox(byId("finder"), {
      onSearch: (search) => {
        this.#highlight(search.trim());
        change({ search: search.trim() });
      },
      onStep: (direction) => this.step(direction),
    });
    let isZoomed = false;
    this.graph = new FlameGraphView(byId("graph"), {
      onZoom: (id) => {
        isZoomed = true;
        change({ node: id ?? "", select: id ?? "" });
      },
      onSelect: (box) => {
        // A click selects and then zooms. That is one step: Back goes to where nothing was selected.
        isZoomed = false;
        const select = box && !box.isRest ? box.id : "";
        queueMicrotask(() => isZoomed || change({ select, row: "" }));
      },
      onHover: (box) => {
        const isFunction = box && !box.isRest && box.frame.kind !== "label";
        this.#shownTable.mark(isFunction ? box.frame : this.#marked);
      },
    });
  }

  #makeTables() {
    const { change } = this.#page;
    const callbacks = {
      onSort: (sort) => change({ sort }),
      onFilter: (filter) => change({ filter }),
      onRows: (rows) => change({ rows }),
      onHover: (row) => this.graph.highlight(row ?? this.#highlighted),
      onSelect: (row) => {
        change({ row: rowKey(row) === this.#state.row ? "" : rowKey(row), select: "" });
      },
    };
    this.table = new Table(byId("pane-table"), COSTS, callbacks);
    this.changes = new Table(byId("pane-changes"), CHANGES, callbacks);
    const onChange = (event) => change({ changes: event.target.checked ? "all" : "" });
    const all = el("input", { type: "checkbox", id: "changes-all", on: { change: onChange } });
    this.changes.head.append(
      el("label", { class: "toggle" }, all, el("span", { text: "Show unchanged" })),
    );
  }

  #makePanel() {
    const { change, toast } = this.#page;
    const withName = (names, name) => [...new Set([...names, name])];
    this.panel = new DetailPanel(byId("panel"), {
      onZoom: (id) => change({ node: id, select: id }),
      onCallers: (callers) => change({ callers, node: "", select: "", row: "" }),
      onFocus: (name) => change({ focus: withName(this.#state.focus, name) }),
      onHide: (name) => change({ hide: withName(this.#state.hide, name), row: "" }),
      onSearch: (search) => {
        change({ search, tab: this.#page.tab === "table" ? "graph" : this.#state.tab });
      },
      onFilter: (name, value, isExcluding) => {
        const operator = isExcluding ? "!=" : "=";
        const matcher = { name, operator, value: value === `[no ${name}]` ? "" : value };
        const q = selector.print(selector.add(this.#selection.matchers, matcher));
        change({ q, node: "", select: "" });
      },
      onRow: (cause) => change({ row: rowKey(cause), select: "", node: "" }),
      onCopy: (text) => toast.copy(text, "Copied the name"),
      onClose: () => change({ select: "", row: "" }),
    });
  }

  get #state() {
    return this.#page.state;
  }

  get #selection() {
    return this.#page.selection;
  }

  get #shownTable() {
    return this.#selection.isComparison ? this.changes : this.table;
  }

  /** What the graph shows: its response, in a comparison as seen from the selected side; or null. */
  get response() {
    const { graphPanel, isComparison } = this.#selection;
    const { response } = this.#page.loader.of(graphPanel);
    return response && isComparison ? viewOf(response, this.#state.side) : response;
  }

  /** The width to request, rounded up so that small changes need no new request. */
  get requestedPx() {
    this.#graphPx = this.graph.width || this.#graphPx; // a hidden graph has no width
    const steps = Math.ceil(this.#graphPx / WIDTH_STEP_PX);
    return Math.min(10_000, Math.max(400, steps * WIDTH_STEP_PX));
  }

  /** Show what depends only on the state. */
  render() {
    const { state, selection, tab } = this.#page;
    const { isComparison, isFleet } = selection;
    this.search.show(state.search);
    byId("panes").dataset.tab = tab;
    byId("panes").classList.toggle("compared", isComparison);
    for (const id of ["changes-legend", "pane-changes"]) byId(id).hidden = !isComparison;
    for (const id of ["coverage", "pane-table"]) byId(id).hidden = isComparison;
    for (const id of ["profile-tools", "panes"]) byId(id).hidden = isFleet;
    if (isFleet) byId("crumbs").hidden = true; // until a graph is drawn
    const isOther = this.#drawn && (this.#drawn.colour === "change") !== isComparison;
    if (isOther) this.graph.dim(true); // until the response comes
    byId("changes-all").checked = state.changes === "all";
  }

  drawGraph(arrivedAt) {
    const { view, color, select, group } = this.#state;
    const { isComparison } = this.#selection;
    const { response } = this;
    const colour = isComparison ? "change" : color;
    const drawn = { response, view, colour };
    const isSame =
      this.#drawn && Object.entries(drawn).every(([name, value]) => this.#drawn[name] === value);
    if (arrivedAt !== null || !isSame) {
      const { response: diff } = this.#page.loader.of("diff");
      const factsOf = isComparison ? (box) => tooltipOf(box, this.#rowOf(box), diff) : null;
      const withLine = group === "line";
      this.graph.show(response, { view, colour, withLine, factsOf, arrivedAt });
      this.#drawn = drawn;
    }
    this.graph.dim(false);
    this.#highlight(this.#highlighted);
    this.graph.select(select || null);
    if (!isComparison) this.showCoverage(response);
    this.#showCrumbs();
    this.#showPanel();
    this.#showUnder();
  }

  /** Show what data a response is made of. */
  showCoverage({ coverage, samples, window }) {
    const shown = { coverage, samples, window };
    // A zoom has a response of its own, but the same coverage.
    if (this.#isNew("coverage", JSON.stringify(shown))) this.coverage.show(shown);
  }

  drawTop() {
    const { sort, filter, rows } = this.#state;
    const { response } = this.#page.loader.of("top");
    if (this.#drawnTop !== response) {
      const { functions, total } = response;
      const largest = Math.max(0, ...functions.map((row) => row.self));
      const context = { total, windowMs: this.#selection.windowMs, largest };
      const all = response.rows ?? functions.length;
      this.table.show(functions, { all, sort, filter, limit: rows, context });
    }
    this.#drawnTop = response;
    this.table.dim(false);
    this.#showPanel();
  }

  drawChanges() {
    const { response } = this.#page.loader.of("changes");
    const { filter, rows, changes } = this.#state;
    if (this.#isNew("changes", response, filter, rows, changes)) {
      const shown = changesShown(response, this.#state);
      const options = { all: shown.length, filter, limit: rows, context: response };
      this.changes.show(shown.slice(0, rows), options);
    }
    this.changes.dim(false);
    this.#highlight(this.#highlighted);
    this.#showPanel();
  }

  /** Show that a panel is out of date. */
  fail(panel) {
    this.#isNew.forget(panel);
    if (panel === "top") this.table.dim(true);
    else if (panel === "changes") this.changes.dim(true);
    else if (panel === this.#selection.graphPanel) this.graph.dim(true);
  }

  #showCrumbs() {
    const { path, nodes, frames } = this.response;
    const isShown = this.#selection.isZoomed && nodes.frame.length > 0;
    const steps = isShown ? [{ id: "", frame: ROOT }, ...path] : [];
    if (isShown && path.length === 0) {
      steps.push({ id: this.#state.node, frame: frames[nodes.frame[0]] });
    }
    const crumbs = steps.map(({ id, frame }) => {
      const name = fullNameOf(asFrame(frame));
      return { name, title: name, go: () => this.#page.change({ node: id }) };
    });
    controls.showCrumbs(byId("crumbs"), crumbs);
  }

  #showUnder() {
    const { side, from, until, over, tz } = this.#state;
    const { isComparison } = this.#selection;
    const { nodes, window } = this.response;
    const parts = [narrowText(this.response, isComparison)];
    if (isComparison) parts.push(wideText(side));
    else if (over === "" && isRelative(from, until)) {
      parts.push(`As of ${formatWindow(window.from_ms, window.until_ms, tz)}.`);
    }
    if (isComparison && nodes.frame.length && !(nodes.total[0] > 0)) {
      parts.unshift(`The ${side} side has no samples here.`);
    }
    const isShown = isComparison || nodes.frame.length > 0;
    byId("under").textContent = isShown ? parts.filter(Boolean).join(" ") : "";
  }

  // Selection: a box of the graph, or a row of the table

  #showPanel() {
    const { isComparison } = this.#selection;
    if (!(isComparison ? this.#showChange() : this.#showCost())) this.panel.hide();
    this.#shownTable.mark(this.#marked);
  }

  /** Show the cost of the selected box or function; return whether there is one. */
  #showCost() {
    const { select, row, callers, by, node } = this.#state;
    const { windowMs } = this.#selection;
    const { response } = this.#page.loader.of("flame");
    const { response: top } = this.#page.loader.of("top");
    const files = response?.modules ?? [];
    const box = select && response ? findBox(response, select) : null;
    if (box) {
      const isCallers = isCalled(box.frame, callers);
      const labelName = labelNameOf(response, box, by);
      const isZoomed = box.id === node;
      this.panel.showBox(box, { windowMs, files, labelName, isZoomed, isCallers });
      return true;
    }
    const picked = row ? top?.functions.find((each) => rowKey(each) === row) : null;
    if (!picked) return false;
    const isCallers = isCalled(picked, callers);
    this.panel.showFunction(picked, { windowMs, files, total: top.total, isCallers });
    return true;
  }

  /** Show how the selected box or function changed; return whether there is one. */
  #showChange() {
    const { select, row, callers, node } = this.#state;
    const { response } = this.#page.loader.of("diff");
    const { response: changes } = this.#page.loader.of("changes");
    const box = select && response ? findBox(this.response, select) : null;
    if (box) {
      const { frame, cause, id, depth } = box;
      this.panel.showChange(frame, {
        facts: changeFacts(box, this.#rowOf(box), response),
        id: depth ? id : null,
        cause,
        isZoomed: id === node,
        isCallers: isCalled(frame, callers),
      });
      return true;
    }
    const picked = row ? changes?.functions.find((each) => rowKey(each) === row) : null;
    if (!picked || !response) return false;
    const { before, after } = picked.total;
    const frame = { file: "", line: 0, ...picked };
    const change = { frame, before, after, verdict: picked.verdict, cause: null };
    const facts = changeFacts(change, picked, response);
    this.panel.showChange(frame, { facts, isCallers: isCalled(picked, callers) });
    return true;
  }

  /** Return the row of a box's function in the list of changes; null if there is none. */
  #rowOf({ frame }) {
    const functions = this.#page.loader.of("changes").response?.functions ?? [];
    if (frame.kind === "label" || frame.kind === "rest") return null;
    const isOf = (each) => each.function === frame.function && each.module === frame.module;
    return functions.find(isOf) ?? null;
  }

  /** The function to mark in the table: that of the selected box or row. */
  get #marked() {
    const { select, row } = this.#state;
    const { response } = this;
    const box = select && response ? findBox(response, select) : null;
    if (box && box.frame.kind !== "label") return box.frame;
    return row ? rowOf(row) : null;
  }

  // Searching

  /** What the graph highlights while the pointer is not on the table. */
  get #highlighted() {
    const { search, row } = this.#state;
    return search || (row ? rowOf(row) : "");
  }

  #highlight(searched) {
    const place = this.graph.highlight(searched);
    const { response } = this;
    const search = response?.search?.text === this.#state.search ? response.search : null;
    if (this.#state.search) this.search.showCount(place, search, response?.nodes.total[0] ?? 0);
  }

  /** Go to the next (1) or the previous (-1) match. */
  step(direction) {
    const { response } = this;
    const total = response?.nodes.total[0] ?? 0;
    this.search.showCount(this.graph.step(direction), response?.search, total);
  }

  focusSearch() {
    const isTable = this.#page.tab === "table";
    (isTable ? this.#shownTable.filter : this.search.input).focus();
  }
}

function isCalled(frame, name) {
  return name === frame.function || namesOf(frame).includes(name);
}

/** Return the state's key of a row; names have no newline. */
function rowKey({ function: name, module }) {
  return `${name}\n${module}`;
}

function rowOf(key) {
  const [name, module] = key.split("\n");
  return { function: name, module };
}
