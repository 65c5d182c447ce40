// What a state selects, and the requests for it.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Selection } from "../../profiler/web/selection.js";
import { changeState, DEFAULTS } from "../../profiler/web/state.js";

const NOW_MS = 1_800_000_000_000;
const MINUTE_MS = 60_000;
const SIZES = { graphPx: 800, pagePx: 1280 };

function select(change = {}) {
  return new Selection({ ...DEFAULTS, ...change }, NOW_MS);
}

function parametersOf([, params], name) {
  return params.filter(([each]) => each === name).map(([, value]) => value);
}

test("relative times count from the last refresh, for all panels alike", () => {
  const requests = select({ from: "now-10m" }).requests(SIZES);

  const froms = Object.values(requests).map((request) => parametersOf(request, "from"));
  assert.deepEqual(new Set(froms.flat()), new Set([String(NOW_MS - 10 * MINUTE_MS)]));
});

test("only panels that are shown have a request", () => {
  assert.deepEqual(Object.keys(select().requests(SIZES)).sort(), [
    "deployments",
    "flame",
    "services",
    "timeline",
    "top",
  ]);
  assert.equal(select({ tab: "graph" }).requests(SIZES).top, null);
  assert.notEqual(select({ tab: "graph", row: "f\nm" }).requests(SIZES).top, null);
  const compared = select({ mode: "compare" }).requests(SIZES);
  assert.deepEqual(Object.keys(compared).sort(), [
    "changes",
    "deployments",
    "diff",
    "services",
    "timeline",
  ]);
});

test("a list of the fleet does not wait for its trend, unless it is sorted by it", () => {
  const { fleet, trend, ...others } = select({ mode: "services" }).requests(SIZES);
  const grown = select({ mode: "versions", order: "growth" }).requests(SIZES);

  assert.deepEqual(Object.keys(others).sort(), ["deployments", "timeline"]);
  assert.equal(fleet[0], "fleet/services");
  assert.deepEqual(parametersOf(fleet, "trend"), ["0"]);
  assert.deepEqual(fleet[1].slice(0, -1), trend[1]);
  assert.equal(grown.trend, null);
  assert.deepEqual(parametersOf(grown.fleet, "sort"), ["growth"]);
  assert.deepEqual(parametersOf(grown.fleet, "by"), ["version"]);
});

test("a list of the fleet is sorted only by what it has", () => {
  const sorts = (mode) =>
    ["", "total", "growth", "hosts", "name"].map((order) => select({ mode, order }).fleetSort);

  assert.deepEqual(sorts("services"), ["cores", "cores", "growth", "hosts", "name"]);
  assert.deepEqual(sorts("functions"), ["self", "total", "growth", "self", "name"]);
  assert.deepEqual(sorts("modules"), ["self", "self", "growth", "self", "name"]);
  const { fleet } = select({ mode: "modules", split: "service", filter: "x" }).requests(SIZES);
  assert.equal(fleet[0], "fleet/top");
  assert.deepEqual(parametersOf(fleet, "group"), ["module"]);
  assert.deepEqual(parametersOf(fleet, "by"), ["service"]);
  assert.deepEqual(parametersOf(fleet, "search"), ["x"]);
});

test("a row of the fleet leads to its graph and to the week before", () => {
  const typed = { q: '{host="a",service="db"}', hide: ["f"], node: "0123456789abcdef" };
  const apply = (state, change) => changeState({ ...DEFAULTS, ...state }, change);
  const services = { mode: "services", ...typed };
  const functions = { mode: "functions", split: "service", ...typed };
  const row = { labels: { service: "api" }, function: "f", module: "m" };

  const graph = apply(services, select(services).graphOf({ labels: {} }));
  const trend = apply(functions, select(functions).trendOf(row));
  const modules = select({ mode: "modules" }).graphOf({ labels: {}, function: "", module: "m" });

  assert.deepEqual([graph.mode, graph.q, graph.hide], ["", '{host="a",service=""}', []]);
  assert.equal(graph.node, "");
  assert.deepEqual(
    [trend.mode, trend.q, trend.row],
    ["compare", '{host="a",service="api"}', "f\nm"],
  );
  assert.equal(new Selection(trend, NOW_MS).before.until, NOW_MS - 7 * 24 * 60 * MINUTE_MS);
  assert.deepEqual([modules.mode, modules.filter], ["functions", "m"]);
  assert.equal(select(typed).ofFleet("services").q, '{host="a"}');
});

test("panes depend on the width of the page", () => {
  assert.equal(select().tabAt(1280), "both");
  assert.equal(select().tabAt(1000), "graph");
  assert.equal(select({ tab: "both" }).tabAt(1000), "both");
  assert.equal(select({ tab: "both" }).tabAt(400), "graph");
  assert.equal(select({ tab: "table" }).tabAt(400), "table");
  assert.equal(select({ mode: "compare" }).tabAt(400), "both");
});

test("services are suggested whatever service is selected", () => {
  const { services } = select({ q: '{service="api",host="a"}' }).requests(SIZES);

  assert.deepEqual(parametersOf(services, "query"), ['{host="a"}']);
});

test("a selector that cannot be parsed is left to the service", () => {
  const selection = select({ q: "{service=" });

  assert.deepEqual(selection.matchers, []);
  assert.deepEqual(parametersOf(selection.requests(SIZES).flame, "query"), ["{service="]);
});

test("the timeline of a comparison shows both sides and what they have in common", () => {
  const selection = select({
    mode: "compare",
    q: '{service="api",version="2"}',
    before_query: '{service="api",version="1"}',
    from: String(NOW_MS - 10 * MINUTE_MS),
    until: String(NOW_MS),
    before_from: String(NOW_MS - 40 * MINUTE_MS),
    before_until: String(NOW_MS - 30 * MINUTE_MS),
  });

  const { outer } = selection;
  assert.ok(outer.from < NOW_MS - 40 * MINUTE_MS);
  assert.equal(outer.until, NOW_MS);
  const { timeline } = selection.requests(SIZES);
  assert.deepEqual(parametersOf(timeline, "query"), ['{service="api"}']);
  assert.deepEqual(parametersOf(timeline, "from"), [String(outer.from)]);
});

test("swapping twice leads back, halving keeps what the windows touch", () => {
  const ago = (minutes) => String(NOW_MS - minutes * MINUTE_MS);
  const state = {
    ...DEFAULTS,
    mode: "compare",
    q: '{version="2"}',
    before_query: '{version="1"}',
    from: ago(10),
    until: ago(0),
    before_from: ago(40),
    before_until: ago(30),
  };
  const apply = (from, change) => changeState(from, change(new Selection(from, NOW_MS)));

  const swapped = apply(state, (selection) => selection.swapped());
  const back = apply(swapped, (selection) => selection.swapped());
  const halved = apply(state, (selection) => selection.halved());

  assert.deepEqual([swapped.q, swapped.before_query], [state.before_query, state.q]);
  assert.deepEqual([swapped.from, swapped.before_until], [ago(40), ago(0)]);
  assert.deepEqual(back, state);
  assert.deepEqual(
    [halved.before_from, halved.before_until, halved.from, halved.until],
    [ago(35), ago(30), ago(10), ago(5)],
  );
});

test("a part of the timeline is the window, or one side of a comparison", () => {
  const part = { from: 10, until: 20 };

  const alone = select({ from: "0", until: "100" }).narrowedTo(part, "after");
  const side = select({ mode: "compare" }).narrowedTo(part, "before");

  assert.deepEqual(alone, { from: "10", until: "20", over: "0..100" });
  assert.deepEqual([side.before_from, side.before_until], ["10", "20"]);
  assert.equal(side.from, undefined);
});

test("data nearby are shown in a window as long as the current one", () => {
  const moved = select({ from: "now-1h" }).movedTo({ from_ms: 5_000_000, until_ms: 5_060_000 });

  assert.equal(Number(moved.until) - Number(moved.from), 60 * MINUTE_MS);
  assert.ok(Number(moved.from) < 5_000_000 && Number(moved.until) > 5_060_000);
});

test("a link has fixed times on both sides", () => {
  const link = select({ mode: "compare", before_from: "-1d" }).frozen();

  for (const name of ["from", "until", "before_from", "before_until"]) {
    assert.match(link[name], /^\d+$/, name);
  }
});
