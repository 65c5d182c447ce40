// Overview: the services, the timeline with its legend, and the deployments.

import * as controls from "./controls.js";
import { DeploymentsMenu } from "./deployments.js";
import { changeTracker, el } from "./dom.js";
import { safeName, share } from "./format.js";
import { assignColours, colourClass, labelOf, seriesName } from "./scale.js";
import * as selector from "./selector.js";
import { widen } from "./state.js";
import { TimelineView } from "./timeline.js";
import { formatWindow } from "./times.js";

const COLOURS = 10;
/** Between requests for verdicts that are being computed: twice as long each time. */
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 15_000;

const byId = (id) => document.getElementById(id);

export class Overview {
  #page;
  #colours = new Map();
  #isNew = changeTracker();
  #timer = 0;
  #pauseMs = FIRST_PAUSE_MS;

  /** `page` has state, selection and loader, and applies changes (page.js). */
  constructor(page) {
    this.#page = page;
    this.services = new controls.ServiceChips(byId("services"), {
      onToggle: (value, isChosen) => this.#toggle("service", value, isChosen),
    });
    this.timeline = new TimelineView(byId("timeline"), {
      onApply: (window) => page.change(page.selection.narrowedTo(window, this.#draggedSide)),
      onMark: (deployments) =>
        deployments.length > 1 ? this.deployments.open() : page.compareDeployment(deployments[0]),
    });
    this.deployments = new DeploymentsMenu(byId("deployments-menu"), {
      onCompare: (deployment) => page.compareDeployment(deployment),
    });
    controls.bindChoice(byId("series"), (series) => page.change({ series }));
    byId("timeline-whole").addEventListener("click", () => page.change(widen(page.state)));
    byId("timeline-zoom").addEventListener("click", () => page.change({ over: "" }));
  }

  /** Show what depends only on the state. */
  render() {
    const { state, selection } = this.#page;
    const { isComparison, window, outer } = selection;
    const shown = state.over && !isComparison ? window : outer;
    controls.checkRadio(byId("series"), state.series);
    byId("target").hidden = !isComparison;
    byId("timeline-whole").hidden = state.over === "" || isComparison;
    byId("timeline-zoom").hidden = state.over === "";
    byId("services").hidden = selection.isFleet;
    byId("timeline-range").textContent = formatWindow(shown.from, shown.until, state.tz);
  }

  drawTimeline() {
    const { state, selection, loader } = this.#page;
    const { response } = loader.of("timeline");
    const { series, over, q, tz } = state;
    const { from, until } = selection.window;
    const deployments = loader.of("deployments").response?.deployments ?? [];
    const services = loader.of("services").response;
    const chosen = this.#chosenParts;
    const parts = JSON.stringify(chosen);
    const values = [response, services, series, over, from, until, q, tz, deployments, parts];
    // A zoom must not wait for an unchanged timeline.
    if (!this.#isNew("timeline", ...values)) return;
    if (series === "service") this.#colours = this.#serviceColours();
    else {
      const layers = response.series.filter((each) => !each.rest);
      this.#colours = assignColours(
        layers.map((each) => labelOf(each, series)),
        COLOURS,
      );
    }
    const options = { chosen, label: series, zone: tz, colours: this.#colours, deployments };
    this.timeline.show(response, options);
    this.#showLegend();
  }

  drawDeployments() {
    const { state, loader } = this.#page;
    const { response, error } = loader.of("deployments");
    this.deployments.show(response, {
      tz: state.tz,
      problem: error?.message,
      isChosen: (each) => this.#isCompared(each),
    });
    this.#redrawTimeline();
    this.#awaitVerdicts(response);
  }

  /** Request the deployments again as long as one of their verdicts is being computed. */
  #awaitVerdicts(response) {
    clearTimeout(this.#timer);
    const isPending = response?.deployments.some((each) => each.pending) ?? false;
    document.documentElement.dataset.verdicts = isPending ? "pending" : "ready";
    if (!isPending) {
      this.#pauseMs = FIRST_PAUSE_MS;
      return;
    }
    this.#timer = setTimeout(async () => {
      this.#pauseMs = Math.min(2 * this.#pauseMs, LONGEST_PAUSE_MS);
      const { loader } = this.#page;
      if (!(await loader.renew("deployments"))) {
        this.#awaitVerdicts(loader.of("deployments").response);
      }
    }, this.#pauseMs);
  }

  drawServices() {
    const { state, selection, loader } = this.#page;
    const { response } = loader.of("services");
    const timeline = loader.of("timeline").response;
    if (!this.#isNew("services", response, timeline, state.q, state.series, innerWidth)) return;
    const matchers = selection.matchers.filter(
      (each) => each.name === "service" && each.operator === "=",
    );
    const chosen = new Set(matchers.map((each) => each.value));
    const isLayered = state.series === "service";
    this.services.show(response.values, chosen, isLayered ? this.#serviceColours() : null);
    if (isLayered) this.#redrawTimeline();
  }

  /** Show that a panel's request failed. */
  fail(panel) {
    this.#isNew.forget(panel);
    if (panel === "timeline") {
      this.timeline.fail(`No timeline: ${this.#page.loader.of(panel).error.message}`);
    }
    if (panel === "deployments") this.drawDeployments();
  }

  #redrawTimeline() {
    const { loader } = this.#page;
    if (loader.of("timeline").response && !loader.isPending("timeline")) this.drawTimeline();
  }

  get #draggedSide() {
    return byId("target").querySelector(":checked").value;
  }

  get #chosenParts() {
    const { state, selection } = this.#page;
    if (!selection.isComparison) return state.over ? [selection.window] : [];
    return [
      { ...selection.before, name: "before" },
      { ...selection.window, name: "after" },
    ];
  }

  #isCompared({ compare: windows }) {
    const { isComparison, window: after, before } = this.#page.selection;
    if (!windows || !isComparison) return false;
    const isOf = (side, window) => side.from_ms === window.from && side.until_ms === window.until;
    return isOf(windows.after, after) && isOf(windows.before, before);
  }

  /** Services keep their colours whatever is selected: colours go to all services, largest first. */
  #serviceColours() {
    const { loader } = this.#page;
    const values = loader.of("services").response?.values ?? [];
    const drawn = loader.of("timeline").response?.series ?? [];
    const names = values.slice(0, COLOURS).map((each) => each.value);
    for (const each of drawn) {
      if (!each.rest && names.length < COLOURS) names.push(labelOf(each, "service"));
    }
    return assignColours(new Set(names), COLOURS);
  }

  #showLegend() {
    const legend = byId("legend");
    const { state, selection, loader } = this.#page;
    const { series } = state;
    const { response } = loader.of("timeline");
    legend.hidden = series === "service" || response.series.length === 0;
    if (legend.hidden) return;
    const { matchers } = selection;
    const total = response.series.reduce((sum, each) => sum + sumOf(each.values), 0);
    const chips = response.series.map((each) => {
      const value = labelOf(each, series);
      const isChosen = selector.has(matchers, { name: series, operator: "=", value });
      const colour = each.rest ? undefined : this.#colours.get(value);
      return el(
        "button",
        {
          type: "button",
          class: "chip service",
          disabled: each.rest,
          "aria-pressed": String(isChosen),
          on: { click: () => this.#toggle(series, value, isChosen) },
        },
        el("i", { class: `swatch ${colourClass(colour)}` }),
        el("span", { class: "chip-text", text: safeName(seriesName(each, series)) }),
        el("span", { class: "chip-share", text: share(sumOf(each.values), total) }),
      );
    });
    legend.replaceChildren(...chips);
  }

  /** Numbers of colours by service. */
  get colours() {
    return this.#colours;
  }

  #toggle(name, value, isChosen) {
    const matcher = { name, operator: "=", value };
    this.#page.change(this.#page.selection.toggled(matcher, isChosen));
  }
}

function sumOf(values) {
  return values.reduce((sum, each) => sum + each, 0);
}
