// Empty: what the page shows when there is no graph to draw, and how to go on from there.

import { button, el } from "./dom.js";
import { safeName } from "./format.js";
import * as selector from "./selector.js";
import { beforeQuery, endComparison, parseState } from "./state.js";
import { formatWindow } from "./times.js";

const SERVICES_SHOWN = 40;

/** Return the nodes to show instead of an empty flame graph or list; null if it is not empty. */
export function emptyState(response, page) {
  const { empty } = response;
  if (empty?.reason === "no_data_ever") return noDataEver(page);
  if (empty?.reason === "no_data_in_range") return noDataInRange(empty.nearest ?? [], page);
  if (empty?.reason === "nothing_matches" && page.selection.matchers.length) {
    return nothingMatches(empty.services ?? [], page);
  }
  return empty || isBlank(response) ? noStack(page) : null;
}

/** Return whether a response has no CPU time to show: that of a flame graph or of a fleet. */
export function isBlank({ nodes, cpu_ns: cpuNs }) {
  return nodes ? !(nodes.total[0] > 0) : !(cpuNs > 0);
}

function noDataEver({ loader, refresh }) {
  const store = loader.status ? safeName(loader.status.store) : "";
  return [
    el("h3", { text: "No data yet" }),
    el(
      "p",
      {},
      "This store",
      store ? ` (${store})` : "",
      " has no profiles yet. To sample this host and serve this page, run:",
    ),
    el("pre", { text: "sudo everflame up" }),
    el("p", { text: "To sample other hosts too, run the agent on each of them:" }),
    el("pre", { text: `sudo everflame agent${store ? ` --store ${store}` : ""}` }),
    el("p", {
      class: "muted",
      text: "The first window arrives after one minute. Run everflame doctor to check a host.",
    }),
    el(
      "p",
      { class: "row" },
      button({ text: "Check again", class: "primary", click: () => refresh() }),
    ),
  ];
}

function noDataInRange(nearest, { state, selection, change }) {
  const { from, until } = selection.window;
  return [
    el("h3", { text: "No data in this range" }),
    el("p", { text: `There are no profiles from ${formatWindow(from, until, state.tz)}.` }),
    ...(nearest.length ? [el("p", { text: "The nearest data:" })] : []),
    el(
      "p",
      { class: "row" },
      windowButtons(nearest, state.tz, (each) => change(selection.movedTo(each))),
      button({ text: "Last hour", click: () => change({ from: "now-1h", until: "now" }) }),
    ),
  ];
}

function nothingMatches(services, { state, change }) {
  const choose = (value) => {
    change({ q: selector.print([{ name: "service", operator: "=", value }]) });
  };
  return [
    el("h3", { text: "No match" }),
    el(
      "p",
      {},
      "There are profiles in this range, but none matches ",
      el("code", { text: safeName(state.q) }),
      ".",
    ),
    ...(services.length ? [el("p", { text: "Available services:" })] : []),
    el("p", { class: "chips" }, valueChips(services.slice(0, SERVICES_SHOWN), choose)),
    el(
      "p",
      { class: "row" },
      button({ text: "Clear the selector", class: "primary", click: () => change({ q: "" }) }),
    ),
  ];
}

function noStack({ state: { callers, focus, hide, node }, selection, change }) {
  const isChanged = !selection.isFleet && (callers || focus.length || hide.length);
  const showAll = () => change({ callers: "", focus: [], hide: [], node: "" });
  const text = isChanged
    ? "No stack in this range passes the stack filters above."
    : "The CPUs were idle in this range: all ticks were counted, and none was busy.";
  const all = button({ text: "Show all stacks", class: "primary", click: showAll });
  return [
    el("h3", { text: isChanged ? "No stacks left" : "No samples" }),
    el("p", { text }),
    ...(isChanged || (node && !selection.isFleet) ? [el("p", { class: "row" }, all)] : []),
  ];
}

/** Return the nodes to show for an error. */
export function errorState(error, page) {
  const { state, selection, change, refresh } = page;
  if (error.status === 404 && error.node) {
    return [
      el("h3", { text: "This box is not in this range" }),
      el("p", { text: "The zoomed function did not run in the selected range and services." }),
      el(
        "p",
        { class: "row" },
        button({ text: "Zoom out", class: "primary", click: () => change({ node: "" }) }),
        button({ text: "Back", click: () => history.back() }),
      ),
    ];
  }
  const { side } = error.problem;
  if (side) {
    return emptySide(error, {
      tz: state.tz,
      query: side === "before" ? beforeQuery(state) : state.q,
      onQuery: (query) => change(selection.sideChanged(side, { query })),
      onWindow: (nearest) => change(selection.sideChanged(side, selection.movedTo(nearest))),
      onEnd: () => change(endComparison()),
    });
  }
  const actions = [button({ text: "Retry", class: "primary", click: () => refresh() })];
  if (error.parameter === "query") {
    actions.push(button({ text: "Clear the selector", click: () => change({ q: "" }) }));
  } else if (error.status >= 400 && error.status < 500) {
    actions.push(button({ text: "Start over", click: () => change(parseState("")) }));
  }
  return [
    el("h3", { class: "bad", text: titleOf(error) }),
    el("p", { class: "detail", text: safeName(error.message) }),
    el("p", { class: "row" }, actions),
  ];
}

function titleOf({ parameter, status, title }) {
  if (parameter === "query") return "Invalid selector";
  return status === 400 ? "Invalid address" : title;
}

/** Return a notice that the service is unavailable while its last response is still shown. */
export function awayNotice(error, { refresh }) {
  const message = safeName(error.message.replace(/\.$/, ""));
  return el(
    "div",
    { class: "notice bad" },
    el(
      "p",
      {},
      el("b", { text: `${error.title}:` }),
      ` ${message}. The last response is still shown below.`,
    ),
    button({ text: "Retry", class: "small", click: () => refresh() }),
  );
}

function windowButtons(windows, tz, choose) {
  return windows.map((each) =>
    button({ text: formatWindow(each.from_ms, each.until_ms, tz), click: () => choose(each) }),
  );
}

function valueChips(values, choose) {
  return values.map((value) =>
    el(
      "button",
      { type: "button", class: "chip service", on: { click: () => choose(value) } },
      el("span", { class: "chip-text", text: safeName(value) }),
    ),
  );
}

/**
 * Return the nodes to show when one side of a comparison is empty, with available alternatives. `query`
 * is that side's selector. Callbacks: onQuery(text), onWindow(nearest), onEnd().
 */
function emptySide({ title, message, problem }, { tz, query, onQuery, onWindow, onEnd }) {
  const { side, reason, nearest = [], services = [], versions = [] } = problem;
  const titles = { before: "The before side is empty", after: "The after side is empty" };
  const choices = (text, values, name) => {
    if (reason !== "nothing_matches" || values.length === 0) return [];
    const choose = (value) => onQuery(withMatcher(query, name, value));
    const chips = valueChips(values, choose);
    return [el("p", { text }), el("p", { class: "chips" }, chips)];
  };
  return [
    el("h3", { text: titles[side] ?? title }),
    el("p", { class: "detail", text: safeName(message) }),
    ...choices("Available versions:", versions, "version"),
    ...choices("Available services:", services, "service"),
    ...(nearest.length ? [el("p", { text: "The nearest data:" })] : []),
    el(
      "p",
      { class: "row" },
      windowButtons(nearest, tz, onWindow),
      button({ text: "End the comparison", click: onEnd }),
    ),
  ];
}

/** Return a selector with a matcher for a label's value in place of others for that label. */
function withMatcher(query, name, value) {
  const others = selector.parse(query).filter((each) => each.name !== name);
  return selector.print([...others, { name, operator: "=", value }]);
}
