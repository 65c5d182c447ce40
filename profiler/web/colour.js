// Colours of boxes, by kind, module or self time, for light and dark pages. No DOM.
//
// A colour depends only on names (for self time: on its share), so a box keeps its colour from one
// window to the next. Text on a box has a contrast of 4.5:1 or more (WCAG 2.2, 1.4.3). The kinds' colours
// are close to the SVG's (profiler/formats/svg.py); saturation and lightness maximize the distance between any two
// kinds for protanopia, deuteranopia, tritanopia and full colour vision.

const TEXT = { light: "#14181d", dark: "#f2f4f7" };
const DIM_TEXT = { light: "#5b6470", dark: "#99a3b0" };

// Hue in degrees, saturation, lightness.
const KINDS = {
  light: {
    native: [36, 0.9, 0.66],
    kernel: [0, 0.56, 0.66],
    inlined: [55, 0.92, 0.66],
    python: [218, 0.92, 0.69],
    jit: [136, 0.6, 0.79],
    go: [193, 0.74, 0.71],
    java: [278, 0.5, 0.7],
    node: [82, 0.38, 0.61],
    label: [214, 0.2, 0.9],
    rest: [220, 0.06, 0.9],
  },
  dark: {
    native: [38, 0.7, 0.31],
    kernel: [10, 0.62, 0.28],
    inlined: [50, 0.38, 0.32],
    python: [219, 0.58, 0.38],
    jit: [150, 0.3, 0.23],
    go: [180, 0.66, 0.26],
    java: [278, 0.4, 0.3],
    node: [107, 0.16, 0.37],
    label: [226, 0.15, 0.22],
    rest: [220, 0.06, 0.2],
  },
};

// Modules of one kind differ slightly, always less than two kinds do.
const VARIANTS = 6;
const VARIANT_HUE = 2;
const VARIANT_LIGHTNESS = { light: 0.009, dark: 0.007 };

// In OKLCH lightness is as perceived, so the text stays readable on any hue.
const MODULES = {
  light: { lightness: [0.76, 0.81, 0.86], chroma: 0.1 },
  dark: { lightness: [0.38, 0.42, 0.46], chroma: 0.085 },
};
const SELF_TIME = {
  light: { from: [0.955, 0.006, 90], to: [0.69, 0.17, 45] },
  dark: { from: [0.29, 0.012, 70], to: [0.5, 0.15, 40] },
};
/** The share of self time that gets the full colour; few boxes have more. */
const SELF_TIME_FULL = 0.25;

// Slightly different from the page's background, so that faded boxes still have edges.
const PAPER = { light: "#fbfbfc", dark: "#1c2026" };

// Colours by verdict. Blue and orange can be told apart with any colour vision, and each verdict has
// a mark and a sign too, so colour is never the only cue. `line` is the colour of the mark. The SVG
// export has the same (profiler/formats/svg_diff.py).
const PLAIN = { light: { fill: "#e3e6ea" }, dark: { fill: "#333a44" } };
const CHANGES = {
  light: {
    more: { fill: "#f5a04c" },
    less: { fill: "#7fb2f0" },
    new: { fill: "#fbd3a8", line: "#f0974a" },
    gone: { fill: "#dbe9fb", line: "#1d5fb4" },
    moved: { fill: "#e3e6ea", line: "#4a5360" },
  },
  dark: {
    more: { fill: "#9a4f00" },
    less: { fill: "#1f5fa8" },
    new: { fill: "#6e3a10", line: "#a4530f" },
    gone: { fill: "#16324f", line: "#7fb2f0" },
    moved: { fill: "#333a44", line: "#b4bdc9" },
  },
};
const MARKS = { new: "hatched", gone: "dashed", moved: "dotted" };
const SIGNS = { more: "↑", less: "↓", new: "+", gone: "−", moved: "⇄" };

const MATCH = {
  light: { fill: "#8b1a8f", text: "#ffffff" },
  dark: { fill: "#f59af7", text: "#1a0a1c" },
};

/**
 * Return {fill, text} of a box as #rrggbb.
 *
 * `colour` is "kind", "module" or "self"; `selfShare` (0 to 1, of all) matters for "self" alone.
 */
export function boxColour(frame, colour, isDark, selfShare = 0) {
  const scheme = isDark ? "dark" : "light";
  return { fill: fillOf(frame, colour, scheme, selfShare), text: TEXT[scheme] };
}

/** Return the colour of a kind as legends show it. Unknown kinds are drawn as native. */
export function kindColour(kind, isDark) {
  const scheme = isDark ? "dark" : "light";
  return { fill: rgbHex(hslRgb(shadeOf(kind, scheme))), text: TEXT[scheme] };
}

/** Return the colour of a search match: much darker or lighter than any other box. */
export function matchColour(isDark) {
  return MATCH[isDark ? "dark" : "light"];
}

/** Return the colour of a box that does not match the search: close to the background. */
export function dimColour({ fill }, isDark) {
  return { fill: towardsPaper(fill, isDark, 0.86), text: DIM_TEXT[isDark ? "dark" : "light"] };
}

/** Return the colour of a caller of the zoomed box, which zooms out when clicked. */
export function fadeColour({ fill, text }, isDark) {
  return { fill: towardsPaper(fill, isDark, 0.62), text };
}

/**
 * Return {fill, text, line, mark} of a box by its verdict. `mark` is "hatched", "dashed", "dotted" or
 * empty; boxes without a change are grey.
 */
export function changeColour(verdict, isDark) {
  const scheme = isDark ? "dark" : "light";
  const known = CHANGES[scheme];
  const colour = Object.hasOwn(known, verdict) ? known[verdict] : PLAIN[scheme];
  const mark = Object.hasOwn(MARKS, verdict) ? MARKS[verdict] : "";
  return { line: colour.fill, ...colour, text: TEXT[scheme], mark };
}

/** Return the sign to show before the name of a changed function; empty for other verdicts. */
export function changeSign(verdict) {
  return Object.hasOwn(SIGNS, verdict) ? SIGNS[verdict] : "";
}

/** Return whether a box stands for no code: its colour is the same in every scheme. */
export function isNeutral(frame) {
  return frame.kind === "label" || frame.kind === "rest";
}

/** Return the contrast of two colours, 1 to 21 (WCAG 2.2, "contrast ratio"). */
export function contrast(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}

/** Return the relative luminance of #rrggbb, 0 to 1 (WCAG 2.2). */
export function luminance(colour) {
  const [red, green, blue] = parseHex(colour).map((part) =>
    part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4,
  );
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

function towardsPaper(fill, isDark, part) {
  const paper = parseHex(PAPER[isDark ? "dark" : "light"]);
  return rgbHex(parseHex(fill).map((each, i) => each + (paper[i] - each) * part));
}

function fillOf(frame, colour, scheme, selfShare) {
  if (isNeutral(frame) || colour === "kind") return rgbHex(hslRgb(variantOf(frame, scheme)));
  if (colour === "self") return rgbHex(oklchRgb(selfTimeShade(selfShare, scheme)));
  return rgbHex(oklchRgb(moduleShade(frame.module, scheme)));
}

function variantOf(frame, scheme) {
  const [hue, saturation, lightness] = shadeOf(frame.kind, scheme);
  if (!frame.module) return [hue, saturation, lightness];
  const variant = hash(frame.module) % VARIANTS;
  const middle = (VARIANTS - 1) / 2;
  return [
    hue + VARIANT_HUE * (variant - middle),
    saturation,
    lightness + VARIANT_LIGHTNESS[scheme] * (((variant * 5) % VARIANTS) - middle),
  ];
}

function shadeOf(kind, scheme) {
  const shades = KINDS[scheme];
  return Object.hasOwn(shades, kind) ? shades[kind] : shades.native;
}

function moduleShade(module, scheme) {
  const { lightness, chroma } = MODULES[scheme];
  const number = hash(module);
  // 24 hues in 3 lightnesses: more could not be told apart.
  return [lightness[number % 3], module ? chroma : 0.01, 15 * (Math.floor(number / 3) % 24)];
}

function selfTimeShade(share, scheme) {
  const { from, to } = SELF_TIME[scheme];
  const part = Math.sqrt(Math.min(1, Math.max(0, share) / SELF_TIME_FULL));
  return [
    from[0] + (to[0] - from[0]) * part,
    from[1] + (to[1] - from[1]) * part,
    from[2] + (to[2] - from[2]) * Math.min(1, 2 * part),
  ];
}

// FNV-1a 32 over UTF-16 code units, mixed so that its low bits depend on all of them.
function hash(text) {
  let state = 0x811c9dc5;
  for (let i = 0; i < text.length; i += 1) {
    state = Math.imul(state ^ text.charCodeAt(i), 0x01000193);
  }
  state = Math.imul(state ^ (state >>> 15), 0x2c1b3c6d);
  return (state ^ (state >>> 13)) >>> 0;
}

function hslRgb([hue, saturation, lightness]) {
  const spread = saturation * Math.min(lightness, 1 - lightness);
  return [0, 8, 4].map((offset) => {
    const place = (((offset + hue / 30) % 12) + 12) % 12;
    return lightness - spread * Math.max(-1, Math.min(place - 3, 9 - place, 1));
  });
}

// Björn Ottosson, "A perceptual color space for image processing" (Oklab), 2020.
function oklchRgb([lightness, chroma, hue]) {
  const a = chroma * Math.cos((hue * Math.PI) / 180);
  const b = chroma * Math.sin((hue * Math.PI) / 180);
  const long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const short = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
    -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
    -0.0041960863 * long - 0.7034186147 * medium + 1.707614701 * short,
  ].map((part) => (part <= 0.0031308 ? 12.92 * part : 1.055 * part ** (1 / 2.4) - 0.055));
}

function parseHex(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16) / 255);
}

function rgbHex(parts) {
  return `#${parts
    .map((part) =>
      Math.round(255 * Math.min(1, Math.max(0, part)))
        .toString(16)
        .padStart(2, "0"),
    )
    .join("")}`;
}
