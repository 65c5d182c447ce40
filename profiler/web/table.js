// Table: rows with their costs, as of functions, from all data.
//
// A plain <table>: its headings sort it, one row is in the tab order, arrow keys move between rows.

import { fullNameOf } from "./describe.js";
import { button, debounce, el } from "./dom.js";
import { cores, counted, cpuTime, number, safeName, share } from "./format.js";

/** The columns of the table of costs, for responses of /api/v1/top. */
export const COSTS = {
  id: "table-filter",
  label: "Functions by CPU time",
  noun: "function",
  hint: "Filter functions and modules",
  none: "No functions",
  columns: [
    { key: "self", title: "Self", sort: "self", class: "num", hint: "Time in the function itself" },
    { key: "self-time", title: "", class: "num optional", spoken: "Self, CPU time" },
    {
      key: "total",
      title: "Total",
      sort: "total",
      class: "num",
      hint: "Time in the function and its callees",
    },
    { key: "total-time", title: "", class: "num optional", spoken: "Total, CPU time" },
    {
      key: "cores",
      title: "Cores",
      class: "num optional",
      hint: "Total in CPU cores, averaged over the window",
    },
    { key: "name", title: "Function", sort: "name", class: "name" },
    { key: "module", title: "Module", sort: "module", class: "module optional" },
  ],
  /** `total` is the sum over all functions, `largest` the largest self time of a row. */
  cells(row, { total, windowMs, largest }) {
    const bar = el("i", { class: "bar", "aria-hidden": "true" });
    bar.style.width = `${largest ? (100 * row.self) / largest : 0}%`;
    return [
      el("td", { class: "num share" }, bar, el("span", { text: share(row.self, total) })),
      el("td", { class: "num optional muted", text: cpuTime(row.self) }),
      el("td", { class: "num", text: share(row.total, total) }),
      el("td", { class: "num optional muted", text: cpuTime(row.total) }),
      el("td", { class: "num optional", text: cores(row.total, windowMs).replace(/ cores?$/, "") }),
      el("td", { class: "name" }, rowName(row)),
      el("td", {
        class: "module optional",
        title: safeName(row.module),
        text: safeName(row.module),
      }),
    ];
  },
};
const STEPS = [200, 1000, 5000];
const FILTER_MS = 250;

/** Return the button that selects a row: its name. */
export function rowName(row) {
  return el("button", {
    type: "button",
    class: "row-name",
    tabindex: "-1",
    title: fullNameOf(row),
    text: safeName(row.function) || "(no name)",
  });
}

export class Table {
  #kind;
  #callbacks;
  #rows = [];
  #elements = [];
  #marked = null;
  #active = 0;
  #links = [];
  #nextStep = STEPS[0];

  /**
   * `kind` describes the columns, as COSTS does: `cells` makes those of a row, one of which has the
   * `rowName`; `heading(row, previous)`, if it is there, returns the heading of the section that a
   * row begins, or "". `show` may be given another kind. Callbacks: onSort(key), onFilter(text),
   * onRows(count), onHover(row | null), onSelect(row). A row is a function of the response, or
   * what its kind says.
   */
  constructor(container, kind, callbacks) {
    this.#kind = kind;
    this.#callbacks = callbacks;
    const filter = debounce((text) => callbacks.onFilter(text), FILTER_MS);
    this.isTyped = filter.isPending;
    this.filter = el("input", {
      type: "search",
      id: kind.id,
      autocomplete: "off",
      spellcheck: "false",
      on: {
        input: (event) => filter(event.target.value.trim()),
        change: (event) => filter.now(event.target.value.trim()),
      },
    });
    this.caption = el("span", { class: "muted", role: "status" });
    this.headings = el("tr");
    this.body = el("tbody", {
      on: { keydown: (event) => this.#onKey(event), mouseleave: () => callbacks.onHover(null) },
    });
    this.more = button({
      text: "Show more",
      class: "small",
      hidden: true,
      click: () => callbacks.onRows(this.#nextStep),
    });
    this.table = el("table", {}, el("thead", {}, this.headings), this.body);
    this.#showKind();
    this.scroller = el("div", { class: "table-scroll" }, this.table);
    this.head = el("div", { class: "table-head" }, this.filter, this.caption);
    container.append(this.head, this.scroller, el("div", { class: "table-more" }, this.more));
  }

  /**
   * Show rows; `all` is the number of all of them. `context` is passed to the kind's cells. If
   * `isSame`, they are those shown now with more known about them: the focus stays where it is.
   */
  show(rows, { all, sort = "", filter, limit, context, kind = this.#kind, isSame = false }) {
    if (!this.isTyped() && this.filter.value.trim() !== filter) this.filter.value = filter;
    this.#kind = kind;
    this.#showKind();
    this.#rows = rows;
    const active = isSame ? Math.min(this.#active, Math.max(0, rows.length - 1)) : 0;
    this.#nextStep = STEPS.find((step) => step > limit) ?? limit;
    this.#showHeadings(sort);
    const { activeElement: focused } = document;
    const kept = this.body.contains(focused);
    const isLink = kept && isSame && focused.matches(".row-link");
    this.#elements = rows.map((row, i) => this.#row(row, i, context));
    this.body.replaceChildren(...this.#withHeadings());
    this.#activate(active);
    if (kept) this.#focusRow(active);
    if (isLink) this.#elements[active]?.querySelector(".row-link")?.focus();
    const shown = rows.length;
    const { noun } = kind;
    this.caption.textContent =
      shown < all ? `${number(shown)} of ${counted(all, noun)}` : counted(all, noun);
    if (shown === 0)
      this.body.append(
        el(
          "tr",
          {},
          el("td", {
            class: "muted none",
            colspan: kind.columns.length,
            text: filter ? `No ${noun} matches “${safeName(filter)}”` : kind.none,
          }),
        ),
      );
    this.more.hidden = shown >= all || this.#nextStep === limit;
    this.mark(this.#marked);
    this.dim(false);
  }

  /** Mark the rows of a function ({function, module?}), and scroll to the first; null marks none. */
  mark(marked) {
    this.#marked = marked;
    let first = null;
    this.#rows.forEach((row, i) => {
      const isMarked =
        marked !== null &&
        row.function === marked.function &&
        (marked.module === undefined || row.module === marked.module);
      const element = this.#elements[i];
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

  #showKind() {
    const { label, noun, hint } = this.#kind;
    this.table.setAttribute("aria-label", label);
    this.filter.setAttribute("aria-label", hint);
    this.filter.placeholder = `Filter ${noun}s`;
  }

  #showHeadings(sort) {
    const focused = this.headings.contains(document.activeElement)
      ? document.activeElement.dataset.sort
      : null;
    this.headings.replaceChildren(
      ...this.#kind.columns.map((column) => {
        const isSorted = column.sort === sort;
        const ariaSort = isSorted
          ? ["name", "module"].includes(column.sort)
            ? "ascending"
            : "descending"
          : column.sort
            ? "none"
            : null;
        const heading = el("th", {
          scope: "col",
          class: column.class,
          "aria-sort": ariaSort,
          "aria-label": column.spoken,
          title: column.hint,
        });
        if (!column.sort) heading.append(column.title);
        else
          heading.append(
            el("button", {
              type: "button",
              class: "sort",
              text: column.title,
              data: { sort: column.sort },
              on: { click: () => this.#callbacks.onSort(column.sort) },
            }),
          );
        return heading;
      }),
    );
    const again = [...this.headings.querySelectorAll("button")];
    if (focused !== null) again.find((each) => each.dataset.sort === focused)?.focus();
  }

  #row(row, i, context) {
    const select = () => {
      this.#active = i;
      this.#callbacks.onSelect(row);
    };
    return el(
      "tr",
      {
        on: {
          click: select,
          mouseenter: () => this.#callbacks.onHover(row),
          focusin: () => this.#callbacks.onHover(row),
          focusout: () => this.#callbacks.onHover(null),
        },
      },
      this.#kind.cells(row, context),
    );
  }

  #withHeadings() {
    const { columns, heading } = this.#kind;
    return this.#elements.flatMap((element, i) => {
      const text = heading?.(this.#rows[i], this.#rows[i - 1] ?? null) ?? "";
      if (!text) return [element];
      const cell = el("th", { scope: "rowgroup", colspan: columns.length, text });
      return [el("tr", { class: "section" }, cell), element];
    });
  }

  #onKey(event) {
    const by = {
      ArrowDown: 1,
      ArrowUp: -1,
      PageDown: 15,
      PageUp: -15,
      Home: -Infinity,
      End: Infinity,
    }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    this.#focusRow(this.#active + by);
  }

  #focusRow(number) {
    const last = this.#rows.length - 1;
    if (last < 0) return;
    this.#activate(Math.min(last, Math.max(0, number)));
    const row = this.#elements[this.#active];
    row.querySelector(".row-name").focus({ preventScroll: true });
    this.#reveal(row);
  }

  /** Put a row into the tab order in place of the last one: its name, and what else it links to. */
  #activate(number) {
    for (const each of this.#links) each.setAttribute("tabindex", "-1");
    this.#active = number;
    this.#links = this.#linksOf(number);
    for (const each of this.#links) each.setAttribute("tabindex", "0");
  }

  #linksOf(number) {
    return [...(this.#elements[number]?.querySelectorAll(".row-name, .row-link") ?? [])];
  }

  /** Scroll inside the table only: the page must not jump. */
  #reveal(row) {
    const head = this.headings.offsetHeight;
    const { scrollTop, clientHeight } = this.scroller;
    if (row.offsetTop - head < scrollTop) this.scroller.scrollTop = row.offsetTop - head;
    else if (row.offsetTop + row.offsetHeight > scrollTop + clientHeight)
      this.scroller.scrollTop = row.offsetTop + row.offsetHeight - clientHeight;
  }
}
