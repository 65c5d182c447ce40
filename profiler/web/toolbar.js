// Toolbar: the header with the selection, and the controls of the graph. What they show depends only
// on the state.

import { address } from "./api.js";
import { fixedSuggestions, SelectorInput } from "./combobox.js";
import * as controls from "./controls.js";
import { changeTracker, el } from "./dom.js";
import { counted, safeName, share } from "./format.js";
import { Menu, RangePicker } from "./menu.js";
import * as selector from "./selector.js";
import { printState } from "./state.js";
import { formatRange, isRelative, RANGES } from "./times.js";

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

const byId = (id) => document.getElementById(id);

export class Toolbar {
  #page;
  #isNew = changeTracker();

  /** `page` has state, selection and loader, and applies changes (page.js). */
  constructor(page) {
    this.#page = page;
    this.selector = new SelectorInput(byId("selector"), {
      suggest: (expects, name) => this.suggest(expects, name),
      onCommit: (q) => page.change({ q }),
    });
    this.range = new RangePicker(byId("range-menu"), {
      label: "Time range",
      presets: RANGES,
      onRange: (from, until) => {
        const isAgain = from === page.state.from && until === page.state.until;
        page.change({ from, until, over: "" });
        if (isAgain || isRelative(from, until)) page.refresh();
      },
      onZone: (tz) => page.change({ tz }),
    });
    new Menu(byId("download-menu"));
    for (const id of ["view", "side", "tab", "invert", "python_native", "by", "group", "color"]) {
      controls.bindChoice(byId(id), (value) => page.change({ [id]: value }));
    }
    byId("compare-button").addEventListener("click", () => page.toggleComparison());
    byId("refresh").addEventListener("click", () => page.refresh());
    byId("copy-link").addEventListener("click", () => this.copyLink());
  }

  render() {
    const { state, selection, loader, tab } = this.#page;
    const { window, isComparison, isFleet, matchers } = selection;
    const name = formatRange(state.from, state.until, loader.nowMs, state.tz);
    this.selector.show(state.q);
    this.range.show({ from: state.from, until: state.until, tz: state.tz, window, name });
    for (const id of ["view", "side"]) controls.checkRadio(byId(id), state[id]);
    controls.checkRadio(byId("tab"), tab);
    for (const id of ["invert", "python_native"]) byId(id).checked = state[id];
    byId("group").value = state.group;
    byId("color").value = state.color;
    byId("compare-button").setAttribute("aria-pressed", String(isComparison));
    for (const id of ["compare-button", "download-menu"]) byId(id).hidden = isFleet;
    byId("side").hidden = !isComparison;
    byId("color-pick").hidden = isComparison;
    byId("tools-graph").hidden = tab === "table";
    byId("finder").hidden = tab === "table";
    byId("refresh").disabled = false;
    this.#showSplits();
    this.#showMatchers();
    this.#showModifiers();
    if (!isFleet) this.#showDownloads();
    const values = matchers.filter((each) => each.operator === "=").map((each) => each.value);
    const what = values.map(safeName).join(", ");
    const whole = isFleet ? "" : what || "All services";
    const list = isFleet ? `Fleet ${state.mode}${what && ` of ${what}`}` : "";
    const shown = isComparison ? `Compare ${what || "all services"}` : whole || list;
    document.title = `${shown} · ${name} – Everflame`;
  }

  copyLink() {
    const text = printState(this.#page.selection.frozen());
    const link = `${location.origin}${location.pathname}${text}`;
    this.#page.toast.copy(link, "Copied a link with fixed times");
  }

  /** Return suggestions while a selector is typed: [{value, hint}]. */
  async suggest(expects, name) {
    const { loader, selection } = this.#page;
    if (expects === "name") {
      const known = await loader.labels("labels", selection.window);
      const labels = known?.labels ?? [];
      return labels.map((each) => ({ value: each.name, hint: counted(each.values, "value") }));
    }
    if (expects === "value") {
      const path = `labels/${encodeURIComponent(name)}/values`;
      const values = (await loader.labels(path, selection.window))?.values ?? [];
      const total = values.reduce((sum, each) => sum + each.samples, 0);
      return values.map((each) => ({ value: each.value, hint: share(each.samples, total) }));
    }
    return fixedSuggestions(expects);
  }

  #showSplits() {
    const { by } = this.#page.state;
    if (!this.#isNew("splits", by)) return;
    const splits = SPLITS.includes(by) ? SPLITS : [...SPLITS, by];
    const options = splits.map((value) => {
      const text = value ? safeName(value.split(",").join(", ")) : "none";
      return el("option", { value, text, selected: value === by });
    });
    byId("by").replaceChildren(...options);
  }

  #showMatchers() {
    const chips = this.#page.selection.matchers.map((each) => ({
      text: safeName(`${each.name} ${each.operator} ${each.value || "(none)"}`),
      label: `Remove ${safeName(selector.printMatcher(each))}`,
      class: "matcher",
      remove: () => this.#page.change(this.#page.selection.toggled(each, true)),
    }));
    controls.showChips(byId("matchers"), chips);
  }

  #showModifiers() {
    const { callers, focus, hide } = this.#page.state;
    const without = (names, name) => names.filter((each) => each !== name);
    const chip = (verb, name, change) => ({
      text: `${verb} ${safeName(name)}`,
      label: `Remove: ${verb} ${safeName(name)}`,
      class: "modifier",
      remove: () => this.#page.change(change),
    });
    if (this.#page.selection.isFleet) return controls.showChips(byId("modifiers"), []);
    controls.showChips(byId("modifiers"), [
      ...(callers ? [chip("callers of", callers, { callers: "" })] : []),
      ...focus.map((name) => chip("focus on", name, { focus: without(focus, name) })),
      ...hide.map((name) => chip("hide", name, { hide: without(hide, name) })),
    ]);
  }

  #showDownloads() {
    const { state, selection } = this.#page;
    const { window, isComparison, isZoomed } = selection;
    const { callers, hide, invert, group, focus } = state;
    const isChanged = Boolean(callers || hide.length) || invert || group !== "function";
    const files = isComparison ? pairFormats() : formats(isChanged);
    const prefix = isComparison ? "everflame-diff" : "everflame";
    const params = selection.viewParams();
    const links = files.map(([ending, title, hint]) => {
      const name = `${prefix}-${fileTime(window.from)}-${fileTime(window.until)}.${ending}`;
      return { name, title, hint, href: address(`export/${name}`, params) };
    });
    const isPart = isZoomed || isChanged || focus.length > 0;
    const note = isPart ? "The files contain what the graph shows, not the whole range." : "";
    controls.showDownloads(byId("downloads"), links, note);
  }
}

function formats(isChanged) {
  const pprof = isChanged
    ? "for pprof: labels and names"
    : "complete: labels, build ids, accounting";
  return [
    ["speedscope.json", "speedscope", "for speedscope.app"],
    ["folded", "Folded stacks", "text, for flamegraph.pl and similar tools"],
    ["pb.gz", "pprof", pprof],
    ["svg", "SVG", "an image"],
    ["json", "JSON", "the boxes as arrays"],
  ];
}

function pairFormats() {
  return [
    ["speedscope.json", "speedscope", "both profiles, for speedscope.app"],
    ["folded", "Folded stacks", "text with two counts, as difffolded.pl writes"],
    ["svg", "SVG", "an image with the same colours"],
    ["json", "JSON", "the boxes as arrays, with the verdict"],
  ];
}

function fileTime(ms) {
  return new Date(ms).toISOString().slice(0, 19).replace(/[-:]/g, "").concat("Z");
}
