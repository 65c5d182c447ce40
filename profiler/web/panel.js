// Panel: details of the selected box or function, and actions on it.

import { button, el } from "./dom.js";
import { cores, counted, cpuTime, namesOf, number, place, safeName, share } from "./format.js";

const FILES_SHOWN = 3;

export class DetailPanel {
  #container;
  #callbacks;

  /**
   * Callbacks: onZoom(id), onCallers(name), onFocus(name), onHide(name), onSearch(name),
   * onFilter(value, isExcluding), onRow(function), onCopy(text), onClose().
   */
  constructor(container, callbacks) {
    this.#container = container;
    this.#callbacks = callbacks;
  }

  hide() {
    this.#container.hidden = true;
    this.#container.replaceChildren();
  }

  /**
   * Show a box of the graph. `labelName` is the label whose value it is, if known; `files` are
   * [module, path, build id] of the files that its module may be.
   */
  showBox(box, { windowMs, labelName, files, isZoomed, isCallers }) {
    const { frame } = box;
    if (box.isRest) {
      this.#show(
        "Boxes too narrow to draw",
        [
          ["Total", amount(box.total, box.shareOfAll)],
          ["To see them", "zoom in, or narrow the selection"],
        ],
        [],
      );
      return;
    }
    const facts = [];
    if (frame.kind === "label")
      facts.push([
        "Label",
        labelName ? safeName(labelName) : box.depth === 0 ? "everything selected" : "label",
      ]);
    else facts.push(...moduleFacts(frame, files));
    const where = place(frame.file, frame.line);
    if (where) facts.push(["Source", safeName(where)]);
    facts.push(["Total", amount(box.total, box.shareOfAll)]);
    if (box.self !== null && box.self !== undefined) {
      facts.push([
        "Self",
        amount(box.self, box.total ? (box.self / box.total) * box.shareOfAll : 0),
      ]);
    }
    facts.push(["Cores", cores(box.total, windowMs)]);
    if (box.samples !== null && box.samples !== undefined)
      facts.push(["Samples", number(box.samples)]);
    const actions = [];
    if (box.depth > 0 && !isZoomed)
      actions.push(["Zoom", "Zoom into this box", () => this.#callbacks.onZoom(box.id)]);
    if (frame.kind === "label" && labelName) {
      actions.push([
        `Only ${labelName} ${frame.function}`,
        "Show only this value",
        () => this.#callbacks.onFilter(labelName, frame.function, false),
      ]);
      actions.push([
        "Exclude",
        "Exclude this value",
        () => this.#callbacks.onFilter(labelName, frame.function, true),
      ]);
    }
    if (frame.kind !== "label") actions.push(...this.#functionActions(frame, isCallers));
    this.#show(frame.function, facts, actions);
  }

  /** Show a function of the table, the sum of all its boxes. */
  showFunction(row, { windowMs, total, files, isCallers }) {
    const facts = moduleFacts(row, files);
    if (row.file) facts.push(["Source", safeName(row.file)]);
    facts.push(
      ["Total", amount(row.total, total ? row.total / total : 0)],
      ["Self", amount(row.self, total ? row.self / total : 0)],
      ["Cores", cores(row.total, windowMs)],
      [
        "Samples",
        `${counted(row.total_samples, "sample")}, ${number(row.self_samples)} of them in the function itself`,
      ],
    );
    const find = [
      "Find in graph",
      "Search for this function in the graph",
      () => this.#callbacks.onSearch(namesOf(row)[0]),
    ];
    this.#show(row.function, facts, [find, ...this.#functionActions(row, isCallers)]);
  }

  /**
   * Show a box or a function of a comparison; `facts` are [[term, text], ...]. `id` is the box's, and
   * `cause` the function that made most of its difference.
   */
  showChange(frame, { facts, id, cause, isZoomed, isCallers }) {
    const actions = [];
    if (id && !isZoomed)
      actions.push(["Zoom", "Zoom into this box", () => this.#callbacks.onZoom(id)]);
    if (cause)
      actions.push([
        `Show ${namesOf(cause)[0]}`,
        "Highlight the function that made most of the difference",
        () => this.#callbacks.onRow(cause),
      ]);
    if (frame.kind !== "label") actions.push(...this.#functionActions(frame, isCallers));
    this.#show(frame.function, facts, actions);
  }

  #functionActions(frame, isCallers) {
    const [name] = namesOf(frame);
    const { onCallers, onFocus, onHide, onCopy } = this.#callbacks;
    return [
      isCallers ? null : ["Callers", "Show all callers of this function", () => onCallers(name)],
      ["Focus", "Keep only stacks that contain this function", () => onFocus(name)],
      ["Hide", "Remove this function from the stacks; its callees move up", () => onHide(name)],
      ["Copy name", "Copy the function's name", () => onCopy(name)],
    ].filter(Boolean);
  }

  #show(name, facts, actions) {
    const close = button({
      icon: "close",
      label: "Close (Escape)",
      class: "quiet",
      click: () => this.#callbacks.onClose(),
    });
    this.#container.replaceChildren(
      el(
        "div",
        { class: "panel-head" },
        el("h3", { text: safeName(name) || "(no name)", title: safeName(name) }),
        close,
      ),
      el(
        "dl",
        {},
        facts.map(([term, text]) =>
          el("div", {}, el("dt", { text: term }), el("dd", { text, title: text })),
        ),
      ),
      el(
        "div",
        { class: "panel-actions" },
        actions.map(([text, title, click]) =>
          el("button", {
            type: "button",
            class: "button small",
            title,
            text: safeName(text),
            on: { click },
          }),
        ),
      ),
    );
    this.#container.hidden = false;
  }
}

/** Return module, kind, paths and build ids; several files of one name have a line each. */
function moduleFacts({ module, kind }, files) {
  const mine = files.filter(([name]) => name === module);
  const builds = mine.map(([, , build]) => build).filter((build) => !build.startsWith("["));
  const paths = [...new Set(mine.map(([, path]) => path))].filter((path) => path !== module);
  return [
    ["Module", safeName(module) || "unknown"],
    ["Kind", safeName(kind)],
    ...paths.slice(0, FILES_SHOWN).map((path) => ["Path", safeName(path)]),
    ...builds.slice(0, FILES_SHOWN).map((build) => ["Build id", safeName(build)]),
    ...(builds.length > FILES_SHOWN
      ? [["", `and ${number(builds.length - FILES_SHOWN)} more builds`]]
      : []),
  ];
}

function amount(ns, part) {
  return `${share(part, 1)} · ${cpuTime(ns)}`;
}
