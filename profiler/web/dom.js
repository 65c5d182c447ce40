// DOM: elements from plain descriptions. Text goes in as text nodes only, never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** Drawn on a 16 x 16 grid, stroked in the colour of the text. */
const ICONS = {
  refresh: "M13.5 8A5.5 5.5 0 1 1 11.7 3.9M13.5 1.5V5H10",
  download: "M8 2v8M4.5 7 8 10.5 11.5 7M2.5 13.5h11",
  link: "M6.5 9.5a3 3 0 0 0 4.2 0l2.4-2.4a3 3 0 0 0-4.2-4.2L8 3.8M9.5 6.5a3 3 0 0 0-4.2 0L2.9 8.9a3 3 0 0 0 4.2 4.2l.9-.9",
  theme: "M8 2.5v11M8 13.5a5.5 5.5 0 0 1 0-11 5.5 5.5 0 0 1 0 11ZM8 5l4.3-1.5M8 8h5.4M8 11l4.3 1.5",
  help: "M5.8 6a2.2 2.2 0 1 1 3.3 1.9c-.7.4-1.1.8-1.1 1.6M8 12.2v.1",
  close: "M4 4l8 8M12 4l-8 8",
  down: "M4 6l4 4 4-4",
  up: "M4 10l4-4 4 4",
  next: "M6 4l4 4-4 4",
  clock: "M8 4.5V8l2.4 1.6M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12Z",
  search: "M7 12A5 5 0 1 0 7 2a5 5 0 0 0 0 10ZM10.6 10.6 14 14",
  wide: "M2 8h12M5 5 2 8l3 3M11 5l3 3-3 3",
  compare: "M2 3.5h5v3H2zM2 9.5h9v3H2zM9.5 5h4.5M12 3l2 2-2 2",
  deploy: "M8 13.5V3M4.5 6.5 8 3l3.5 3.5M3 13.5h10",
  swap: "M5 13V3M2.5 5.5 5 3l2.5 2.5M11 3v10M8.5 10.5 11 13l2.5-2.5",
  zoom: "M7 12A5 5 0 1 0 7 2a5 5 0 0 0 0 10ZM10.6 10.6 14 14M7 5v4M5 7h4",
};

/**
 * Make an element. `properties`: `class`, `text`, `on` ({event: listener}), `data` (dataset), else
 * attributes; false and null leave one out, true sets it empty. Children are nodes or text.
 */
export function el(name, properties = {}, ...children) {
  const element = document.createElement(name);
  set(element, properties);
  element.append(
    ...children.flat().filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/** The same for SVG. */
export function svg(name, properties = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  set(element, properties);
  element.append(...children);
  return element;
}

/** Change an element as `el` makes it. */
export function set(element, { on = {}, data = {}, text, ...attributes }) {
  for (const [event, listener] of Object.entries(on)) element.addEventListener(event, listener);
  Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) element.removeAttribute(name);
    else element.setAttribute(name, value === true ? "" : value);
  }
  if (text !== undefined) element.textContent = text;
}

export function icon(name) {
  const path = svg("path", { d: ICONS[name] });
  return svg(
    "svg",
    { class: "icon", viewBox: "0 0 16 16", "aria-hidden": "true", focusable: "false" },
    path,
  );
}

/** A button with an icon, a text, or both; one without text has `label` as its name and tooltip. */
export function button({ icon: iconName, text, label, class: className = "", click, ...rest }) {
  const name = label ? { "aria-label": label, title: label } : {};
  return el(
    "button",
    {
      type: "button",
      class: `button ${className}`.trim(),
      on: click ? { click } : {},
      ...name,
      ...rest,
    },
    iconName ? icon(iconName) : null,
    text ? el("span", { text }) : null,
  );
}

/** A chip with a button that removes it. */
export function removableChip(text, label, remove, className = "") {
  return el(
    "span",
    { class: `chip ${className}`.trim(), role: "listitem" },
    el("span", { class: "chip-text", text, title: text }),
    button({ icon: "close", label, class: "chip-remove", click: remove }),
  );
}

/**
 * Keep calling back at most once per `ms`, with the last arguments; `now` calls at once, `isPending`
 * returns whether a call is pending.
 */
export function debounce(callback, ms) {
  let timer = 0;
  const later = (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => later.now(...args), ms);
  };
  later.now = (...args) => {
    clearTimeout(timer);
    timer = 0;
    callback(...args);
  };
  later.isPending = () => timer !== 0;
  return later;
}

/** Return whether a key was typed into something that takes text. */
export function isTyping(event) {
  return (
    event.target.closest?.("input:not([type=checkbox]), textarea, select, [contenteditable]") !==
    null
  );
}

/**
 * Return a function that returns whether the values of a view differ from the last call's, so that an
 * unchanged view is not drawn again; `forget(view)` makes the next call return true.
 */
export function changeTracker() {
  const drawnFrom = new Map();
  const isNew = (view, ...values) => {
    const before = drawnFrom.get(view);
    drawnFrom.set(view, values);
    return !before || values.some((value, i) => value !== before[i]);
  };
  isNew.forget = (view) => drawnFrom.delete(view);
  return isNew;
}
