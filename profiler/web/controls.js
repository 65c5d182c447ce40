// Controls: what stands around the views. Each takes elements of index.html and callbacks, shows
// what it is told, and keeps no state that the address does not have.

import { button, debounce, el, icon, removableChip, set } from "./dom.js";
import { counted, number, safeName, share, span } from "./format.js";
import * as selector from "./selector.js";
import { colourClass } from "./timeline.js";
import { formatWindow, fromInput, toInput } from "./times.js";

const SERVICES_SHOWN = 10;
const SERVICES_SHOWN_NARROW = 5;
const NARROW_PX = 560;
const OPTIONS_SHOWN = 50;
const OPERATOR_HINTS = {
  "=": "is",
  "!=": "is not",
  "=~": "matches the pattern",
  "!~": "does not match the pattern",
};

/** Put the icons into a page's elements with `data-icon`. */
export function fillIcons(root) {
  for (const element of root.querySelectorAll("[data-icon]"))
    element.prepend(icon(element.dataset.icon));
}

/** A button that opens what stands next to it. Escape, a click or the focus elsewhere closes it. */
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

/** The selector as text, with suggestions (ARIA combobox with a list box). */
export class SelectorInput {
  #options = [];
  #active = -1;
  #completion = null;
  #asked = 0;

  /**
   * `suggest(expects, name)` gives [{value, hint}] (a promise); `onCommit(text)` takes a selector as
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
    this.#say("");
  }

  focus() {
    this.input.focus();
    this.input.select();
  }

  #commit() {
    try {
      const text = selector.print(selector.parse(this.input.value));
      this.#close();
      this.#say("");
      this.input.value = text;
      this.onCommit(text);
    } catch (error) {
      if (!(error instanceof selector.SelectorError)) throw error;
      this.#close();
      this.#say(error.message);
      this.input.setSelectionRange(error.position, this.input.value.length);
    }
  }

  #say(problem) {
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
        this.#say("");
        this.input.blur();
      } else {
        event.preventDefault();
        this.#close();
      }
    }
  }

  async #update() {
    const asked = ++this.#asked;
    this.#say("");
    let completion;
    try {
      completion = selector.completionAt(this.input.value, this.input.selectionStart);
    } catch {
      return this.#close(); // an escape half typed
    }
    const found = await this.suggest(completion.expects, completion.name);
    if (asked !== this.#asked || document.activeElement !== this.input) return;
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
    this.#asked += 1;
    this.#options = [];
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    set(this.input, { "aria-activedescendant": null });
  }
}

/** Suggestions of operators, and of what may follow a matcher. */
export function fixedSuggestions(expects) {
  if (expects === "operator")
    return selector.OPERATORS.map((value) => ({ value, hint: OPERATOR_HINTS[value] }));
  return expects === "end" ? [{ value: ",", hint: "and another label" }] : [];
}

/** A window: presets ([from, until, name]), and two times in the zone that is chosen. */
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

  /** `window` in ms is what the texts mean now. */
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

/** Services with their shares; a click chooses one or lets go of it. */
export class ServiceChips {
  #isLong = false;

  constructor(container, { onToggle }) {
    this.container = container;
    this.onToggle = onToggle;
  }

  /** `values` is [{value, samples}], `chosen` the values asked for, `colours` numbers or null. */
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
          title: `${name}: ${share(samples, total)} of the CPU time of all services, ${counted(samples, "sample")}${isChosen ? ". Click to show all" : ". Click to show it alone"}`,
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

/** Chips that can be taken away: [{text, label, remove, class?}]. */
export function showChips(container, chips) {
  container.hidden = chips.length === 0;
  container.replaceChildren(
    ...chips.map((chip) => removableChip(chip.text, chip.label, chip.remove, chip.class)),
  );
}

/** The path of the zoom: [{name, title, go}], the last where one is. */
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

/** Links to the same data as files, for other tools, and what must be known of them. */
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

/** The search box: typing searches, Enter goes on to the next match. */
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
    // What is being typed stays; what Back or a button changed is shown, whoever has the focus.
    if (!this.search.isPending() && this.input.value.trim() !== text) this.input.value = text;
    for (const each of this.buttons) each.hidden = text === "";
    if (text === "") this.found.textContent = "";
  }

  /** `place` is {index, count} of the boxes drawn, `search` the service's count of the full data. */
  say({ index, count }, search, total) {
    for (const each of this.buttons) each.disabled = count === 0;
    if (!search) {
      this.found.textContent = count ? `${number(count)} boxes` : "";
      return;
    }
    const boxes = index
      ? `${number(index)} of ${number(count)}`
      : `${number(count)} ${count === 1 ? "box" : "boxes"}`;
    const part = `${share(search.total, total)} of CPU`;
    this.found.textContent = search.functions === 0 ? "no match" : `${boxes}, ${part}`;
    this.found.title =
      search.functions === 0
        ? ""
        : `${counted(search.functions, "function")} with “${safeName(search.text)}” in the full data: ${part}, ${counted(search.samples, "sample")}. Each stack counts once.`;
  }
}

const LOSSES = {
  map_full: "a table in the kernel was full",
  map_busy: "a table in the kernel was locked by the code that was interrupted",
  budget: "the profiler held back to stay within its CPU budget",
  fault: "the profiler itself failed; its log says how",
  spool_full: "the store was away for too long, the oldest stacks were given up",
};
const STOPS = {
  root: ["complete", "reached the outermost frame"],
  kernel_thread: ["complete", "a thread of the kernel has no user stack"],
  no_user_registers: ["none", "the thread was leaving, or has no user side"],
  no_process_yet: ["cut", "the process was young, or new to the profiler"],
  no_table_yet: ["cut", "the unwind table of a file was not loaded yet"],
  no_table: ["cut", "a file without unwind information or frame pointers"],
  no_room: ["cut", "the memory for unwind tables is full of others that are in use"],
  no_mapping: ["cut", "no code is known at the address"],
  hole: ["cut", "the file's unwind information leaves this function out"],
  unsupported_rule: ["cut", "a rule for leaving the frame that is not supported"],
  register_lost: ["cut", "a rule that needs a register of the leaf"],
  bad_frame_pointer: ["cut", "compiled at run time, without frame pointers"],
  bad_stack_pointer: ["cut", "the rules lead nowhere: damaged, or a stack that was switched"],
  chain_end: ["cut", "the chain of frame pointers ended; perhaps by chance"],
  unreadable: ["cut", "the stack's memory was not there to read"],
  truncated: ["cut", "deeper than a record has room for; the leaf side is kept"],
  compat: ["cut", "a 32-bit program; its leaf is kept"],
};

/** What the figures rest on, in one line, and in full on demand. */
export class CoverageStrip {
  constructor(container) {
    this.container = container;
  }

  show({ coverage, samples, window }) {
    const isOpen = this.container.querySelector("details")?.open ?? false;
    const lost = sum(coverage.lost);
    const { hosts, skipped } = coverage;
    const facts = [];
    if (coverage.complete !== null && coverage.complete !== undefined) {
      facts.push([share(coverage.complete, 1), "of stacks complete", coverage.complete < 0.9]);
    }
    facts.push([number(lost), `sample${lost === 1 ? "" : "s"} lost`, lost > 0]);
    if (skipped.length)
      facts.push([
        number(skipped.length),
        `object${skipped.length === 1 ? "" : "s"} skipped`,
        true,
      ]);
    facts.push([number(hosts), hosts === 1 ? "host" : "hosts", false]);
    facts.push([number(samples), samples === 1 ? "sample" : "samples", false]);
    const line = facts.map(([figure, noun, isBad]) =>
      el("span", { class: isBad ? "fact bad" : "fact" }, el("b", { text: figure }), ` ${noun}`),
    );
    this.container.replaceChildren(
      el(
        "details",
        { open: isOpen },
        el("summary", {}, ...line, el("span", { class: "more" }, "Details", icon("down"))),
        this.#details(coverage, window),
      ),
    );
  }

  clear() {
    this.container.replaceChildren();
  }

  #details(coverage, window) {
    const { ticks, stored, idle, filtered } = coverage;
    const names = coverage.host_names.slice(0, 12).map(safeName);
    const listed =
      names.join(", ") +
      (coverage.hosts > names.length ? ` and ${coverage.hosts - names.length} more` : "");
    const accounts = [
      ["Ticks of the CPUs", ticks],
      ["stored as samples", stored],
      ["idle", idle],
      ["filtered", filtered],
      ["lost", sum(coverage.lost)],
    ].map(([name, count]) => [name, number(count), ticks ? share(count, ticks) : ""]);
    const losses = entries(coverage.lost).map(([cause, count]) => [
      spoken(cause),
      number(count),
      known(LOSSES, cause, ""),
    ]);
    const stops = entries(coverage.stops).map(([reason, count]) => [
      spoken(reason),
      `${number(count)} · ${share(count, stored)}`,
      known(STOPS, reason, ["", ""]).join(": ").replace(/^: $/, ""),
    ]);
    const profiledMs = coverage.profiled_ns / 1e6 / Math.max(1, coverage.hosts);
    const sources = [
      ["Hosts", number(coverage.hosts), listed],
      ["CPUs", number(coverage.cpus ?? 0), ""],
      ["Objects read", number(coverage.objects ?? 0), ""],
      [
        "Window",
        span(window.until_ms - window.from_ms),
        coverage.hosts
          ? `profiled for ${span(profiledMs)} of it${coverage.hosts > 1 ? " on average per host" : ""}`
          : "",
      ],
    ];
    return el(
      "div",
      { class: "coverage-details" },
      facts("Every tick ends in one place", accounts),
      facts("Why samples were lost", losses.length ? losses : [["nothing was lost", "", ""]]),
      facts("Where user stacks end", stops.length ? stops : [["no stacks", "", ""]]),
      facts("Where it comes from", sources),
      coverage.skipped.length
        ? facts(
            "Skipped objects: what they hold is missing here",
            coverage.skipped.map(({ key, reason }) => [key, "", reason]),
            "wide",
          )
        : null,
    );
  }
}

function facts(title, rows, className = "") {
  return el(
    "section",
    { class: className },
    el("h3", { text: title }),
    el(
      "table",
      {},
      el(
        "tbody",
        {},
        rows.map(([name, figure, why]) =>
          el(
            "tr",
            {},
            el("th", { scope: "row", text: safeName(name) }),
            el("td", { class: "num", text: figure }),
            el("td", { class: "muted", text: safeName(why) }),
          ),
        ),
      ),
    ),
  );
}

/** Look up a name from outside, which may be one that every object has. */
function known(table, name, otherwise) {
  return Object.hasOwn(table, name) ? table[name] : otherwise;
}

function spoken(name) {
  return name.replaceAll("_", " ");
}

function entries(counts) {
  return Object.entries(counts)
    .filter(([, count]) => count > 0)
    .sort((one, other) => other[1] - one[1]);
}

function sum(counts) {
  return Object.values(counts).reduce((total, count) => total + count, 0);
}

const KEYS = [
  [
    "Anywhere",
    [
      ["/", "search"],
      ["n  N", "next, previous match"],
      ["s", "selector"],
      ["t", "timeline"],
      ["g", "graph"],
      ["1  2  3", "graph, table, both"],
      ["i", "inverted or not"],
      ["v", "icicle or flame"],
      ["0", "reset the zoom"],
      ["r", "refresh"],
      ["d", "compare with before, or not"],
      ["b  a  u", "as wide as before, after, both"],
      ["c", "copy a link"],
      ["Escape", "close, let go of the selected box"],
      ["?", "this help"],
    ],
  ],
  [
    "Timeline",
    [
      ["← →", "choose a step"],
      ["Shift ← →", "extend to a range"],
      ["Enter", "show that range"],
      ["Escape", "let go"],
      ["Tab", "go on to the deployments"],
    ],
  ],
  [
    "Graph",
    [
      ["← → ↑ ↓", "go from box to box"],
      ["Enter", "zoom in"],
      ["Escape", "zoom out"],
      ["Home", "show everything"],
    ],
  ],
  [
    "Table",
    [
      ["↑ ↓", "go from row to row"],
      ["Enter", "select the function"],
    ],
  ],
];

/** Fill the help dialog. */
export function showHelp(dialog) {
  dialog.replaceChildren(
    el(
      "div",
      { class: "dialog-head" },
      el("h2", { id: "help-title", text: "Keys" }),
      button({ icon: "close", label: "Close", class: "quiet", click: () => dialog.close() }),
    ),
    el(
      "div",
      { class: "keys" },
      KEYS.map(([title, keys]) =>
        el(
          "section",
          {},
          el("h3", { text: title }),
          el(
            "dl",
            {},
            keys.map(([key, what]) =>
              el(
                "div",
                {},
                el(
                  "dt",
                  {},
                  key.split("  ").map((each) => el("kbd", { text: each })),
                ),
                el("dd", { text: what }),
              ),
            ),
          ),
        ),
      ),
    ),
    el("p", {
      class: "muted",
      text: "Drag over the timeline to look at a part of it. Click a box to zoom into it. Every step is in the address: Back undoes it, and the address can be sent to somebody else.",
    }),
  );
  dialog.showModal();
}
