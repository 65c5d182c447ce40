// The flame graph's viewport: where boxes are on the screen, with scrolling and scale.

import { boxOf, hit, layOut } from "./layout.js";

export const ROW_PX = 20;
export const GAP_PX = 1;
/** Browsers draw nothing on a canvas that is wider or higher than this in device pixels. */
const CANVAS_LIMIT = 32767;

export class Viewport {
  #parts;
  #graph = null;
  #isFlame = false;
  /** The boxes, see layOut() in layout.js; null before the first layout. */
  boxes = null;
  rows = 0;

  constructor(parts) {
    this.#parts = parts;
    // An empty canvas would be black until the first response is drawn.
    parts.canvas.width = parts.canvas.height = 0;
  }

  /** The width for boxes, without a scroll bar. */
  get width() {
    return this.#parts.scroller.clientWidth;
  }

  get scrollTop() {
    return this.#parts.scroller.scrollTop;
  }

  /** Device pixels per CSS pixel. */
  get ratio() {
    const { clientWidth, clientHeight } = this.#parts.scroller;
    const most = CANVAS_LIMIT / Math.max(1, clientWidth, clientHeight);
    return Math.min(devicePixelRatio || 1, most);
  }

  /** Set the tree; layOut() comes later. `isFlame`: the root is at the bottom. */
  setGraph(graph, isFlame) {
    this.#graph = graph;
    this.#isFlame = isFlame;
    this.boxes = null;
  }

  /** Lay out the tree with one node at full width, and fit the canvas to it. */
  layOut(zoomed) {
    const { scroller, space } = this.#parts;
    const [rowsBefore, { scrollTop }] = [this.rows, scroller];
    // A scroll bar takes width, and less width may mean fewer rows: counting them without it keeps
    // it from appearing and disappearing forever.
    const isThere = this.#graph.size > 0 && this.#graph.totalOf(zoomed) > 0;
    const widest = isThere ? scroller.offsetWidth : 0;
    this.boxes = layOut(this.#graph, zoomed, widest);
    this.rows = this.boxes.rows;
    space.style.height = `${this.rows * ROW_PX}px`;
    if (this.#isFlame) {
      // With the root at the bottom, rows keep their distance to the bottom.
      const added = (this.rows - rowsBefore) * ROW_PX;
      scroller.scrollTop = rowsBefore > 0 ? scrollTop + added : this.rows * ROW_PX;
    }
    this.#fit(zoomed, widest);
  }

  // Fit boxes and canvas to the room that a scroll bar leaves.
  #fit(zoomed, widest) {
    const { canvas, scroller } = this.#parts;
    const { clientWidth: width, clientHeight: height } = scroller;
    if (widest > width) this.boxes = layOut(this.#graph, zoomed, width);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * this.ratio);
    canvas.height = Math.round(height * this.ratio);
  }

  /** Scroll to where the root is. */
  scrollToRoot() {
    this.#parts.scroller.scrollTop = this.#isFlame ? this.rows * ROW_PX : 0;
  }

  scrollTo(node) {
    const { scroller } = this.#parts;
    const top = this.topOf(this.#graph.rowOf(node));
    if (top < scroller.scrollTop) scroller.scrollTop = top - ROW_PX;
    const bottom = top + ROW_PX - scroller.clientHeight;
    if (bottom > scroller.scrollTop) scroller.scrollTop = bottom + ROW_PX;
  }

  topOf(row) {
    return (this.#isFlame ? this.rows - 1 - row : row) * ROW_PX;
  }

  #rowAt(y) {
    const line = Math.floor(y / ROW_PX);
    return this.#isFlame ? this.rows - 1 - line : line;
  }

  /** Return the first and the last visible row. */
  visibleRows() {
    const { scrollTop, clientHeight } = this.#parts.scroller;
    const edges = [this.#rowAt(scrollTop), this.#rowAt(scrollTop + clientHeight - 1)];
    return [Math.max(0, Math.min(...edges)), Math.min(this.boxes.rows - 1, Math.max(...edges))];
  }

  /** Return the index of the box under a pointer event, or -1. */
  boxAt(event) {
    if (!this.boxes) return -1;
    const { top, left } = this.#parts.scroller.getBoundingClientRect();
    const y = event.clientY - top + this.scrollTop;
    return hit(this.boxes, event.clientX - left, this.#rowAt(y));
  }

  /** Return {left, top, width} of a box, in pixels of all rows. */
  rectOf(i) {
    const { x, width, node } = this.boxes;
    return {
      left: x[i],
      top: this.topOf(this.#graph.rowOf(node[i])),
      width: width[i] - (width[i] > 3 ? GAP_PX : 0),
    };
  }

  /** Place the outlines of the box under the pointer (its index or -1) and of the selected node. */
  placeOutlines(hovered, selected) {
    this.outline(this.#parts.hovered, hovered);
    this.outline(this.#parts.selected, selected === null ? -1 : this.indexOf(selected));
  }

  outline(element, i) {
    element.hidden = i < 0;
    if (i < 0) return;
    const { left, top, width } = this.rectOf(i);
    element.style.transform = `translate(${left}px, ${top}px)`;
    element.style.width = `${Math.max(2, width)}px`;
    element.style.height = `${ROW_PX - GAP_PX}px`;
  }

  /** Return the index of a node's own box, or -1 when it is not drawn. */
  indexOf(node) {
    return boxOf(this.#graph, this.boxes, node);
  }
}
