// What node's test runner found, as one line of JSON a test: {name, skipped, problem}.

import { inspect } from "node:util";

export default async function* report(events) {
  for await (const { type, data } of events) {
    if (data.nesting !== 0 || (type !== "test:pass" && type !== "test:fail")) continue;
    const { error } = data.details;
    // The runner wraps what a test has thrown.
    const problem = error ? inspect(error.cause ?? error) : null;
    yield `${JSON.stringify({ name: data.name, skipped: data.skip ?? null, problem })}\n`;
  }
}
