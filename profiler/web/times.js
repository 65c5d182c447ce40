// Times: as in the address (now-1h, Unix ms, RFC 3339), as text, and as values of inputs. Inside the
// page a time is an integer of Unix milliseconds; a window is half-open.

const MS = { ms: 1, s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000, w: 604_800_000 };
const RELATIVE = /^now(?:([+-])((?:\d{1,9}(?:ms|s|m|h|d|w))+))?$/;
const RFC3339 = /^\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:[Zz]|[+-]\d\d:\d\d)$/;
// As the service reads them (profiler/times.py): plain numbers, and the latest time.
const FIRST_MILLISECONDS = 1e11;
const LATEST_MS = 9_223_372_036_854;
const STEP_MS = 10 * MS.m;
const LONG_MS = 6 * MS.h;

/** The presets: from, until, name. */
export const RANGES = [
  ["now-15m", "now", "Last 15 minutes"],
  ["now-1h", "now", "Last hour"],
  ["now-3h", "now", "Last 3 hours"],
  ["now-6h", "now", "Last 6 hours"],
  ["now-12h", "now", "Last 12 hours"],
  ["now-24h", "now", "Last 24 hours"],
  ["now-7d", "now", "Last 7 days"],
];

/** Parse a time; null if the text is not one, or none between 1970 and 2262. */
export function parseTime(text, nowMs) {
  const time = parseAnyTime(text, nowMs);
  return time !== null && time >= 0 && time <= LATEST_MS ? time : null;
}

function parseAnyTime(text, nowMs) {
  const relative = RELATIVE.exec(text);
  if (relative) {
    const parts = (relative[2] ?? "").matchAll(/(\d+)(ms|s|m|h|d|w)/g);
    const offset = [...parts].reduce((sum, [, number, unit]) => sum + number * MS[unit], 0);
    return relative[1] === "-" ? nowMs - offset : nowMs + offset;
  }
  if (/^\d{1,13}(\.\d+)?$/.test(text)) {
    const number = Number(text);
    return Math.floor(number >= FIRST_MILLISECONDS ? number : number * 1000);
  }
  if (!RFC3339.test(text)) return null;
  const time = Date.parse(text.replace(" ", "T"));
  return Number.isNaN(time) ? null : time;
}

/** Return whether a window moves with the clock. */
export function isRelative(from, until) {
  return from.startsWith("now") || until.startsWith("now");
}

/**
 * Return {from, until} in ms, or null if the texts are not a window. A long one that moves with the
 * clock begins with the ten minutes in which it would: compacted data are added up by ten minutes,
 * and the rest of them would take longer than all others.
 */
export function resolveWindow(from, until, nowMs) {
  const window = { from: parseTime(from, nowMs), until: parseTime(until, nowMs) };
  if (window.from === null || window.until === null || window.from >= window.until) return null;
  const isLong = window.until - window.from >= LONG_MS;
  if (isLong && from.startsWith("now")) window.from -= window.from % STEP_MS;
  return window;
}

/** Write a time: `2026-11-21 10:07:54`, with seconds if they are not zero or `hasSeconds`. */
export function formatTime(ms, zone, { hasSeconds = false, hasDate = true } = {}) {
  const [date, clock] = local(ms, zone).toISOString().split("T");
  const shown = hasSeconds || ms % 60_000 ? clock.slice(0, 8) : clock.slice(0, 5);
  return hasDate ? `${date} ${shown}` : shown;
}

/** Write a window, with the second date only if it differs. */
export function formatWindow(from, until, zone) {
  const isOneDay = dayOf(from, zone) === dayOf(until, zone);
  const hasSeconds = from % 60_000 > 0 || until % 60_000 > 0;
  const start = formatTime(from, zone, { hasSeconds });
  const end = formatTime(until, zone, { hasSeconds, hasDate: !isOneDay });
  return `${start} – ${end} ${zoneName(zone)}`;
}

/** Return the text of a range's button. */
export function formatRange(from, until, nowMs, zone) {
  const known = RANGES.find((range) => range[0] === from && range[1] === until);
  if (known) return known[2];
  const window = resolveWindow(from, until, nowMs);
  return window ? formatWindow(window.from, window.until, zone) : `${from} – ${until}`;
}

/** Return a time as the value of an input of type datetime-local. */
export function toInput(ms, zone) {
  return local(ms, zone)
    .toISOString()
    .slice(0, ms % 60_000 ? 19 : 16);
}

/** Parse the value of such an input; null if it is not a time. */
export function fromInput(text, zone) {
  const time = zone === "local" ? Date.parse(text) : Date.parse(`${text}Z`);
  return Number.isNaN(time) ? null : time;
}

/** Minutes that the zone is ahead of UTC at a time. */
export function offsetMinutes(ms, zone) {
  return zone === "local" ? -new Date(ms).getTimezoneOffset() : 0;
}

export function zoneName(zone) {
  return zone === "local" ? "local" : "UTC";
}

function dayOf(ms, zone) {
  return Math.floor((ms + offsetMinutes(ms, zone) * 60_000) / 86_400_000);
}

/** A Date whose UTC fields read as the zone's clock. */
function local(ms, zone) {
  return new Date(ms + offsetMinutes(ms, zone) * 60_000);
}
