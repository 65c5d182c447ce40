// Page: the address in, requests and views out.
//
// An action of the user changes the state, and the state is written to the address. What the state
// needs and the page does not have yet is requested from the service. `<html data-state>` is loading,
// ready, empty or error.

import { publishColours } from "./compare.js";
import { Comparison } from "./comparison.js";
import { fillIcons, showCrumbs } from "./controls.js";
import { button, changeTracker, el, set } from "./dom.js";
import { awayNotice, emptyState, errorState, isBlank } from "./empty.js";
import { bytes, counted, safeName, share, span } from "./format.js";
import { bindKeys, showHelp } from "./keys.js";
import { Fleet } from "./fleet.js";
import { Loader } from "./loader.js";
import { Overview } from "./overview.js";
import { Profile } from "./profile.js";
import { Selection } from "./selection.js";
import { changeState, endComparison, isStep, LISTS, parseState, printState } from "./state.js";
import { bindTheme } from "./theme.js";
import { formatWindow } from "./times.js";
import { Toast } from "./toast.js";
import { Toolbar } from "./toolbar.js";

const RESIZE_MS = 200;
const TABS = ["graph", "table", "both", "both"];

const byId = (id) => document.getElementById(id);

class Page {
  state = parseState(location.search);
  toast = new Toast(byId("toast"));
  loader = new Loader({
    onResponse: (panel, arrivedAt) => this.#draw(panel, arrivedAt),
    onError: (panel) => this.#fail(panel),
    onProgress: () => this.#showState(),
    onSlow: (isSlow) => this.#showSlow(isSlow),
  });
  #isNew = changeTracker();

  start() {
    fillIcons(document);
    publishColours(document.documentElement);
    this.toolbar = new Toolbar(this);
    this.overview = new Overview(this);
    this.comparison = new Comparison(this);
    this.profile = new Profile(this);
    this.fleet = new Fleet(this);
    this.#bind();
    let timer = 0;
    addEventListener("popstate", () => this.#go(parseState(location.search)));
    addEventListener("resize", () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.#go(this.state), RESIZE_MS);
    });
    this.#render();
    this.refresh();
  }

  /** What the state selects; relative times count from the last refresh. */
  get selection() {
    return new Selection(this.state, this.loader.nowMs);
  }

  get tab() {
    return this.selection.tabAt(innerWidth);
  }

  // Called by the parts of the page

  /** Apply a change to the state, the address and the views. */
  change = (change) => {
    const next = changeState(this.state, change);
    if (printState(next) !== printState(this.state)) {
      const url = this.#addressOf(next);
      if (isStep(this.state, next)) history.pushState(null, "", url);
      else history.replaceState(null, "", url);
    }
    this.#go(next);
  };

  /** Fetch the clock and the status again, then everything else. */
  refresh = async () => {
    if (await this.loader.refresh()) this.#go(this.state);
  };

  /** Return a link to the page after a change; a plain click applies it without loading the page. */
  link = (change, properties) => {
    const onClick = (event) => {
      event.stopPropagation();
      if (event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
      event.preventDefault();
      this.change(change);
    };
    const href = this.#addressOf(changeState(this.state, change));
    return el("a", { ...properties, href, on: { click: onClick } });
  };

  #addressOf(state) {
    return `${location.pathname}${printState(state)}`;
  }

  toggleComparison = () => {
    this.change(this.selection.isComparison ? endComparison() : { mode: "compare" });
  };

  toggleFleet = () => {
    this.change(this.selection.isFleet ? { mode: "" } : this.selection.ofFleet("services"));
  };

  compareDeployment = ({ compare: windows, compare_reason: reason }) => {
    if (windows) this.change(this.selection.comparing(windows));
    else this.toast.show(reason ?? "This deployment cannot be compared.");
  };

  #go(next) {
    this.state = next;
    this.#render();
    const sizes = { graphPx: this.profile.requestedPx, pagePx: innerWidth };
    this.loader.load(this.selection.requests(sizes));
  }

  /** Show what depends only on the state. */
  #render() {
    this.toolbar.render();
    this.overview.render();
    this.comparison.render();
    this.profile.render();
    this.fleet.render();
    this.#showViews();
  }

  /** Show which view of the page this is, with links to the others. */
  #showViews() {
    const { selection, state } = this;
    const { isFleet } = selection;
    const views = [
      ["Flame graph", isFleet ? { mode: "" } : {}, !isFleet],
      ["Fleet", isFleet ? {} : selection.ofFleet("services"), isFleet],
    ];
    const links = views.map(([text, change, isCurrent]) => {
      const current = { "aria-current": isCurrent ? "page" : null };
      return this.link(change, { text, class: "view", ...current });
    });
    if (this.#isNew("views", printState(state))) {
      const place = [...byId("views").children].indexOf(document.activeElement);
      byId("views").replaceChildren(...links);
      links[place]?.focus();
    }
    const skip = isFleet ? ["#fleet", "Skip to the list"] : ["#graph", "Skip to the flame graph"];
    set(document.querySelector(".skip"), { href: skip[0], text: skip[1] });
  }

  // Responses

  #draw(panel, arrivedAt) {
    const { isFleet, mainPanel } = this.selection;
    if (panel === "fleet" || panel === "trend") {
      this.fleet.draw();
      if (panel === mainPanel) {
        this.profile.showCoverage(this.#main.response);
        this.#showFoot();
      }
    } else if (panel === "timeline") {
      this.overview.drawTimeline();
      this.fleet.draw(); // its colours are those of the layers
    } else if (isFleet && panel !== "deployments") return;
    else if (panel === mainPanel) {
      this.profile.drawGraph(arrivedAt);
      this.comparison.draw();
      this.#showFoot();
    } else if (panel === "services") this.overview.drawServices();
    else if (panel === "deployments") this.overview.drawDeployments();
    else if (panel === "top") this.profile.drawTop();
    else if (panel === "changes") {
      this.profile.drawChanges();
      this.comparison.draw();
    }
  }

  #fail(panel) {
    this.overview.fail(panel);
    this.profile.fail(panel);
    this.fleet.fail(panel);
  }

  /** {response, error} of the panel that is most of what the page shows. */
  get #main() {
    return this.loader.of(this.selection.mainPanel);
  }

  #showSlow(isSlow) {
    const progress = byId("progress");
    progress.hidden = !isSlow;
    for (const id of ["graph", "verdict", "fleet-table"])
      byId(id).classList.toggle("waiting", isSlow);
    const cancel = () => {
      this.loader.cancel();
      this.toast.show("Cancelled. The page may still show previous data.");
    };
    const parts = [
      el("span", { class: "hidden", role: "status", text: "Waiting for the service" }),
      el("i"),
      button({ text: "Cancel", class: "small cancel", click: cancel }),
    ];
    progress.replaceChildren(...(isSlow ? parts : []));
  }

  /** Show the outcome of the main request: the panes, or why there is nothing to show. */
  #showState() {
    const { isComparison, isFleet } = this.selection;
    const { response, error } = this.#main;
    const { isBusy, status } = this.loader;
    const place = byId("state");
    const empty = error || !response || isComparison ? null : emptyState(response, this);
    const isStale = error?.isAway && response && !isBlank(response);
    const box = error && !isStale ? errorState(error, this) : empty;
    document.documentElement.dataset.state = stateName({ isBusy, error, empty, response });
    byId("notice").replaceChildren(...(isStale ? [awayNotice(error, this)] : []));
    place.hidden = box === null;
    // A focused button in it keeps the focus while other responses arrive.
    const isNew = this.#isNew("state", box && printState(this.state), error, response, status);
    if (isNew) place.replaceChildren(...(box ?? []));
    byId("panes").hidden = box !== null || isFleet;
    byId("fleet").hidden = box !== null || !isFleet;
    this.fleet.wait();
    if (response === null && box === null) this.#showWaiting();
    if (error && !isStale) showCrumbs(byId("crumbs"), []);
    if (isComparison && !isStale && (error || !response)) {
      this.comparison.clear(error ? "No verdict" : "Comparing…");
    }
  }

  #showWaiting() {
    const again = () => this.refresh();
    const waiting = "Loading…";
    const { isBusy } = this.loader;
    byId("under").replaceChildren(
      isBusy ? waiting : button({ text: "Try again", class: "small", click: again }),
    );
  }

  #showFoot() {
    const { agent, host_seconds: hostSeconds } = this.#main.response;
    const parts = [];
    if (agent && hostSeconds > 0) {
      const part = share(agent.cpu_ns, hostSeconds * 1e9);
      const title = "Sampler, BPF program and uploader: CPU time averaged over the selected hosts";
      parts.push(el("span", { title }, `The agent: ${part} of one CPU, ${bytes(agent.rss_bytes)}`));
    }
    const { status } = this.loader;
    if (status) {
      const { version, store, data, keep, hosts } = status;
      const { tz } = this.state;
      const kept = keep ? keptText(keep) : "";
      const range = data ? formatWindow(data.from_ms, data.until_ms, tz) : "";
      if (data)
        parts.push(el("span", { text: `Data: ${range}, ${counted(hosts.length, "host")}` }));
      if (kept) parts.push(el("span", { text: `kept for ${kept}` }));
      parts.push(
        el("span", { text: safeName(store) }),
        el("span", { text: `Everflame ${version}` }),
      );
    }
    byId("foot").replaceChildren(...parts);
  }

  // Keys, help, theme

  #bind() {
    const help = byId("help");
    byId("help-button").addEventListener("click", () => showHelp(help));
    help.addEventListener("click", (event) => event.target === help && help.close());
    bindTheme(byId("theme"), () => this.profile.graph.recolour());
    const ofComparison = (side) => () => this.selection.isComparison && this.change({ side });
    const place = (number) => () => {
      const { isFleet } = this.selection;
      this.change(isFleet ? { mode: LISTS[number] } : { tab: TABS[number] });
    };
    const ofGraph = (act) => () => this.selection.isFleet || act();
    const actions = {
      "/": () => (this.selection.isFleet ? this.fleet : this.profile).focusSearch(),
      "?": () => showHelp(help),
      s: () => this.toolbar.selector.focus(),
      t: () => this.overview.timeline.focus(),
      f: () => this.toggleFleet(),
      g: () => (this.selection.isFleet ? this.fleet.table : this.profile.graph).focus(),
      n: ofGraph(() => this.profile.step(1)),
      N: ofGraph(() => this.profile.step(-1)),
      ...Object.fromEntries([1, 2, 3, 4].map((key) => [key, place(key - 1)])),
      i: ofGraph(() => this.change({ invert: !this.state.invert })),
      v: ofGraph(() => this.change({ view: this.state.view === "icicle" ? "flame" : "icicle" })),
      0: ofGraph(() => this.change({ node: "" })),
      d: ofGraph(() => this.toggleComparison()),
      b: ofComparison("before"),
      a: ofComparison("after"),
      u: ofComparison(""),
      r: () => this.refresh(),
      c: () => this.toolbar.copyLink(),
      Escape: () => this.change({ select: "", row: "" }),
    };
    bindKeys(actions, help);
  }
}

function stateName({ isBusy, error, empty, response }) {
  if (isBusy) return "loading";
  if (error || !response) return "error";
  return empty ? "empty" : "ready";
}

function keptText({ seconds, bytes: size }) {
  return [seconds ? span(seconds * 1000) : "", size ? `up to ${bytes(size)}` : ""]
    .filter(Boolean)
    .join(", ");
}

new Page().start();
