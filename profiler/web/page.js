// Page: the address in, requests and views out.
//
// A user's act changes the state; the state goes into the address; what the state asks for and is
// not there yet is asked of the service. `<html data-state>` says how that stands: loading, ready,
// empty or error.

import {Api, address, isCancelled} from "./api.js";
import * as controls from "./controls.js";
import {button, el, isTyping} from "./dom.js";
import {bytes, counted, number, safeName, share, span} from "./format.js";
import {FlameGraphView} from "./graph.js";
import {ROOT_ID, graphOf} from "./layout.js";
import {DetailPanel} from "./panel.js";
import {assignColours} from "./scale.js";
import * as selector from "./selector.js";
import {changeState, freezeState, isStep, narrowTo, outerWindow, parseState, printState, queryParams, widen} from "./state.js";
import {FunctionTable} from "./table.js";
import {TimelineView, colourClass, labelOf, seriesName} from "./timeline.js";
import {formatRange, formatWindow, isRelative, resolveWindow} from "./times.js";

const COLOURS = 10;
const SLOW_MS = 300;
const WIDE_PX = 1200;
const WIDTH_STEP_PX = 200;
const TOAST_MS = 4000;
const THEME_KEY = "everflame-theme";
const THEMES = ["auto", "light", "dark"];
const SPLITS = ["service", "version", "service,version", "host", "service,host", "comm", "service,comm", ""];
const ANSWERS = ["flame", "timeline", "services", "top"];

const byId = (id) => document.getElementById(id);
const root = document.documentElement;

class Page {
  #api = new Api();
  #state = parseState(location.search);
  #clockSkewMs = 0;
  #nowMs = Date.now();
  /** The last answer of each question, with the address that was asked: {key, answer, error}. */
  #shown = Object.fromEntries(ANSWERS.map((name) => [name, {key: null, answer: null, error: null}]));
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
    return resolveWindow(this.#state.from, this.#state.until, this.#nowMs) ?? {from: this.#nowMs - 3_600_000, until: this.#nowMs};
  }

  get #outer() {
    return resolveWindow(...outerWindow(this.#state), this.#nowMs) ?? this.#window;
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

  get #tab() {
    const isWide = innerWidth >= WIDE_PX;
    const {tab} = this.#state;
    if (tab === "both" && innerWidth < 900) return "graph";
    return tab || (isWide ? "both" : "graph");
  }

  // Requests

  /** Read the clock and the status anew, then everything else. */
  async #refresh() {
    const refresh = (this.#refreshing = {});
    this.#setBusy("status", true);
    try {
      const {answer} = await this.#api.ask("status", "status");
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
    const range = [["from", String(outer.from)], ["until", String(outer.until)]];
    const query = state.q ? [["query", state.q]] : [];
    const rest = selector.print(this.#matchers.filter((each) => each.name !== "service"));
    const flame = [
      ...this.#viewParams(), ["width", String(this.#askedWidth)],
      ...(state.search ? [["search", state.search]] : []),
    ];
    const top = [
      ...common, ["sort", state.sort], ["limit", String(state.rows)],
      ...(state.filter ? [["search", state.filter]] : []),
    ];
    return {
      flame: ["flamegraph", flame],
      timeline: ["timeline", [...query, ...range, ["by", state.series]]],
      services: ["labels/service/values", [...(rest ? [["query", rest]] : []), ["from", String(this.#window.from)], ["until", String(this.#window.until)]]],
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
    ];
  }

  get #askedWidth() {
    const width = this.graph.width || this.lastWidth || 1200;
    this.lastWidth = width;
    return Math.min(10_000, Math.max(400, Math.ceil(width / WIDTH_STEP_PX) * WIDTH_STEP_PX));
  }

  async #ask(name, key, [path, params]) {
    const shown = this.#shown[name];
    const question = (shown.question = {}); // what is asked again has the same key
    shown.key = key;
    this.#setBusy(name, true);
    let arrivedAt = null;
    try {
      const arrived = await this.#api.ask(name, path, params, {isKept: true});
      if (shown.question !== question) return; // a later one took its place
      ({arrivedAt} = arrived);
      shown.answer = arrived.answer;
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
    if (isAny && !this.#slowTimer) this.#slowTimer = setTimeout(() => this.#showSlow(true), SLOW_MS);
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
    byId("graph").classList.toggle("waiting", isSlow);
    progress.replaceChildren(...(isSlow
      ? [el("span", {class: "hidden", role: "status", text: "Waiting for the service"}), el("i"), button({text: "Cancel", class: "small cancel", click: () => this.#cancel()})]
      : []));
  }

  #cancel() {
    for (const name of ["status", ...ANSWERS]) this.#api.cancel(name);
    this.#toast("Cancelled. What is shown may belong to the last question.");
  }

  // Drawing answers

  #draw(name, arrivedAt = null) {
    if (name === "flame") this.#drawFlame(arrivedAt);
    else if (name === "timeline") this.#drawTimeline();
    else if (name === "services") this.#drawServices();
    else this.#drawTop();
  }

  #drawFlame(arrivedAt) {
    const state = this.#state;
    const {answer} = this.#shown.flame;
    if (arrivedAt !== null || this.drawn?.answer !== answer || this.drawn.view !== state.view || this.drawn.color !== state.color) {
      this.graph.show(answer, {view: state.view, colour: state.color, arrivedAt});
      this.drawn = {answer, view: state.view, color: state.color};
    }
    this.graph.dim(false);
    this.#highlight(this.#highlighted);
    this.graph.select(state.select || null);
    const {coverage, samples, window} = answer;
    // A zoom is an answer of its own about the same objects.
    if (this.#isNew("coverage", JSON.stringify([coverage, samples, window]))) this.coverage.show({coverage, samples, window});
    this.#showCrumbs();
    this.#showPanel();
    this.#showUnder();
    this.#showFoot();
  }

  #drawTimeline() {
    const {answer} = this.#shown.timeline;
    const {series, over, q, tz} = this.#state;
    const {from, until} = this.#window;
    if (!this.#isNew("timeline", answer, this.#shown.services.answer, series, over, from, until, q, tz)) return;
    if (series !== "service") this.#colours = assignColours(answer.series.filter((each) => !each.rest).map((each) => labelOf(each, series)), COLOURS);
    else this.#colours = this.#serviceColours();
    this.timeline.show(answer, {chosen: this.#state.over ? this.#window : null, label: series, zone: this.#state.tz, colours: this.#colours});
    this.#showLegend();
  }

  #drawServices() {
    const {answer} = this.#shown.services;
    if (!this.#isNew("services", answer, this.#shown.timeline.answer, this.#state.q, this.#state.series, innerWidth)) return;
    const chosen = new Set(this.#matchers.filter((each) => each.name === "service" && each.operator === "=").map((each) => each.value));
    const isLayered = this.#state.series === "service";
    this.services.show(answer.values, chosen, isLayered ? this.#serviceColours() : null);
    if (isLayered && this.#shown.timeline.answer && !this.#pending.has("timeline")) this.#drawTimeline();
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
    for (const each of drawn) if (!each.rest && names.length < COLOURS) names.push(labelOf(each, "service"));
    return assignColours(new Set(names), COLOURS);
  }

  #drawTop() {
    const {sort, filter, rows} = this.#state;
    const {answer} = this.#shown.top;
    if (this.drawnTop !== answer) this.table.show(answer, {sort, filter, rows, windowMs: this.#windowMs});
    this.drawnTop = answer;
    this.table.dim(false);
    this.#markRow();
    this.#showPanel();
  }

  #fail(name) {
    const {error} = this.#shown[name];
    this.#drawnFrom.delete(name);
    if (name === "timeline") this.timeline.fail(`No timeline: ${error.message}`);
    if (name === "top") this.table.dim(true);
    if (name === "flame") this.graph.dim(true);
  }

  // Views of the state

  /** Show what follows from the state alone. */
  #render() {
    const state = this.#state;
    const window = this.#window;
    const name = formatRange(state.from, state.until, this.#nowMs, state.tz);
    this.selector.show(state.q);
    this.range.show({from: state.from, until: state.until, tz: state.tz, window, name});
    this.search.show(state.search);
    for (const id of ["series", "view"]) controls.checkRadio(byId(id), state[id]);
    controls.checkRadio(byId("tab"), this.#tab);
    byId("invert").checked = state.invert;
    byId("group").value = state.group;
    byId("color").value = state.color;
    this.#showSplits();
    this.#showMatchers();
    this.#showModifiers();
    this.#showDownloads();
    byId("panes").dataset.tab = this.#tab;
    byId("tools-graph").hidden = this.#tab === "table";
    byId("finder").hidden = this.#tab === "table";
    byId("timeline-whole").hidden = state.over === "";
    byId("timeline-zoom").hidden = state.over === "";
    byId("timeline-range").textContent = state.over ? formatWindow(window.from, window.until, state.tz) : formatWindow(this.#outer.from, this.#outer.until, state.tz);
    byId("refresh").disabled = false;
    const what = this.#matchers.filter((each) => each.operator === "=").map((each) => safeName(each.value)).join(", ");
    document.title = `${what || "All services"} · ${name} – Everflame`;
  }

  #showSplits() {
    if (!this.#isNew("splits", this.#state.by)) return;
    const options = SPLITS.includes(this.#state.by) ? SPLITS : [...SPLITS, this.#state.by];
    byId("by").replaceChildren(...options.map((value) => el("option", {value, text: value ? safeName(value.split(",").join(", ")) : "nothing", selected: value === this.#state.by})));
  }

  #showMatchers() {
    controls.showChips(byId("matchers"), this.#matchers.map((each) => ({
      text: safeName(`${each.name} ${each.operator} ${each.value || "(none)"}`),
      label: `Remove ${safeName(selector.printMatcher(each))}`,
      class: "matcher",
      remove: () => this.#change({q: selector.print(selector.remove(this.#matchers, each))}),
    })));
  }

  #showModifiers() {
    const {callers, focus, hide} = this.#state;
    const chip = (verb, name, remove) => ({text: `${verb} ${safeName(name)}`, label: `Remove: ${verb} ${safeName(name)}`, class: "modifier", remove});
    controls.showChips(byId("modifiers"), [
      ...(callers ? [chip("callers of", callers, () => this.#change({callers: ""}))] : []),
      ...focus.map((name) => chip("only with", name, () => this.#change({focus: focus.filter((each) => each !== name)}))),
      ...hide.map((name) => chip("without", name, () => this.#change({hide: hide.filter((each) => each !== name)}))),
    ]);
  }

  #showDownloads() {
    const {from, until} = this.#window;
    const state = this.#state;
    const isZoomed = Boolean(state.node) && state.node !== ROOT_ID;
    const isChanged = Boolean(state.callers || state.hide.length) || state.invert || state.group !== "function";
    const files = [
      ["speedscope.json", "speedscope", "for speedscope.app"],
      ["folded", "Folded stacks", "text, for flamegraph.pl and others"],
      ["pb.gz", "pprof", isChanged ? "for pprof: labels and names" : "everything: labels, build ids, accounting"],
      ["svg", "SVG", "a picture to send around"],
      ["json", "JSON", "the drawing as arrays"],
    ];
    controls.showDownloads(byId("downloads"), files.map(([ending, title, hint]) => {
      const name = `everflame-${fileTime(from)}-${fileTime(until)}.${ending}`;
      return {name, title, hint, href: address(`export/${name}`, this.#viewParams())};
    }), isZoomed || isChanged || state.focus.length ? "Files hold what the graph shows, not all of the range." : "");
  }

  #showLegend() {
    const legend = byId("legend");
    const {series} = this.#state;
    const {answer} = this.#shown.timeline;
    legend.hidden = series === "service" || answer.series.length === 0;
    if (legend.hidden) return;
    const total = answer.series.reduce((sum, each) => sum + sumOf(each.values), 0);
    legend.replaceChildren(...answer.series.map((each) => {
      const value = labelOf(each, series);
      const isChosen = selector.has(this.#matchers, {name: series, operator: "=", value});
      return el(
        "button",
        {type: "button", class: "chip service", disabled: each.rest, "aria-pressed": String(isChosen), on: {click: () => this.#toggleMatcher(series, value, isChosen)}},
        el("i", {class: `swatch ${colourClass(each.rest ? undefined : this.#colours.get(value))}`}),
        el("span", {class: "chip-text", text: safeName(seriesName(each, series))}),
        el("span", {class: "chip-share", text: share(sumOf(each.values), total)}),
      );
    }));
  }

  #showCrumbs() {
    const {path, nodes, frames} = this.#shown.flame.answer;
    if (!this.#state.node || this.#state.node === ROOT_ID || nodes.frame.length === 0) return controls.showCrumbs(byId("crumbs"), []);
    const steps = [{id: "", frame: ["all"]}, ...path];
    if (path.length === 0) steps.push({id: this.#state.node, frame: frames[nodes.frame[0]]});
    controls.showCrumbs(byId("crumbs"), steps.map(({id, frame}) => ({name: safeName(frame[0]), title: safeName(frame[0]), go: () => this.#change({node: id})})));
  }

  #showUnder() {
    const {rest, nodes, total, window} = this.#shown.flame.answer;
    const parts = [];
    if (rest.nodes > 0) parts.push(`${number(rest.nodes)} ${rest.nodes === 1 ? "box" : "boxes"} too narrow to draw: summed, hatched, ${share(rest.total, nodes.total[0] || total)}. Zoom in to see them.`);
    if (this.#state.over === "" && isRelative(this.#state.from, this.#state.until)) parts.push(`As of ${formatWindow(window.from_ms, window.until_ms, this.#state.tz)}.`);
    byId("under").textContent = nodes.frame.length ? parts.join(" ") : "";
  }

  #showFoot() {
    const {agent, host_seconds: hostSeconds} = this.#shown.flame.answer;
    const parts = [];
    if (agent && hostSeconds > 0) {
      parts.push(el("span", {title: "On average over the hosts of this selection"}, `The agent itself: ${share(agent.cpu_ns, hostSeconds * 1e9)} of one CPU, ${bytes(agent.rss_bytes)}`));
    }
    if (this.#status) {
      const {version, store, data, keep, hosts} = this.#status;
      if (data) parts.push(el("span", {text: `Data: ${formatWindow(data.from_ms, data.until_ms, this.#state.tz)}, ${counted(hosts.length, "host")}`}));
      if (keep) parts.push(el("span", {text: `kept for ${[keep.seconds ? span(keep.seconds * 1000) : "", keep.bytes ? `up to ${bytes(keep.bytes)}` : ""].filter(Boolean).join(", ")}`}));
      parts.push(el("span", {text: safeName(store)}), el("span", {text: `Everflame ${version}`}));
    }
    byId("foot").replaceChildren(...parts);
  }

  /** Say what the flame graph's question came to, and show or hide the panes with it. */
  #showState() {
    const {answer, error} = this.#shown.flame;
    const isBusy = this.#pending.size > 0;
    const place = byId("state");
    const notice = byId("notice");
    const empty = error || !answer ? null : this.#emptyState(answer);
    const isStale = error !== null && answer !== null && answer.nodes.frame.length > 0 && error.isAway;
    const box = error && !isStale ? this.#errorState(error) : empty;
    root.dataset.state = isBusy ? "loading" : error ? "error" : empty ? "empty" : answer ? "ready" : "error";
    notice.replaceChildren(...(isStale ? [this.#awayNotice(error)] : []));
    place.hidden = box === null;
    place.replaceChildren(...(box ?? []));
    byId("panes").hidden = box !== null;
    if (answer === null && box === null) byId("under").replaceChildren(isBusy ? "Asking the service…" : button({text: "Ask again", class: "small", click: () => this.#refresh()}));
    if (error && !isStale) controls.showCrumbs(byId("crumbs"), []);
  }

  #emptyState(answer) {
    const {empty, nodes} = answer;
    const {callers, focus, hide, node} = this.#state;
    if (empty?.reason === "no_data_ever") {
      return [
        el("h3", {text: "No data yet"}),
        el("p", {}, "This store", this.#status ? ` (${safeName(this.#status.store)})` : "", " has never held a profile. Start sampling on this host, with this page:"),
        el("pre", {text: "sudo everflame up"}),
        el("p", {text: "or only the agent, on every host that belongs here:"}),
        el("pre", {text: `sudo everflame agent${this.#status ? ` --store ${safeName(this.#status.store)}` : ""}`}),
        el("p", {class: "muted", text: "The first window arrives after a minute. everflame doctor says what a host is missing."}),
        el("p", {class: "row"}, button({text: "Look again", class: "primary", click: () => this.#refresh()})),
      ];
    }
    if (empty?.reason === "no_data_in_range") {
      const near = empty.nearest ?? [];
      return [
        el("h3", {text: "No data in this range"}),
        el("p", {text: `Nothing was profiled from ${formatWindow(this.#window.from, this.#window.until, this.#state.tz)}.`}),
        near.length ? el("p", {text: "The nearest data:"}) : null,
        el("p", {class: "row"}, near.map((each) => button({text: formatWindow(each.from_ms, each.until_ms, this.#state.tz), click: () => this.#change(around(each, this.#windowMs))})),
          button({text: "Last hour", click: () => this.#change({from: "now-1h", until: "now"})})),
      ].filter(Boolean);
    }
    if (empty?.reason === "nothing_matches" && this.#matchers.length) {
      const services = empty.services ?? [];
      return [
        el("h3", {text: "Nothing matches"}),
        el("p", {}, "There are profiles in this range, but none of ", el("code", {text: safeName(this.#state.q)}), "."),
        services.length ? el("p", {text: "Services that are there:"}) : null,
        el("p", {class: "chips"}, services.slice(0, 40).map((value) => el("button", {type: "button", class: "chip service", on: {click: () => this.#change({q: selector.print([{name: "service", operator: "=", value}])})}}, el("span", {class: "chip-text", text: safeName(value)})))),
        el("p", {class: "row"}, button({text: "Clear the selector", class: "primary", click: () => this.#change({q: ""})})),
      ].filter(Boolean);
    }
    if (empty || nodes.frame.length === 0 || !(nodes.total[0] > 0)) {
      const isChanged = callers || focus.length || hide.length;
      return [
        el("h3", {text: isChanged ? "No stack is left" : "No samples"}),
        el("p", {text: isChanged ? "No stack of this range has what the changes above ask for." : "The CPUs were idle in this range: every tick was counted, none was busy."}),
        isChanged || node ? el("p", {class: "row"}, button({text: "Show all stacks", class: "primary", click: () => this.#change({callers: "", focus: [], hide: [], node: ""})})) : null,
      ].filter(Boolean);
    }
    return null;
  }

  #errorState(error) {
    if (error.status === 404 && error.node) {
      return [
        el("h3", {text: "This box is not in this range"}),
        el("p", {text: "What was zoomed to did not run in the chosen time and selection."}),
        el("p", {class: "row"}, button({text: "Zoom out", class: "primary", click: () => this.#change({node: ""})}), button({text: "Back", click: () => history.back()})),
      ];
    }
    const actions = [button({text: "Retry", class: "primary", click: () => this.#refresh()})];
    if (error.parameter === "query") actions.push(button({text: "Clear the selector", click: () => this.#change({q: ""})}));
    else if (error.status >= 400 && error.status < 500) actions.push(button({text: "Start over", click: () => this.#change(parseState(""))}));
    const title = error.parameter === "query" ? "The selector cannot be read" : error.status === 400 ? "The address asks for what there is not" : error.title;
    return [el("h3", {class: "bad", text: title}), el("p", {class: "detail", text: safeName(error.message)}), el("p", {class: "row"}, actions)];
  }

  #awayNotice(error) {
    return el("div", {class: "notice bad"},
      el("p", {}, el("b", {text: `${error.title}:`}), ` ${safeName(error.message.replace(/\.$/, ""))}. The last answer stays below.`),
      button({text: "Retry", class: "small", click: () => this.#refresh()}));
  }

  // Selection: a box of the graph, or a row of the table

  #showPanel() {
    const {select, row, callers} = this.#state;
    const {answer} = this.#shown.flame;
    const windowMs = this.#windowMs;
    const box = select && answer ? findBox(answer, select) : null;
    const picked = row ? this.#shown.top.answer?.functions.find((each) => rowKey(each) === row) : null;
    const files = answer?.modules ?? [];
    if (box) this.panel.showBox(box, {windowMs, files, labelName: this.#labelOf(box), isZoomed: box.id === this.#state.node, isCallers: callers === box.frame.function});
    else if (picked) this.panel.showFunction(picked, {windowMs, files, total: this.#shown.top.answer.total, isCallers: callers === picked.function});
    else this.panel.hide();
    this.#markRow();
  }

  #markRow() {
    this.table.mark(this.#marked);
  }

  /** The function that the table marks: that of the selected box, or of the selected row. */
  get #marked() {
    const {select, row} = this.#state;
    const {answer} = this.#shown.flame;
    const box = select && answer ? findBox(answer, select) : null;
    if (box && box.frame.kind !== "label") return box.frame;
    return row ? rowOf(row) : null;
  }

  /** What the graph lights up while nothing is pointed at. */
  get #highlighted() {
    return this.#state.search || rowOf(this.#state.row).function;
  }

  /** Give the label whose value a box is; null where the levels do not say it. */
  #labelOf({frame, path}) {
    if (frame.kind !== "label" || path.length === 0) return null;
    const names = this.#state.by.split(",").filter(Boolean);
    const {answer} = this.#shown.flame;
    const graph = graphOf(answer);
    let levels = 0;
    for (let node = graph.top; node < graph.size; node += 1) if (graph.frameOf(node).kind === "label") levels = Math.max(levels, graph.rowOf(node));
    const position = path.filter(([, , kind]) => kind === "label").length - 1;
    return levels === names.length ? names[position] ?? null : null;
  }

  #highlight(text) {
    const place = this.graph.highlight(text);
    const {answer} = this.#shown.flame;
    const search = answer?.search && answer.search.text === this.#state.search ? answer.search : null;
    if (this.#state.search) this.search.say(place, search, answer?.nodes.total[0] ?? 0);
  }

  #step(direction) {
    const place = this.graph.step(direction);
    this.search.say(place, this.#shown.flame.answer?.search, this.#shown.flame.answer?.nodes.total[0] ?? 0);
  }

  // Making views, and what they call

  #makeViews() {
    this.selector = new controls.SelectorInput(byId("selector"), {
      suggest: (expects, name) => this.#suggest(expects, name),
      onCommit: (q) => this.#change({q}),
    });
    this.range = new controls.RangePicker(byId("range-menu"), {
      onRange: (from, until) => {
        const isAgain = from === this.#state.from && until === this.#state.until;
        this.#change({from, until, over: ""});
        if (isAgain || isRelative(from, until)) this.#refresh();
      },
      onZone: (tz) => this.#change({tz}),
    });
    this.services = new controls.ServiceChips(byId("services"), {onToggle: (value, isChosen) => this.#toggleMatcher("service", value, isChosen)});
    this.timeline = new TimelineView(byId("timeline"), {onApply: (window) => this.#change(narrowTo(this.#state, window))});
    this.coverage = new controls.CoverageStrip(byId("coverage"));
    this.search = new controls.SearchBox(byId("finder"), {
      onSearch: (search) => {
        this.#highlight(search.trim());
        this.#change({search: search.trim()});
      },
      onStep: (direction) => this.#step(direction),
    });
    this.graph = new FlameGraphView(byId("graph"), {
      onZoom: (id) => {
        this.zoomed = true;
        this.#change({node: id ?? "", select: id ?? ""});
      },
      onSelect: (box) => {
        // A click selects and then zooms: that is one step, and Back goes to where nothing was selected.
        this.zoomed = false;
        queueMicrotask(() => this.zoomed || this.#change({select: box && !box.isRest ? box.id : "", row: ""}));
      },
      onHover: (box) => this.table.mark(box && !box.isRest && box.frame.kind !== "label" ? box.frame : this.#marked),
    });
    this.table = new FunctionTable(byId("pane-table"), {
      onSort: (sort) => this.#change({sort}),
      onFilter: (filter) => this.#change({filter}),
      onRows: (rows) => this.#change({rows}),
      onHover: (row) => this.graph.highlight(row ? row.function : this.#highlighted),
      onSelect: (row) => this.#change({row: rowKey(row) === this.#state.row ? "" : rowKey(row), select: ""}),
    });
    this.panel = new DetailPanel(byId("panel"), {
      onZoom: (id) => this.#change({node: id, select: id}),
      onCallers: (callers) => this.#change({callers, node: "", select: "", row: ""}),
      onFocus: (name) => this.#change({focus: [...new Set([...this.#state.focus, name])]}),
      onHide: (name) => this.#change({hide: [...new Set([...this.#state.hide, name])], row: ""}),
      onSearch: (search) => this.#change({search, tab: this.#tab === "table" ? "graph" : this.#state.tab}),
      onFilter: (name, value, isExcluding) => this.#filter(name, value, isExcluding),
      onCopy: (text) => this.#copy(text, "Copied the name"),
      onClose: () => this.#change({select: "", row: ""}),
    });
  }

  #bindControls() {
    controls.bindChoice(byId("series"), (series) => this.#change({series}));
    controls.bindChoice(byId("view"), (view) => this.#change({view}));
    controls.bindChoice(byId("tab"), (tab) => this.#change({tab}));
    for (const id of ["invert", "by", "group", "color"]) controls.bindChoice(byId(id), (value) => this.#change({[id]: value}));
    new controls.Menu(byId("download-menu"));
    byId("refresh").addEventListener("click", () => this.#refresh());
    byId("copy-link").addEventListener("click", () => this.#copyLink());
    byId("timeline-whole").addEventListener("click", () => this.#change(widen(this.#state)));
    byId("timeline-zoom").addEventListener("click", () => this.#change({over: ""}));
    byId("theme").addEventListener("click", () => this.#showTheme(THEMES[(THEMES.indexOf(readTheme()) + 1) % THEMES.length]));
    byId("help-button").addEventListener("click", () => controls.showHelp(byId("help")));
    byId("help").addEventListener("click", (event) => event.target === byId("help") && byId("help").close());
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
      1: () => this.#change({tab: "graph"}),
      2: () => this.#change({tab: "table"}),
      3: () => this.#change({tab: "both"}),
      i: () => this.#change({invert: !this.#state.invert}),
      v: () => this.#change({view: this.#state.view === "icicle" ? "flame" : "icicle"}),
      0: () => this.#change({node: ""}),
      r: () => this.#refresh(),
      c: () => this.#copyLink(),
      Escape: () => this.#change({select: "", row: ""}),
    };
    document.addEventListener("keydown", (event) => {
      const isOurs = !event.defaultPrevented && !event.ctrlKey && !event.metaKey && !event.altKey;
      if (!isOurs || isTyping(event) || byId("help").open || !Object.hasOwn(keys, event.key)) return;
      event.preventDefault();
      keys[event.key]();
    });
  }

  #focusSearch() {
    if (this.#tab === "table") this.table.filter.focus();
    else this.search.input.focus();
  }

  #onResize() {
    clearTimeout(this.resizeTimer);
    this.resizeTimer = setTimeout(() => this.#go(this.#state), 200);
  }

  #toggleMatcher(name, value, isChosen) {
    const matcher = {name, operator: "=", value};
    const others = this.#matchers;
    this.#change({q: selector.print(isChosen ? selector.remove(others, matcher) : selector.add(others, matcher))});
  }

  #filter(name, value, isExcluding) {
    const matcher = {name, operator: isExcluding ? "!=" : "=", value: value === `[no ${name}]` ? "" : value};
    this.#change({q: selector.print(selector.add(this.#matchers, matcher)), node: "", select: ""});
  }

  async #suggest(expects, name) {
    if (expects === "name") {
      const answer = await this.#known("labels");
      return answer.labels.map((each) => ({value: each.name, hint: counted(each.values, "value")}));
    }
    if (expects === "value") {
      const answer = await this.#known(`labels/${encodeURIComponent(name)}/values`);
      const total = sumOf(answer.values.map((each) => each.samples));
      return answer.values.map((each) => ({value: each.value, hint: share(each.samples, total)}));
    }
    return controls.fixedSuggestions(expects);
  }

  /** Labels for suggestions: asked once per window. Without them typing goes on as before. */
  async #known(path) {
    const key = `${path} ${this.#window.from} ${this.#window.until}`;
    if (!this.#labels.has(key)) {
      try {
        const {answer} = await this.#api.ask("labels", path, [["from", String(this.#window.from)], ["until", String(this.#window.until)]]);
        this.#labels.set(key, answer);
      } catch {
        return {labels: [], values: []};
      }
    }
    return this.#labels.get(key);
  }

  #copyLink() {
    const frozen = freezeState(this.#state, this.#window, this.#outer);
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
    const field = copyable ? el("input", {readonly: true, value: copyable, "aria-label": "To copy"}) : null;
    toast.replaceChildren(...[el("span", {text}), field, copyable ? button({icon: "close", label: "Close", class: "quiet", click: () => toast.replaceChildren()}) : null].filter(Boolean));
    field?.select();
    clearTimeout(this.toastTimer);
    if (!copyable) this.toastTimer = setTimeout(() => toast.replaceChildren(), TOAST_MS);
  }

  #showTheme(theme) {
    writeTheme(theme);
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
    const label = {auto: "Colours: as the system", light: "Colours: light", dark: "Colours: dark"}[theme];
    byId("theme").setAttribute("aria-label", label);
    byId("theme").title = label;
    this.graph.recolour();
  }
}

/** A row of the table as the state names it: names hold no newline. */
function rowKey({function: name, module}) {
  return `${name}\n${module}`;
}

function rowOf(key) {
  const [name, module] = key.split("\n");
  return {function: name, module};
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
  };
}

/** Give the change that shows data nearby, in a window as long as the one before if it can be. */
function around({from_ms: from, until_ms: until}, lengthMs) {
  const more = Math.max(0, lengthMs - (until - from)) / 2;
  return {from: String(Math.floor(from - more)), until: String(Math.ceil(until + more)), over: ""};
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
