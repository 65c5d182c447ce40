// The flame graph's elements around its canvas: outlines, tooltip, text for screen readers.

/** Make the elements of a graph; the caller puts `root` into the page. */
export function makeParts(document) {
  const make = (tag, className, parent, attributes = {}) => {
    const element = document.createElement(tag);
    element.className = className;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    parent?.append(element);
    return element;
  };
  const root = make("div", "flame", null);
  const scroller = make("div", "flame-scroller", root);
  const space = make("div", "flame-space", scroller);
  const canvas = make("canvas", "flame-canvas", space, {
    role: "application",
    tabindex: "0",
    "aria-roledescription": "flame graph",
    "aria-label": "Flame graph",
  });
  const outline = (className) =>
    make("div", `flame-outline ${className}`, space, { "aria-hidden": "true" });
  const selected = outline("flame-selected");
  const hovered = outline("flame-hovered");
  const tooltip = make("div", "flame-tooltip", root, { role: "tooltip" });
  const live = make("div", "flame-live", root, { "aria-live": "polite", role: "status" });
  for (const element of [selected, hovered, tooltip]) element.hidden = true;
  return { root, scroller, space, canvas, selected, hovered, tooltip, live };
}

export function fillTooltip(tooltip, { name, where, file, rows, hint }) {
  const { ownerDocument: document } = tooltip;
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    element.className = className;
    element.textContent = text;
    return element;
  };
  const table = make("table", "flame-tooltip-numbers", "");
  for (const [title, value, part] of rows) {
    const row = make("tr", "", "");
    row.append(make("th", "", title), make("td", "", value), make("td", "", part));
    table.append(row);
  }
  const lines = [
    ["flame-tooltip-name", name],
    ["flame-tooltip-where", where],
    ["flame-tooltip-where", file],
  ]
    .filter(([, text]) => text)
    .map(([className, text]) => make("div", className, text));
  if (hint) lines.push(make("div", "flame-tooltip-where", hint));
  tooltip.replaceChildren(...lines, table);
}

// Below and right of the point, or above it if there is no room; always inside the window.
export function placeTooltip(tooltip, x, y, gap, keepClearPx = 0) {
  const { offsetWidth: width, offsetHeight: height } = tooltip;
  const { clientWidth, clientHeight } = tooltip.ownerDocument.documentElement;
  const left = Math.max(4, Math.min(x + gap, clientWidth - width - 4));
  const below = y + gap + height <= clientHeight - 4;
  const top = below ? y + gap : Math.max(4, y - keepClearPx - gap - height);
  tooltip.style.left = `${left}px`;
  tooltip.style.top = `${top}px`;
}

/** Call back when the graph is resized, the page scrolls or the colour scheme changes. */
export function watch({ root, scroller, canvas }, { onResize, onScroll, onScheme }) {
  const sizes = new ResizeObserver(() => {
    const isOther =
      scroller.clientWidth !== parseFloat(canvas.style.width) ||
      scroller.clientHeight !== parseFloat(canvas.style.height);
    if (isOther) onResize();
  });
  sizes.observe(scroller);
  window.addEventListener("scroll", onScroll, { passive: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onScheme);
  const theme = new MutationObserver(onScheme);
  const html = root.ownerDocument.documentElement;
  theme.observe(html, { attributeFilter: ["class", "style", "data-theme", "data-scheme"] });
}

// A message is handled after the frame that the callback of an animation frame belongs to.
export function afterPaint(done) {
  requestAnimationFrame(() => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      done();
    };
    port2.postMessage(null);
  });
}
