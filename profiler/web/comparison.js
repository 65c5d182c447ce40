// Comparison: the card with both sides, the verdict, and what to try next.

import { nextSteps, Sides, Verdict } from "./compare.js";
import { beforeQuery, SAME } from "./state.js";

const byId = (id) => document.getElementById(id);

export class Comparison {
  #page;

  /** `page` has state, selection and loader, and applies changes (page.js). */
  constructor(page) {
    const { change, toggleComparison, toolbar } = page;
    this.#page = page;
    this.sides = new Sides(byId("comparison"), {
      suggest: (expects, name) => toolbar.suggest(expects, name),
      onWindow: (from, until) => change({ before_from: from, before_until: until }),
      onQuery: (query) => change({ before_query: query === page.state.q ? SAME : query }),
      onSwap: () => change(page.selection.swapped()),
      onEnd: () => {
        byId("compare-button").focus();
        toggleComparison();
      },
    });
    this.verdict = new Verdict(byId("verdict"));
  }

  /** Show what depends only on the state. */
  render() {
    const { state, selection } = this.#page;
    const { isComparison, window, before } = selection;
    byId("comparison").hidden = !isComparison;
    if (!isComparison) return;
    const after = { ...window, query: state.q };
    this.sides.show({ ...before, query: beforeQuery(state) }, after, state);
  }

  /** Show the verdict, with the number of changed functions when it is known. */
  draw() {
    const { change, loader, selection } = this.#page;
    const { response, error } = loader.of("diff");
    if (!selection.isComparison || !response || error) return;
    const changes = loader.of("changes");
    const isThere = changes.response && !changes.error && !changes.isOld;
    const steps = nextSteps(response, {
      onHalve: () => change(selection.halved()),
      onAll: () => change({ changes: "all" }),
      onYesterday: () => change({ before_from: "-1d", before_until: "" }),
    });
    this.sides.showFacts(response);
    this.verdict.show(response, isThere ? changes.response.functions : null, steps);
  }

  /** Show a text in place of a verdict. */
  clear(text) {
    this.sides.showFacts(null);
    this.verdict.clear(text);
  }
}
