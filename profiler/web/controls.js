// Controls: chips, breadcrumbs, downloads, search box. Each takes elements of index.html and callbacks
// and shows the values it is given; the only state is in the address.

import { button, debounce, el, icon, removableChip } from "./dom.js";
import { counted, number, safeName, share } from "./format.js";
import { colourClass } from "./scale.js";

const SERVICES_SHOWN = 10;
const SERVICES_SHOWN_NARROW = 5;
const NARROW_PX = 560;

/** Put the icons into a page's elements with `data-icon`. */
export function fillIcons(root) {
  for (const element of root.querySelectorAll("[data-icon]"))
    element.prepend(icon(element.dataset.icon));
}

/** Services with their shares; a click selects a service or clears the selection. */
export class ServiceChips {
  #isLong = false;

  constructor(container, { onToggle }) {
    this.container = container;
    this.onToggle = onToggle;
  }

  /** `values` is [{value, samples}], `chosen` the selected values, `colours` numbers by value or null. */
  show(values, chosen, colours) {
    const total = values.reduce((sum, each) => sum + each.samples, 0);
    const most = innerWidth < NARROW_PX ? SERVICES_SHOWN_NARROW : SERVICES_SHOWN;
    const shown = this.#isLong
      ? values
      : values.filter((each, i) => i < most || chosen.has(each.value));
    const chips = shown.map(({ value, samples }) => {
      const isChosen = chosen.has(value);
      const name = safeName(value);
      return el(
        "button",
        {
          type: "button",
          class: "chip service",
          "aria-pressed": String(isChosen),
          title: `${name}: ${share(samples, total)} of the CPU time of all services, ${counted(samples, "sample")}${isChosen ? ". Click to show all services" : ". Click to show only this service"}`,
          on: { click: () => this.onToggle(value, isChosen) },
        },
        colours ? el("i", { class: `swatch ${colourClass(colours.get(value))}` }) : null,
        el("span", { class: "chip-text", text: name }),
        el("span", { class: "chip-share", text: share(samples, total) }),
      );
    });
    const hidden = values.length - shown.length;
    if (values.length > most) {
      chips.push(
        button({
          text: hidden > 0 ? `${number(hidden)} more` : "Fewer",
          class: "small quiet",
          click: () => {
            this.#isLong = !this.#isLong;
            this.show(values, chosen, colours);
          },
        }),
      );
    }
    this.container.replaceChildren(...chips);
  }
}

/** Show removable chips: [{text, label, remove, class?}]. */
export function showChips(container, chips) {
  container.hidden = chips.length === 0;
  container.replaceChildren(
    ...chips.map((chip) => removableChip(chip.text, chip.label, chip.remove, chip.class)),
  );
}

/** Show the path of the zoom: [{name, title, go}], the last is the current one. */
export function showCrumbs(container, crumbs) {
  container.hidden = crumbs.length < 2;
  const last = crumbs.length - 1;
  container.replaceChildren(
    el(
      "ol",
      {},
      crumbs.map(({ name, title, go }, i) =>
        el(
          "li",
          {},
          i === last
            ? el("span", { "aria-current": "location", text: name, title })
            : el("button", { type: "button", text: name, title, on: { click: go } }),
        ),
      ),
    ),
    button({ icon: "close", text: "Reset zoom", class: "small", click: crumbs[0]?.go }),
  );
  container.firstChild.scrollLeft = container.firstChild.scrollWidth;
}

/** Show links to the data as files for other tools, with a note below them. */
export function showDownloads(container, links, note) {
  container.replaceChildren(
    ...links.map(({ href, name, hint, title }) =>
      el(
        "a",
        { href, download: name, class: "download" },
        el("b", { text: title }),
        el("span", { class: "muted", text: hint }),
      ),
    ),
    note ? el("p", { class: "note muted", text: note }) : "",
  );
}

/** Call back with a radio's value, a check box's state or a list's choice. */
export function bindChoice(container, onChange) {
  container.addEventListener("change", (event) => {
    const { type, checked, value } = event.target;
    onChange(type === "checkbox" ? checked : value);
  });
}

/** Show which radio of a group is chosen. */
export function checkRadio(container, value) {
  for (const radio of container.querySelectorAll("input[type=radio]"))
    radio.checked = radio.value === value;
}

/** The search box: typing searches, Enter goes to the next match. */
export class SearchBox {
  constructor(container, { onSearch, onStep }) {
    this.input = container.querySelector("input");
    this.found = container.querySelector("#found");
    this.buttons = [
      container.querySelector("#find-previous"),
      container.querySelector("#find-next"),
    ];
    this.search = debounce(onSearch, 250);
    this.input.addEventListener("input", () => this.search(this.input.value));
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") {
        event.preventDefault();
        this.search.now(this.input.value);
        onStep(event.shiftKey ? -1 : 1);
      } else if (event.key === "Escape") {
        event.stopPropagation();
        event.preventDefault();
        if (this.input.value === "") return this.input.blur();
        this.input.value = "";
        this.search.now("");
      }
    });
    for (const [i, each] of this.buttons.entries()) {
      each.addEventListener("click", () => onStep(i === 0 ? -1 : 1));
    }
  }

  show(text) {
    // Text being typed stays; a change by Back or a button is shown, even if the box has the focus.
    if (!this.search.isPending() && this.input.value.trim() !== text) this.input.value = text;
    for (const each of this.buttons) each.hidden = text === "";
    if (text === "") this.found.textContent = "";
  }

  /** Takes {index, count} of the drawn boxes, and the service's count over all data. */
  showCount({ index, count }, search, total) {
    for (const each of this.buttons) each.disabled = count === 0;
    if (!search) {
      this.found.textContent = count ? counted(count, "box", "boxes") : "";
      return;
    }
    const boxes = index ? `${number(index)} of ${number(count)}` : counted(count, "box", "boxes");
    const part = `${share(search.total, total)} of CPU`;
    this.found.textContent = search.functions === 0 ? "no match" : `${boxes}, ${part}`;
    this.found.title =
      search.functions === 0
        ? ""
        : `${counted(search.functions, "function")} with “${safeName(search.text)}” in all data, drawn or not: ${part}, ${counted(search.samples, "sample")}. Each stack is counted once.`;
  }
}
