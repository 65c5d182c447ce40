// The flame graph on a canvas: drawing, pointer, keyboard, tooltip, screen reader.
//
//   import {FlameGraphView} from "./graph.js";
//   const view = new FlameGraphView(container, {onZoom, onSelect, onHover});
//
// `container` is an empty block element. The view fills its width and is as high as its rows, at most
// `--flame-max-height` (graph.css; default 78vh), beyond which it scrolls. The page loads graph.css.
//
// Methods
//   show(response, {view, colour, withLine, factsOf, zoomPath, arrivedAt})
//       Draw a response of /api/v1/flamegraph, or a view of a comparison (tree.js). view: "icicle"
//       (root on top; the default) or "flame". colour: "kind" (default), "module", "self" or
//       "change". withLine: whether boxes are lines of functions, and are named so. factsOf(box) returns the tooltip's facts, {rows: [[name, value, share], ...], hint};
//       by default the costs. zoomPath: null, or the path of a node as onZoom passes it: zoom into
//       that node, or into the deepest one on the path that the response has. arrivedAt:
//       performance.now() when the response arrived, the start of the measure
//       `everflame:first-paint`. An option that is left out has its default, not its last value.
//       A response without boxes (empty, or a total of 0) is drawn 0 px high.
//   highlight(searched)  Highlight the boxes whose function or module contains this text, or those of
//                        one {function, module}; "" ends it. Survives show(). Returns {index, count}
//                        as step() does.
//   step(+1 | -1)        Select the next or previous match and scroll to it. Wraps around. Returns
//                        {index, count}; index counts from 1, 0 when none is selected.
//   select(id | null)    Select the box with this node id (16 hex digits) and scroll to it, without
//                        calling onSelect. Returns whether it exists.
//   recolour()           Read the colours again. The view does so itself when the system's scheme or
//                        an attribute of <html> changes.
//   dim(isDim)           Show that the graph is out of date.
//   focus()              Put the keyboard focus on the graph.
//   width                The graph's width in CSS pixels, to request boxes for.
//
// Callbacks (all optional)
//   onZoom(id, path)     The user zoomed to this node, and the view has drawn it from the current
//                        response. id: 16 hex digits, null for the overall root. path: frames
//                        [[function, module, kind], ...] from below the overall root, the node last.
//                        A node above this response's root is drawn only by the next show().
//   onSelect(box | null) The user selected a box (click, arrows, step) or nothing.
//   onHover(box | null)  The pointer moved to another box.
//   box: {id, path, frame: {function, module, kind, file, line}, total, self, samples, depth,
//         shareOfAll, isRest, verdict, before, after, cause}
//       total and self are in the response's unit (self is null above the response's root);
//       shareOfAll is of the response's total; depth 0 is the overall root; isRest: a sum of boxes
//       too narrow to draw (with the id and path of its parent). Only in a comparison: verdict, both
//       sides in the response's unit, and the frame of the changed descendant that made most of the
//       box's difference, or null.
//
// Measures for benchmarks (performance.getEntriesByName):
//   everflame:first-paint   from the response's arrival to its painting
//   everflame:zoom          from the click or key to the painting, including the callbacks

import { costRows, describeBox, spokenGraph, spokenNode, tooltipHead } from "./describe.js";
import { neighbour } from "./layout.js";
import { Matches } from "./matches.js";
import { Painter } from "./painter.js";
import { afterPaint, fillTooltip, makeParts, placeTooltip, watch } from "./parts.js";
import { graphOf, ROOT_ID } from "./tree.js";
import { ROW_PX, Viewport } from "./viewport.js";

const TOOLTIP_GAP_PX = 14;

/** A canvas that shows one response of the service. */
export class FlameGraphView {
  #callbacks;
  #parts;
  #viewport;
  #painter;
  #matches = new Matches();
  #graph = null;
  #response = null;
  #view = "icicle";
  #colour = "kind";
  #withLine = false;
  #factsOf = null;
  /** The node to zoom to; one above the response's root is drawn only by the next show(). */
  #target = 0;
  #selected = null;
  #hovered = -1;
  /** The node whose tooltip the keyboard opened. */
  #tooltipNode = null;

  constructor(container, { onZoom, onSelect, onHover } = {}) {
    this.#callbacks = { onZoom, onSelect, onHover };
    this.#parts = makeParts(container.ownerDocument);
    container.append(this.#parts.root);
    this.#viewport = new Viewport(this.#parts);
    this.#painter = new Painter(this.#parts);
    this.#listen();
    watch(this.#parts, {
      onResize: () => {
        if (!this.#graph) return;
        this.#hide();
        this.#layOut();
        this.#draw();
      },
      onScroll: () => this.#hide(),
      onScheme: () => this.recolour(),
    });
  }

  get width() {
    return this.#viewport.width;
  }

  show(
    response,
    {
      view = "icicle",
      colour = "kind",
      withLine = false,
      factsOf = null,
      zoomPath = null,
      arrivedAt = null,
    } = {},
  ) {
    const start = arrivedAt ?? performance.now();
    const selectedPath = this.#selected === null ? null : this.#graph.pathOf(this.#selected);
    const isOtherView = view !== this.#view || this.#graph === null;
    this.#graph = graphOf(response);
    this.#viewport.setGraph(this.#graph, view === "flame");
    this.#response = response;
    this.#view = view;
    this.#colour = colour;
    this.#withLine = withLine;
    this.#factsOf = factsOf;
    this.#painter.forgetColours();
    this.#target = zoomPath ? Math.max(0, this.#graph.findPath(zoomPath)) : 0;
    this.#selected = selectedPath ? exactly(this.#graph, selectedPath) : null;
    this.#matches.search(this.#graph);
    this.#hide();
    this.#layOut();
    if (isOtherView) this.#viewport.scrollToRoot();
    this.#draw();
    afterPaint(() => {
      performance.measure("everflame:first-paint", { start, end: performance.now() });
      // A click needs the ids, which take some ms for thousands of boxes: compute them while idle.
      requestIdleCallback(() => this.#graph.findId(ROOT_ID));
    });
  }

  highlight(searched) {
    if (this.#matches.setSearch(searched)) {
      this.#matches.search(this.#graph);
      this.#matches.list(this.#viewport.boxes);
      this.#draw();
    }
    return this.#matches.placeOf(this.#selected);
  }

  step(direction) {
    const node = this.#matches.next(this.#selected, direction);
    if (node === null) return { index: 0, count: 0 };
    this.#selectNode(node);
    return this.#matches.placeOf(node);
  }

  select(id) {
    const node = id === null ? null : (this.#graph?.findId(id) ?? null);
    this.#selected = node;
    this.#showSelection();
    return node !== null;
  }

  recolour() {
    this.#painter.readScheme();
    this.#draw();
  }

  dim(isDim) {
    this.#parts.root.classList.toggle("is-dim", isDim);
  }

  focus() {
    this.#parts.canvas.focus({ preventScroll: true });
  }

  // Laying out and drawing

  get #zoomed() {
    return Math.max(0, this.#target);
  }

  #layOut() {
    this.#viewport.layOut(this.#zoomed);
    this.#matches.list(this.#viewport.boxes);
    const label = this.#viewport.rows
      ? spokenGraph(this.#graph, this.#zoomed, this.#response)
      : "Flame graph, empty";
    this.#parts.canvas.setAttribute("aria-label", label);
  }

  #draw() {
    if (!this.#viewport.boxes) return;
    this.#painter.paint({
      graph: this.#graph,
      viewport: this.#viewport,
      colour: this.#colour,
      withLine: this.#withLine,
      zoomed: this.#zoomed,
      matches: this.#matches,
    });
    this.#viewport.placeOutlines(this.#hovered, this.#selected);
  }

  // Zooming and selecting

  #zoomTo(node, start = performance.now()) {
    const target = this.#graph.isRest(node) ? this.#graph.parentOf(node) : node;
    // A node above this response may be requested again: the last request may have failed.
    if (target === null || (target === this.#target && target >= 0)) return;
    this.#target = target;
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
    const { boxes } = this.#viewport;
    const i = node === null ? -1 : this.#viewport.indexOf(node);
    this.#callbacks.onSelect?.(node === null ? null : describeBox(this.#graph, boxes, node, i));
  }

  #showSelection() {
    const node = this.#selected;
    if (!this.#viewport.boxes) return;
    this.#viewport.placeOutlines(this.#hovered, node);
    this.#parts.live.textContent = node === null ? "" : this.#spoken(node);
    if (node !== null) this.#viewport.scrollTo(node);
  }

  #spoken(node) {
    const match = this.#matches.has(node) ? this.#matches.placeOf(this.#selected) : null;
    return spokenNode(this.#graph, node, this.#response.type, match);
  }

  // Pointer and keyboard

  #listen() {
    const { canvas, scroller } = this.#parts;
    canvas.addEventListener("click", (event) => this.#click(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerleave", () => this.#hide());
    canvas.addEventListener("keydown", (event) => this.#press(event));
    canvas.addEventListener("blur", () => this.#hide());
    let frame = 0;
    scroller.addEventListener(
      "scroll",
      () => {
        if (this.#hovered >= 0) this.#hide();
        else if (this.#tooltipNode !== null) this.#showTooltipAt(this.#tooltipNode);
        if (frame) return;
        frame = requestAnimationFrame(() => {
          frame = 0;
          this.#draw();
        });
      },
      { passive: true },
    );
  }

  #click(event) {
    const i = this.#viewport.boxAt(event);
    if (i < 0) {
      if (this.#selected !== null) this.#selectNode(null);
      return;
    }
    const { node, cutEnd } = this.#viewport.boxes;
    if (cutEnd[i] !== 0) {
      this.#zoomTo(this.#graph.parentOf(node[i]), event.timeStamp);
      return;
    }
    this.#selectNode(node[i]);
    this.#zoomTo(node[i], event.timeStamp);
  }

  #move(event) {
    const { hovered, tooltip, canvas } = this.#parts;
    const i = this.#viewport.boxAt(event);
    canvas.classList.toggle("is-over-box", i >= 0);
    if (i !== this.#hovered) {
      this.#hovered = i;
      this.#viewport.outline(hovered, i);
      if (i >= 0) this.#fillTooltip(i);
      const { boxes } = this.#viewport;
      const box = i < 0 ? null : describeBox(this.#graph, boxes, boxes.node[i], i);
      this.#callbacks.onHover?.(box);
    }
    tooltip.hidden = i < 0 || event.pointerType === "touch";
    if (i >= 0) placeTooltip(tooltip, event.clientX, event.clientY, TOOLTIP_GAP_PX);
  }

  #hide() {
    const wasOver = this.#hovered >= 0;
    this.#tooltipNode = null;
    this.#hovered = -1;
    this.#parts.hovered.hidden = true;
    this.#parts.tooltip.hidden = true;
    if (wasOver) this.#callbacks.onHover?.(null);
  }

  #press(event) {
    if (!this.#viewport.rows || event.ctrlKey || event.metaKey || event.altKey) return;
    const { key } = event;
    const isFlame = this.#view === "flame";
    const moves = {
      ArrowUp: isFlame ? "child" : "parent",
      ArrowDown: isFlame ? "parent" : "child",
      ArrowLeft: "previous",
      ArrowRight: "next",
    };
    const zooms = {
      Enter: () => this.#selected,
      Escape: () => this.#graph.parentOf(this.#target),
      Backspace: () => this.#graph.parentOf(this.#target),
      Home: () => this.#graph.top,
    };
    let isOurs = true;
    if (Object.hasOwn(moves, key)) this.#moveSelection(moves[key]);
    else isOurs = Object.hasOwn(zooms, key) && this.#zoomByKey(zooms[key]());
    if (isOurs) event.preventDefault();
  }

  #moveSelection(direction) {
    const { boxes } = this.#viewport;
    const isShown = this.#selected !== null && this.#viewport.indexOf(this.#selected) >= 0;
    const node = isShown ? neighbour(this.#graph, boxes, this.#selected, direction) : this.#zoomed;
    if (node === null) return;
    this.#selectNode(node);
    this.#showTooltipAt(node);
  }

  /** Zoom to a node; return whether there is one. */
  #zoomByKey(node) {
    if (node === null) return false;
    this.#zoomTo(node);
    if (this.#selected !== null) this.#viewport.scrollTo(this.#selected);
    const shown = this.#graph.isRest(node) ? this.#target : node;
    this.#parts.live.textContent = `Zoomed to ${this.#spoken(shown)}`;
    return true;
  }

  #showTooltipAt(node) {
    const { tooltip, scroller } = this.#parts;
    const i = this.#viewport.indexOf(node);
    const { left, top } = this.#viewport.rectOf(i);
    const frame = scroller.getBoundingClientRect();
    const below = top + ROW_PX - scroller.scrollTop;
    this.#tooltipNode = node;
    tooltip.hidden = below < ROW_PX || below > scroller.clientHeight + 1;
    if (tooltip.hidden) return;
    this.#fillTooltip(i);
    placeTooltip(tooltip, frame.left + left, frame.top + below, 4, ROW_PX);
  }

  #fillTooltip(i) {
    const { boxes } = this.#viewport;
    const node = boxes.node[i];
    const box = describeBox(this.#graph, boxes, node, i);
    const facts = this.#factsOf?.(box) ?? {
      rows: costRows(this.#graph, this.#zoomed, node, box, this.#response),
    };
    fillTooltip(this.#parts.tooltip, { ...tooltipHead(box), ...facts });
  }
}

/** Return the node at the end of a path; null if the tree has only a part of it. */
function exactly(graph, path) {
  const node = graph.findPath(path);
  return graph.pathOf(node).length === path.length ? node : null;
}
