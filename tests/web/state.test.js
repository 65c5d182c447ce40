// The address is the state: it reads back, leaves defaults out, and Back undoes steps.

import assert from "node:assert/strict";
import { test } from "node:test";

import * as state from "../../profiler/web/state.js";

const { DEFAULTS, changeState, isStep, parseState, printState } = state;

test("no parameters are the defaults, and the defaults are no parameters", () => {
  assert.deepEqual(parseState(""), { ...DEFAULTS });
  assert.equal(printState(DEFAULTS), "");
});

test("every state reads back from its address", () => {
  const full = {
    ...DEFAULTS,
    q: '{service="a b&c"}',
    from: "1763720000000",
    until: "1763723600000",
    over: "now-6h..now",
    mode: "compare",
    before_query: "",
    before_from: "1763716400000",
    before_until: "1763720000000",
    side: "before",
    changes: "all",
    series: "version",
    by: "",
    group: "line",
    invert: true,
    callers: "std::vector<int>::push_back(int const&)",
    focus: ["main", "a+b"],
    hide: ["%s"],
    python_native: true,
    node: "0123456789abcdef",
    select: "cbf29ce484222325",
    row: "memset",
    search: "memcpy",
    color: "self",
    view: "flame",
    tab: "both",
    sort: "name",
    order: "growth",
    split: "service,version",
    filter: "é",
    rows: 1000,
    tz: "local",
  };

  assert.deepEqual(parseState(printState(full)), full);
});

test("what means nothing is read as the default", () => {
  const read = parseState(
    "?mode=x&side=y&group=galaxy&node=xyz&view=&rows=7&invert=no&from=&series=%3D&unknown=1",
  );

  assert.deepEqual(read, { ...DEFAULTS });
});

test("a filter and more rows belong to one list of the fleet", () => {
  const typed = { ...DEFAULTS, mode: "services", filter: "api", rows: 1000, order: "growth" };

  const other = changeState(typed, { mode: "functions" });
  const graph = changeState(typed, { mode: "" });
  const chosen = changeState(typed, { mode: "functions", filter: "libc" });

  assert.deepEqual([other.filter, other.rows, other.order], ["", 200, "growth"]);
  assert.equal(graph.filter, "");
  assert.equal(chosen.filter, "libc");
  assert.equal(changeState(typed, { order: "name" }).filter, "api");
  const table = { ...DEFAULTS, filter: "f" };
  assert.equal(changeState(table, { mode: "compare" }).filter, "f");
});

test("an empty list of labels is kept apart from the default", () => {
  assert.equal(printState({ ...DEFAULTS, by: "" }), "?by=");
  assert.equal(parseState("?by=").by, "");
});

test("a change of the tree forgets the zoom, a change of the time keeps it", () => {
  const zoomed = { ...DEFAULTS, node: "0123456789abcdef", select: "0123456789abcdef" };

  assert.equal(changeState(zoomed, { invert: true }).node, "");
  assert.equal(changeState(zoomed, { python_native: true }).node, "");
  assert.equal(changeState(zoomed, { hide: ["f"] }).select, "");
  assert.equal(changeState(zoomed, { from: "now-3h" }).node, zoomed.node);
  assert.equal(changeState(zoomed, { q: '{service="api"}' }).node, zoomed.node);
  assert.equal(changeState(zoomed, { node: "" }).select, "");
});

test("a box or a row of the table is selected, not both", () => {
  const boxed = changeState(DEFAULTS, { select: "0123456789abcdef" });
  const rowed = changeState(boxed, { row: "memcpy" });

  assert.deepEqual([rowed.select, rowed.row], ["", "memcpy"]);
  assert.deepEqual([changeState(rowed, { select: "0123456789abcdef" }).row], [""]);
});

test("steps can be undone, refinements make no steps", () => {
  for (const change of [
    { q: "{}" },
    { from: "now-3h" },
    { node: "0123456789abcdef" },
    { focus: ["f"] },
    { tab: "table" },
  ]) {
    assert.equal(isStep(DEFAULTS, changeState(DEFAULTS, change)), true, JSON.stringify(change));
  }
  for (const change of [
    { search: "m" },
    { filter: "m" },
    { select: "0123456789abcdef" },
    { tz: "local" },
  ]) {
    assert.equal(isStep(DEFAULTS, changeState(DEFAULTS, change)), false, JSON.stringify(change));
  }
});

test("narrowing keeps the timeline's window, and the whole range is the way back", () => {
  const once = changeState(DEFAULTS, state.narrowTo(DEFAULTS, { from: 1000, until: 2000 }));
  const twice = changeState(once, state.narrowTo(once, { from: 1500, until: 1600 }));

  assert.deepEqual([once.from, once.until, once.over], ["1000", "2000", "now-1h..now"]);
  assert.deepEqual([twice.from, twice.until, twice.over], ["1500", "1600", "now-1h..now"]);
  assert.deepEqual(state.outerWindow(twice), ["now-1h", "now"]);
  assert.deepEqual(changeState(twice, state.widen(twice)), { ...DEFAULTS });
});

test("another range ends the narrowing", () => {
  const narrow = changeState(DEFAULTS, state.narrowTo(DEFAULTS, { from: 1000, until: 2000 }));

  assert.equal(changeState(narrow, { from: "now-3h", until: "now" }).over, "");
});

test("a link holds absolute times", () => {
  const narrow = changeState(DEFAULTS, state.narrowTo(DEFAULTS, { from: 1000, until: 2000 }));

  const frozen = state.freezeState(
    narrow,
    { from: 1000, until: 2000 },
    { from: 0, until: 3600000 },
  );

  assert.deepEqual([frozen.from, frozen.until, frozen.over], ["1000", "2000", "0..3600000"]);
});

test("requests carry absolute times and leave out what is not asked for", () => {
  const asked = { ...DEFAULTS, by: "", focus: ["a", "b"] };

  assert.deepEqual(state.queryParams(asked, { from: 1, until: 2 }), [
    ["from", "1"],
    ["until", "2"],
    ["by", ""],
    ["focus", "a"],
    ["focus", "b"],
  ]);
});

test("what stands before is the same selection, right before or a while earlier", () => {
  const window = { from: 7_200_000, until: 9_000_000 };
  const of = (change) => state.beforeWindow({ ...DEFAULTS, ...change }, window, 10_000_000);

  assert.deepEqual(of({}), { from: 5_400_000, until: 7_200_000 });
  assert.deepEqual(of({ before_from: "-1h" }), { from: 3_600_000, until: 5_400_000 });
  assert.deepEqual(of({ before_from: "1", before_until: "now" }), {
    from: 1000,
    until: 10_000_000,
  });
  assert.deepEqual(of({ before_from: "nonsense" }), of({}));
  assert.deepEqual(of({ before_from: "-999999999w" }), of({}));
  assert.equal(state.beforeQuery({ ...DEFAULTS, q: '{a="b"}' }), '{a="b"}');
  assert.equal(state.beforeQuery({ ...DEFAULTS, q: '{a="b"}', before_query: "" }), "");
});

test("two selections become a state, and what stood after stays when it ends", () => {
  const before = { query: '{host="a"}', from: 1, until: 2 };
  const after = { query: '{host="b"}', from: 3, until: 4 };
  const both = changeState(DEFAULTS, state.compare(before, after));

  assert.deepEqual(state.beforeWindow(both, after, 0), { from: 1000, until: 2000 });
  assert.equal(state.beforeQuery(both), before.query);
  assert.equal(both.q, after.query);
  assert.equal(state.compare(before, { ...before }).before_query, state.SAME);
  const alone = changeState(both, state.endComparison());
  assert.equal(printState(alone), "?q=%7Bhost%3D%22b%22%7D&from=3&until=4");
});

test("a link keeps the times of both sides", () => {
  const moving = { ...DEFAULTS, mode: "compare", before_from: "-1d" };
  const frozen = state.freezeState(moving, { from: 5, until: 6 }, null, { from: 3, until: 4 });

  assert.equal(printState(frozen), "?from=5&until=6&mode=compare&before_from=3&before_until=4");
});
