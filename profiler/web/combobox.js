// Combobox: a selector as text, with suggestions while it is typed.

import { el, set } from "./dom.js";
import { safeName } from "./format.js";
import * as selector from "./selector.js";

const OPTIONS_SHOWN = 50;

const OPERATOR_HINTS = {
  "=": "is",
  "!=": "is not",
  "=~": "matches the pattern",
  "!~": "does not match the pattern",
};

/** The selector as text, with suggestions (ARIA combobox with a list box). */
export class SelectorInput {
  #options = [];
  #active = -1;
  #completion = null;
  #request = 0;

  /**
   * `suggest(expects, name)` returns a promise of [{value, hint}]; `onCommit(text)` takes a selector as
   * `print` writes it.
   */
  constructor(form, { suggest, onCommit }) {
    this.form = form;
    this.input = form.querySelector("input");
    this.list = form.querySelector("[role=listbox]");
    this.problem = form.querySelector(".problem");
    this.clear = form.querySelector(".clear");
    this.suggest = suggest;
    this.onCommit = onCommit;
    this.shown = "";
    this.input.addEventListener("input", () => this.#update());
    this.input.addEventListener("focus", () => this.#update());
    this.input.addEventListener("click", () => this.#update());
    this.input.addEventListener("blur", () => this.#close());
    this.input.addEventListener("keydown", (event) => this.#onKey(event));
    this.clear.addEventListener("click", () => this.onCommit(""));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#commit();
    });
  }

  show(text) {
    this.shown = text;
    this.clear.hidden = text === "";
    if (document.activeElement !== this.input || this.list.hidden) this.input.value = text;
    this.#showProblem("");
  }

  focus() {
    this.input.focus();
    this.input.select();
  }

  #commit() {
    try {
      const text = selector.print(selector.parse(this.input.value));
      this.#close();
      this.#showProblem("");
      this.input.value = text;
      this.onCommit(text);
    } catch (error) {
      if (!(error instanceof selector.SelectorError)) throw error;
      this.#close();
      this.#showProblem(error.message);
      this.input.setSelectionRange(error.position, this.input.value.length);
    }
  }

  #showProblem(problem) {
    this.problem.textContent = problem;
    this.problem.hidden = problem === "";
    this.input.setAttribute("aria-invalid", String(problem !== ""));
  }

  #onKey(event) {
    const count = this.#options.length;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (this.list.hidden) this.#update();
      else
        this.#choose(
          (this.#active + (event.key === "ArrowDown" ? 1 : -1) + count) % Math.max(1, count),
        );
    } else if (event.key === "Enter" && this.#active >= 0 && !this.list.hidden) {
      event.preventDefault();
      this.#take(this.#active);
    } else if (
      event.key === "Tab" &&
      !event.shiftKey &&
      !this.list.hidden &&
      count > 0 &&
      this.input.value !== this.shown
    ) {
      event.preventDefault();
      this.#take(Math.max(0, this.#active));
    } else if (event.key === "Escape") {
      event.stopPropagation();
      if (this.list.hidden) {
        this.input.value = this.shown;
        this.#showProblem("");
        this.input.blur();
      } else {
        event.preventDefault();
        this.#close();
      }
    }
  }

  async #update() {
    const request = ++this.#request;
    this.#showProblem("");
    let completion;
    try {
      completion = selector.completionAt(this.input.value, this.input.selectionStart);
    } catch {
      return this.#close(); // an incomplete escape
    }
    const found = await this.suggest(completion.expects, completion.name);
    if (request !== this.#request || document.activeElement !== this.input) return;
    const typed = completion.typed.toLowerCase();
    const begins = (option) => option.value.toLowerCase().startsWith(typed);
    const matching = found.filter((option) => option.value.toLowerCase().includes(typed));
    matching.sort((one, other) => begins(other) - begins(one));
    this.#completion = completion;
    this.#options = matching.slice(0, OPTIONS_SHOWN);
    this.#draw();
  }

  #draw() {
    this.list.replaceChildren(
      ...this.#options.map(({ value, hint }, i) =>
        el(
          "li",
          {
            id: `${this.list.id}-${i}`,
            role: "option",
            "aria-selected": "false",
            on: {
              pointerdown: (event) => {
                event.preventDefault();
                this.#take(i);
              },
            },
          },
          el("span", { text: safeName(value) }),
          hint ? el("span", { class: "muted", text: hint }) : null,
        ),
      ),
    );
    this.list.hidden = this.#options.length === 0;
    this.input.setAttribute("aria-expanded", String(!this.list.hidden));
    this.#choose(-1);
  }

  #choose(i) {
    this.#active = i;
    for (const [k, option] of [...this.list.children].entries()) {
      option.setAttribute("aria-selected", String(k === i));
    }
    set(this.input, { "aria-activedescendant": i < 0 ? null : `${this.list.id}-${i}` });
    this.list.children[i]?.scrollIntoView({ block: "nearest" });
  }

  #take(i) {
    const choice = this.#options[i].value;
    const done = selector.complete(this.input.value, this.#completion, choice);
    this.input.value = done.text;
    this.input.setSelectionRange(done.caret, done.caret);
    if (this.#completion.expects === "value") this.#commit();
    else this.#update();
  }

  #close() {
    this.#request += 1;
    this.#options = [];
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    set(this.input, { "aria-activedescendant": null });
  }
}

/** Return suggestions that do not depend on the data: operators, and what may follow a matcher. */
export function fixedSuggestions(expects) {
  if (expects === "operator")
    return selector.OPERATORS.map((value) => ({ value, hint: OPERATOR_HINTS[value] }));
  return expects === "end" ? [{ value: ",", hint: "add another label" }] : [];
}
