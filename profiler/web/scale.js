// Scale: positions, ticks, series and colours of the timeline. No DOM.

import { offsetMinutes } from "./times.js";

const S = 1000;
const MIN = 60 * S;
const H = 60 * MIN;
const D = 24 * H;
const TIME_STEPS = [
  S,
  2 * S,
  5 * S,
  10 * S,
  15 * S,
  30 * S,
  MIN,
  2 * MIN,
  5 * MIN,
  10 * MIN,
  15 * MIN,
  30 * MIN,
  H,
  2 * H,
  3 * H,
  6 * H,
  12 * H,
  D,
  2 * D,
  7 * D,
  14 * D,
  28 * D,
];

/** A straight line from one interval to another; `invert` goes back. */
export function linear([from, until], [low, high]) {
  const slope = until === from ? 0 : (high - low) / (until - from);
  const scale = (value) => low + (value - from) * slope;
  scale.invert = (position) => (slope === 0 ? from : from + (position - low) / slope);
  return scale;
}

/** Return round times inside [from, until), at most `count`: [{ms, label}]. Dates are at midnight. */
export function timeTicks(from, until, count, zone) {
  const least = (until - from) / Math.max(1, count);
  const step = TIME_STEPS.find((each) => each >= least) ?? Math.ceil(least / D) * D;
  const ticks = [];
  for (let shown = roundUp(from + offset(from, zone), step); ; shown += step) {
    // Ticks are at round local times: 06:00 stays 06:00 when clocks change.
    const ms = shown - offset(shown - offset(shown, zone), zone);
    if (ms >= until || ticks.length > count) return ticks;
    if (ms >= from) ticks.push({ ms, label: tickLabel(shown, step) });
  }
}

/** Return round values from 0 to at least `max`, about `count`: [0, 0.5, 1, …]. */
export function valueTicks(max, count) {
  if (!(max > 0)) return [0, 1];
  const least = max / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= least * (1 - 1e-9));
  const ticks = [0];
  for (let i = 1; ticks.at(-1) < max * (1 - 1e-9); i++)
    ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

/**
 * Stack a timeline's series: {layers: [{lower, upper}], isGap, max}, in cores while profiled, so
 * that a step that was profiled in part has its full height. The last series is on top; a step without
 * profiles is a gap.
 */
export function stackSeries(timeline) {
  const isGap = timeline.covered_ns.map((ns) => !(ns > 0));
  let lower = isGap.map(() => 0);
  const layers = timeline.series.map(({ values }) => {
    const upper = lower.map((base, i) =>
      isGap[i] ? base : base + (values[i] ?? 0) / timeline.covered_ns[i],
    );
    const layer = { lower, upper };
    lower = upper;
    return layer;
  });
  return { layers, isGap, max: Math.max(0, ...lower) };
}

/** Draw a layer as bars that touch, an SVG path with one outline per run of steps without gaps. */
export function layerPath({ lower, upper }, isGap, x, y) {
  return runs(isGap.map((gap) => !gap))
    .map(([start, end]) => {
      const there = [];
      const back = [];
      for (let i = start; i < end; i++) {
        there.push(
          `${round(x(i))} ${round(y(upper[i]))}`,
          `${round(x(i + 1))} ${round(y(upper[i]))}`,
        );
        back.unshift(
          `${round(x(i + 1))} ${round(y(lower[i]))}`,
          `${round(x(i))} ${round(y(lower[i]))}`,
        );
      }
      return `M${[...there, ...back].join("L")}Z`;
    })
    .join("");
}

/** Return the runs of true: [[start, end), …]. */
export function runs(flags) {
  const found = [];
  flags.forEach((flag, i) => {
    if (!flag) return;
    if (i > 0 && flags[i - 1]) found.at(-1)[1] = i + 1;
    else found.push([i, i + 1]);
  });
  return found;
}

/**
 * Move a selection of whole steps by a key: arrows move one step (Page keys ten), with Shift they
 * extend; Home and End go to the edges. A selection is {anchor, head}, both steps that belong to it.
 * Returns null for other keys.
 */
export function moveSelection(selection, key, isExtending, count) {
  const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -count, End: count }[
    key
  ];
  if (by === undefined || count === 0) return null;
  const limit = (step) => Math.min(count - 1, Math.max(0, step));
  const isEdge = key === "Home" || key === "End";
  const head =
    selection || isEdge ? limit((selection?.head ?? 0) + by) : limit(by < 0 ? count - 1 : 0);
  return { anchor: isExtending && selection ? selection.anchor : head, head };
}

/** Return the window of a selection, cut to the timeline's own: {from, until} in ms. */
export function selectionWindow({ anchor, head }, timeline) {
  const start = timeline.start_ms + Math.min(anchor, head) * timeline.step_ms;
  const end = timeline.start_ms + (Math.max(anchor, head) + 1) * timeline.step_ms;
  const { from_ms: from, until_ms: until } = timeline.window;
  return { from: Math.max(from, start), until: Math.min(until, end) };
}

/**
 * Return each name a number below `count`, by its hash, or the next
 * free one if two collide. Beyond `count` names, colours are shared.
 */
export function assignColours(names, count) {
  const taken = new Set();
  const colours = new Map();
  for (const name of [...names].sort()) {
    let colour = hash(name) % count;
    for (let i = 0; taken.has(colour) && i < count; i++) colour = (colour + 1) % count;
    taken.add(colour);
    colours.set(name, colour);
  }
  return colours;
}

/** Return the name of a series in legends. */
export function seriesName(series, label) {
  if (series.rest) return "all others";
  return labelOf(series, label) || `no ${label}`;
}

/** Return a series' value of a label, "" if it has none; the label may be called like a property of every object. */
export function labelOf({ labels }, name) {
  return Object.hasOwn(labels, name) ? labels[name] : "";
}

/** Return the style sheet's class of a colour number; undefined is the grey of the rest. */
export function colourClass(colour) {
  return colour === undefined ? "s-rest" : `s${colour}`;
}

function hash(text) {
  let value = 0x811c9dc5;
  for (const character of text) value = Math.imul(value ^ character.codePointAt(0), 0x01000193);
  return (value >>> 8) & 0xffff;
}

function offset(ms, zone) {
  return offsetMinutes(ms, zone) * MIN;
}

function roundUp(value, step) {
  return Math.ceil(value / step) * step;
}

function tickLabel(shown, step) {
  const [date, clock] = new Date(shown).toISOString().split("T");
  if (shown % D === 0) return date.slice(5);
  return step < MIN ? clock.slice(0, 8) : clock.slice(0, 5);
}

function round(value) {
  return Math.round(value * 10) / 10;
}
