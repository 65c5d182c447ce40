// Table: functions with what they cost, from the full data; the flame graph's other form.
//
// A plain <table>: sorted by its headings, one row in the tab order, arrows move between rows.

import {button, debounce, el} from "./dom.js";
import {cores, counted, cpuTime, number, safeName, share} from "./format.js";

const COLUMNS = [
  {key: "self", title: "Self", sort: "self", class: "num", hint: "Time in the function itself"},
  {key: "self-time", title: "", class: "num optional", spoken: "Self, CPU time"},
  {key: "total", title: "Total", sort: "total", class: "num", hint: "Time in the function and in what it calls"},
  {key: "total-time", title: "", class: "num optional", spoken: "Total, CPU time"},
  {key: "cores", title: "Cores", class: "num optional", hint: "Total as CPU cores, on average over the window"},
  {key: "name", title: "Function", sort: "name", class: "name"},
  {key: "module", title: "Module", sort: "module", class: "module optional"},
];
const STEPS = [200, 1000, 5000];
const FILTER_MS = 250;

export class FunctionTable {
  #callbacks;
  #rows = [];
  #marked = null;
  #active = 0;
  #largest = 0;
  #nextStep = STEPS[0];

  /**
   * Callbacks: onSort(key), onFilter(text), onRows(count), onHover(row | null), onSelect(row). A row
   * is a function as /api/v1/top gives it.
   */
  constructor(container, callbacks) {
    this.#callbacks = callbacks;
    const filter = debounce((text) => callbacks.onFilter(text), FILTER_MS);
    this.isTyped = filter.isPending;
    this.filter = el("input", {
      type: "search", id: "table-filter", placeholder: "Filter functions", "aria-label": "Filter functions and modules",
      autocomplete: "off", spellcheck: "false",
      on: {input: (event) => filter(event.target.value.trim()), change: (event) => filter.now(event.target.value.trim())},
    });
    this.caption = el("span", {class: "muted", role: "status"});
    this.headings = el("tr");
    this.body = el("tbody", {on: {keydown: (event) => this.#onKey(event), mouseleave: () => callbacks.onHover(null)}});
    this.more = button({text: "Show more", class: "small", click: () => callbacks.onRows(this.#nextStep)});
    this.table = el("table", {"aria-label": "Functions by CPU time"}, el("thead", {}, this.headings), this.body);
    this.scroller = el("div", {class: "table-scroll"}, this.table);
    container.append(el("div", {class: "table-head"}, this.filter, this.caption), this.scroller, el("div", {class: "table-more"}, this.more));
  }

  /** Show an answer of /api/v1/top; `windowMs` is its length in time. */
  show(answer, {sort, filter, rows, windowMs}) {
    if (!this.isTyped() && this.filter.value.trim() !== filter) this.filter.value = filter;
    this.#rows = answer.functions;
    this.#largest = Math.max(0, ...answer.functions.map((row) => row.self));
    this.#active = 0;
    this.#nextStep = STEPS.find((step) => step > rows) ?? rows;
    this.#showHeadings(sort);
    const kept = this.body.contains(document.activeElement);
    this.body.replaceChildren(...answer.functions.map((row, i) => this.#row(row, i, answer, windowMs)));
    if (kept) this.#focusRow(0);
    const all = answer.rows ?? answer.functions.length;
    const shown = answer.functions.length;
    this.caption.textContent = shown < all ? `${number(shown)} of ${counted(all, "function")}` : counted(all, "function");
    if (shown === 0) this.body.append(el("tr", {}, el("td", {class: "muted none", colspan: COLUMNS.length, text: filter ? `No function matches “${safeName(filter)}”` : "No functions"})));
    this.more.hidden = shown >= all || this.#nextStep === rows;
    this.mark(this.#marked);
    this.dim(false);
  }

  /** Mark the rows of a function ({function, module?}), and show the first; null marks none. */
  mark(wanted) {
    this.#marked = wanted;
    let first = null;
    this.#rows.forEach((row, i) => {
      const isMarked = wanted !== null && row.function === wanted.function && (wanted.module === undefined || row.module === wanted.module);
      const element = this.body.children[i];
      element.classList.toggle("marked", isMarked);
      element.toggleAttribute("aria-current", isMarked);
      if (isMarked) first ??= element;
    });
    if (first && !this.body.contains(document.activeElement)) this.#reveal(first);
  }

  /** Show that the rows are out of date. */
  dim(isDim) {
    this.table.classList.toggle("stale", isDim);
  }

  focus() {
    this.#focusRow(this.#active);
  }

  #showHeadings(sort) {
    this.headings.replaceChildren(...COLUMNS.map((column) => {
      const isSorted = column.sort === sort;
      const ariaSort = isSorted ? (["name", "module"].includes(sort) ? "ascending" : "descending") : column.sort ? "none" : null;
      const heading = el("th", {scope: "col", class: column.class, "aria-sort": ariaSort, "aria-label": column.spoken, title: column.hint});
      if (!column.sort) heading.append(column.title);
      else heading.append(el("button", {type: "button", class: "sort", text: column.title, data: {sort: column.sort}, on: {click: () => this.#callbacks.onSort(column.sort)}}));
      return heading;
    }));
  }

  #row(row, i, answer, windowMs) {
    const name = safeName(row.function) || "(no name)";
    const select = () => {
      this.#active = i;
      this.#callbacks.onSelect(row);
    };
    const bar = el("i", {class: "bar", "aria-hidden": "true"});
    bar.style.width = `${this.#largest ? (100 * row.self) / this.#largest : 0}%`;
    return el("tr", {
      on: {
        click: select,
        mouseenter: () => this.#callbacks.onHover(row),
        focusin: () => this.#callbacks.onHover(row),
        focusout: () => this.#callbacks.onHover(null),
      },
    },
    el("td", {class: "num share"}, bar, el("span", {text: share(row.self, answer.total)})),
    el("td", {class: "num optional muted", text: cpuTime(row.self)}),
    el("td", {class: "num", text: share(row.total, answer.total)}),
    el("td", {class: "num optional muted", text: cpuTime(row.total)}),
    el("td", {class: "num optional", text: cores(row.total, windowMs).replace(/ cores?$/, "")}),
    el("td", {class: "name"}, el("button", {type: "button", class: "row-name", tabindex: i === 0 ? "0" : "-1", title: name, text: name})),
    el("td", {class: "module optional", title: safeName(row.module), text: safeName(row.module)}));
  }

  #onKey(event) {
    const by = {ArrowDown: 1, ArrowUp: -1, PageDown: 15, PageUp: -15, Home: -Infinity, End: Infinity}[event.key];
    if (by === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    this.#focusRow(this.#active + by);
  }

  #focusRow(wanted) {
    const last = this.#rows.length - 1;
    if (last < 0) return;
    this.#buttonOf(this.#active)?.setAttribute("tabindex", "-1");
    this.#active = Math.min(last, Math.max(0, wanted));
    const name = this.#buttonOf(this.#active);
    name.setAttribute("tabindex", "0");
    name.focus({preventScroll: true});
    this.#reveal(this.body.children[this.#active]);
  }

  #buttonOf(i) {
    return this.body.children[i]?.querySelector("button");
  }

  /** Scroll inside the table alone: the page must not jump. */
  #reveal(row) {
    const head = this.headings.offsetHeight;
    const {scrollTop, clientHeight} = this.scroller;
    if (row.offsetTop - head < scrollTop) this.scroller.scrollTop = row.offsetTop - head;
    else if (row.offsetTop + row.offsetHeight > scrollTop + clientHeight) this.scroller.scrollTop = row.offsetTop + row.offsetHeight - clientHeight;
  }
}
