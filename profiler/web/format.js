// Numbers, times and names as people read them. No DOM; every number has its unit.

const SECOND_NS = 1e9;
const MINUTE_NS = 60 * SECOND_NS;
const HOUR_NS = 60 * MINUTE_NS;
const DAY_NS = 24 * HOUR_NS;
const SPLIT_LENGTH = 14;
const ELLIPSIS = "…";
const DASH = "–";

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

// Characters that are invisible or reorder the text around them: control, format, lone surrogates,
// private, unassigned, separators other than a space, and the default-ignorable characters outside
// of those categories (symbolizer/text.py).
const INVISIBLE =
  // biome-ignore lint/suspicious/noMisleadingCharacterClass: each stands for itself
  /[\p{C}\p{Zl}\p{Zp}\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\u{e0100}-\u{e01ef}]/gu;
const SHORT_ESCAPES = { "\n": "\\n", "\r": "\\r", "\t": "\\t" };

/** Return a name with invisible characters written as escapes, as the service does. */
export function safeName(text) {
  const name = String(text);
  // Spaces alone would make a button without a name.
  if (/^ +$/.test(name)) return "\\x20".repeat(name.length);
  return name.replace(INVISIBLE, (character) => {
    if (Object.hasOwn(SHORT_ESCAPES, character)) return SHORT_ESCAPES[character];
    const code = character.codePointAt(0);
    if (code <= 0xff) return `\\x${code.toString(16).padStart(2, "0")}`;
    if (code <= 0xffff) return `\\u${code.toString(16).padStart(4, "0")}`;
    return `\\U${code.toString(16).padStart(8, "0")}`;
  });
}

/** Cut text to at most `length` characters: in the middle, because names of one namespace differ
 * at their end; at the end if few characters fit. */
export function shorten(text, length) {
  if (text.length <= length) return text;
  const characters = [...text];
  if (characters.length <= length) return text;
  if (length <= 1) return length === 1 ? ELLIPSIS : "";
  const head = length < SPLIT_LENGTH ? length - 1 : Math.ceil((length - 1) / 2);
  const tail = length - 1 - head;
  return (
    characters.slice(0, head).join("") +
    ELLIPSIS +
    (tail > 0 ? characters.slice(-tail).join("") : "")
  );
}

/** Return a whole number with thousands separated. */
export function number(value) {
  return whole.format(value);
}

/** Return `1 sample`, `1,234 samples`. */
export function counted(value, noun, plural = `${noun}s`) {
  return `${number(value)} ${value === 1 ? noun : plural}`;
}

/** Return a part of a whole: `34.2 %`, and `<0.1 %` for what would round to zero. */
export function share(part, total) {
  if (!total) return "0 %";
  const percent = (100 * part) / total;
  if (percent > 0 && percent < 0.05) return "<0.1 %";
  if (percent < 100 && percent >= 99.95) return ">99.9 %";
  return `${percent.toFixed(percent === 0 || percent >= 100 ? 0 : 1)} %`;
}

/** Return a growth with its sign: `+52 %`, `−3.4 %`, `×13` from ten times as much on; 0.5 means
 * an increase by half. */
export function growth(relative) {
  if (relative >= 9) return `×${number(1 + relative)}`;
  const percent = 100 * Math.abs(relative);
  const text = percent.toFixed(percent < 9.95 ? 1 : 0);
  return `${Number(text) === 0 ? "±" : relative < 0 ? "−" : "+"}${text} %`;
}

/** Return cores per host: `0.42`, `0.0031`, and `<0.0001` for what would round to zero. */
export function coresPerHost(value) {
  if (value > 0 && value < 0.0001) return "<0.0001 cores per host";
  return `${Number(value.toPrecision(value < 0.01 ? 2 : 3))} cores per host`;
}

/** Return nanoseconds of CPU time with a suitable unit: `820 µs`, `1.24 s`, `12.3 min`, `3.1 d`. */
export function cpuTime(ns) {
  const size = Math.abs(ns);
  if (size === 0) return "0 s";
  if (size < 1e3) return `${whole.format(ns)} ns`;
  if (size < 999.5e3) return scaled(ns / 1e3, "µs");
  if (size < 999.5e6) return scaled(ns / 1e6, "ms");
  if (size < 119.95 * SECOND_NS) return scaled(ns / SECOND_NS, "s");
  if (size < 119.95 * MINUTE_NS) return scaled(ns / MINUTE_NS, "min");
  if (size < 47.95 * HOUR_NS) return scaled(ns / HOUR_NS, "h");
  return scaled(ns / DAY_NS, "d");
}

/** Return a value in a profile's unit: `12.3 min of CPU`, `1.5 MiB`, `1,234`. */
export function quantity(value, unit) {
  if (unit === "nanoseconds") return cpuTime(value);
  if (unit === "bytes") return bytes(value);
  return unit === "count" ? number(value) : `${number(value)} ${unit}`;
}

/** Return CPU time over a window as cores: `0.42 cores`, `1.00 core`. */
export function cores(ns, windowMs) {
  return windowMs > 0 ? coresUsed(ns / (windowMs * 1e6)) : `${DASH} cores`;
}

/** Return a number of cores: `0.42 cores`, `1.00 core`. */
export function coresUsed(used) {
  const text = coreCount(used);
  return `${text} ${Number(text) === 1 ? "core" : "cores"}`;
}

/** Return a number of cores without the word: `0.42`, and `<0.001` for what would round to zero. */
export function coreCount(used) {
  if (used > 0 && used < 0.001) return "<0.001";
  const digits = used === 0 ? 0 : used < 0.1 ? 3 : used < 10 ? 2 : used < 100 ? 1 : 0;
  return used >= 100 ? number(used) : used.toFixed(digits);
}

/** Return a change of a number of cores: `+0.42`, `−13.1`, `±0`. */
export function coreChange(by) {
  const text = coreCount(Math.abs(by));
  if (by === 0 || text.startsWith("<")) return "±0";
  return `${by < 0 ? "−" : "+"}${text}`;
}

/** Return a size: `512 B`, `40.1 MiB`. */
export function bytes(size) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let [value, i] = [size, 0];
  for (; Math.abs(value) >= 1023.5 && i < units.length - 1; i += 1) value /= 1024;
  return i === 0 ? `${number(value)} B` : scaled(value, units[i]);
}

/** Return a length of time in words that fit a control: `45 s`, `5 min`, `1 h 30 min`, `2 d`. */
export function span(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  let seconds = Math.round(ms / 1000);
  const parts = [];
  for (const [length, unit] of [
    [86400, "d"],
    [3600, "h"],
    [60, "min"],
    [1, "s"],
  ]) {
    const count = Math.floor(seconds / length);
    seconds -= count * length;
    if (count > 0) parts.push(`${count} ${unit}`);
  }
  return parts.slice(0, 2).join(" ");
}

/** Return a moment as `2026-05-28 20:26:40`; `zone` is "utc" or "local", or a name from the tz base. */
export function moment(ms, zone = "utc") {
  const { year, month, day, hour, minute, second } = clock(ms, zone);
  return `${year}-${month}-${day} ${hour}:${minute}:${second}`;
}

/** Return the time of day: `20:26:40`. */
export function timeOfDay(ms, zone = "utc") {
  const { hour, minute, second } = clock(ms, zone);
  return `${hour}:${minute}:${second}`;
}

/** Return a window with its zone and length: the day once, when it ends on the day it began. */
export function windowText({ from_ms: from, until_ms: until }, zone = "utc") {
  const start = moment(from, zone);
  const end = moment(until, zone);
  const isOneDay = start.slice(0, 10) === end.slice(0, 10);
  const zoneName = zone === "utc" ? " UTC" : "";
  return `${start} ${DASH} ${isOneDay ? end.slice(11) : end}${zoneName} (${span(until - from)})`;
}

/**
 * Return what a frame is called where its module does not stand beside it, longest name first, as
 * Frame.names() does (symbolizer/location.py). `withLine` adds its line, if that is known.
 */
export function namesOf({ function: called, module, kind, file, line }, withLine = false) {
  const name = `${called}${withLine && line ? `:${line}` : ""}`;
  const isWhole = called === module || called === file;
  if (kind !== "python" || !module || module.startsWith("[") || isWhole) return [name];
  const names = [`${module}.${name}`, `${module.split(".").at(-1)}.${name}`];
  if (called !== "<module>") names.push(name);
  return [...new Set(names)];
}

/** Return the location of code: `api.c:22`, the file alone, or "". */
export function place(file, line) {
  return file && line ? `${file}:${line}` : file || "";
}

// Three digits: more would be noise in a sampled number.
function scaled(value, unit) {
  const size = Math.abs(value);
  const digits = size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2;
  return `${digits === 0 ? number(value) : value.toFixed(digits)} ${unit}`;
}

function clock(ms, zone) {
  const format = new Intl.DateTimeFormat("en-CA", {
    timeZone: zone === "utc" ? "UTC" : zone === "local" ? undefined : zone,
    year: "numeric",
    month: "2-digit",
    day: "2-digit",
    hour: "2-digit",
    minute: "2-digit",
    second: "2-digit",
    hourCycle: "h23",
  });
  return Object.fromEntries(format.formatToParts(ms).map((part) => [part.type, part.value]));
}
