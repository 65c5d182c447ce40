// The tree of one response: its nodes, their ids, and their verdicts. No DOM.
//
// Nodes are in preorder, node 0 is the response's root, a node's subtree is the range from itself to
// its `end` (profiler/flamegraph/flamegraph.py). Siblings are sorted largest first, a `rest` last. A
// response for a zoomed node also has its callers: nodes -1 (the parent of 0), -2, ...; the last of
// them, `top`, is the overall root. So numbers ascend in preorder throughout.
//
// Nothing here recurses: a response may be 4,096 boxes deep.

import { namesOf } from "./format.js";

export const ROOT_ID = "cbf29ce484222325";

/** The verdicts on what costs more or less than before. */
export const CHANGED = new Set(["more", "less", "new", "gone"]);

const FNV_OFFSET = [0xcbf29ce4, 0x84222325];

const FNV_PRIME_LOW = 0x1b3; // the prime is 2^40 + 0x1b3
const KEY_SEPARATOR = 1;
const ROOT_FRAME = { function: "all", module: "", kind: "label", file: "", line: 0 };
const encoder = new TextEncoder();

/**
 * Return the stable id of the node at the end of a path, as FlameGraph.ids() does: FNV-1a 64 over the
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

/** Return the tree of a response, the same one on each call: its ids are costly, see `idOf`. */
export function graphOf(response) {
  if (!graphs.has(response)) graphs.set(response, new Graph(response));
  return graphs.get(response);
}

const views = new WeakMap();

/**
 * Return a response of /api/v1/diff as one of /api/v1/flamegraph, whose boxes are as wide as `side`
 * makes them: "before", "after", or "" for the mean of both. The same one on each call.
 */
export function viewOf(diff, side) {
  if (!views.has(diff)) views.set(diff, new Map());
  const ofSides = views.get(diff);
  if (!ofSides.has(side)) ofSides.set(side, makeView(diff, side));
  return ofSides.get(side);
}

/** A response of /api/v1/flamegraph as a tree, or a view of a comparison. */
export class Graph {
  /** By node, counted from `top`: the halves of its id; computed on first use. */
  #ids = null;
  /** By id: the response's root and its callers, whose ids are in the response. */
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

  /** Return the node's samples, or null if the response does not have them. */
  samplesOf(node) {
    if (!this.samples) return null;
    return node < 0 ? this.#ancestor(node).samples : this.samples[node];
  }

  /** Return the node's self value, or null if the response does not have it. */
  selfOf(node) {
    return node < 0 || !this.self ? null : this.self[node];
  }

  /** Return whether this is a comparison: then boxes have two sides and a verdict. */
  get isComparison() {
    return this.verdict !== undefined;
  }

  /** Return {before, after} of a comparison's node. */
  sidesOf(node) {
    if (node < 0) return this.#ancestor(node);
    return { before: this.before[node], after: this.after[node] };
  }

  /** Return the verdict of a node; empty if it has none. */
  verdictOf(node) {
    return this.isComparison && node >= 0 ? this.comparison.verdicts[this.verdict[node]] : "";
  }

  /** Return how much more a node costs after than before, in cores per host, without the change that
   * all functions have in common. */
  growthOf(node) {
    const { before, after } = this.sidesOf(node);
    const { scale, common_change: common } = this.comparison;
    const factor = Math.sqrt(1 + common.relative); // of both sides alike: swapped, the sign alone
    return (after * scale.after) / factor - before * scale.before * factor;
  }

  /** Return the descendant whose self value contributes most to a node's growth, of those that changed
   * or moved; or null. */
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

  /** Return whether a node is a sum of nodes that are too narrow to draw. */
  isRest(node) {
    return this.frameOf(node).kind === "rest";
  }

  /** Return the parent, or null for the overall root. */
  parentOf(node) {
    if (node > 0) return this.parent[node];
    return node > this.top ? node - 1 : null;
  }

  /** Return how many boxes are above a node: 0 for the overall root. */
  rowOf(node) {
    return node < 0 ? node - this.top : this.depth[node] - this.top;
  }

  isWithin(node, ancestor) {
    if (ancestor < 0) return node >= ancestor;
    return node >= ancestor && node < this.end[ancestor];
  }

  /** Return the path of a node, as for `nodeId`. */
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

  /** Return the deepest node of a path that is in this response. */
  findPath(path) {
    let node = this.top;
    for (const key of path) {
      const child = this.#childWithKey(node, key);
      if (child === null) break;
      node = child;
    }
    return node;
  }

  /** Return the first node with this id, or null. */
  findId(id) {
    if (this.#above.has(id)) return this.#above.get(id);
    const { high, low } = this.#allIds();
    const [idHigh, idLow] = [parseInt(id.slice(0, 8), 16), parseInt(id.slice(8), 16)];
    for (let i = 0; i < low.length; i += 1) {
      if (low[i] === idLow && high[i] === idHigh) return i + this.top;
    }
    return null;
  }

  /** Return the nodes whose function or module contains the text in any case, or those of one function,
   * {function, module}; in preorder. The overall root and sums never match. */
  matches(searched) {
    if (searched === "") return [];
    const isSearched = typeof searched === "string" ? withText(searched) : ofFunction(searched);
    const isMatch = this.frames.map(isSearched);
    const nodes = [];
    for (let node = this.top + 1; node < this.size; node += 1) {
      if (node < 0 ? isSearched(this.frameOf(node)) : isMatch[this.frame[node]]) nodes.push(node);
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

  // All at once, each from its parent's id, so that each box hashes one key and not its whole path.
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

/** Return a frame of a response by the names of its fields. */
export function asFrame([name, module = "", kind = "native", file = "", line = 0]) {
  return { function: name, module, kind, file, line };
}

// `path` ends with the response's root, node 0.
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

function withText(text) {
  const lower = text.toLowerCase();
  return (frame) =>
    frame.kind !== "rest" &&
    (namesOf(frame)[0].toLowerCase().includes(lower) || frame.module.toLowerCase().includes(lower));
}

function ofFunction(searched) {
  return ({ function: name, module, kind }) =>
    name === searched.function && module === searched.module && kind !== "label" && kind !== "rest";
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
