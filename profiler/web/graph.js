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
//   show(answer, {view, colour, zoomPath, arrivedAt})
//       Draw an answer of /api/v1/flamegraph, at once. view: "icicle" (root on top; the default) or
//       "flame". colour: "kind" (default), "module" or "self". zoomPath: null, or frames
//       [[function, module, kind], ...] from below the overall root, as onZoom gives them: zoom
//       into that node inside of this answer (as far down as it is there). arrivedAt:
//       performance.now() of the answer's arrival, where the measure `everflame:first-paint`
//       begins. Every call gives all options: what is left out has its default.
//       An answer without boxes (empty, or a total of 0) is drawn as nothing, 0 px high.
//   highlight(text)      Light up boxes whose function or module has it; "" ends it. Survives show().
//                        Gives {index, count} as step() does.
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
//         share, shareOfAll, isRest}
//       total, self in the answer's unit (self is null for ancestors above the answer's root);
//       share is of the node zoomed to, shareOfAll of the answer's `total`; depth 0 is the overall
//       root; isRest: a sum of boxes too narrow to draw (its id and path are its parent's).
//
// Measures for benchmarks (performance.getEntriesByName):
//   everflame:first-paint   from the answer's arrival until it is painted
//   everflame:zoom          from the click or key until all boxes are drawn

/** A canvas that shows one answer of the service. */
export class FlameGraphView {
  width = 1200;

  constructor(container, {onZoom, onSelect, onHover} = {}) {
    this.callbacks = {onZoom, onSelect, onHover};
    this.container = container;
  }

  show(answer, {view = "icicle", colour = "kind", zoomPath = null, arrivedAt = null} = {}) {}

  highlight(text) {
    return {index: 0, count: 0};
  }

  step(direction) {
    return {index: 0, count: 0};
  }

  select(id) {
    return false;
  }

  zoom(id) {}

  resize() {}

  recolour() {}

  dim(isDim) {}

  focus() {}

  destroy() {}
}
