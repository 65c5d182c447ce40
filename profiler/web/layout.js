// Arrays in, boxes out: the tree of one answer, and where its boxes stand at some width. No DOM.
//
// Nodes stand in preorder, node 0 is the answer's root, a node's subtree is the range from itself to
// its `end` (profiler/flamegraph/flamegraph.py). Siblings stand largest first, a `rest` last. An answer for a
// zoomed node also says what stands above it: those are nodes -1 (the parent of 0), -2, ...; the last
// of them, `top`, is the overall root. So numbers ascend in preorder throughout.
//
// Nothing here recurses: an answer may be 4,096 boxes deep.

export const ROOT_ID = "cbf29ce484222325";

/** Narrower than this a box is not drawn by itself, as the service cuts (profiler/flamegraph/flamegraph.py). */
export const LEAST_PX = 0.5;

/** The verdicts on what costs more or less than before. */
export const CHANGED = new Set(["more", "less", "new", "gone"]);

const FNV_OFFSET = [0xcbf29ce4, 0x84222325];
const FNV_PRIME_LOW = 0x1b3; // the prime is 2^40 + 0x1b3
const KEY_SEPARATOR = 1;
const ROOT_FRAME = { function: "all", module: "", kind: "label", file: "", line: 0 };
const encoder = new TextEncoder();

/**
 * Give the stable id of the node at the end of a path, as FlameGraph.ids() does: FNV-1a 64 over the
 * root-first keys (function NUL module NUL kind, joined by 0x01), as 16 hex digits.
 *
 * `path` is [[function, module, kind], ...] from below the overall root; a key may have more in it.
 */
export function nodeId(path) {
  let state = FNV_OFFSET;
  path.forEach((key, i) => {
    state = hashKey(state, encodeKey(key), i === 0);
  });
  return hex(state);
}

const graphs = new WeakMap();

/** Give the tree of an answer, the same one each time: its ids are costly, see `idOf`. */
export function graphOf(answer) {
  if (!graphs.has(answer)) graphs.set(answer, new Graph(answer));
  return graphs.get(answer);
}

const views = new WeakMap();

/**
 * Give an answer of /api/v1/diff as one of /api/v1/flamegraph, whose boxes are as wide as `side`
 * makes them: "before", "after", or "" for the mean of both. The same one each time.
 */
export function viewOf(diff, side) {
  if (!views.has(diff)) views.set(diff, new Map());
  const ofSides = views.get(diff);
  if (!ofSides.has(side)) ofSides.set(side, makeView(diff, side));
  return ofSides.get(side);
}

/** An answer of /api/v1/flamegraph as a tree, or a view of a comparison. */
export class Graph {
  /** By node, counted from `top`: the halves of its id; computed when first asked for. */
  #ids = null;
  /** By id: the answer's root and what stands above it, whose ids the answer tells. */
  #above = new Map();

  constructor({ frames, nodes, path, total, ...comparison }) {
    this.frames = frames.map(asFrame);
    this.frame = nodes.frame;
    this.depth = nodes.depth;
    this.total = nodes.total;
    this.samples = nodes.samples;
    this.self = nodes.self;
    this.size = nodes.frame.length;
    this.before = nodes.before;
    this.after = nodes.after;
    this.verdict = nodes.verdict;
    this.comparison = comparison;
    this.wholeTotal = total;
    this.ancestors = ancestorsOf(path, total);
    this.top = -this.ancestors.length;
    for (const [i, { id }] of (path ?? []).entries()) this.#above.set(id, i - path.length + 1);
    this.#link();
  }

  frameOf(node) {
    return node < 0 ? this.#ancestor(node).frame : this.frames[this.frame[node]];
  }

  totalOf(node) {
    return node < 0 ? this.#ancestor(node).total : this.total[node];
  }

  /** Give the node's samples, or null where the answer does not say. */
  samplesOf(node) {
    if (!this.samples) return null;
    return node < 0 ? this.#ancestor(node).samples : this.samples[node];
  }

  /** Give the node's own part of its total, or null where the answer does not say. */
  selfOf(node) {
    return node < 0 || !this.self ? null : this.self[node];
  }

  /** Tell whether this is a comparison: then boxes have two sides and a verdict. */
  get isComparison() {
    return this.verdict !== undefined;
  }

  /** Give {before, after} of a comparison's node. */
  sidesOf(node) {
    if (node < 0) return this.#ancestor(node);
    return { before: this.before[node], after: this.after[node] };
  }

  /** Give what a comparison says of a node; empty where it says nothing. */
  verdictOf(node) {
    return this.isComparison && node >= 0 ? this.comparison.verdicts[this.verdict[node]] : "";
  }

  /** Give by how much more a comparison's node costs after than before, in cores a host and beyond
   * what all functions have in common. */
  growthOf(node) {
    const { before, after } = this.sidesOf(node);
    const { scale, common_change: common } = this.comparison;
    const factor = Math.sqrt(1 + common.relative); // of both sides alike: swapped, the sign alone
    return (after * scale.after) / factor - before * scale.before * factor;
  }

  /** Give the node below that made most of a node's growth itself, of those that changed or whose cost
   * moved; or null. */
  causeOf(node) {
    const growth = this.growthOf(node);
    const first = Math.max(0, node);
    const end = node < 0 ? this.size : this.end[node];
    const own = new Float64Array(end - first);
    for (let at = first; at < end; at += 1) {
      const part = this.growthOf(at);
      own[at - first] += part;
      if (at > first) own[this.parent[at] - first] -= part;
    }
    let [cause, most] = [null, 0];
    for (let at = first; at < end; at += 1) {
      const part = own[at - first] * Math.sign(growth);
      const verdict = this.verdictOf(at);
      const isChange = CHANGED.has(verdict) || verdict === "moved";
      if (isChange && at !== node && part > most) [cause, most] = [at, part];
    }
    return cause;
  }

  /** Tell whether a node is what the service summed because it is too narrow to draw. */
  isRest(node) {
    return this.frameOf(node).kind === "rest";
  }

  /** Give the parent, or null for the overall root. */
  parentOf(node) {
    if (node > 0) return this.parent[node];
    return node > this.top ? node - 1 : null;
  }

  /** Give how many boxes stand above a node: 0 for the overall root. */
  rowOf(node) {
    return node < 0 ? node - this.top : this.depth[node] - this.top;
  }

  isWithin(node, ancestor) {
    if (ancestor < 0) return node >= ancestor;
    return node >= ancestor && node < this.end[ancestor];
  }

  /** Give the path of a node as `nodeId` takes it. */
  pathOf(node) {
    const path = [];
    for (let at = node; at > this.top; at = this.parentOf(at)) {
      const { function: name, module, kind } = this.frameOf(at);
      path.push([name, module, kind]);
    }
    return path.reverse();
  }

  idOf(node) {
    const { high, low } = this.#allIds();
    return hex([high[node - this.top], low[node - this.top]]);
  }

  /** Give the deepest node on a path that this answer has. */
  findPath(path) {
    let node = this.top;
    for (const key of path) {
      const child = this.#childWithKey(node, key);
      if (child === null) break;
      node = child;
    }
    return node;
  }

  /** Give the first node with this id, or null. */
  findId(id) {
    if (this.#above.has(id)) return this.#above.get(id);
    const { high, low } = this.#allIds();
    const [wantedHigh, wantedLow] = [parseInt(id.slice(0, 8), 16), parseInt(id.slice(8), 16)];
    for (let i = 0; i < low.length; i += 1) {
      if (low[i] === wantedLow && high[i] === wantedHigh) return i + this.top;
    }
    return null;
  }

  /** Give the nodes whose function or module has the text, whatever its case, or those of one
   * function, {function, module}; in preorder. The overall root and sums of what is too narrow have
   * no function. */
  matches(wanted) {
    if (wanted === "") return [];
    const isWanted = typeof wanted === "string" ? withText(wanted) : ofFunction(wanted);
    const isMatch = this.frames.map(isWanted);
    const nodes = [];
    for (let node = this.top + 1; node < this.size; node += 1) {
      if (node < 0 ? isWanted(this.frameOf(node)) : isMatch[this.frame[node]]) nodes.push(node);
    }
    return nodes;
  }

  #link() {
    this.parent = new Int32Array(this.size);
    this.end = new Int32Array(this.size).fill(this.size);
    this.left = new Float64Array(this.size);
    const open = []; // the nodes from the root down to the one at hand, by depth
    const next = []; // where the next child of each of them starts
    for (let i = 0; i < this.size; i += 1) {
      const depth = this.depth[i];
      for (let above = depth; above < open.length; above += 1) this.end[open[above]] = i;
      open.length = depth;
      if (i > 0) {
        this.parent[i] = open[depth - 1];
        this.left[i] = next[depth - 1];
        next[depth - 1] += this.total[i];
      }
      open.push(i);
      next[depth] = this.left[i];
    }
  }

  // All at once, each from its parent's: a box costs one key, not the keys of its whole path.
  #allIds() {
    if (this.#ids) return this.#ids;
    const keys = this.frames.map(keyOf);
    const count = this.size - this.top;
    const [high, low] = [new Uint32Array(count), new Uint32Array(count)];
    [high[0], low[0]] = FNV_OFFSET;
    for (let i = 1; i < count; i += 1) {
      const node = i + this.top;
      const key = node < 0 ? keyOf(this.frameOf(node)) : keys[this.frame[node]];
      const above = this.parentOf(node) - this.top;
      [high[i], low[i]] = hashKey([high[above], low[above]], key, above === 0);
    }
    this.#ids = { high, low };
    return this.#ids;
  }

  #ancestor(node) {
    return this.ancestors[this.ancestors.length + node];
  }

  #childWithKey(node, key) {
    if (node < 0) return isSameKey(this.frameOf(node + 1), key) ? node + 1 : null;
    for (let child = node + 1; child < this.end[node]; child = this.end[child]) {
      if (isSameKey(this.frameOf(child), key)) return child;
    }
    return null;
  }
}

/**
 * Lay out a subtree at full width, with what stands above it at full width too.
 *
 * Gives parallel arrays, row by row and from left to right within a row: `x` and `width` in pixels,
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

/** Give the index of the box at a place, or -1. */
export function hit(boxes, x, row) {
  if (row < 0 || row >= boxes.rows) return -1;
  const after = firstAbove(boxes.x, boxes.rowStart[row], boxes.rowStart[row + 1], x);
  const i = after - 1;
  return i >= boxes.rowStart[row] && x < boxes.x[i] + boxes.width[i] ? i : -1;
}

/** Give the index of a node's own box, or -1 when it is not drawn. */
export function boxOf(graph, boxes, node) {
  const row = graph.rowOf(node);
  if (row >= boxes.rows) return -1;
  const start = boxes.rowStart[row];
  const i = firstAbove(boxes.node, start, boxes.rowStart[row + 1], node) - 1;
  return i >= start && boxes.node[i] === node && boxes.cutEnd[i] === 0 ? i : -1;
}

/** Give total and samples of a box. */
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

/** Give what a comparison says of a node, or of all siblings from it up to `cutEnd`. */
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

/** Give the drawn node that lies "parent", "child", "next" or "previous" of a drawn one, or null.
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

/** Give the place in an ascending list of matches that follows a node, wrapping around, or -1. */
export function stepMatch(matches, node, direction) {
  if (matches.length === 0) return -1;
  if (node === null) return direction > 0 ? 0 : matches.length - 1;
  const after = firstAbove(matches, 0, matches.length, node);
  if (direction > 0) return after % matches.length;
  const isOn = after > 0 && matches[after - 1] === node;
  return (after - (isOn ? 2 : 1) + matches.length) % matches.length;
}

function asFrame([name, module = "", kind = "native", file = "", line = 0]) {
  return { function: name, module, kind, file, line };
}

// `path` ends with the answer's own root, which is node 0.
function ancestorsOf(path, total) {
  if (!path?.length) return [];
  const root = { frame: ROOT_FRAME, total, samples: null };
  const below = path.slice(0, -1).map((each) => ({ ...each, frame: asFrame(each.frame) }));
  return [root, ...below];
}

function makeView(diff, side) {
  const { nodes, scale, path, totals } = diff;
  const width = ({ before, after }) => {
    if (side === "before") return before * scale.before;
    if (side === "after") return after * scale.after;
    return (before * scale.before + after * scale.after) / 2;
  };
  const total = nodes.before.map((before, i) => width({ before, after: nodes.after[i] }));
  return {
    ...diff,
    total: width(totals),
    nodes: { ...nodes, total },
    path: path?.map((each) => ({ ...each, total: width(each) })),
  };
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
    // What follows is narrower still, or the rest; of one side of a comparison it may be wider.
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

/** Give the first place from `start` to `end` whose number is above `wanted`. */
function firstAbove(ascending, start, end, wanted) {
  let [low, high] = [start, end];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ascending[middle] > wanted) high = middle;
    else low = middle + 1;
  }
  return low;
}

function withText(text) {
  const wanted = text.toLowerCase();
  return ({ function: name, module, kind }) =>
    kind !== "rest" &&
    (name.toLowerCase().includes(wanted) || module.toLowerCase().includes(wanted));
}

function ofFunction(wanted) {
  return ({ function: name, module, kind }) =>
    name === wanted.function && module === wanted.module && kind !== "label" && kind !== "rest";
}

function isSameKey(frame, [name, module, kind]) {
  return frame.function === name && frame.module === module && frame.kind === kind;
}

function encodeKey([name, module, kind]) {
  return encoder.encode(`${name}\0${module}\0${kind}`);
}

function keyOf({ function: name, module, kind }) {
  return encodeKey([name, module, kind]);
}

// 64 bits as two halves: BigInt is ten times slower, and the low product fits a double.
function hashKey([high, low], key, isFirst) {
  for (let i = isFirst ? 0 : -1; i < key.length; i += 1) {
    low = (low ^ (i < 0 ? KEY_SEPARATOR : key[i])) >>> 0;
    const carry = ((low * FNV_PRIME_LOW) / 2 ** 32) | 0;
    high = (Math.imul(high, FNV_PRIME_LOW) + carry + (low << 8)) | 0;
    low = Math.imul(low, FNV_PRIME_LOW) >>> 0;
  }
  return [high >>> 0, low];
}

function hex(state) {
  return state.map((half) => half.toString(16).padStart(8, "0")).join("");
}
