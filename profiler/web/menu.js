// Menu: a button that opens a popup, and the popup that selects a time range.

import { checkRadio } from "./controls.js";
import { button, set } from "./dom.js";
import { formatWindow, fromInput, toInput } from "./times.js";

/** A button that opens the popup next to it. Escape, a click or focus elsewhere closes it. */
export class Menu {
  constructor(container, { onOpen } = {}) {
    this.button = container.querySelector("button");
    this.popup = container.querySelector(".popup");
    this.onOpen = onOpen;
    this.button.addEventListener("click", () => (this.popup.hidden ? this.open() : this.close()));
    container.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || this.popup.hidden) return;
      event.stopPropagation();
      this.close();
      this.button.focus();
    });
    container.addEventListener("focusout", (event) => {
      if (event.relatedTarget && !container.contains(event.relatedTarget)) this.close();
    });
    document.addEventListener(
      "pointerdown",
      (event) => container.contains(event.target) || this.close(),
    );
  }

  open() {
    this.onOpen?.();
    this.popup.hidden = false;
    this.button.setAttribute("aria-expanded", "true");
    this.popup.querySelector("[aria-current], a, button, input")?.focus();
  }

  close() {
    this.popup.hidden = true;
    this.button.setAttribute("aria-expanded", "false");
  }
}

/** Selects a window: from presets ([from, until, name]), or by two times in the selected zone. */
export class RangePicker {
  constructor(container, { label, presets, onRange, onZone }) {
    this.menu = new Menu(container, { onOpen: () => this.#fill() });
    this.label = label;
    this.presets = presets;
    this.list = container.querySelector(".ranges");
    this.form = container.querySelector("form");
    this.from = container.querySelector("[name=from]");
    this.until = container.querySelector("[name=until]");
    this.problem = container.querySelector(".problem");
    this.onRange = onRange;
    for (const radio of container.querySelectorAll("[name=tz]")) {
      radio.addEventListener("change", () => {
        onZone(radio.value);
        this.#fill();
      });
    }
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#apply();
    });
  }

  /** `from` and `until` are texts as in the address, `window` has what they mean now in ms. */
  show({ from, until, tz, window, name }) {
    this.shown = { from, until, tz, window };
    this.menu.button.querySelector(".range-name").textContent = name;
    set(this.menu.button, {
      "aria-label": `${this.label}: ${name}`,
      title: formatWindow(window.from, window.until, tz),
    });
    checkRadio(this.form, tz);
  }

  #fill() {
    const { from, until, tz, window } = this.shown;
    this.problem.hidden = true;
    this.from.value = toInput(window.from - (window.from % 1000), tz);
    this.until.value = toInput(window.until - (window.until % 1000), tz);
    this.list.replaceChildren(
      ...this.presets.map(([start, end, name]) =>
        button({
          text: name,
          class: "quiet",
          "aria-current": start === from && end === until ? "true" : null,
          click: () => this.#choose(start, end),
        }),
      ),
    );
  }

  #apply() {
    const from = fromInput(this.from.value, this.shown.tz);
    const until = fromInput(this.until.value, this.shown.tz);
    const isWindow = from !== null && until !== null && from < until;
    this.problem.hidden = isWindow;
    this.problem.textContent = "The range must end after it starts.";
    if (isWindow) this.#choose(String(from), String(until));
  }

  #choose(from, until) {
    this.menu.close();
    this.menu.button.focus();
    this.onRange(from, until);
  }
}
