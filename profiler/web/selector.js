// Selector: parsing, printing and completing label selectors.
//
//   {service="api",version=~"1\\.5.*",host!="web-3"}
//
// `print` returns the text that the service reads (grammar: storage/selector.py). `parse` also accepts
// shorter forms: no braces, no quotes around a plain value. Only the service checks patterns: they are
// RE2's, not the browser's.

/** The operators, in the order in which they are offered. */
export const OPERATORS = ["=", "!=", "=~", "!~"];

const NAME = /[A-Za-z_][A-Za-z0-9_.]*/y;
const WHOLE_NAME = /^[A-Za-z_][A-Za-z0-9_.]*$/;
const OPERATOR = /=~|!~|!=|=/y;
const SPACES = /\s*/y;
const QUOTED = /"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|`[^`]*`/sy;
const OPEN_QUOTE = /"(?:[^"\\]|\\.)*\\?$|'(?:[^'\\]|\\.)*\\?$|`[^`]*$/sy;
const BARE = /[^\s,{}"'`]+/y;
const ESCAPE = /\\(?:([abfnrtv\\"'])|x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))/gsu;
const PLAIN = { a: "\x07", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t", v: "\v" };
const UNSEEN = /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u;

/** Text that is not a selector. `position` is the first wrong character, from 0. */
export class SelectorError extends Error {
  constructor(problem, position) {
    super(`${problem} at character ${position + 1}`);
    this.position = position;
  }
}

/**
 * Read a selector: a list of {name, operator, value}, in their order.
 * Throws a SelectorError.
 */
export function parse(text) {
  const matchers = [];
  let matcher = {};
  for (const token of scan(text)) {
    if (token.problem) throw new SelectorError(token.problem, token.start);
    if (token.kind === "name") matcher = { name: token.value };
    if (token.kind === "operator") matcher.operator = token.value;
    if (token.kind === "value") matchers.push({ ...matcher, value: token.value });
  }
  return matchers;
}

/** Write matchers as the service reads them; empty for none. */
export function print(matchers) {
  if (matchers.length === 0) return "";
  return `{${matchers.map(printMatcher).join(",")}}`;
}

export function printMatcher({ name, operator, value }) {
  return `${WHOLE_NAME.test(name) ? name : quote(name)}${operator}${quote(value)}`;
}

/** Return the matchers with one more. It replaces an `=` on the same label, and itself. */
export function add(matchers, matcher) {
  const kept = matchers.filter((each) => !isSame(each, matcher) && !isReplacedBy(each, matcher));
  return [...kept, matcher];
}

/** Return the matchers without this one. */
export function remove(matchers, matcher) {
  return matchers.filter((each) => !isSame(each, matcher));
}

/** Return whether it is among them. */
export function has(matchers, matcher) {
  return matchers.some((each) => isSame(each, matcher));
}

/**
 * Return what can be typed at the caret:
 * {expects: "name" | "operator" | "value" | "end", name, typed, start, end}. `typed` is the
 * text before the caret (a value without its quote); a choice replaces `start` to `end`.
 */
export function completionAt(text, caret) {
  let expects = "name";
  let name = "";
  for (const token of scan(text)) {
    const isInside = token.start < caret && caret <= token.end;
    const isWord = ["name", "operator", "value"].includes(token.kind);
    const isOver = caret === token.end && (token.isClosed || token.kind === "operator");
    if (isInside && isWord && !isOver) {
      const typed = unquoteStart(text.slice(token.start, caret));
      return { expects: token.kind, name, typed, start: token.start, end: token.end };
    }
    if (token.start >= caret) break;
    if (token.kind === "name") [name, expects] = [token.value, "operator"];
    if (token.kind === "operator") expects = "value";
    if (token.kind === "value") expects = "end";
    if (token.kind === "comma" || token.kind === "open") expects = "name";
    if (token.kind === "close") expects = "done";
  }
  const typed = expects === "operator" && text[caret - 1] === "!" ? "!" : "";
  return { expects, name, typed, start: caret - typed.length, end: caret };
}

/** Insert a choice: {text, caret}. The caret is where typing continues. */
export function complete(text, completion, choice) {
  const rest = text.slice(completion.end);
  const written = {
    name: () =>
      (WHOLE_NAME.test(choice) ? choice : quote(choice)) + (/^\s*[=!]/.test(rest) ? "" : "="),
    operator: () => choice,
    value: () =>
      quote(choice) + (/^\s*[,}]/.test(rest) || !text.trimStart().startsWith("{") ? "" : "}"),
    end: () => choice,
  }[completion.expects]();
  const head = text.slice(0, completion.start) + written;
  const caret =
    completion.expects === "value" && head.endsWith("}") ? head.length - 1 : head.length;
  return { text: head + rest, caret };
}

/** Cut text into tokens {kind, start, end, value?, isClosed?, problem?}; it stops at a problem. */
function* scan(text) {
  let at = 0;
  const skip = () => {
    SPACES.lastIndex = at;
    at += SPACES.exec(text)[0].length;
  };
  const match = (pattern) => {
    pattern.lastIndex = at;
    return pattern.exec(text)?.[0];
  };
  const take = (kind, length, more = {}) => {
    const token = { kind, start: at, end: at + length, ...more };
    at += length;
    return token;
  };
  const problem = (message) => ({ kind: "problem", start: at, end: text.length, problem: message });

  skip();
  if (at === text.length) return;
  const isBraced = text[at] === "{";
  if (isBraced) yield take("open", 1);
  for (;;) {
    skip();
    if (isBraced && text[at] === "}") break;
    if (!isBraced && at === text.length) return;
    const quotedName = match(QUOTED);
    const name = quotedName ?? match(NAME);
    if (name === undefined) return yield problem("the name of a label is missing");
    yield take("name", name.length, { value: quotedName ? unquote(name, at) : name });
    skip();
    const operator = match(OPERATOR);
    if (operator === undefined) return yield problem("one of = != =~ !~ is missing");
    yield take("operator", operator.length, { value: operator });
    skip();
    const quoted = match(QUOTED);
    const open = match(OPEN_QUOTE);
    const bare = match(BARE);
    if (quoted !== undefined) {
      yield take("value", quoted.length, { value: unquote(quoted, at), isClosed: true });
    } else if (open !== undefined) {
      const value = unquoteStart(open);
      yield take("value", open.length, { value, problem: "the closing quote is missing" });
      return;
    } else if (bare !== undefined) {
      yield take("value", bare.length, { value: bare });
    } else {
      return yield problem("a value is missing");
    }
    skip();
    if (text[at] === ",") yield take("comma", 1);
    else if (isBraced && text[at] === "}") break;
    else if (at < text.length) return yield problem("a comma is missing");
    else if (isBraced) return yield problem("the closing } is missing");
    else return;
  }
  yield take("close", 1);
  skip();
  if (at < text.length) yield problem("unexpected text after the }");
}

function unquote(quoted, start) {
  const inner = quoted.slice(1, -1);
  if (quoted[0] === "`") return inner;
  return inner.replace(ESCAPE, (escaped, plain, x, u, U, _other, offset) => {
    if (plain) return PLAIN[plain] ?? plain;
    const code = Number.parseInt(x ?? u ?? U, 16);
    if (Number.isNaN(code) || code > 0x10ffff) {
      throw new SelectorError(
        `unknown escape ${escaped} (a backslash is written \\\\)`,
        start + 1 + offset,
      );
    }
    return String.fromCodePoint(code);
  });
}

/** Return the text inside a quote that may not be closed yet, escapes included. */
function unquoteStart(text) {
  return /^["'`]/.test(text) ? text.slice(1).replace(/["'`]$/, "") : text;
}

function quote(text) {
  const escaped = Array.from(text, (character) => {
    if (character === '"' || character === "\\") return `\\${character}`;
    if (!UNSEEN.test(character)) return character;
    return `\\U${character.codePointAt(0).toString(16).padStart(8, "0")}`;
  });
  return `"${escaped.join("")}"`;
}

function isSame(one, other) {
  return one.name === other.name && one.operator === other.operator && one.value === other.value;
}

function isReplacedBy(old, matcher) {
  return old.name === matcher.name && old.operator === "=" && matcher.operator === "=";
}
