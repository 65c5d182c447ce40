// Arrays in, boxes out: where the boxes of a tree (tree.js) stand at some width. No DOM.
//
// Nothing here recurses: a response may be 4,096 boxes deep.

/** Narrower boxes are not drawn; the service cuts at the same width (profiler/flamegraph/flamegraph.py). */
export const LEAST_PX = 0.5;

/**
 * Lay out a subtree at full width, with its callers above it at full width too.
 *
 * Returns parallel arrays, row by row and from left to right within a row: `x` and `width` in pixels,
 * `node`, and `cutEnd`: 0, or, for a box that sums children which are too narrow, the node where
 * they end (`node` is the first of them). Boxes of row r are those from `rowStart[r]` up to
 * `rowStart[r + 1]`; row 0 is the overall root's. A sum that is too narrow itself is left out.
 */
export function layOut(graph, zoomed, widthPx) {
  const columns = { x: [], width: [], node: [], cutEnd: [], row: [] };
  const add = (x, width, node, cutEnd, row) => {
    columns.x.push(x);
    columns.width.push(width);
    columns.node.push(node);
    columns.cutEnd.push(cutEnd);
    columns.row.push(row);
  };
  if (graph.size > 0 && widthPx > 0) {
    const above = [];
    for (let at = graph.parentOf(zoomed); at !== null; at = graph.parentOf(at)) above.push(at);
    for (const node of above.reverse()) add(0, widthPx, node, 0, graph.rowOf(node));
    addSubtree(graph, zoomed, widthPx, add);
  }
  return { zoomed, ...byRow(columns) };
}

/** Return the index of the box at a place, or -1. */
export function hit(boxes, x, row) {
  if (row < 0 || row >= boxes.rows) return -1;
  const after = firstAbove(boxes.x, boxes.rowStart[row], boxes.rowStart[row + 1], x);
  const i = after - 1;
  return i >= boxes.rowStart[row] && x < boxes.x[i] + boxes.width[i] ? i : -1;
}

/** Return the index of a node's own box, or -1 when it is not drawn. */
export function boxOf(graph, boxes, node) {
  const row = graph.rowOf(node);
  if (row >= boxes.rows) return -1;
  const start = boxes.rowStart[row];
  const i = firstAbove(boxes.node, start, boxes.rowStart[row + 1], node) - 1;
  return i >= start && boxes.node[i] === node && boxes.cutEnd[i] === 0 ? i : -1;
}

/** Return total and samples of a box. */
export function sumOf(graph, boxes, i) {
  const node = boxes.node[i];
  if (boxes.cutEnd[i] === 0) {
    return { nodes: 1, total: graph.totalOf(node), samples: graph.samplesOf(node) };
  }
  const sum = { nodes: 0, total: 0, samples: 0 };
  for (let at = node; at < boxes.cutEnd[i]; at = graph.end[at]) {
    sum.nodes += 1;
    sum.total += graph.total[at];
    sum.samples += graph.samples?.[at] ?? 0;
  }
  return sum;
}

/** Return the comparison's values of a node, or of all siblings from it up to `cutEnd`. */
export function comparedTo(graph, node, cutEnd = 0) {
  const sides = graph.sidesOf(node);
  if (cutEnd === 0) {
    const cause = graph.causeOf(node);
    return {
      before: sides.before,
      after: sides.after,
      verdict: graph.verdictOf(node),
      cause: cause === null ? null : graph.frameOf(cause),
    };
  }
  let [before, after] = [0, 0];
  for (let at = node; at < cutEnd; at = graph.end[at]) {
    before += graph.before[at];
    after += graph.after[at];
  }
  return { before, after, verdict: "", cause: null };
}

/** Return the drawn node that lies "parent", "child", "next" or "previous" of a drawn one, or null.
 * Next and previous are siblings, and beyond the last of them the nearest box of the same row. */
export function neighbour(graph, boxes, node, direction) {
  if (direction === "parent") return graph.parentOf(node);
  if (direction === "child") return childTowards(graph, boxes, node);
  const step = direction === "next" ? 1 : -1;
  const row = graph.rowOf(node);
  const from = boxOf(graph, boxes, node);
  if (from < 0) return null;
  for (let i = from + step; i >= boxes.rowStart[row] && i < boxes.rowStart[row + 1]; i += step) {
    if (boxes.cutEnd[i] === 0) return boxes.node[i];
  }
  return null;
}

function addSubtree(graph, zoomed, widthPx, add) {
  const scale = widthPx / (graph.total[zoomed] || 1);
  const left = graph.left[zoomed];
  add(0, widthPx, zoomed, 0, graph.rowOf(zoomed));
  for (let i = zoomed + 1; i < graph.end[zoomed]; ) {
    const x = (graph.left[i] - left) * scale;
    const width = graph.total[i] * scale;
    if (width >= LEAST_PX) {
      add(x, width, i, 0, graph.rowOf(i));
      i += 1;
      continue;
    }
    // Later siblings are narrower still, or the rest; in one side of a comparison they may be wider.
    const end = graph.end[graph.parent[i]];
    let [cut, sum] = [i, 0];
    for (; cut < end && graph.total[cut] * scale < LEAST_PX; cut = graph.end[cut]) {
      sum += graph.total[cut];
    }
    if (sum * scale >= LEAST_PX) add(x, sum * scale, i, cut, graph.rowOf(i));
    i = cut;
  }
}

// Boxes come in preorder, so within a row they already stand from left to right.
function byRow(columns) {
  const count = columns.row.length;
  const rows = columns.row.reduce((most, row) => Math.max(most, row + 1), 0);
  const rowStart = new Int32Array(rows + 1);
  for (const row of columns.row) rowStart[row + 1] += 1;
  for (let row = 0; row < rows; row += 1) rowStart[row + 1] += rowStart[row];
  const place = rowStart.slice();
  const x = new Float64Array(count);
  const width = new Float64Array(count);
  const node = new Int32Array(count);
  const cutEnd = new Int32Array(count);
  for (let i = 0; i < count; i += 1) {
    const to = place[columns.row[i]]++;
    x[to] = columns.x[i];
    width[to] = columns.width[i];
    node[to] = columns.node[i];
    cutEnd[to] = columns.cutEnd[i];
  }
  return { rows, rowStart, x, width, node, cutEnd };
}

function childTowards(graph, boxes, node) {
  if (node !== boxes.zoomed && graph.isWithin(boxes.zoomed, node)) {
    let child = boxes.zoomed;
    while (graph.parentOf(child) !== node) child = graph.parentOf(child);
    return child;
  }
  const child = node + 1;
  if (child >= graph.end[node]) return null;
  return boxOf(graph, boxes, child) < 0 ? null : child;
}

/** Return the first place from `start` to `end` whose number is above `value`. */
export function firstAbove(ascending, start, end, value) {
  let [low, high] = [start, end];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ascending[middle] > value) high = middle;
    else low = middle + 1;
  }
  return low;
}
