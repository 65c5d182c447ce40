// Toast: a short message that disappears after a while, unless it has text to copy.

import { button, el } from "./dom.js";

const SHOWN_MS = 4000;

export class Toast {
  #element;
  #timer = 0;

  constructor(element) {
    this.#element = element;
  }

  /** Show a message; `copyable` is text to copy by hand. */
  show(text, copyable) {
    const field = copyable
      ? el("input", { readonly: true, value: copyable, "aria-label": "Text to copy" })
      : null;
    const close = () => this.#element.replaceChildren();
    const parts = [el("span", { text })];
    if (field) {
      parts.push(field, button({ icon: "close", label: "Close", class: "quiet", click: close }));
    }
    this.#element.replaceChildren(...parts);
    field?.select();
    clearTimeout(this.#timer);
    if (!copyable) this.#timer = setTimeout(close, SHOWN_MS);
  }

  /** Copy text and confirm it. */
  async copy(text, done) {
    try {
      await navigator.clipboard.writeText(text);
      this.show(`${done}.`);
    } catch {
      // Browsers allow this only for secure origins.
      this.show("The browser does not allow copying here. Copy this text:", text);
    }
  }
}
