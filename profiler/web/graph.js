// The flame graph on a canvas: drawing, pointer, keyboard, tooltip, what a screen reader says.
//
//   import {FlameGraphView} from "./graph.js";
//   const view = new FlameGraphView(container, {onZoom, onSelect, onHover});
//
// `container` is an empty block element; the view fills its width and is as high as its rows, at
// most `--flame-max-height` (graph.css; default 78vh), beyond which it scrolls inside. The page
// loads graph.css beside its own style sheet.
//
// Methods
//   show(answer, {view, colour, factsOf, zoomPath, arrivedAt})
//       Draw an answer of /api/v1/flamegraph, or a view of a comparison (layout.js), at once. view:
//       "icicle" (root on top; the default) or "flame". colour: "kind" (default), "module", "self"
//       or "change". factsOf(box): what the tooltip says of a box, {rows: [[name, value, share], ...],
//       hint}; left out, what it costs. zoomPath: null, or frames
//       [[function, module, kind], ...] from below the overall root, as onZoom gives them: zoom
//       into that node inside of this answer (as far down as it is there). arrivedAt:
//       performance.now() of the answer's arrival, where the measure `everflame:first-paint`
//       begins. Every call gives all options: what is left out has its default.
//       An answer without boxes (empty, or a total of 0) is drawn as nothing, 0 px high.
//   highlight(wanted)    Light up boxes whose function or module has this text, or those of one
//                        {function, module}; "" ends it. Survives show(). Gives {index, count} as
//                        step() does.
//   step(+1 | -1)        Select the next or previous match, scroll to it: {index, count}, index
//                        counts from 1, 0 when none is selected. Wraps around.
//   select(id | null)    Select the box with this node id (16 hex digits), scroll to it. Gives
//                        whether it is there. Does not call onSelect.
//   zoom(id | null)      Zoom as a click does (null: the overall root); calls onZoom.
//   resize()             Fit to the container. Called by itself when the container's width changes.
//   recolour()           Read the colours again. Called by itself when the system's scheme
//                        changes; call it after switching `color-scheme` or `data-theme` on <html>.
//   dim(isDim)           Show that what is drawn is out of date.
//   focus()              Put the keyboard focus on the graph.
//   destroy()            Remove everything.
//   width                Pixels (CSS) that the graph is wide: what to ask the service for.
//
// Callbacks (each may be left out)
//   onZoom(id, path)     The user zoomed to this node; the view has already drawn it from what it
//                        has. id: 16 hex digits, null for the overall root. path: frames
//                        [[function, module, kind], ...] from below the overall root, the node last.
//                        When the node lies above this answer's root there is nothing yet to draw:
//                        the view stays as it is until show().
//   onSelect(box | null) The user selected a box (click, arrows, step) or nothing.
//   onHover(box | null)  The pointer is on another box.
//   box: {id, path, frame: {function, module, kind, file, line}, total, self, samples, depth,
//         share, shareOfAll, isRest, verdict, before, after, cause}
//       total, self in the answer's unit (self is null for ancestors above the answer's root);
//       share is of the node zoomed to, shareOfAll of the answer's `total`; depth 0 is the overall
//       root; isRest: a sum of boxes too narrow to draw (its id and path are its parent's). Of a
//       comparison alone: what it says of the box, both sides in its unit, and the frame of what
//       changed below it, which made most of the box's own difference, or null.
//
// Measures for benchmarks (performance.getEntriesByName):
//   everflame:first-paint   from the answer's arrival until it is painted
//   everflame:zoom          from the click or key until it is painted; what the callbacks do is in it

import {
  boxColour,
  changeColour,
  changeSign,
  dimColour,
  fadeColour,
  isNeutral,
  matchColour,
} from "./colour.js";
import { cores, counted, number, place, quantity, safeName, share, shorten } from "./format.js";
import {
  CHANGED,
  ROOT_ID,
  boxOf,
  comparedTo,
  graphOf,
  hit,
  layOut,
  neighbour,
  stepMatch,
  sumOf,
} from "./layout.js";

const ROW_PX = 20;
const GAP_PX = 1;
const FONT = '12px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace';
const TEXT_INSET_PX = 4;
const TEXT_LEAST_PX = 30;
const TOOLTIP_GAP_PX = 14;
/** Browsers draw nothing on a canvas that is wider or higher than this in device pixels. */
const CANVAS_LIMIT = 32767;
const CACHED_TEXTS = 20000;

const KIND_NAMES = { jit: "JIT", go: "Go", java: "Java", node: "Node.js", python: "Python" };

/** A canvas that shows one answer of the service. */
export class FlameGraphView {
  #callbacks;
  #parts;
  #watchers;
  #context;
  #graph = null;
  #answer = null;
  #view = "icicle";
  #colour = "kind";
  #factsOf = null;
  #boxes = null;
  #rows = 0;
  /** The node that was asked for; above the answer's root it is not drawn until the next show(). */
  #asked = 0;
  #selected = null;
  #hovered = -1;
  /** The node whose tooltip the keyboard opened. */
  #told = null;
  #searched = "";
  #isMatch = null;
  #matches = [];
  #scheme = null;
  #colours = new Map();
  #texts = new Map();
  #hatchings = new Map();
  #cellPx = 7.2;
  #frameRequest = 0;

  constructor(container, { onZoom, onSelect, onHover } = {}) {
    this.#callbacks = { onZoom, onSelect, onHover };
    this.#parts = makeParts(container.ownerDocument);
    container.append(this.#parts.root);
    this.#context = this.#parts.canvas.getContext("2d", { alpha: false });
    // Nothing is black until the first answer is drawn.
    this.#parts.canvas.width = this.#parts.canvas.height = 0;
    this.#listen();
    this.#watchers = this.#watch();
    this.#readScheme();
  }

  get width() {
    return this.#parts.scroller.clientWidth;
  }

  show(
    answer,
    { view = "icicle", colour = "kind", factsOf = null, zoomPath = null, arrivedAt = null } = {},
  ) {
    const start = arrivedAt ?? performance.now();
    const selectedPath = this.#selected === null ? null : this.#graph.pathOf(this.#selected);
    const isOtherView = view !== this.#view || this.#graph === null;
    this.#graph = graphOf(answer);
    this.#boxes = null;
    this.#answer = answer;
    this.#view = view;
    this.#colour = colour;
    this.#factsOf = factsOf;
    this.#colours.clear();
    this.#asked = zoomPath ? Math.max(0, this.#graph.findPath(zoomPath)) : 0;
    this.#selected = selectedPath ? exactly(this.#graph, selectedPath) : null;
    this.#findMatches();
    this.#hide();
    this.#layOut();
    if (isOtherView) this.#parts.scroller.scrollTop = view === "flame" ? this.#rows * ROW_PX : 0;
    this.#draw();
    afterPaint(() => {
      performance.measure("everflame:first-paint", { start, end: performance.now() });
      // A click asks for ids, which take some ms for thousands of boxes: there is time for it now.
      requestIdleCallback(() => this.#graph.findId(ROOT_ID));
    });
  }

  highlight(wanted) {
    if (!isSameSearch(wanted, this.#searched)) {
      this.#searched = wanted;
      this.#findMatches();
      this.#draw();
    }
    return this.#place();
  }

  step(direction) {
    const at = stepMatch(this.#matches, this.#selected, direction);
    if (at < 0) return { index: 0, count: 0 };
    this.#selectNode(this.#matches[at]);
    return this.#place();
  }

  select(id) {
    const node = id === null ? null : (this.#graph?.findId(id) ?? null);
    this.#selected = node;
    this.#showSelection();
    return node !== null;
  }

  zoom(id) {
    if (!this.#graph) return;
    const node = id === null ? this.#graph.top : this.#graph.findId(id);
    if (node !== null) this.#zoomTo(node);
  }

  resize() {
    if (!this.#graph) return;
    this.#hide();
    this.#layOut();
    this.#draw();
  }

  recolour() {
    this.#readScheme();
    this.#draw();
  }

  dim(isDim) {
    this.#parts.root.classList.toggle("is-dim", isDim);
  }

  focus() {
    this.#parts.canvas.focus({ preventScroll: true });
  }

  destroy() {
    cancelAnimationFrame(this.#frameRequest);
    for (const stop of this.#watchers) stop();
    this.#parts.root.remove();
  }

  // Laying out

  get #zoomed() {
    return Math.max(0, this.#asked);
  }

  #layOut() {
    const { scroller, space, canvas } = this.#parts;
    const [rowsBefore, { scrollTop }] = [this.#rows, scroller];
    // A scroll bar takes width, and less width may mean fewer rows: counting them without it keeps
    // it from coming and going for ever.
    const isThere = this.#graph.size > 0 && this.#graph.totalOf(this.#zoomed) > 0;
    const widest = isThere ? scroller.offsetWidth : 0;
    this.#boxes = layOut(this.#graph, this.#zoomed, widest);
    this.#rows = this.#boxes.rows;
    space.style.height = `${this.#rows * ROW_PX}px`;
    if (this.#view === "flame") {
      // With the root at the bottom, rows keep their distance to the bottom.
      const added = (this.#rows - rowsBefore) * ROW_PX;
      scroller.scrollTop = rowsBefore > 0 ? scrollTop + added : this.#rows * ROW_PX;
    }
    canvas.setAttribute("aria-label", this.#description());
    this.#fit(widest);
  }

  // Fit boxes and canvas to the room that a scroll bar leaves.
  #fit(widest) {
    const { canvas, scroller } = this.#parts;
    const { clientWidth: width, clientHeight: height } = scroller;
    if (widest > width) this.#boxes = layOut(this.#graph, this.#zoomed, width);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * this.#ratio);
    canvas.height = Math.round(height * this.#ratio);
    this.#listMatches();
  }

  get #ratio() {
    const { clientWidth, clientHeight } = this.#parts.scroller;
    const most = CANVAS_LIMIT / Math.max(1, clientWidth, clientHeight);
    return Math.min(devicePixelRatio || 1, most);
  }

  #topOf(row) {
    return (this.#view === "flame" ? this.#rows - 1 - row : row) * ROW_PX;
  }

  #rowAt(y) {
    const line = Math.floor(y / ROW_PX);
    return this.#view === "flame" ? this.#rows - 1 - line : line;
  }

  // Drawing

  #draw() {
    if (!this.#graph || !this.#boxes) return;
    const { canvas, scroller } = this.#parts;
    const context = this.#context;
    const ratio = this.#ratio;
    const { scrollTop, clientHeight, clientWidth } = scroller;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = this.#scheme.background;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.font = FONT;
    context.textBaseline = "middle";
    const hatching = this.#hatching(ratio);
    const edges = [this.#rowAt(scrollTop), this.#rowAt(scrollTop + clientHeight - 1)];
    const first = Math.max(0, Math.min(...edges));
    const last = Math.min(this.#boxes.rows - 1, Math.max(...edges));
    for (let row = first; row <= last; row += 1) {
      this.#drawRow(row, this.#topOf(row) - scrollTop, clientWidth, ratio, hatching);
    }
    this.#placeOutlines();
  }

  #drawRow(row, top, right, ratio, hatching) {
    const context = this.#context;
    const { x, width, node, cutEnd, rowStart } = this.#boxes;
    const height = ROW_PX - GAP_PX;
    for (let i = rowStart[row]; i < rowStart[row + 1]; i += 1) {
      // On whole device pixels edges stay sharp, and neighbours neither overlap nor gape.
      const start = Math.round(x[i] * ratio) / ratio;
      const end = Math.min(right, Math.round((x[i] + width[i]) * ratio) / ratio);
      const gap = width[i] > 3 ? GAP_PX : 0;
      const drawn = Math.max(1 / ratio, end - start - gap);
      const colour = this.#colourOf(node[i], cutEnd[i] !== 0);
      context.fillStyle = colour.fill;
      context.fillRect(start, top, drawn, height);
      if (cutEnd[i] !== 0 || this.#graph.frameOf(node[i]).kind === "rest") {
        context.fillStyle = hatching;
        context.fillRect(start, top, drawn, height);
        continue;
      }
      if (colour.mark) this.#drawMark(colour, start, top, drawn, ratio);
      if (drawn >= TEXT_LEAST_PX) {
        context.fillStyle = colour.text;
        const shown = this.#fitted(this.#titleOf(node[i]), drawn - 2 * TEXT_INSET_PX);
        context.fillText(shown, start + TEXT_INSET_PX, top + height / 2 + 0.5);
      }
      if (colour.isFound) this.#strokeBox(start, top, drawn, this.#scheme.foreground, []);
    }
  }

  // Marks say without colour what changes are.
  #drawMark({ mark, line }, start, top, width, ratio) {
    const context = this.#context;
    if (mark === "hatched") {
      context.fillStyle = this.#hatching(ratio, line);
      context.fillRect(start, top, width, ROW_PX - GAP_PX);
    } else if (mark === "dashed") {
      this.#strokeBox(start, top, width, line, [4, 3]);
    } else {
      context.fillStyle = line;
      for (let x = start; x < start + width - 1; x += 4) context.fillRect(x, top + 17, 2, 2);
    }
  }

  #strokeBox(start, top, width, colour, dash) {
    const context = this.#context;
    context.strokeStyle = colour;
    context.lineWidth = 1.5;
    context.setLineDash(dash);
    context.strokeRect(start + 0.75, top + 0.75, Math.max(0, width - 1.5), ROW_PX - GAP_PX - 1.5);
  }

  #titleOf(node) {
    const name = nameOf(this.#graph.frameOf(node));
    const sign = changeSign(this.#graph.verdictOf(node));
    return sign ? `${sign} ${name}` : name;
  }

  #colourOf(node, isSum) {
    const { isDark } = this.#scheme;
    const isFound = this.#isMatch?.has(node) && !isSum;
    if (this.#colour === "change") return this.#colourOfChange(node, isSum, isFound);
    if (isFound) return matchColour(isDark);
    const isAbove = node < this.#zoomed && this.#graph.isWithin(this.#zoomed, node);
    const change = this.#isMatch ? dimColour : isAbove ? fadeColour : null;
    if (isSum) return this.#frameColour({ kind: "rest", module: "" }, "rest", 0, change);
    const frame = this.#graph.frameOf(node);
    if (this.#colour === "self") {
      const own = isAbove ? 0 : this.#graph.selfOf(node) / (this.#graph.wholeTotal || 1);
      const step = Math.round(own * 400);
      const key = isNeutral(frame) ? frame.kind : `self ${step}`;
      return this.#frameColour(frame, key, step / 400, change);
    }
    const key = node < 0 ? `above ${node}` : this.#graph.frame[node];
    return this.#frameColour(frame, key, 0, change);
  }

  // What changed keeps its colour when it is found: the colour is the answer.
  #colourOfChange(node, isSum, isFound) {
    const { isDark } = this.#scheme;
    const key = isSum ? "" : this.#graph.verdictOf(node);
    const colour = changeColour(key, isDark);
    if (!this.#isMatch) return colour;
    return isFound ? { ...colour, isFound } : dimColour(colour, isDark);
  }

  #frameColour(frame, key, selfShare, change) {
    const { isDark } = this.#scheme;
    if (!this.#colours.has(change)) this.#colours.set(change, new Map());
    const cache = this.#colours.get(change);
    let colour = cache.get(key);
    if (!colour) {
      colour = boxColour(frame, this.#colour, isDark, selfShare);
      if (change) colour = change(colour, isDark);
      cache.set(key, colour);
    }
    return colour;
  }

  #fitted(name, width) {
    const length = Math.floor(width / this.#cellPx);
    const key = `${length} ${name}`;
    let text = this.#texts.get(key);
    if (text === undefined) {
      text = shorten(name, length);
      // Other scripts are wider than the font's cell.
      for (
        let fit = length - 1;
        fit > 0 && !isAscii(text) && this.#measure(text) > width;
        fit -= 1
      ) {
        text = shorten(name, fit);
      }
      if (this.#texts.size >= CACHED_TEXTS) this.#texts.clear();
      this.#texts.set(key, text);
    }
    return text;
  }

  #measure(text) {
    return this.#context.measureText(text).width;
  }

  #hatching(ratio, colour = this.#scheme.isDark ? "#4a515c" : "#bfc5ce") {
    const key = `${ratio} ${colour}`;
    if (!this.#hatchings.has(key)) {
      this.#hatchings.set(key, drawHatching(this.#context, ratio, colour));
    }
    return this.#hatchings.get(key);
  }

  #readScheme() {
    const { root, canvas } = this.#parts;
    const style = getComputedStyle(root);
    const background = style.backgroundColor;
    this.#scheme = { background, foreground: style.color, isDark: isDarkColour(background) };
    canvas.classList.toggle("is-dark", this.#scheme.isDark);
    this.#colours.clear();
    this.#texts.clear();
    this.#context.font = FONT;
    this.#cellPx = this.#measure("M".repeat(20)) / 20;
  }

  #placeOutlines() {
    const { hovered, selected } = this.#parts;
    this.#outline(hovered, this.#hovered);
    const node = this.#selected;
    this.#outline(selected, node === null ? -1 : boxOf(this.#graph, this.#boxes, node));
  }

  #outline(element, i) {
    element.hidden = i < 0;
    if (i < 0) return;
    const { left, top, width } = this.#rectOf(i);
    element.style.transform = `translate(${left}px, ${top}px)`;
    element.style.width = `${Math.max(2, width)}px`;
    element.style.height = `${ROW_PX - GAP_PX}px`;
  }

  #rectOf(i) {
    const { x, width } = this.#boxes;
    return {
      left: x[i],
      top: this.#topOf(this.#rowOfBox(i)),
      width: width[i] - (width[i] > 3 ? GAP_PX : 0),
    };
  }

  #rowOfBox(i) {
    return this.#graph.rowOf(this.#boxes.node[i]);
  }

  // Searching

  #findMatches() {
    const isSearching = this.#searched !== "" && this.#graph !== null;
    this.#isMatch = isSearching ? new Set(this.#graph.matches(this.#searched)) : null;
    this.#listMatches();
  }

  // Only what is drawn can be stepped to.
  #listMatches() {
    this.#matches = [];
    if (!this.#isMatch || !this.#boxes) return;
    const { node, cutEnd } = this.#boxes;
    for (let i = 0; i < node.length; i += 1) {
      if (cutEnd[i] === 0 && this.#isMatch.has(node[i])) this.#matches.push(node[i]);
    }
    this.#matches.sort((a, b) => a - b);
  }

  #place() {
    const index = this.#selected === null ? 0 : this.#matches.indexOf(this.#selected) + 1;
    return { index, count: this.#matches.length };
  }

  // Zooming and selecting

  #zoomTo(node, start = performance.now()) {
    const target = this.#graph.isRest(node) ? this.#graph.parentOf(node) : node;
    // What lies above this answer may be asked for again: the service may have failed to answer.
    if (target === null || (target === this.#asked && target >= 0)) return;
    this.#asked = target;
    if (target >= 0) {
      this.#hide();
      this.#layOut();
      this.#draw();
      afterPaint(() => performance.measure("everflame:zoom", { start, end: performance.now() }));
    }
    const path = this.#graph.pathOf(target);
    this.#callbacks.onZoom?.(path.length ? this.#graph.idOf(target) : null, path);
  }

  #selectNode(node) {
    this.#selected = node;
    this.#showSelection();
    const i = node === null ? -1 : boxOf(this.#graph, this.#boxes, node);
    this.#callbacks.onSelect?.(node === null ? null : this.#describe(node, i));
  }

  #showSelection() {
    const { live } = this.#parts;
    if (!this.#boxes) return;
    this.#placeOutlines();
    live.textContent = this.#selected === null ? "" : this.#spoken(this.#selected);
    if (this.#selected !== null) this.#scrollTo(this.#selected);
  }

  #scrollTo(node) {
    const { scroller } = this.#parts;
    const top = this.#topOf(this.#graph.rowOf(node));
    if (top < scroller.scrollTop) scroller.scrollTop = top - ROW_PX;
    const bottom = top + ROW_PX - scroller.clientHeight;
    if (bottom > scroller.scrollTop) scroller.scrollTop = bottom + ROW_PX;
  }

  /** Give what callbacks are told about a box; `i` is its place among the boxes, -1 if not drawn. */
  #describe(node, i) {
    const graph = this.#graph;
    const isSum = i >= 0 && this.#boxes.cutEnd[i] !== 0;
    const isRest = isSum || graph.isRest(node);
    const named = isRest ? graph.parentOf(node) : node;
    const { total, samples, nodes } = isSum
      ? sumOf(graph, this.#boxes, i)
      : { total: graph.totalOf(node), samples: graph.samplesOf(node), nodes: 1 };
    return {
      id: graph.idOf(named),
      path: graph.pathOf(named),
      frame: isSum ? sumFrame(nodes) : graph.frameOf(node),
      total,
      self: isSum ? total : graph.selfOf(node),
      samples,
      depth: graph.rowOf(node),
      share: total / (graph.totalOf(this.#zoomed) || 1),
      shareOfAll: total / (graph.wholeTotal || 1),
      isRest,
      ...(graph.isComparison ? comparedTo(graph, node, isSum ? this.#boxes.cutEnd[i] : 0) : {}),
    };
  }

  #spoken(node) {
    const graph = this.#graph;
    const name = nameOf(graph.frameOf(node));
    const of = this.#answer.type === "cpu" ? "of CPU" : "of all";
    const verdict = graph.verdictOf(node);
    const said = CHANGED.has(verdict) || verdict === "moved" ? `${verdict}, ` : "";
    const spoken = `${name}, ${said}${share(graph.totalOf(node), graph.wholeTotal)} ${of}, depth ${graph.rowOf(node)}`;
    return this.#isMatch?.has(node)
      ? `${spoken}, match ${this.#place().index} of ${this.#matches.length}`
      : spoken;
  }

  #description() {
    const { total, samples, unit } = this.#answer;
    if (!this.#rows) return "Flame graph, empty";
    const name = nameOf(this.#graph.frameOf(this.#zoomed));
    const size = this.#graph.isComparison
      ? "before and after"
      : `${quantity(total, unit)} in all, ${counted(samples, "sample")}`;
    return (
      `Flame graph of ${name}: ${size}. ` +
      "Arrow keys move, Enter zooms in, Escape zooms out, Home shows everything."
    );
  }

  // Pointer and keyboard

  #listen() {
    const { canvas, scroller } = this.#parts;
    canvas.addEventListener("click", (event) => this.#click(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerleave", () => this.#hide());
    canvas.addEventListener("keydown", (event) => this.#press(event));
    canvas.addEventListener("blur", () => this.#hide());
    scroller.addEventListener(
      "scroll",
      () => {
        if (this.#hovered >= 0) this.#hide();
        else if (this.#told !== null) this.#showTooltipAt(this.#told);
        this.#drawSoon();
      },
      { passive: true },
    );
  }

  #watch() {
    const { root, scroller } = this.#parts;
    const sizes = new ResizeObserver(() => {
      const isOther =
        scroller.clientWidth !== parseFloat(this.#parts.canvas.style.width) ||
        scroller.clientHeight !== parseFloat(this.#parts.canvas.style.height);
      if (isOther) this.resize();
    });
    sizes.observe(scroller);
    const hide = () => this.#hide();
    window.addEventListener("scroll", hide, { passive: true });
    const recolour = () => this.recolour();
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    scheme.addEventListener("change", recolour);
    const theme = new MutationObserver(recolour);
    const html = root.ownerDocument.documentElement;
    theme.observe(html, { attributeFilter: ["class", "style", "data-theme", "data-scheme"] });
    return [
      () => sizes.disconnect(),
      () => window.removeEventListener("scroll", hide),
      () => scheme.removeEventListener("change", recolour),
      () => theme.disconnect(),
    ];
  }

  #drawSoon() {
    if (this.#frameRequest) return;
    this.#frameRequest = requestAnimationFrame(() => {
      this.#frameRequest = 0;
      this.#draw();
    });
  }

  #boxAt(event) {
    if (!this.#boxes) return -1;
    const { top, left } = this.#parts.scroller.getBoundingClientRect();
    const y = event.clientY - top + this.#parts.scroller.scrollTop;
    return hit(this.#boxes, event.clientX - left, this.#rowAt(y));
  }

  #click(event) {
    const i = this.#boxAt(event);
    if (i < 0) {
      if (this.#selected !== null) this.#selectNode(null);
      return;
    }
    const node = this.#boxes.node[i];
    if (this.#boxes.cutEnd[i] !== 0) {
      this.#zoomTo(this.#graph.parentOf(node), event.timeStamp);
      return;
    }
    this.#selectNode(node);
    this.#zoomTo(node, event.timeStamp);
  }

  #move(event) {
    const i = this.#boxAt(event);
    this.#parts.canvas.classList.toggle("is-over-box", i >= 0);
    if (i !== this.#hovered) {
      this.#hovered = i;
      this.#outline(this.#parts.hovered, i);
      if (i >= 0) fillTooltip(this.#parts.tooltip, this.#tooltipLines(i));
      this.#callbacks.onHover?.(i < 0 ? null : this.#describe(this.#boxes.node[i], i));
    }
    this.#parts.tooltip.hidden = i < 0 || event.pointerType === "touch";
    if (i >= 0) placeTooltip(this.#parts.tooltip, event.clientX, event.clientY, TOOLTIP_GAP_PX);
  }

  #hide() {
    const wasOver = this.#hovered >= 0;
    this.#told = null;
    this.#hovered = -1;
    this.#parts.hovered.hidden = true;
    this.#parts.tooltip.hidden = true;
    if (wasOver) this.#callbacks.onHover?.(null);
  }

  #press(event) {
    if (!this.#rows || event.ctrlKey || event.metaKey || event.altKey) return;
    if (this.#act(event.key)) event.preventDefault();
  }

  #act(key) {
    const isFlame = this.#view === "flame";
    const moves = {
      ArrowUp: isFlame ? "child" : "parent",
      ArrowDown: isFlame ? "parent" : "child",
      ArrowLeft: "previous",
      ArrowRight: "next",
    };
    if (Object.hasOwn(moves, key)) return this.#moveSelection(moves[key]);
    if (key === "Enter" && this.#selected !== null) return this.#zoomByKey(this.#selected);
    if (key === "Escape" || key === "Backspace")
      return this.#zoomByKey(this.#graph.parentOf(this.#asked));
    if (key === "Home") return this.#zoomByKey(this.#graph.top);
    return false;
  }

  #moveSelection(direction) {
    const isShown = this.#selected !== null && boxOf(this.#graph, this.#boxes, this.#selected) >= 0;
    const node = isShown
      ? neighbour(this.#graph, this.#boxes, this.#selected, direction)
      : this.#zoomed;
    if (node !== null) {
      this.#selectNode(node);
      this.#showTooltipAt(node);
    }
    return true;
  }

  #zoomByKey(node) {
    if (node === null) return false;
    this.#zoomTo(node);
    if (this.#selected !== null) this.#scrollTo(this.#selected);
    this.#parts.live.textContent = `Zoomed to ${this.#spoken(this.#graph.isRest(node) ? this.#asked : node)}`;
    return true;
  }

  #showTooltipAt(node) {
    const { tooltip, scroller } = this.#parts;
    const i = boxOf(this.#graph, this.#boxes, node);
    const { left, top } = this.#rectOf(i);
    const frame = scroller.getBoundingClientRect();
    const below = top + ROW_PX - scroller.scrollTop;
    this.#told = node;
    tooltip.hidden = below < ROW_PX || below > scroller.clientHeight + 1;
    if (tooltip.hidden) return;
    fillTooltip(tooltip, this.#tooltipLines(i));
    placeTooltip(tooltip, frame.left + left, frame.top + below, 4, ROW_PX);
  }

  #tooltipLines(i) {
    const node = this.#boxes.node[i];
    const box = this.#describe(node, i);
    const { unit, window, type } = this.#answer;
    const { frame } = box;
    const lines = {
      name: nameOf(frame),
      where: [safeName(frame.module), kindName(frame.kind)].filter(Boolean).join(" · "),
      file: safeName(place(frame.file, frame.line)),
      rows: [],
      hint: box.isRest ? "Too narrow to draw: zoom in to see them." : "",
    };
    if (this.#factsOf) return { ...lines, ...this.#factsOf(box) };
    const all = this.#graph.wholeTotal;
    const isZoomed = this.#graph.totalOf(this.#zoomed) !== all;
    lines.rows.push(["Total", quantity(box.total, unit), share(box.total, all)]);
    if (box.self !== null && !box.isRest)
      lines.rows.push(["Self", quantity(box.self, unit), share(box.self, all)]);
    if (isZoomed && node >= this.#zoomed) {
      lines.rows.push([
        "Of what is shown",
        "",
        share(box.total, this.#graph.totalOf(this.#zoomed)),
      ]);
    }
    if (type === "cpu" && window) {
      lines.rows.push(["On average", cores(box.total, window.until_ms - window.from_ms), ""]);
    }
    if (box.samples !== null) lines.rows.push(["Samples", number(box.samples), ""]);
    return lines;
  }
}

function makeParts(document) {
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

function fillTooltip(tooltip, { name, where, file, rows, hint }) {
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

// Below and right of the place, or above it and what is to be kept clear; inside of the window.
function placeTooltip(tooltip, x, y, gap, keepClearPx = 0) {
  const { offsetWidth: width, offsetHeight: height } = tooltip;
  const { clientWidth, clientHeight } = tooltip.ownerDocument.documentElement;
  const left = Math.max(4, Math.min(x + gap, clientWidth - width - 4));
  const below = y + gap + height <= clientHeight - 4;
  const top = below ? y + gap : Math.max(4, y - keepClearPx - gap - height);
  tooltip.style.left = `${left}px`;
  tooltip.style.top = `${top}px`;
}

function drawHatching(context, ratio, colour) {
  const side = Math.max(4, Math.round(6 * ratio));
  const tile = context.canvas.ownerDocument.createElement("canvas");
  tile.width = side;
  tile.height = side;
  const pen = tile.getContext("2d");
  pen.strokeStyle = colour;
  pen.lineWidth = ratio;
  pen.beginPath();
  for (const shift of [-side, 0, side]) {
    pen.moveTo(shift - 1, side + 1);
    pen.lineTo(shift + side + 1, -1);
  }
  pen.stroke();
  const pattern = context.createPattern(tile, "repeat");
  pattern.setTransform(new DOMMatrix().scale(1 / ratio));
  return pattern;
}

function isSameSearch(one, other) {
  if (typeof one === "string" || typeof other === "string") return one === other;
  return one.function === other.function && one.module === other.module;
}

function sumFrame(nodes) {
  const boxes = nodes === 1 ? "1 box" : `${number(nodes)} boxes`;
  return { function: `(${boxes} too narrow to draw)`, module: "", kind: "rest", file: "", line: 0 };
}

function exactly(graph, path) {
  const node = graph.findPath(path);
  return graph.pathOf(node).length === path.length ? node : null;
}

function nameOf(frame) {
  return safeName(frame.function) || "(no name)";
}

function kindName(kind) {
  if (kind === "rest") return "";
  return Object.hasOwn(KIND_NAMES, kind) ? KIND_NAMES[kind] : safeName(kind);
}

// Computed colours are rgb(...) or rgba(...), with color-mix() also color(srgb ...).
function isDarkColour(colour) {
  const scale = colour.startsWith("color(") ? 255 : 1;
  const [red, green, blue] = (colour.match(/[\d.]+/g) ?? [255, 255, 255]).map(
    (part) => part * scale,
  );
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue < 128;
}

function isAscii(text) {
  for (let i = 0; i < text.length; i += 1) {
    // The ellipsis is of the font's own width.
    if (text.charCodeAt(i) > 126 && text[i] !== "…") return false;
  }
  return true;
}

// A message is handled after the frame that the callback of an animation frame belongs to.
function afterPaint(done) {
  requestAnimationFrame(() => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      done();
    };
    port2.postMessage(null);
  });
}
