// Selectors in the page: they read and write what the service reads, and help while typing.

import assert from "node:assert/strict";
import { test } from "node:test";

import * as selector from "../../profiler/web/selector.js";

const SERVICE = { name: "service", operator: "=", value: "api" };
const VERSION = { name: "version", operator: "=~", value: "1\\.5.*" };

function choose(text, choice) {
  const caret = text.indexOf("|");
  const plain = text.replace("|", "");
  const done = selector.complete(plain, selector.completionAt(plain, caret), choice);
  return `${done.text.slice(0, done.caret)}|${done.text.slice(done.caret)}`;
}

function expectation(text) {
  const completion = selector.completionAt(text.replace("|", ""), text.indexOf("|"));
  return [completion.expects, completion.name, completion.typed];
}

test("a selector reads back what it writes", () => {
  for (const value of [
    "api",
    "",
    'a"b',
    "a\\b",
    "1\\.5.*",
    "новый",
    "a\nb\u200b",
    "{x},",
    "\u{1f525}",
  ]) {
    const matchers = [
      { name: "service", operator: "=", value },
      { name: "my label", operator: "!~", value },
    ];
    assert.deepEqual(selector.parse(selector.print(matchers)), matchers);
  }
});

test("the text is Prometheus's", () => {
  assert.equal(selector.print([SERVICE, VERSION]), '{service="api",version=~"1\\\\.5.*"}');
  assert.equal(selector.print([]), "");
});

test("quotes, spaces, backquotes and a comma at the end are read", () => {
  assert.deepEqual(selector.parse(" { service = 'api' , version=~`1\\.5.*`, } "), [
    SERVICE,
    VERSION,
  ]);
  for (const empty of ["", "  ", "{}", " { } "]) assert.deepEqual(selector.parse(empty), []);
});

test("braces and quotes may be left out by hand", () => {
  assert.deepEqual(selector.parse("service=api, version=~1\\.5.*"), [SERVICE, VERSION]);
});

test("a mistake is named with its place", () => {
  const cases = {
    "{service}": /one of = != =~ !~ is missing at character 9/,
    '{service="api"': /closing } is missing at character 15/,
    '{service="api': /closing quote is missing at character 10/,
    "{=1}": /name of a label is missing at character 2/,
    "{service=}": /value is missing at character 10/,
    '{a="1" b="2"}': /comma is missing at character 8/,
    '{a="1"} x': /unexpected text after the } at character 9/,
    '{a="\\q"}': /unknown escape \\q .* at character 5/,
  };
  for (const [text, message] of Object.entries(cases)) {
    assert.throws(() => selector.parse(text), message, text);
  }
});

test("adding a matcher replaces an equality on the same label, and twice is once", () => {
  const web = { ...SERVICE, value: "web" };

  assert.deepEqual(selector.add([SERVICE, VERSION], web), [VERSION, web]);
  assert.deepEqual(selector.add([VERSION], VERSION), [VERSION]);
  assert.deepEqual(selector.add([SERVICE], { ...web, operator: "!=" }), [
    SERVICE,
    { ...web, operator: "!=" },
  ]);
});

test("removing takes the matcher that was meant", () => {
  assert.deepEqual(selector.remove([SERVICE, VERSION], SERVICE), [VERSION]);
  assert.equal(selector.has([SERVICE], { ...SERVICE, operator: "!=" }), false);
});

test("what could be typed follows from the place of the caret", () => {
  assert.deepEqual(expectation("|"), ["name", "", ""]);
  assert.deepEqual(expectation("{|}"), ["name", "", ""]);
  assert.deepEqual(expectation("{ser|vice}"), ["name", "", "ser"]);
  assert.deepEqual(expectation('{service=|"api"}'), ["value", "service", ""]);
  assert.deepEqual(expectation('{service=|~"api"}'), ["operator", "service", "="]);
  assert.deepEqual(expectation("{service!|}"), ["operator", "service", "!"]);
  assert.deepEqual(expectation("{service |"), ["operator", "service", ""]);
  assert.deepEqual(expectation('{service= |"api"}'), ["value", "service", ""]);
  assert.deepEqual(expectation('{service="a|"}'), ["value", "service", "a"]);
  assert.deepEqual(expectation('{service="a|'), ["value", "service", "a"]);
  assert.deepEqual(expectation('{service="api"|'), ["end", "service", ""]);
  assert.deepEqual(expectation('{service="api",|}'), ["name", "service", ""]);
  assert.deepEqual(expectation('{service="api"}|'), ["done", "service", ""]);
});

test("a choice replaces what was typed and leaves the caret where typing goes on", () => {
  assert.equal(choose("|", "service"), "service=|");
  assert.equal(choose("{ser|", "service"), "{service=|");
  assert.equal(choose('{ser|="api"}', "service"), '{service|="api"}');
  assert.equal(choose("{service=|", "api"), '{service="api"|}');
  assert.equal(choose('{service="ap|"}', "api"), '{service="api"|}');
  assert.equal(choose('service="a|', 'a"b'), 'service="a\\"b"|');
});
