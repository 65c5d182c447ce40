// Matches of a search in a tree, and stepping from one to the next. No DOM.

import { firstAbove } from "./layout.js";

export class Matches {
  #searched = "";
  /** All nodes that match; null without a search. */
  #nodes = null;
  /** The matches that are drawn, in preorder: only these can be stepped to. */
  #drawn = [];

  get isSearching() {
    return this.#nodes !== null;
  }

  get count() {
    return this.#drawn.length;
  }

  has(node) {
    return this.#nodes?.has(node) ?? false;
  }

  /** Set the text or function to search for; return whether it changed. */
  setSearch(searched) {
    if (isSameSearch(searched, this.#searched)) return false;
    this.#searched = searched;
    return true;
  }

  /** Search a tree; null if there is none yet. */
  search(graph) {
    const isSearching = this.#searched !== "" && graph !== null;
    this.#nodes = isSearching ? new Set(graph.matches(this.#searched)) : null;
  }

  /** List the matches among the drawn boxes; null if nothing is drawn. */
  list(boxes) {
    this.#drawn = [];
    if (!this.#nodes || !boxes) return;
    const { node, cutEnd } = boxes;
    for (let i = 0; i < node.length; i += 1) {
      if (cutEnd[i] === 0 && this.#nodes.has(node[i])) this.#drawn.push(node[i]);
    }
    this.#drawn.sort((a, b) => a - b);
  }

  /** Return {index, count}: the position of a node among the matches, from 1; 0 if it is not one. */
  placeOf(node) {
    const index = node === null ? 0 : this.#drawn.indexOf(node) + 1;
    return { index, count: this.count };
  }

  /** Return the match that follows a node in a direction, wrapping around; null if there is none. */
  next(node, direction) {
    const at = stepMatch(this.#drawn, node, direction);
    return at < 0 ? null : this.#drawn[at];
  }
}

/** Return the place in an ascending list of matches that follows a node, wrapping around, or -1. */
export function stepMatch(matches, node, direction) {
  if (matches.length === 0) return -1;
  if (node === null) return direction > 0 ? 0 : matches.length - 1;
  const after = firstAbove(matches, 0, matches.length, node);
  if (direction > 0) return after % matches.length;
  const isOn = after > 0 && matches[after - 1] === node;
  return (after - (isOn ? 2 : 1) + matches.length) % matches.length;
}

function isSameSearch(one, other) {
  if (typeof one === "string" || typeof other === "string") return one === other;
  return one.function === other.function && one.module === other.module;
}
