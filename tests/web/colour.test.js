// Colours: stable, readable, and told apart by all eyes.

import assert from "node:assert/strict";
import { test } from "node:test";

import {
  boxColour,
  changeColour,
  changeSign,
  contrast,
  dimColour,
  fadeColour,
  kindColour,
  luminance,
  matchColour,
} from "../../profiler/web/colour.js";

const KINDS = [
  "native",
  "kernel",
  "inlined",
  "python",
  "jit",
  "go",
  "java",
  "node",
  "label",
  "rest",
];
const MODULES = ["", ...Array.from({ length: 80 }, (_, i) => `lib${i * 7919}.so.${i}`)];

// G. M. Machado et al., "A Physiologically-based Model for Simulation of Color Vision
// Deficiency" (2009), severity 1.0, on linear RGB.
const EYES = {
  "full sight": [
    [1, 0, 0],
    [0, 1, 0],
    [0, 0, 1],
  ],
  protanopia: [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
  ],
  deuteranopia: [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.01182, 0.04294, 0.968881],
  ],
  tritanopia: [
    [1.255528, -0.076749, -0.178779],
    [-0.078411, 0.930809, 0.147602],
    [0.004733, 0.691367, 0.3039],
  ],
};

function everyColour() {
  const colours = [];
  for (const isDark of [false, true]) {
    for (const kind of KINDS) {
      for (const module of MODULES) {
        for (const colour of ["kind", "module"]) {
          colours.push([boxColour({ kind, module }, colour, isDark), isDark]);
        }
      }
    }
    for (let part = 0; part <= 1; part += 0.005) {
      colours.push([boxColour({ kind: "native", module: "api" }, "self", isDark, part), isDark]);
    }
  }
  return colours;
}

function times(matrix, vector) {
  return matrix.map((row) => row.reduce((sum, each, i) => sum + each * vector[i], 0));
}

// CIE 1976 L*a*b* under D65.
function labOf(colour, eyes) {
  const linear = [1, 3, 5].map((at) => luminance(`#${colour.slice(at, at + 2).repeat(3)}`));
  const seen = times(eyes, linear).map((part) => Math.min(1, Math.max(0, part)));
  const [x, y, z] = times(
    [
      [0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047],
      [0.2126729, 0.7151522, 0.072175],
      [0.0193339 / 1.08883, 0.119192 / 1.08883, 0.9503041 / 1.08883],
    ],
    seen,
  ).map((part) => (part > 0.008856 ? Math.cbrt(part) : 7.787 * part + 16 / 116));
  return [116 * y - 16, 500 * (x - y), 200 * (y - z)];
}

function distance(one, other) {
  return Math.hypot(...one.map((part, i) => part - other[i]));
}

test("contrast is that of WCAG", () => {
  assert.equal(contrast("#000000", "#ffffff"), 21);
  assert.equal(contrast("#ffffff", "#ffffff"), 1);
  assert.ok(Math.abs(contrast("#767676", "#ffffff") - 4.54) < 0.01);
});

test("text on every box has a contrast of 4.5 or more", () => {
  for (const [colour] of everyColour()) {
    assert.ok(contrast(colour.fill, colour.text) >= 4.5, JSON.stringify(colour));
  }
});

test("text stays readable on boxes that are dimmed, faded or found", () => {
  for (const [colour, isDark] of everyColour()) {
    for (const changed of [dimColour(colour, isDark), fadeColour(colour, isDark)]) {
      assert.ok(contrast(changed.fill, changed.text) >= 4.5, JSON.stringify(changed));
    }
  }
  for (const isDark of [false, true]) {
    const { fill, text } = matchColour(isDark);
    assert.ok(contrast(fill, text) >= 4.5);
  }
});

test("no two kinds look alike, whatever colours an eye sees", () => {
  const kinds = KINDS.filter((kind) => kind !== "rest"); // it is hatched
  for (const isDark of [false, true]) {
    for (const [name, eyes] of Object.entries(EYES)) {
      const seen = kinds.map((kind) => labOf(kindColour(kind, isDark).fill, eyes));
      for (let i = 0; i < seen.length; i += 1) {
        for (let k = 0; k < i; k += 1) {
          const apart = distance(seen[i], seen[k]);
          assert.ok(apart > 10, `${kinds[i]}, ${kinds[k]}, ${name}, ${isDark}: ${apart}`);
        }
      }
    }
  }
});

test("what a search found stands out from every other box by its lightness alone", () => {
  for (const [colour, isDark] of everyColour()) {
    assert.ok(contrast(matchColour(isDark).fill, dimColour(colour, isDark).fill) >= 3);
  }
});

test("a box keeps its colour whatever else there is", () => {
  const frame = { kind: "native", module: "libc.so.6", function: "memcpy" };

  assert.deepEqual(boxColour(frame, "kind", false), boxColour({ ...frame }, "kind", false));
  assert.equal(boxColour(frame, "module", false).fill, boxColour(frame, "module", false, 0.5).fill);
});

test("by module, one module has one colour whatever the kind", () => {
  const fills = ["native", "inlined", "kernel"].map(
    (kind) => boxColour({ kind, module: "api" }, "module", false).fill,
  );

  assert.equal(new Set(fills).size, 1);
});

test("by module, most modules differ", () => {
  const fills = MODULES.map(
    (module) => boxColour({ kind: "native", module }, "module", false).fill,
  );

  assert.ok(new Set(fills).size > 35);
});

test("by own time, more time is a stronger colour", () => {
  const frame = { kind: "native", module: "api" };
  const [none, some, much] = [0, 0.02, 0.3].map((part) =>
    luminance(boxColour(frame, "self", false, part).fill),
  );

  assert.ok(none > some && some > much);
});

test("an unknown kind is drawn as native", () => {
  const of = (kind) => boxColour({ kind, module: "x" }, "kind", true);

  assert.deepEqual(of("wasm"), of("native"));
  assert.deepEqual(of("constructor"), of("native"));
});

test("what changed is readable, and told apart by all eyes and by more than its colour", () => {
  const verdicts = ["more", "less", "new", "gone", "moved", "unchanged"];
  for (const isDark of [false, true]) {
    const colours = verdicts.map((verdict) => changeColour(verdict, isDark));
    for (const { fill, line, text, mark } of colours) {
      assert.ok(contrast(fill, text) >= 4.5, fill);
      // Text stands on the hatching, but beside a dashed edge, which itself must be seen.
      const edge =
        mark === "dashed"
          ? contrast(line, fill) >= 3
          : mark === "dotted" || contrast(line, text) >= 4.5;
      assert.ok(edge, line);
    }
    for (const eyes of Object.values(EYES)) {
      const [more, less, , , , plain] = colours.map(({ fill }) => labOf(fill, eyes));
      const pairs = [
        [more, less],
        [more, plain],
        [less, plain],
      ];
      assert.ok(Math.min(...pairs.map((pair) => distance(...pair))) > 10);
    }
    assert.equal(new Set(colours.slice(2, 5).map(({ mark }) => mark)).size, 3);
  }
  assert.equal(new Set(verdicts.map(changeSign)).size, verdicts.length);
});

test("what is no change has one grey", () => {
  for (const verdict of ["unchanged", "too little data", "", "__proto__", "constructor"]) {
    assert.deepEqual(changeColour(verdict, true), changeColour("unchanged", true));
    assert.equal(changeSign(verdict), "");
  }
});
