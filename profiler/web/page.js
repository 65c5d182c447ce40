// Page: the address in, requests and views out.
//
// A user's act changes the state; the state goes into the address; what the state asks for and is
// not there yet is asked of the service. `<html data-state>` says how that stands: loading, ready,
// empty or error.

import { Api, address, isCancelled } from "./api.js";
import {
  CHANGES,
  DeploymentsMenu,
  Sides,
  Verdict,
  changeFacts,
  changesShown,
  emptySide,
  nextSteps,
  publishColours,
  showLegend,
  tooltipOf,
} from "./compare.js";
import * as controls from "./controls.js";
import { button, el, isTyping } from "./dom.js";
import { bytes, counted, number, safeName, share, span } from "./format.js";
import { FlameGraphView } from "./graph.js";
import { ROOT_ID, comparedTo, graphOf, viewOf } from "./layout.js";
import { DetailPanel } from "./panel.js";
import { assignColours } from "./scale.js";
import * as selector from "./selector.js";
import {
  SAME,
  beforeQuery,
  beforeWindow,
  changeState,
  compare,
  endComparison,
  freezeState,
  isComparison,
  isStep,
  narrowTo,
  outerWindow,
  parseState,
  printState,
  queryParams,
  widen,
} from "./state.js";
import { COSTS, FunctionTable } from "./table.js";
import { TimelineView, colourClass, labelOf, seriesName } from "./timeline.js";
import { RANGES, formatRange, formatWindow, isRelative, resolveWindow } from "./times.js";

const COLOURS = 10;
const SLOW_MS = 300;
const WIDE_PX = 1200;
const WIDTH_STEP_PX = 200;
const TOAST_MS = 4000;
const THEME_KEY = "everflame-theme";
const THEMES = ["auto", "light", "dark"];
const SPLITS = [
  "service",
  "version",
  "service,version",
  "host",
  "service,host",
  "comm",
  "service,comm",
  "",
];
const ANSWERS = ["flame", "diff", "timeline", "services", "top", "changes", "deployments"];
/** Functions that a comparison asks for, what changed first; smaller ones cost next to nothing. */
const CHANGES_ASKED = 1000;
/** The parameters that say what stands after. */
const SIDE = ["query", "from", "until"];
/** Of what is compared, this much more is on the timeline to each side. */
const CONTEXT = 0.15;

const byId = (id) => document.getElementById(id);
const root = document.documentElement;

class Page {
  #api = new Api();
  #state = parseState(location.search);
  #clockSkewMs = 0;
  #nowMs = Date.now();
  /** The last answer of each question, with the address that was asked: {key, answer, error, isOld}. */
  #shown = Object.fromEntries(
    ANSWERS.map((name) => [name, { key: null, answer: null, error: null }]),
  );
  #pending = new Set();
  #status = null;
  #refreshing = null;
  #slowTimer = 0;
  #labels = new Map();
  #colours = new Map();
  /** What each view was drawn from, see #isNew. */
  #drawnFrom = new Map();

  start() {
    controls.fillIcons(document);
    publishColours(root);
    showLegend(byId("changes-legend"));
    this.#makeViews();
    this.#bindControls();
    this.#bindKeys();
    this.#showTheme(readTheme());
    addEventListener("popstate", () => this.#go(parseState(location.search)));
    addEventListener("resize", () => this.#onResize());
    this.#render();
    this.#refresh();
  }

  // State

  /** Take a user's act into the state, the address and the views. */
  #change(change) {
    const next = changeState(this.#state, change);
    const text = printState(next);
    if (text !== printState(this.#state)) {
      const url = `${location.pathname}${text}`;
      if (isStep(this.#state, next)) history.pushState(null, "", url);
      else history.replaceState(null, "", url);
    }
    this.#go(next);
  }

  #go(next) {
    this.#state = next;
    this.#render();
    this.#load();
  }

  /** Times relative to now keep their meaning until a refresh: all answers are of one window. */
  get #window() {
    return (
      resolveWindow(this.#state.from, this.#state.until, this.#nowMs) ?? {
        from: this.#nowMs - 3_600_000,
        until: this.#nowMs,
      }
    );
  }

  /** The timeline's window; of a comparison it has both sides. */
  get #outer() {
    const own = resolveWindow(...outerWindow(this.#state), this.#nowMs) ?? this.#window;
    if (!this.#isComparison) return own;
    const windows = [own, this.#window, this.#before];
    const [from, until] = [
      Math.min(...windows.map((each) => each.from)),
      Math.max(...windows.map((each) => each.until)),
    ];
    if (this.#state.over) return { from, until };
    const more = Math.round((until - from) * CONTEXT);
    return { from: from - more, until: Math.max(until, Math.min(until + more, this.#nowMs)) };
  }

  get #isComparison() {
    return isComparison(this.#state);
  }

  get #before() {
    return beforeWindow(this.#state, this.#window, this.#nowMs);
  }

  /** What the graph shows: the answer of its question, which a comparison has a view of; or null. */
  get #drawing() {
    const { answer } = this.#shown[this.#graphName];
    return answer && this.#isComparison ? viewOf(answer, this.#state.side) : answer;
  }

  get #graphName() {
    return this.#isComparison ? "diff" : "flame";
  }

  get #windowMs() {
    return this.#window.until - this.#window.from;
  }

  get #matchers() {
    try {
      return selector.parse(this.#state.q);
    } catch {
      return []; // the service says what is wrong with it
    }
  }

  /** What is asked for; of a comparison what both sides ask for, which the timeline shows. */
  get #sharedMatchers() {
    const matchers = this.#matchers;
    if (!this.#isComparison) return matchers;
    try {
      const before = selector.parse(beforeQuery(this.#state));
      return matchers.filter((each) => selector.has(before, each));
    } catch {
      return [];
    }
  }

  get #tab() {
    const isWide = innerWidth >= WIDE_PX;
    const { tab } = this.#state;
    if (this.#isComparison) return tab || "both"; // the list says what the colours are
    if (tab === "both" && innerWidth < 900) return "graph";
    return tab || (isWide ? "both" : "graph");
  }

  // Requests

  /** Read the clock and the status anew, then everything else. */
  async #refresh() {
    const refresh = {};
    this.#refreshing = refresh;
    this.#setBusy("status", true);
    try {
      const { answer } = await this.#api.ask("status", "status");
      this.#status = answer;
      this.#clockSkewMs = answer.now_ms - Date.now();
    } catch (error) {
      if (isCancelled(error)) {
        if (this.#refreshing === refresh) this.#setBusy("status", false);
        return;
      }
      this.#status ??= null; // the other answers say what is wrong
    }
    this.#nowMs = Date.now() + this.#clockSkewMs;
    this.#api.forget();
    this.#labels.clear();
    for (const name of ANSWERS) this.#shown[name].key = null;
    this.#setBusy("status", false);
    this.#render();
    this.#load();
  }

  /** Ask for what the state needs and is not shown. */
  #load() {
    const questions = this.#questions();
    for (const name of ANSWERS) {
      const question = questions[name];
      const shown = this.#shown[name];
      if (!question) continue;
      const key = address(...question);
      if (shown.key === key && !shown.error) this.#draw(name);
      else this.#ask(name, key, question);
    }
    this.#showState();
  }

  #questions() {
    const state = this.#state;
    const common = queryParams(state, this.#window);
    const outer = this.#outer;
    const range = [
      ["from", String(outer.from)],
      ["until", String(outer.until)],
    ];
    const shared = this.#isComparison ? selector.print(this.#sharedMatchers) : state.q;
    const query = shared ? [["query", shared]] : [];
    const width = ["width", String(this.#askedWidth)];
    const rest = selector.print(this.#sharedMatchers.filter((each) => each.name !== "service"));
    const flame = [
      ...this.#viewParams(),
      width,
      ...(state.search ? [["search", state.search]] : []),
    ];
    const top = [
      ...common,
      ["sort", state.sort],
      ["limit", String(state.rows)],
      ...(state.filter ? [["search", state.filter]] : []),
    ];
    const deployments = ["deployments", [...query, ...range]];
    const services = [
      "labels/service/values",
      [
        ...(rest ? [["query", rest]] : []),
        ["from", String(this.#window.from)],
        ["until", String(this.#window.until)],
      ],
    ];
    const timeline = ["timeline", [...query, ...range, ["by", state.series]]];
    if (this.#isComparison) {
      return {
        diff: ["diff", [...this.#viewParams(), width]],
        changes: [
          "diff/top",
          [
            ...common.filter(([name]) => SIDE.includes(name)),
            ...this.#beforeParams(),
            ["limit", String(CHANGES_ASKED)],
          ],
        ],
        timeline,
        services,
        deployments,
      };
    }
    return {
      flame: ["flamegraph", flame],
      timeline,
      services,
      deployments,
      top: this.#tab === "graph" && !state.row ? null : ["top", top], // a row's figures are in the panel
    };
  }

  /** What is looked at and how: the graph's question, and a download's. */
  #viewParams() {
    const state = this.#state;
    return [
      ...queryParams(state, this.#window),
      ...(state.invert ? [["invert", "1"]] : []),
      ["group", state.group],
      ...(state.node && state.node !== ROOT_ID ? [["node", state.node]] : []),
      ...(state.callers ? [["callers", state.callers]] : []),
      ...(this.#isComparison ? this.#beforeParams() : []),
    ];
  }

  #beforeParams() {
    const { from, until } = this.#before;
    return [
      ["before_query", beforeQuery(this.#state)],
      ["before_from", String(from)],
      ["before_until", String(until)],
    ];
  }

  get #askedWidth() {
    const width = this.graph.width || this.lastWidth || 1200;
    this.lastWidth = width;
    return Math.min(10_000, Math.max(400, Math.ceil(width / WIDTH_STEP_PX) * WIDTH_STEP_PX));
  }

  async #ask(name, key, [path, params]) {
    const shown = this.#shown[name];
    const question = {}; // what is asked again has the same key
    shown.question = question;
    shown.key = key;
    shown.isOld = true;
    this.#setBusy(name, true);
    let arrivedAt = null;
    try {
      const arrived = await this.#api.ask(name, path, params, { isKept: true });
      if (shown.question !== question) return; // a later one took its place
      ({ arrivedAt } = arrived);
      shown.answer = arrived.answer;
      shown.isOld = false;
      shown.error = null;
    } catch (error) {
      if (shown.question !== question) return;
      if (isCancelled(error)) shown.key = null;
      else shown.error = error;
    }
    this.#showState(); // what is hidden has no width to draw in
    try {
      if (shown.error) this.#fail(name);
      else if (arrivedAt !== null) this.#draw(name, arrivedAt);
    } finally {
      this.#setBusy(name, false);
    }
  }

  #setBusy(name, isBusy) {
    if (isBusy) this.#pending.add(name);
    else this.#pending.delete(name);
    const isAny = this.#pending.size > 0;
    if (isAny && !this.#slowTimer)
      this.#slowTimer = setTimeout(() => this.#showSlow(true), SLOW_MS);
    if (!isAny) {
      clearTimeout(this.#slowTimer);
      this.#slowTimer = 0;
      this.#showSlow(false);
    }
    this.#showState();
  }

  #showSlow(isSlow) {
    const progress = byId("progress");
    progress.hidden = !isSlow;
    for (const id of ["graph", "verdict"]) byId(id).classList.toggle("waiting", isSlow);
    progress.replaceChildren(
      ...(isSlow
        ? [
            el("span", { class: "hidden", role: "status", text: "Waiting for the service" }),
            el("i"),
            button({ text: "Cancel", class: "small cancel", click: () => this.#cancel() }),
          ]
        : []),
    );
  }

  #cancel() {
    for (const name of ["status", ...ANSWERS]) this.#api.cancel(name);
    this.#toast("Cancelled. What is shown may belong to the last question.");
  }

  // Drawing answers

  #draw(name, arrivedAt = null) {
    if (name === this.#graphName) this.#drawGraph(arrivedAt);
    else if (name === "timeline") this.#drawTimeline();
    else if (name === "services") this.#drawServices();
    else if (name === "top") this.#drawTop();
    else if (name === "changes") this.#drawChanges();
    else if (name === "deployments") this.#drawDeployments();
  }

  #drawGraph(arrivedAt) {
    const { view, color, select } = this.#state;
    const answer = this.#drawing;
    const colour = this.#isComparison ? "change" : color;
    if (
      arrivedAt !== null ||
      this.drawn?.answer !== answer ||
      this.drawn.view !== view ||
      this.drawn.colour !== colour
    ) {
      const factsOf = this.#isComparison
        ? (box) => tooltipOf(box, this.#rowOf(box), this.#shown.diff.answer)
        : null;
      this.graph.show(answer, { view, colour, factsOf, arrivedAt });
      this.drawn = { answer, view, colour };
    }
    this.graph.dim(false);
    this.#highlight(this.#highlighted);
    this.graph.select(select || null);
    if (this.#isComparison) this.#showVerdict();
    else this.#showCoverage(answer);
    this.#showCrumbs();
    this.#showPanel();
    this.#showUnder();
    this.#showFoot();
  }

  #showCoverage({ coverage, samples, window }) {
    // A zoom is an answer of its own about the same objects.
    if (this.#isNew("coverage", JSON.stringify([coverage, samples, window])))
      this.coverage.show({ coverage, samples, window });
  }

  #showVerdict() {
    const { answer } = this.#shown.diff;
    const { answer: changes, error, isOld } = this.#shown.changes;
    const functions = changes && !error && !isOld ? changes.functions : null;
    this.sides.tell(answer);
    this.verdict.show(
      answer,
      functions,
      nextSteps(answer, {
        onHalve: () => this.#halve(),
        onAll: () => this.#change({ changes: "all" }),
        onYesterday: () => this.#change({ before_from: "-1d", before_until: "" }),
      }),
    );
  }

  #drawTimeline() {
    const { answer } = this.#shown.timeline;
    const { series, over, q, tz } = this.#state;
    const { from, until } = this.#window;
    const deployments = this.#shown.deployments.answer?.deployments ?? [];
    const chosen = this.#chosenParts;
    if (
      !this.#isNew(
        "timeline",
        answer,
        this.#shown.services.answer,
        series,
        over,
        from,
        until,
        q,
        tz,
        deployments,
        JSON.stringify(chosen),
      )
    )
      return;
    if (series !== "service")
      this.#colours = assignColours(
        answer.series.filter((each) => !each.rest).map((each) => labelOf(each, series)),
        COLOURS,
      );
    else this.#colours = this.#serviceColours();
    this.timeline.show(answer, {
      chosen,
      label: series,
      zone: tz,
      colours: this.#colours,
      deployments,
    });
    this.#showLegend();
  }

  get #chosenParts() {
    if (!this.#isComparison) return this.#state.over ? [this.#window] : [];
    return [
      { ...this.#before, name: "before" },
      { ...this.#window, name: "after" },
    ];
  }

  #drawDeployments() {
    const { answer, error } = this.#shown.deployments;
    this.deployments.show(answer, {
      tz: this.#state.tz,
      problem: error?.message,
      isChosen: (each) => this.#isCompared(each),
    });
    if (this.#shown.timeline.answer && !this.#pending.has("timeline")) this.#drawTimeline();
  }

  #isCompared({ compare: windows }) {
    if (!windows || !this.#isComparison) return false;
    const [after, before] = [this.#window, this.#before];
    const isOf = (side, window) => side.from_ms === window.from && side.until_ms === window.until;
    return isOf(windows.after, after) && isOf(windows.before, before);
  }

  #drawServices() {
    const { answer } = this.#shown.services;
    if (
      !this.#isNew(
        "services",
        answer,
        this.#shown.timeline.answer,
        this.#state.q,
        this.#state.series,
        innerWidth,
      )
    )
      return;
    const chosen = new Set(
      this.#matchers
        .filter((each) => each.name === "service" && each.operator === "=")
        .map((each) => each.value),
    );
    const isLayered = this.#state.series === "service";
    this.services.show(answer.values, chosen, isLayered ? this.#serviceColours() : null);
    if (isLayered && this.#shown.timeline.answer && !this.#pending.has("timeline"))
      this.#drawTimeline();
  }

  /** Tell whether a view is to be drawn from other values than the last time. A zoom must not wait for
   * a timeline that stays as it is. */
  #isNew(view, ...values) {
    const before = this.#drawnFrom.get(view);
    this.#drawnFrom.set(view, values);
    return !before || values.some((value, i) => value !== before[i]);
  }

  /** Services keep their colours whatever is selected: by all that are there, most first. */
  #serviceColours() {
    const values = this.#shown.services.answer?.values ?? [];
    const drawn = this.#shown.timeline.answer?.series ?? [];
    const names = values.slice(0, COLOURS).map((each) => each.value);
    for (const each of drawn)
      if (!each.rest && names.length < COLOURS) names.push(labelOf(each, "service"));
    return assignColours(new Set(names), COLOURS);
  }

  #drawTop() {
    const { sort, filter, rows } = this.#state;
    const { answer } = this.#shown.top;
    if (this.drawnTop !== answer) {
      const { functions, total } = answer;
      const context = {
        total,
        windowMs: this.#windowMs,
        largest: Math.max(0, ...functions.map((row) => row.self)),
      };
      this.table.show(functions, {
        all: answer.rows ?? functions.length,
        sort,
        filter,
        limit: rows,
        context,
      });
    }
    this.drawnTop = answer;
    this.table.dim(false);
    this.#markRow();
    this.#showPanel();
  }

  #drawChanges() {
    const { answer } = this.#shown.changes;
    const { filter, rows, changes } = this.#state;
    if (this.#isNew("changes", answer, filter, rows, changes)) {
      const wanted = changesShown(answer, this.#state);
      this.changes.show(wanted.slice(0, rows), {
        all: wanted.length,
        filter,
        limit: rows,
        context: answer,
      });
    }
    this.changes.dim(false);
    if (this.#shown.diff.answer && !this.#shown.diff.error) this.#showVerdict();
    this.#highlight(this.#highlighted);
    this.#markRow();
    this.#showPanel();
  }

  /** Give what the list of changes has of a box's function; null where it has nothing. */
  #rowOf({ frame }) {
    const functions = this.#shown.changes.answer?.functions ?? [];
    if (frame.kind === "label" || frame.kind === "rest") return null;
    return (
      functions.find((each) => each.function === frame.function && each.module === frame.module) ??
      null
    );
  }

  #fail(name) {
    const { error } = this.#shown[name];
    this.#drawnFrom.delete(name);
    if (name === "timeline") this.timeline.fail(`No timeline: ${error.message}`);
    if (name === "top") this.table.dim(true);
    if (name === "changes") this.changes.dim(true);
    if (name === "deployments") this.#drawDeployments();
    if (name === this.#graphName) this.graph.dim(true);
  }

  // Views of the state

  /** Show what follows from the state alone. */
  #render() {
    const state = this.#state;
    const window = this.#window;
    const name = formatRange(state.from, state.until, this.#nowMs, state.tz);
    this.selector.show(state.q);
    this.range.show({ from: state.from, until: state.until, tz: state.tz, window, name });
    this.search.show(state.search);
    for (const id of ["series", "view", "side"]) controls.checkRadio(byId(id), state[id]);
    controls.checkRadio(byId("tab"), this.#tab);
    byId("invert").checked = state.invert;
    byId("group").value = state.group;
    byId("color").value = state.color;
    this.#showSplits();
    this.#showMatchers();
    this.#showModifiers();
    this.#showDownloads();
    this.#showSides();
    byId("panes").dataset.tab = this.#tab;
    byId("tools-graph").hidden = this.#tab === "table";
    byId("finder").hidden = this.#tab === "table";
    byId("timeline-whole").hidden = state.over === "" || this.#isComparison;
    byId("timeline-zoom").hidden = state.over === "";
    byId("timeline-range").textContent =
      state.over && !this.#isComparison
        ? formatWindow(window.from, window.until, state.tz)
        : formatWindow(this.#outer.from, this.#outer.until, state.tz);
    byId("refresh").disabled = false;
    const what = this.#matchers
      .filter((each) => each.operator === "=")
      .map((each) => safeName(each.value))
      .join(", ");
    document.title = `${this.#isComparison ? "Compare " : ""}${what || (this.#isComparison ? "all services" : "All services")} · ${name} – Everflame`;
  }

  #showSides() {
    const is = this.#isComparison;
    byId("compare-button").setAttribute("aria-pressed", String(is));
    byId("panes").classList.toggle("compared", is);
    for (const id of ["comparison", "target", "side", "changes-legend", "pane-changes"])
      byId(id).hidden = !is;
    for (const id of ["coverage", "color-pick", "pane-table"]) byId(id).hidden = is;
    if (this.drawn && (this.drawn.colour === "change") !== is) this.graph.dim(true); // until the answer comes
    if (!is) return;
    const { q, changes } = this.#state;
    this.sides.show(
      { ...this.#before, query: beforeQuery(this.#state) },
      { ...this.#window, query: q },
      this.#state,
    );
    byId("changes-all").checked = changes === "all";
  }

  #showSplits() {
    if (!this.#isNew("splits", this.#state.by)) return;
    const options = SPLITS.includes(this.#state.by) ? SPLITS : [...SPLITS, this.#state.by];
    byId("by").replaceChildren(
      ...options.map((value) =>
        el("option", {
          value,
          text: value ? safeName(value.split(",").join(", ")) : "nothing",
          selected: value === this.#state.by,
        }),
      ),
    );
  }

  #showMatchers() {
    controls.showChips(
      byId("matchers"),
      this.#matchers.map((each) => ({
        text: safeName(`${each.name} ${each.operator} ${each.value || "(none)"}`),
        label: `Remove ${safeName(selector.printMatcher(each))}`,
        class: "matcher",
        remove: () => this.#change({ q: selector.print(selector.remove(this.#matchers, each)) }),
      })),
    );
  }

  #showModifiers() {
    const { callers, focus, hide } = this.#state;
    const chip = (verb, name, remove) => ({
      text: `${verb} ${safeName(name)}`,
      label: `Remove: ${verb} ${safeName(name)}`,
      class: "modifier",
      remove,
    });
    controls.showChips(byId("modifiers"), [
      ...(callers ? [chip("callers of", callers, () => this.#change({ callers: "" }))] : []),
      ...focus.map((name) =>
        chip("only with", name, () =>
          this.#change({ focus: focus.filter((each) => each !== name) }),
        ),
      ),
      ...hide.map((name) =>
        chip("without", name, () => this.#change({ hide: hide.filter((each) => each !== name) })),
      ),
    ]);
  }

  #showDownloads() {
    const { from, until } = this.#window;
    const state = this.#state;
    const isZoomed = Boolean(state.node) && state.node !== ROOT_ID;
    const isChanged =
      Boolean(state.callers || state.hide.length) || state.invert || state.group !== "function";
    const formats = [
      ["speedscope.json", "speedscope", "for speedscope.app"],
      ["folded", "Folded stacks", "text, for flamegraph.pl and others"],
      [
        "pb.gz",
        "pprof",
        isChanged ? "for pprof: labels and names" : "everything: labels, build ids, accounting",
      ],
      ["svg", "SVG", "a picture to send around"],
      ["json", "JSON", "the drawing as arrays"],
    ];
    const compared = [
      ["speedscope.json", "speedscope", "both profiles, for speedscope.app"],
      ["folded", "Folded stacks", "text with two counts, as difffolded.pl writes"],
      ["svg", "SVG", "a picture with the same colours"],
      ["json", "JSON", "the drawing as arrays, with the verdict"],
    ];
    const files = this.#isComparison ? compared : formats;
    controls.showDownloads(
      byId("downloads"),
      files.map(([ending, title, hint]) => {
        const name = `everflame-${this.#isComparison ? "diff-" : ""}${fileTime(from)}-${fileTime(until)}.${ending}`;
        return { name, title, hint, href: address(`export/${name}`, this.#viewParams()) };
      }),
      isZoomed || isChanged || state.focus.length
        ? "Files hold what the graph shows, not all of the range."
        : "",
    );
  }

  #showLegend() {
    const legend = byId("legend");
    const { series } = this.#state;
    const { answer } = this.#shown.timeline;
    legend.hidden = series === "service" || answer.series.length === 0;
    if (legend.hidden) return;
    const total = answer.series.reduce((sum, each) => sum + sumOf(each.values), 0);
    legend.replaceChildren(
      ...answer.series.map((each) => {
        const value = labelOf(each, series);
        const isChosen = selector.has(this.#matchers, { name: series, operator: "=", value });
        return el(
          "button",
          {
            type: "button",
            class: "chip service",
            disabled: each.rest,
            "aria-pressed": String(isChosen),
            on: { click: () => this.#toggleMatcher(series, value, isChosen) },
          },
          el("i", {
            class: `swatch ${colourClass(each.rest ? undefined : this.#colours.get(value))}`,
          }),
          el("span", { class: "chip-text", text: safeName(seriesName(each, series)) }),
          el("span", { class: "chip-share", text: share(sumOf(each.values), total) }),
        );
      }),
    );
  }

  #showCrumbs() {
    const { path, nodes, frames } = this.#drawing;
    if (!this.#state.node || this.#state.node === ROOT_ID || nodes.frame.length === 0)
      return controls.showCrumbs(byId("crumbs"), []);
    const steps = [{ id: "", frame: ["all"] }, ...path];
    if (path.length === 0) steps.push({ id: this.#state.node, frame: frames[nodes.frame[0]] });
    controls.showCrumbs(
      byId("crumbs"),
      steps.map(({ id, frame }) => ({
        name: safeName(frame[0]),
        title: safeName(frame[0]),
        go: () => this.#change({ node: id }),
      })),
    );
  }

  #showUnder() {
    if (this.#isComparison) return this.#showUnderComparison();
    const { rest, nodes, total, window } = this.#shown.flame.answer;
    const parts = [];
    if (rest.nodes > 0)
      parts.push(
        `${number(rest.nodes)} ${rest.nodes === 1 ? "box" : "boxes"} too narrow to draw: summed, hatched, ${share(rest.total, nodes.total[0] || total)}. Zoom in to see them.`,
      );
    if (this.#state.over === "" && isRelative(this.#state.from, this.#state.until))
      parts.push(`As of ${formatWindow(window.from_ms, window.until_ms, this.#state.tz)}.`);
    byId("under").textContent = nodes.frame.length ? parts.join(" ") : "";
  }

  #showUnderComparison() {
    const { rest, nodes } = this.#drawing;
    const { side } = this.#state;
    const parts = [];
    if (nodes.frame.length && !(nodes.total[0] > 0))
      parts.push(`There is nothing of this ${side}.`);
    if (rest.nodes > 0)
      parts.push(
        `${number(rest.nodes)} ${rest.nodes === 1 ? "box" : "boxes"} too narrow to draw: summed, hatched in grey. Zoom in to see them.`,
      );
    parts.push(
      side
        ? `Boxes are as wide as ${side}; what is not there then has no box.`
        : "Boxes are as wide as both sides on average, so what is new or gone is there too.",
    );
    byId("under").textContent = parts.join(" ");
  }

  #showFoot() {
    const { agent, host_seconds: hostSeconds } = this.#drawing;
    const parts = [];
    if (agent && hostSeconds > 0) {
      parts.push(
        el(
          "span",
          { title: "On average over the hosts of this selection" },
          `The agent itself: ${share(agent.cpu_ns, hostSeconds * 1e9)} of one CPU, ${bytes(agent.rss_bytes)}`,
        ),
      );
    }
    if (this.#status) {
      const { version, store, data, keep, hosts } = this.#status;
      if (data)
        parts.push(
          el("span", {
            text: `Data: ${formatWindow(data.from_ms, data.until_ms, this.#state.tz)}, ${counted(hosts.length, "host")}`,
          }),
        );
      if (keep)
        parts.push(
          el("span", {
            text: `kept for ${[keep.seconds ? span(keep.seconds * 1000) : "", keep.bytes ? `up to ${bytes(keep.bytes)}` : ""].filter(Boolean).join(", ")}`,
          }),
        );
      parts.push(
        el("span", { text: safeName(store) }),
        el("span", { text: `Everflame ${version}` }),
      );
    }
    byId("foot").replaceChildren(...parts);
  }

  /** Say what the flame graph's question came to, and show or hide the panes with it. */
  #showState() {
    const { answer, error } = this.#shown[this.#graphName];
    const isBusy = this.#pending.size > 0;
    const place = byId("state");
    const notice = byId("notice");
    const empty = error || !answer || this.#isComparison ? null : this.#emptyState(answer);
    const isStale =
      error !== null && answer !== null && answer.nodes.frame.length > 0 && error.isAway;
    const box = error && !isStale ? this.#errorState(error) : empty;
    root.dataset.state = isBusy
      ? "loading"
      : error
        ? "error"
        : empty
          ? "empty"
          : answer
            ? "ready"
            : "error";
    notice.replaceChildren(...(isStale ? [this.#awayNotice(error)] : []));
    place.hidden = box === null;
    // Whoever has come to a button in it stays there while other answers arrive.
    if (this.#isNew("state", box && printState(this.#state), error, answer, this.#status))
      place.replaceChildren(...(box ?? []));
    byId("panes").hidden = box !== null;
    if (answer === null && box === null)
      byId("under").replaceChildren(
        isBusy
          ? "Asking the service…"
          : button({ text: "Ask again", class: "small", click: () => this.#refresh() }),
      );
    if (error && !isStale) controls.showCrumbs(byId("crumbs"), []);
    if (this.#isComparison && !isStale && (error || !answer)) {
      this.sides.tell(null);
      this.verdict.clear(error ? "No verdict" : "Comparing…");
    }
  }

  #emptyState(answer) {
    const { empty, nodes } = answer;
    const { callers, focus, hide, node } = this.#state;
    if (empty?.reason === "no_data_ever") {
      return [
        el("h3", { text: "No data yet" }),
        el(
          "p",
          {},
          "This store",
          this.#status ? ` (${safeName(this.#status.store)})` : "",
          " has never held a profile. Start sampling on this host, with this page:",
        ),
        el("pre", { text: "sudo everflame up" }),
        el("p", { text: "or only the agent, on every host that belongs here:" }),
        el("pre", {
          text: `sudo everflame agent${this.#status ? ` --store ${safeName(this.#status.store)}` : ""}`,
        }),
        el("p", {
          class: "muted",
          text: "The first window arrives after a minute. everflame doctor says what a host is missing.",
        }),
        el(
          "p",
          { class: "row" },
          button({ text: "Look again", class: "primary", click: () => this.#refresh() }),
        ),
      ];
    }
    if (empty?.reason === "no_data_in_range") {
      const near = empty.nearest ?? [];
      return [
        el("h3", { text: "No data in this range" }),
        el("p", {
          text: `Nothing was profiled from ${formatWindow(this.#window.from, this.#window.until, this.#state.tz)}.`,
        }),
        near.length ? el("p", { text: "The nearest data:" }) : null,
        el(
          "p",
          { class: "row" },
          near.map((each) =>
            button({
              text: formatWindow(each.from_ms, each.until_ms, this.#state.tz),
              click: () => this.#change(around(each, this.#windowMs)),
            }),
          ),
          button({
            text: "Last hour",
            click: () => this.#change({ from: "now-1h", until: "now" }),
          }),
        ),
      ].filter(Boolean);
    }
    if (empty?.reason === "nothing_matches" && this.#matchers.length) {
      const services = empty.services ?? [];
      return [
        el("h3", { text: "Nothing matches" }),
        el(
          "p",
          {},
          "There are profiles in this range, but none of ",
          el("code", { text: safeName(this.#state.q) }),
          ".",
        ),
        services.length ? el("p", { text: "Services that are there:" }) : null,
        el(
          "p",
          { class: "chips" },
          services.slice(0, 40).map((value) =>
            el(
              "button",
              {
                type: "button",
                class: "chip service",
                on: {
                  click: () =>
                    this.#change({
                      q: selector.print([{ name: "service", operator: "=", value }]),
                    }),
                },
              },
              el("span", { class: "chip-text", text: safeName(value) }),
            ),
          ),
        ),
        el(
          "p",
          { class: "row" },
          button({
            text: "Clear the selector",
            class: "primary",
            click: () => this.#change({ q: "" }),
          }),
        ),
      ].filter(Boolean);
    }
    if (empty || nodes.frame.length === 0 || !(nodes.total[0] > 0)) {
      const isChanged = callers || focus.length || hide.length;
      return [
        el("h3", { text: isChanged ? "No stack is left" : "No samples" }),
        el("p", {
          text: isChanged
            ? "No stack of this range has what the changes above ask for."
            : "The CPUs were idle in this range: every tick was counted, none was busy.",
        }),
        isChanged || node
          ? el(
              "p",
              { class: "row" },
              button({
                text: "Show all stacks",
                class: "primary",
                click: () => this.#change({ callers: "", focus: [], hide: [], node: "" }),
              }),
            )
          : null,
      ].filter(Boolean);
    }
    return null;
  }

  #errorState(error) {
    if (error.status === 404 && error.node) {
      return [
        el("h3", { text: "This box is not in this range" }),
        el("p", { text: "What was zoomed to did not run in the chosen time and selection." }),
        el(
          "p",
          { class: "row" },
          button({ text: "Zoom out", class: "primary", click: () => this.#change({ node: "" }) }),
          button({ text: "Back", click: () => history.back() }),
        ),
      ];
    }
    if (error.problem.side) {
      const { side } = error.problem;
      return emptySide(error, {
        tz: this.#state.tz,
        query: side === "before" ? beforeQuery(this.#state) : this.#state.q,
        onQuery: (query) => this.#changeSide(side, { query }),
        onWindow: (nearest) => this.#changeSide(side, around(nearest, this.#windowMs)),
        onEnd: () => this.#change(endComparison()),
      });
    }
    const actions = [button({ text: "Retry", class: "primary", click: () => this.#refresh() })];
    if (error.parameter === "query")
      actions.push(button({ text: "Clear the selector", click: () => this.#change({ q: "" }) }));
    else if (error.status >= 400 && error.status < 500)
      actions.push(button({ text: "Start over", click: () => this.#change(parseState("")) }));
    const title =
      error.parameter === "query"
        ? "The selector cannot be read"
        : error.status === 400
          ? "The address asks for what there is not"
          : error.title;
    return [
      el("h3", { class: "bad", text: title }),
      el("p", { class: "detail", text: safeName(error.message) }),
      el("p", { class: "row" }, actions),
    ];
  }

  #awayNotice(error) {
    return el(
      "div",
      { class: "notice bad" },
      el(
        "p",
        {},
        el("b", { text: `${error.title}:` }),
        ` ${safeName(error.message.replace(/\.$/, ""))}. The last answer stays below.`,
      ),
      button({ text: "Retry", class: "small", click: () => this.#refresh() }),
    );
  }

  // Selection: a box of the graph, or a row of the table

  #showPanel() {
    if (this.#isComparison) return this.#showChange();
    const { select, row, callers } = this.#state;
    const { answer } = this.#shown.flame;
    const windowMs = this.#windowMs;
    const box = select && answer ? findBox(answer, select) : null;
    const picked = row
      ? this.#shown.top.answer?.functions.find((each) => rowKey(each) === row)
      : null;
    const files = answer?.modules ?? [];
    if (box)
      this.panel.showBox(box, {
        windowMs,
        files,
        labelName: this.#labelOf(box),
        isZoomed: box.id === this.#state.node,
        isCallers: callers === box.frame.function,
      });
    else if (picked)
      this.panel.showFunction(picked, {
        windowMs,
        files,
        total: this.#shown.top.answer.total,
        isCallers: callers === picked.function,
      });
    else this.panel.hide();
    this.#markRow();
  }

  #showChange() {
    const { select, row, callers, node } = this.#state;
    const { answer } = this.#shown.diff;
    const box = select && answer ? findBox(this.#drawing, select) : null;
    const picked = row
      ? this.#shown.changes.answer?.functions.find((each) => rowKey(each) === row)
      : null;
    if (box) {
      const { frame, cause } = box;
      this.panel.showChange(frame, {
        facts: changeFacts(box, this.#rowOf(box), answer),
        id: box.depth ? box.id : null,
        cause,
        isZoomed: box.id === node,
        isCallers: callers === frame.function,
      });
    } else if (picked && answer) {
      const told = {
        frame: { file: "", line: 0, ...picked },
        before: picked.total.before,
        after: picked.total.after,
        verdict: picked.verdict,
        cause: null,
      };
      this.panel.showChange(told.frame, {
        facts: changeFacts(told, picked, answer),
        isCallers: callers === picked.function,
      });
    } else this.panel.hide();
    this.#markRow();
  }

  #markRow() {
    (this.#isComparison ? this.changes : this.table).mark(this.#marked);
  }

  /** The function that the table marks: that of the selected box, or of the selected row. */
  get #marked() {
    const { select, row } = this.#state;
    const answer = this.#drawing;
    const box = select && answer ? findBox(answer, select) : null;
    if (box && box.frame.kind !== "label") return box.frame;
    return row ? rowOf(row) : null;
  }

  /** What the graph lights up while nothing is pointed at. */
  get #highlighted() {
    const { search, row } = this.#state;
    return search || (row ? rowOf(row) : "");
  }

  /** Give the label whose value a box is; null where the levels do not say it. */
  #labelOf({ frame, path }) {
    if (frame.kind !== "label" || path.length === 0) return null;
    const names = this.#state.by.split(",").filter(Boolean);
    const graph = graphOf(this.#drawing);
    let levels = 0;
    for (let node = graph.top; node < graph.size; node += 1)
      if (graph.frameOf(node).kind === "label") levels = Math.max(levels, graph.rowOf(node));
    const position = path.filter(([, , kind]) => kind === "label").length - 1;
    return levels === names.length ? (names[position] ?? null) : null;
  }

  #highlight(wanted) {
    const place = this.graph.highlight(wanted);
    const answer = this.#drawing;
    const search =
      answer?.search && answer.search.text === this.#state.search ? answer.search : null;
    if (this.#state.search) this.search.say(place, search, answer?.nodes.total[0] ?? 0);
  }

  #step(direction) {
    const answer = this.#drawing;
    this.search.say(this.graph.step(direction), answer?.search, answer?.nodes.total[0] ?? 0);
  }

  // Comparing

  #toggleComparison() {
    this.#change(this.#isComparison ? endComparison() : { mode: "compare" });
  }

  #compareDeployment({ compare: windows, compare_reason: reason }) {
    if (!windows) return this.#toast(reason ?? "This deployment cannot be compared.");
    const [before, after] = [windows.before, windows.after].map((each) => ({
      query: each.query,
      from: each.from_ms,
      until: each.until_ms,
    }));
    const { from, until } = this.#outer;
    const over = `${Math.min(from, before.from)}..${Math.max(until, after.until)}`;
    this.#change({ ...compare(before, after), over, node: "", select: "", row: "" });
  }

  #swap() {
    const after = { ...this.#window, query: this.#state.q };
    const { from, until } = this.#outer;
    this.#change({
      ...compare(after, { ...this.#before, query: beforeQuery(this.#state) }),
      over: this.#state.over && `${from}..${until}`,
    });
  }

  /** Change what one side selects: {query} or {from, until} as texts. */
  #changeSide(side, { query, from, until }) {
    const isBefore = side === "before";
    if (query !== undefined)
      return this.#change(
        isBefore ? { before_query: query } : { q: query, before_query: beforeQuery(this.#state) },
      );
    this.#change(isBefore ? { before_from: from, before_until: until } : { from, until });
  }

  /** Halve both windows, towards each other. */
  #halve() {
    const [before, after] = [this.#before, this.#window];
    const half = (window) => Math.round((window.until - window.from) / 2);
    const query = beforeQuery(this.#state);
    this.#change(
      compare(
        { query, from: before.until - half(before), until: before.until },
        { query: this.#state.q, from: after.from, until: after.from + half(after) },
      ),
    );
  }

  /** Take a part of the timeline: of a comparison it is the side that a drag chooses. */
  #choosePart(window) {
    if (!this.#isComparison) return this.#change(narrowTo(this.#state, window));
    const { from, until } = this.#outer;
    const side = byId("target").querySelector(":checked").value;
    const times = { from: String(window.from), until: String(window.until) };
    const change =
      side === "after" ? times : { before_from: times.from, before_until: times.until };
    this.#change({ ...change, over: `${from}..${until}` });
  }

  // Making views, and what they call

  #makeViews() {
    this.selector = new controls.SelectorInput(byId("selector"), {
      suggest: (expects, name) => this.#suggest(expects, name),
      onCommit: (q) => this.#change({ q }),
    });
    this.range = new controls.RangePicker(byId("range-menu"), {
      label: "Time range",
      presets: RANGES,
      onRange: (from, until) => {
        const isAgain = from === this.#state.from && until === this.#state.until;
        this.#change({ from, until, over: "" });
        if (isAgain || isRelative(from, until)) this.#refresh();
      },
      onZone: (tz) => this.#change({ tz }),
    });
    this.services = new controls.ServiceChips(byId("services"), {
      onToggle: (value, isChosen) => this.#toggleMatcher("service", value, isChosen),
    });
    this.timeline = new TimelineView(byId("timeline"), {
      onApply: (window) => this.#choosePart(window),
      onMark: (deployments) =>
        deployments.length > 1 ? this.deployments.open() : this.#compareDeployment(deployments[0]),
    });
    this.deployments = new DeploymentsMenu(byId("deployments-menu"), {
      onCompare: (deployment) => this.#compareDeployment(deployment),
    });
    this.sides = new Sides(byId("comparison"), {
      suggest: (expects, name) => this.#suggest(expects, name),
      onWindow: (from, until) => this.#change({ before_from: from, before_until: until }),
      onQuery: (query) => this.#change({ before_query: query === this.#state.q ? SAME : query }),
      onSwap: () => this.#swap(),
      onEnd: () => {
        byId("compare-button").focus();
        this.#toggleComparison();
      },
    });
    this.verdict = new Verdict(byId("verdict"));
    this.coverage = new controls.CoverageStrip(byId("coverage"));
    this.search = new controls.SearchBox(byId("finder"), {
      onSearch: (search) => {
        this.#highlight(search.trim());
        this.#change({ search: search.trim() });
      },
      onStep: (direction) => this.#step(direction),
    });
    this.graph = new FlameGraphView(byId("graph"), {
      onZoom: (id) => {
        this.zoomed = true;
        this.#change({ node: id ?? "", select: id ?? "" });
      },
      onSelect: (box) => {
        // A click selects and then zooms: that is one step, and Back goes to where nothing was selected.
        this.zoomed = false;
        queueMicrotask(
          () => this.zoomed || this.#change({ select: box && !box.isRest ? box.id : "", row: "" }),
        );
      },
      onHover: (box) =>
        (this.#isComparison ? this.changes : this.table).mark(
          box && !box.isRest && box.frame.kind !== "label" ? box.frame : this.#marked,
        ),
    });
    const ofTables = {
      onSort: (sort) => this.#change({ sort }),
      onFilter: (filter) => this.#change({ filter }),
      onRows: (rows) => this.#change({ rows }),
      onHover: (row) => this.graph.highlight(row ?? this.#highlighted),
      onSelect: (row) =>
        this.#change({ row: rowKey(row) === this.#state.row ? "" : rowKey(row), select: "" }),
    };
    this.table = new FunctionTable(byId("pane-table"), COSTS, ofTables);
    this.changes = new FunctionTable(byId("pane-changes"), CHANGES, ofTables);
    this.changes.head.append(
      el(
        "label",
        { class: "toggle" },
        el("input", {
          type: "checkbox",
          id: "changes-all",
          on: { change: (event) => this.#change({ changes: event.target.checked ? "all" : "" }) },
        }),
        el("span", { text: "Unchanged too" }),
      ),
    );
    this.panel = new DetailPanel(byId("panel"), {
      onZoom: (id) => this.#change({ node: id, select: id }),
      onCallers: (callers) => this.#change({ callers, node: "", select: "", row: "" }),
      onFocus: (name) => this.#change({ focus: [...new Set([...this.#state.focus, name])] }),
      onHide: (name) => this.#change({ hide: [...new Set([...this.#state.hide, name])], row: "" }),
      onSearch: (search) =>
        this.#change({ search, tab: this.#tab === "table" ? "graph" : this.#state.tab }),
      onFilter: (name, value, isExcluding) => this.#filter(name, value, isExcluding),
      onRow: (cause) => this.#change({ row: rowKey(cause), select: "", node: "" }),
      onCopy: (text) => this.#copy(text, "Copied the name"),
      onClose: () => this.#change({ select: "", row: "" }),
    });
  }

  #bindControls() {
    controls.bindChoice(byId("series"), (series) => this.#change({ series }));
    controls.bindChoice(byId("view"), (view) => this.#change({ view }));
    controls.bindChoice(byId("side"), (side) => this.#change({ side }));
    byId("compare-button").addEventListener("click", () => this.#toggleComparison());
    controls.bindChoice(byId("tab"), (tab) => this.#change({ tab }));
    for (const id of ["invert", "by", "group", "color"])
      controls.bindChoice(byId(id), (value) => this.#change({ [id]: value }));
    new controls.Menu(byId("download-menu"));
    byId("refresh").addEventListener("click", () => this.#refresh());
    byId("copy-link").addEventListener("click", () => this.#copyLink());
    byId("timeline-whole").addEventListener("click", () => this.#change(widen(this.#state)));
    byId("timeline-zoom").addEventListener("click", () => this.#change({ over: "" }));
    byId("theme").addEventListener("click", () =>
      this.#showTheme(THEMES[(THEMES.indexOf(readTheme()) + 1) % THEMES.length]),
    );
    byId("help-button").addEventListener("click", () => controls.showHelp(byId("help")));
    byId("help").addEventListener(
      "click",
      (event) => event.target === byId("help") && byId("help").close(),
    );
  }

  #bindKeys() {
    const keys = {
      "/": () => this.#focusSearch(),
      "?": () => controls.showHelp(byId("help")),
      s: () => this.selector.focus(),
      t: () => this.timeline.focus(),
      g: () => this.graph.focus(),
      n: () => this.#step(1),
      N: () => this.#step(-1),
      1: () => this.#change({ tab: "graph" }),
      2: () => this.#change({ tab: "table" }),
      3: () => this.#change({ tab: "both" }),
      i: () => this.#change({ invert: !this.#state.invert }),
      v: () => this.#change({ view: this.#state.view === "icicle" ? "flame" : "icicle" }),
      0: () => this.#change({ node: "" }),
      d: () => this.#toggleComparison(),
      b: () => this.#isComparison && this.#change({ side: "before" }),
      a: () => this.#isComparison && this.#change({ side: "after" }),
      u: () => this.#isComparison && this.#change({ side: "" }),
      r: () => this.#refresh(),
      c: () => this.#copyLink(),
      Escape: () => this.#change({ select: "", row: "" }),
    };
    document.addEventListener("keydown", (event) => {
      const isOurs = !event.defaultPrevented && !event.ctrlKey && !event.metaKey && !event.altKey;
      if (!isOurs || isTyping(event) || byId("help").open || !Object.hasOwn(keys, event.key))
        return;
      event.preventDefault();
      keys[event.key]();
    });
  }

  #focusSearch() {
    if (this.#tab === "table") (this.#isComparison ? this.changes : this.table).filter.focus();
    else this.search.input.focus();
  }

  #onResize() {
    clearTimeout(this.resizeTimer);
    this.resizeTimer = setTimeout(() => this.#go(this.#state), 200);
  }

  #toggleMatcher(name, value, isChosen) {
    const matcher = { name, operator: "=", value };
    const others = this.#matchers;
    this.#change({
      q: selector.print(
        isChosen ? selector.remove(others, matcher) : selector.add(others, matcher),
      ),
    });
  }

  #filter(name, value, isExcluding) {
    const matcher = {
      name,
      operator: isExcluding ? "!=" : "=",
      value: value === `[no ${name}]` ? "" : value,
    };
    this.#change({
      q: selector.print(selector.add(this.#matchers, matcher)),
      node: "",
      select: "",
    });
  }

  async #suggest(expects, name) {
    if (expects === "name") {
      const answer = await this.#known("labels");
      return answer.labels.map((each) => ({
        value: each.name,
        hint: counted(each.values, "value"),
      }));
    }
    if (expects === "value") {
      const answer = await this.#known(`labels/${encodeURIComponent(name)}/values`);
      const total = sumOf(answer.values.map((each) => each.samples));
      return answer.values.map((each) => ({ value: each.value, hint: share(each.samples, total) }));
    }
    return controls.fixedSuggestions(expects);
  }

  /** Labels for suggestions: asked once per window. Without them typing goes on as before. */
  async #known(path) {
    const key = `${path} ${this.#window.from} ${this.#window.until}`;
    if (!this.#labels.has(key)) {
      try {
        const { answer } = await this.#api.ask("labels", path, [
          ["from", String(this.#window.from)],
          ["until", String(this.#window.until)],
        ]);
        this.#labels.set(key, answer);
      } catch {
        return { labels: [], values: [] };
      }
    }
    return this.#labels.get(key);
  }

  #copyLink() {
    const frozen = freezeState(this.#state, this.#window, this.#outer, this.#before);
    const link = `${location.origin}${location.pathname}${printState(frozen)}`;
    this.#copy(link, "Copied a link with fixed times");
  }

  async #copy(text, said) {
    try {
      await navigator.clipboard.writeText(text);
      this.#toast(`${said}.`);
    } catch {
      // Without a secure origin browsers keep the clipboard closed.
      this.#toast("The browser does not allow copying here. It is:", text);
    }
  }

  #toast(text, copyable) {
    const toast = byId("toast");
    const field = copyable
      ? el("input", { readonly: true, value: copyable, "aria-label": "To copy" })
      : null;
    toast.replaceChildren(
      ...[
        el("span", { text }),
        field,
        copyable
          ? button({
              icon: "close",
              label: "Close",
              class: "quiet",
              click: () => toast.replaceChildren(),
            })
          : null,
      ].filter(Boolean),
    );
    field?.select();
    clearTimeout(this.toastTimer);
    if (!copyable) this.toastTimer = setTimeout(() => toast.replaceChildren(), TOAST_MS);
  }

  #showTheme(theme) {
    writeTheme(theme);
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
    const label = {
      auto: "Colours: as the system",
      light: "Colours: light",
      dark: "Colours: dark",
    }[theme];
    byId("theme").setAttribute("aria-label", label);
    byId("theme").title = label;
    this.graph.recolour();
  }
}

/** A row of the table as the state names it: names hold no newline. */
function rowKey({ function: name, module }) {
  return `${name}\n${module}`;
}

function rowOf(key) {
  const [name, module] = key.split("\n");
  return { function: name, module };
}

/** Describe a box of an answer by its id, as the graph does; null if it is not there. */
function findBox(answer, id) {
  if (answer.nodes.frame.length === 0) return null;
  const graph = graphOf(answer);
  const node = id === ROOT_ID ? graph.top : graph.findId(id);
  if (node === null) return null;
  const total = graph.totalOf(node);
  return {
    id,
    path: graph.pathOf(node),
    frame: graph.frameOf(node),
    total,
    self: graph.selfOf(node),
    samples: graph.samplesOf(node),
    depth: graph.rowOf(node),
    shareOfAll: total / (answer.total || 1),
    isRest: false,
    ...(graph.isComparison ? comparedTo(graph, node) : {}),
  };
}

/** Give the change that shows data nearby, in a window as long as the one before if it can be. */
function around({ from_ms: from, until_ms: until }, lengthMs) {
  const more = Math.max(0, lengthMs - (until - from)) / 2;
  return {
    from: String(Math.floor(from - more)),
    until: String(Math.ceil(until + more)),
    over: "",
  };
}

function fileTime(ms) {
  return new Date(ms).toISOString().slice(0, 19).replace(/[-:]/g, "").concat("Z");
}

function sumOf(values) {
  return values.reduce((sum, each) => sum + each, 0);
}

function readTheme() {
  try {
    const theme = localStorage.getItem(THEME_KEY);
    return THEMES.includes(theme) ? theme : "auto";
  } catch {
    return "auto"; // storage may be forbidden
  }
}

function writeTheme(theme) {
  try {
    localStorage.setItem(THEME_KEY, theme);
  } catch {
    // The choice lasts as long as the page.
  }
}

new Page().start();
