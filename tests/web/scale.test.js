// The timeline's arithmetic, and times as people and addresses write them.

import assert from "node:assert/strict";
import { test } from "node:test";

import * as scale from "../../profiler/web/scale.js";
import * as times from "../../profiler/web/times.js";

const NOON = Date.UTC(2026, 10, 21, 12);
const MIN = 60_000;

function timeline(values, covered) {
  return {
    window: { from_ms: 5_000, until_ms: 205_000 },
    start_ms: 0,
    step_ms: 60_000,
    series: values.map((each) => ({ values: each })),
    covered_ns: covered,
  };
}

test("a line goes there and back", () => {
  const x = scale.linear([10, 20], [0, 100]);

  assert.equal(x(15), 50);
  assert.equal(x.invert(50), 15);
  assert.equal(scale.linear([5, 5], [0, 100])(5), 0);
});

test("ticks of time are round, inside, and no more than asked for", () => {
  const ticks = scale.timeTicks(NOON - 47 * MIN, NOON + 13 * MIN, 6, "utc");

  assert.deepEqual(
    ticks.map((tick) => tick.label),
    ["11:20", "11:30", "11:40", "11:50", "12:00", "12:10"],
  );
  for (const length of [7, 60, 900, 3600, 86_400, 30 * 86_400]) {
    for (const count of [1, 3, 8, 20]) {
      const found = scale.timeTicks(NOON, NOON + length * 1000, count, "utc");
      assert.ok(found.length <= count + 1, `${length} s: ${found.length} of ${count}`);
      assert.ok(found.every((tick) => tick.ms >= NOON && tick.ms < NOON + length * 1000));
    }
  }
});

test("midnight is a date", () => {
  const ticks = scale.timeTicks(NOON, NOON + 24 * 60 * MIN, 4, "utc");

  assert.deepEqual(
    ticks.map((tick) => tick.label),
    ["12:00", "18:00", "11-22", "06:00"],
  );
});

test("ticks of values are round and reach the largest", () => {
  assert.deepEqual(scale.valueTicks(3.4, 4), [0, 1, 2, 3, 4]);
  assert.deepEqual(scale.valueTicks(0.3, 3), [0, 0.1, 0.2, 0.3]);
  assert.deepEqual(scale.valueTicks(0, 3), [0, 1]);
  assert.equal(scale.valueTicks(1234, 4).at(-1) >= 1234, true);
});

test("layers stand on each other in cores", () => {
  const { layers, max } = scale.stackSeries(
    timeline(
      [
        [60e9, 30e9],
        [30e9, 0],
      ],
      [60e9, 60e9],
    ),
  );

  assert.deepEqual(layers[0], { lower: [0, 0], upper: [1, 0.5] });
  assert.deepEqual(layers[1], { lower: [1, 0.5], upper: [1.5, 0.5] });
  assert.equal(max, 1.5);
});

test("a step that was profiled in part is as high as while it was profiled", () => {
  const { layers } = scale.stackSeries(timeline([[60e9, 10e9]], [60e9, 10e9]));

  assert.deepEqual(layers[0].upper, [1, 1]);
});

test("a step without any profile is a gap, never a zero", () => {
  const { layers, isGap } = scale.stackSeries(timeline([[60e9, 5, 60e9]], [60e9, 0, 60e9]));
  const path = scale.layerPath(
    layers[0],
    isGap,
    (i) => i * 10,
    (cores) => 100 - cores * 10,
  );

  assert.deepEqual(isGap, [false, true, false]);
  assert.equal(path, "M0 90L10 90L10 100L0 100ZM20 90L30 90L30 100L20 100Z");
});

test("runs are found", () => {
  assert.deepEqual(scale.runs([true, true, false, true]), [
    [0, 2],
    [3, 4],
  ]);
  assert.deepEqual(scale.runs([]), []);
});

test("keys move a selection, and with Shift extend it", () => {
  const move = (selection, key, isExtending) =>
    scale.moveSelection(selection, key, isExtending, 20);

  assert.deepEqual(move(null, "ArrowRight", false), { anchor: 0, head: 0 });
  assert.deepEqual(move(null, "ArrowLeft", false), { anchor: 19, head: 19 });
  assert.deepEqual(move(null, "Home", false), { anchor: 0, head: 0 });
  assert.deepEqual(move(null, "End", false), { anchor: 19, head: 19 });
  assert.deepEqual(move({ anchor: 3, head: 3 }, "ArrowRight", true), { anchor: 3, head: 4 });
  assert.deepEqual(move({ anchor: 3, head: 5 }, "ArrowLeft", false), { anchor: 4, head: 4 });
  assert.deepEqual(move({ anchor: 3, head: 5 }, "End", true), { anchor: 3, head: 19 });
  assert.equal(move({ anchor: 3, head: 5 }, "x", false), null);
});

test("a selection's window stays inside the timeline's", () => {
  const line = timeline([], []);

  assert.deepEqual(scale.selectionWindow({ anchor: 2, head: 1 }, line), {
    from: 60_000,
    until: 180_000,
  });
  assert.deepEqual(scale.selectionWindow({ anchor: 0, head: 3 }, line), {
    from: 5_000,
    until: 205_000,
  });
});

test("colours differ as long as there are enough, and stay with their names", () => {
  const names = ["api", "web", "db", "worker", "cron"];
  const colours = scale.assignColours(names, 8);

  assert.equal(new Set(colours.values()).size, 5);
  assert.deepEqual(scale.assignColours([...names].reverse(), 8), colours);
  assert.equal(scale.assignColours(["a", "b", "c"], 2).size, 3);
});

test("times are read as the service reads them", () => {
  assert.equal(times.parseTime("now", NOON), NOON);
  assert.equal(times.parseTime("now-1h30m", NOON), NOON - 90 * MIN);
  assert.equal(times.parseTime("1763720000", NOON), 1_763_720_000_000);
  assert.equal(times.parseTime("1763720000000", NOON), 1_763_720_000_000);
  assert.equal(times.parseTime("2026-11-21T12:00:00Z", 0), NOON);
  assert.equal(times.parseTime("2026-11-21T13:00:00+01:00", 0), NOON);
  for (const text of ["", "yesterday", "now-1y", "2026-11-21T12:00:00"]) {
    assert.equal(times.parseTime(text, NOON), null, text);
  }
});

test("a time that no date has is none, and its range is still written", () => {
  for (const text of ["now-999999999w", "now+999999999w", "9999999999999"]) {
    assert.equal(times.parseTime(text, NOON), null, text);
  }
  assert.equal(times.formatRange("now-999999999w", "now", NOON, "utc"), "now-999999999w – now");
});

test("a window must end after it starts", () => {
  assert.deepEqual(times.resolveWindow("now-1h", "now", NOON), {
    from: NOON - 60 * MIN,
    until: NOON,
  });
  assert.equal(times.resolveWindow("now", "now-1h", NOON), null);
  const later = NOON + 7 * 60_000 + 1;
  const day = 24 * 3_600_000;
  assert.deepEqual(times.resolveWindow("now-24h", "now", later), {
    from: NOON - day,
    until: later,
  });
  const fixed = String(later - day);
  assert.equal(times.resolveWindow(fixed, "now", later).from, later - day);
});

test("windows and ranges are written for people", () => {
  assert.equal(times.formatWindow(NOON, NOON + 90 * MIN, "utc"), "2026-11-21 12:00 – 13:30 UTC");
  assert.equal(
    times.formatWindow(NOON, NOON + 720 * MIN + 5000, "utc"),
    "2026-11-21 12:00:00 – 2026-11-22 00:00:05 UTC",
  );
  assert.equal(times.formatRange("now-6h", "now", NOON, "utc"), "Last 6 hours");
});

test("an input's time reads back in both zones", () => {
  for (const zone of ["utc", "local"]) {
    assert.equal(times.fromInput(times.toInput(NOON, zone), zone), NOON);
    assert.equal(times.fromInput(times.toInput(NOON + 1000, zone), zone), NOON + 1000);
  }
  assert.equal(times.fromInput("", "utc"), null);
});
