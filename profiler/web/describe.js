// Descriptions of the flame graph's boxes: for callbacks, tooltips and screen readers. No DOM.

import { cores, counted, namesOf, number, place, quantity, safeName, share } from "./format.js";
import { comparedTo, sumOf } from "./layout.js";
import { CHANGED, graphOf, ROOT_ID } from "./tree.js";

const KIND_NAMES = { jit: "JIT", go: "Go", java: "Java", node: "Node.js", python: "Python" };

/**
 * Describe a node, or the sum drawn in its place: `i` is the index of its box, -1 if it is not drawn.
 * graph.js lists the fields.
 */
export function describeBox(graph, boxes, node, i) {
  const isSum = i >= 0 && boxes.cutEnd[i] !== 0;
  const isRest = isSum || graph.isRest(node);
  const named = isRest ? graph.parentOf(node) : node;
  const { total, samples, nodes } = isSum
    ? sumOf(graph, boxes, i)
    : { total: graph.totalOf(node), samples: graph.samplesOf(node), nodes: 1 };
  return {
    id: graph.idOf(named),
    path: graph.pathOf(named),
    frame: isSum ? sumFrame(nodes) : graph.frameOf(node),
    total,
    self: isSum ? total : graph.selfOf(node),
    samples,
    depth: graph.rowOf(node),
    shareOfAll: total / (graph.wholeTotal || 1),
    isRest,
    ...(graph.isComparison ? comparedTo(graph, node, isSum ? boxes.cutEnd[i] : 0) : {}),
  };
}

/** Describe a box of a response by its id; null if it is not there. */
export function findBox(response, id) {
  if (response.nodes.frame.length === 0) return null;
  const graph = graphOf(response);
  const node = id === ROOT_ID ? graph.top : graph.findId(id);
  return node === null ? null : describeBox(graph, null, node, -1);
}

/** Return a node as a screen reader reads it; `place` is {index, count} of a match, or null. */
export function spokenNode(graph, node, type, place) {
  const name = fullNameOf(graph.frameOf(node));
  const of = type === "cpu" ? "of CPU" : "of the total";
  const verdict = graph.verdictOf(node);
  const change = CHANGED.has(verdict) || verdict === "moved" ? `${verdict}, ` : "";
  const part = `${share(graph.totalOf(node), graph.wholeTotal)} ${of}`;
  const spoken = `${name}, ${change}${part}, depth ${graph.rowOf(node)}`;
  return place ? `${spoken}, match ${place.index} of ${place.count}` : spoken;
}

/** Return the graph as a screen reader reads it, zoomed into a node. */
export function spokenGraph(graph, zoomed, { total, samples, unit }) {
  const size = graph.isComparison
    ? "before and after"
    : `${quantity(total, unit)} in total, ${counted(samples, "sample")}`;
  return (
    `Flame graph of ${fullNameOf(graph.frameOf(zoomed))}: ${size}. ` +
    "Arrow keys move, Enter zooms in, Escape zooms out, Home resets the zoom."
  );
}

/** Return the lines of a tooltip that all views have in common: {name, where, file, hint}. */
export function tooltipHead({ frame, isRest }) {
  return {
    name: nameOf(frame),
    where: [safeName(frame.module), kindName(frame.kind)].filter(Boolean).join(" · "),
    file: safeName(place(frame.file, frame.line)),
    hint: isRest ? "Too narrow to draw: zoom in to see them." : "",
  };
}

/** Return the rows of a tooltip, [[name, value, share], ...]: the cost of a box. */
export function costRows(graph, zoomed, node, box, { unit, window, type }) {
  const all = graph.wholeTotal;
  const rows = [["Total", quantity(box.total, unit), share(box.total, all)]];
  if (box.self !== null && !box.isRest) {
    rows.push(["Self", quantity(box.self, unit), share(box.self, all)]);
  }
  const shown = graph.totalOf(zoomed);
  if (shown !== all && node >= zoomed)
    rows.push(["Of the zoomed box", "", share(box.total, shown)]);
  if (type === "cpu" && window) {
    rows.push(["Average", cores(box.total, window.until_ms - window.from_ms), ""]);
  }
  if (box.samples !== null) rows.push(["Samples", number(box.samples), ""]);
  return rows;
}

/** Return the name to show for a frame beside its module. */
function nameOf(frame) {
  return safeName(frame.function) || "(no name)";
}

/** Return the name to show for a frame where its module does not stand beside it. */
export function fullNameOf(frame) {
  return safeName(namesOf(frame)[0]) || "(no name)";
}

function kindName(kind) {
  if (kind === "rest") return "";
  return Object.hasOwn(KIND_NAMES, kind) ? KIND_NAMES[kind] : safeName(kind);
}

function sumFrame(nodes) {
  const boxes = counted(nodes, "box", "boxes");
  return { function: `(${boxes} too narrow to draw)`, module: "", kind: "rest", file: "", line: 0 };
}

/** Return the label, of those the tree is split by, whose value a box is; null if unknown. */
export function labelNameOf(response, { frame, path }, by) {
  if (frame.kind !== "label" || path.length === 0) return null;
  const names = by.split(",").filter(Boolean);
  const graph = graphOf(response);
  let levels = 0;
  for (let node = graph.top; node < graph.size; node += 1) {
    if (graph.frameOf(node).kind === "label") levels = Math.max(levels, graph.rowOf(node));
  }
  const position = path.filter(([, , kind]) => kind === "label").length - 1;
  return levels === names.length ? (names[position] ?? null) : null;
}

/** Return a note about boxes that are too narrow to draw; empty if all are drawn. */
export function narrowText({ rest, nodes, total }, isComparison) {
  if (rest.nodes === 0) return "";
  const boxes = counted(rest.nodes, "box", "boxes");
  const part = isComparison ? "" : ` (${share(rest.total, nodes.total[0] || total)})`;
  const hatched = isComparison ? "Hatched in grey" : "Hatched";
  return `${hatched}: ${boxes} too narrow to draw${part}. Zoom in to see them.`;
}

/** Return a note about the widths of a comparison's boxes. */
export function wideText(side) {
  return side
    ? `Box widths show the ${side} side; functions that it does not have are not drawn.`
    : "Box widths show the mean of both sides, so new and gone functions are drawn too.";
}
