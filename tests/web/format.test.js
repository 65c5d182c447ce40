// Numbers with units, times with zones, names without surprises.

import assert from "node:assert/strict";
import { test } from "node:test";

import * as format from "../../profiler/web/format.js";

const MORNING = Date.UTC(2026, 4, 28, 8, 5, 9);

test("CPU time has three digits and the unit that suits its size", () => {
  const cases = [
    [0, "0 s"],
    [820, "820 ns"],
    [820_000, "820 µs"],
    [1_500_000, "1.50 ms"],
    [1_240_000_000, "1.24 s"],
    [93_100_000_000, "93.1 s"],
    [738e9, "12.3 min"],
    [3600e9 * 5, "5.00 h"],
    [86400e9 * 2.71, "2.71 d"],
    [86400e9 * 1234, "1,234 d"],
  ];

  for (const [ns, text] of cases) assert.equal(format.cpuTime(ns), text);
});

test("rounding never shows a thousand of the smaller unit", () => {
  assert.equal(format.cpuTime(999_499), "999 µs");
  assert.equal(format.cpuTime(999_600), "1.00 ms");
  assert.equal(format.cpuTime(999_900_000), "1.00 s");
  assert.equal(format.bytes(1024 * 1024 - 1), "1.00 MiB");
});

test("a share is never rounded to nothing or to everything", () => {
  assert.equal(format.share(342, 1000), "34.2 %");
  assert.equal(format.share(1, 1_000_000), "<0.1 %");
  assert.equal(format.share(999_999, 1_000_000), ">99.9 %");
  assert.equal(format.share(5, 5), "100 %");
  assert.equal(format.share(0, 5), "0 %");
  assert.equal(format.share(0, 0), "0 %");
});

test("cores are CPU time over the window's length", () => {
  assert.equal(format.cores(25.2e9, 60_000), "0.42 cores");
  assert.equal(format.cores(60e9, 60_000), "1.00 core");
  assert.equal(format.cores(2.4e9, 60_000), "0.040 cores");
  assert.equal(format.cores(60e9 * 1234, 60_000), "1,234 cores");
  assert.equal(format.cores(1, 60_000), "<0.001 cores");
  assert.equal(format.cores(0, 60_000), "0 cores");
});

test("a change of cores has a sign, and none if it would round to zero", () => {
  const cases = [
    [0.42, "+0.42"],
    [-13.06, "−13.1"],
    [0.0002, "±0"],
    [0, "±0"],
  ];

  for (const [by, text] of cases) assert.equal(format.coreChange(by), text);
});

test("cores over no time are not a number", () => {
  assert.equal(format.cores(60e9, 0), "– cores");
});

test("counts agree with their noun", () => {
  assert.equal(format.counted(1, "sample"), "1 sample");
  assert.equal(format.counted(1234, "sample"), "1,234 samples");
  assert.equal(format.counted(0, "sample"), "0 samples");
});

test("a quantity carries its profile's unit", () => {
  assert.equal(format.quantity(1.5e9, "nanoseconds"), "1.50 s");
  assert.equal(format.quantity(42_048_000, "bytes"), "40.1 MiB");
  assert.equal(format.quantity(1234, "count"), "1,234");
  assert.equal(format.quantity(1234, "faults"), "1,234 faults");
});

test("times say their zone's clock", () => {
  assert.equal(format.moment(MORNING), "2026-05-28 08:05:09");
  assert.equal(format.moment(MORNING, "Asia/Tokyo"), "2026-05-28 17:05:09");
  assert.equal(format.timeOfDay(Date.UTC(2026, 0, 1)), "00:00:00");
});

test("a window names its day once, its zone and its length", () => {
  const until = MORNING + 5_400_000;

  assert.equal(
    format.windowText({ from_ms: MORNING, until_ms: until }),
    "2026-05-28 08:05:09 – 09:35:09 UTC (1 h 30 min)",
  );
  assert.equal(
    format.windowText({ from_ms: MORNING, until_ms: MORNING + 86_400_000 }),
    "2026-05-28 08:05:09 – 2026-05-29 08:05:09 UTC (1 d)",
  );
});

test("what cannot be seen in a name is written out", () => {
  const cases = [
    ["a\u202eb", "a\\u202eb"],
    ["\u200b", "\\u200b"],
    ["two\nlines", "two\\nlines"],
    ["\u001b[31m", "\\x1b[31m"],
    ["\u0000", "\\x00"],
    ["\u2028", "\\u2028"],
    ["\ufeff", "\\ufeff"],
    ["\u2066", "\\u2066"],
    ["\u00a0", "\\xa0"],
    ["\ue000", "\\ue000"],
    ["\ud800", "\\ud800"],
    ["\u{e0001}", "\\U000e0001"],
    ["\u3164", "\\u3164"],
    ["\ufe0f", "\\ufe0f"],
  ];

  for (const [name, text] of cases) assert.equal(format.safeName(name), text);
});

test("a name of nothing but spaces can be seen", () => {
  assert.equal(format.safeName("  "), "\\x20\\x20");
});

test("what can be seen in a name stays as it is", () => {
  for (const name of ["std::vector<int>::push_back", "漢字 🔥", "naïve", "a b", "<b>&amp;", ""]) {
    assert.equal(format.safeName(name), name);
  }
});

test("a long name is cut in its middle, a short box at its end", () => {
  const name = "std::vector<int>::push_back";

  assert.equal(format.shorten(name, 40), name);
  assert.equal(format.shorten(name, 17), "std::vec…ush_back");
  assert.equal(format.shorten(name, 8), "std::ve…");
  assert.equal(format.shorten(name, 1), "…");
  assert.equal(format.shorten(name, 0), "");
});

test("a cut never splits a character in two", () => {
  const cut = format.shorten("🔥".repeat(30), 15);

  assert.equal([...cut].length, 15);
  assert.ok(cut.isWellFormed());
});

test("a place is a file, with its line if that is known", () => {
  assert.equal(format.place("api.c", 22), "api.c:22");
  assert.equal(format.place("api.c", 0), "api.c");
  assert.equal(format.place("", 0), "");
});

test("a Python function has its module in its name, as far as there is room", () => {
  const frame = { module: "pkg.shop", kind: "python", file: "/srv/pkg/shop.py", line: 7 };
  const main = { ...frame, function: "main" };
  const body = { ...frame, function: "<module>" };

  assert.deepEqual(format.namesOf(main), ["pkg.shop.main", "shop.main", "main"]);
  assert.deepEqual(format.namesOf(main, true), ["pkg.shop.main:7", "shop.main:7", "main:7"]);
  assert.deepEqual(format.namesOf(body), ["pkg.shop.<module>", "shop.<module>"]);
  assert.deepEqual(format.namesOf({ ...main, module: "shop" }), ["shop.main", "main"]);
});

test("all other code has one name, as has a whole module or file", () => {
  const frame = { function: "f", module: "libc.so.6", kind: "native", file: "f.c", line: 0 };
  const python = { ...frame, kind: "python" };

  assert.deepEqual(format.namesOf(frame, true), ["f"]);
  assert.deepEqual(format.namesOf({ ...frame, line: 3 }, true), ["f:3"]);
  assert.deepEqual(format.namesOf({ ...python, module: "f" }), ["f"]);
  assert.deepEqual(format.namesOf({ ...python, file: "f" }), ["f"]);
  assert.deepEqual(format.namesOf({ ...python, module: "[python]" }), ["f"]);
});

test("a length of time is at most two units", () => {
  assert.equal(format.span(45_000), "45 s");
  assert.equal(format.span(300_000), "5 min");
  assert.equal(format.span(90_061_000), "1 d 1 h");
  assert.equal(format.span(250), "250 ms");
});
