// The flame graph's painter: boxes in, pixels of a canvas out.

import {
  boxColour,
  changeColour,
  changeSign,
  dimColour,
  fadeColour,
  isNeutral,
  matchColour,
} from "./colour.js";
import { namesOf, safeName, shorten } from "./format.js";
import { GAP_PX, ROW_PX } from "./viewport.js";

const FONT = '12px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace';
const TEXT_INSET_PX = 4;
const TEXT_LEAST_PX = 30;
const CACHED_TEXTS = 20000;

/** Draws boxes; caches colours, shortened names and hatchings. */
export class Painter {
  #root;
  #canvas;
  #context;
  /** The arguments of `paint`. */
  #scene = null;
  #scheme = null;
  #colours = new Map();
  #texts = new Map();
  #hatchings = new Map();
  #cellPx = 7.2;

  constructor({ root, canvas }) {
    this.#root = root;
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d", { alpha: false });
    this.readScheme();
  }

  /**
   * Draw what the viewport shows. `colour` is "kind", "module", "self" or "change", `withLine`
   * whether names have lines, `zoomed` the node at full width, `matches` the search's matches
   * (Matches).
   */
  paint({ graph, viewport, colour, withLine, zoomed, matches }) {
    this.#scene = { graph, boxes: viewport.boxes, colour, withLine, zoomed, matches };
    const { ratio, scrollTop, width } = viewport;
    const context = this.#context;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = this.#scheme.background;
    context.fillRect(0, 0, this.#canvas.width, this.#canvas.height);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.font = FONT;
    context.textBaseline = "middle";
    const hatching = this.#hatching(ratio);
    const [first, last] = viewport.visibleRows();
    for (let row = first; row <= last; row += 1) {
      this.#drawRow(row, viewport.topOf(row) - scrollTop, width, ratio, hatching);
    }
  }

  /** Drop cached colours: in another tree the same numbers are other frames. */
  forgetColours() {
    this.#colours.clear();
  }

  #drawRow(row, top, right, ratio, hatching) {
    const context = this.#context;
    const { x, width, node, cutEnd, rowStart } = this.#scene.boxes;
    const height = ROW_PX - GAP_PX;
    for (let i = rowStart[row]; i < rowStart[row + 1]; i += 1) {
      // Whole device pixels keep edges sharp, without overlaps or gaps between neighbours.
      const start = Math.round(x[i] * ratio) / ratio;
      const end = Math.min(right, Math.round((x[i] + width[i]) * ratio) / ratio);
      const gap = width[i] > 3 ? GAP_PX : 0;
      const drawn = Math.max(1 / ratio, end - start - gap);
      const colour = this.#colourOf(node[i], cutEnd[i] !== 0);
      context.fillStyle = colour.fill;
      context.fillRect(start, top, drawn, height);
      if (cutEnd[i] !== 0 || this.#scene.graph.frameOf(node[i]).kind === "rest") {
        context.fillStyle = hatching;
        context.fillRect(start, top, drawn, height);
        continue;
      }
      if (colour.mark) this.#drawMark(colour, start, top, drawn, ratio);
      if (drawn >= TEXT_LEAST_PX) {
        context.fillStyle = colour.text;
        const shown = this.#fitted(this.#titlesOf(node[i]), drawn - 2 * TEXT_INSET_PX);
        context.fillText(shown, start + TEXT_INSET_PX, top + height / 2 + 0.5);
      }
      if (colour.isFound) this.#strokeBox(start, top, drawn, this.#scheme.foreground, []);
    }
  }

  // Marks show verdicts without colour.
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

  // What may be written into a box, longest first.
  #titlesOf(node) {
    const { graph, withLine } = this.#scene;
    const names = namesOf(graph.frameOf(node), withLine).map((name) => safeName(name));
    const sign = changeSign(graph.verdictOf(node));
    return names.map((name) => `${sign ? `${sign} ` : ""}${name || "(no name)"}`);
  }

  #colourOf(node, isSum) {
    const { isDark } = this.#scheme;
    const { graph, colour, zoomed, matches } = this.#scene;
    const isFound = matches.has(node) && !isSum;
    if (colour === "change") return this.#colourOfChange(node, isSum, isFound);
    if (isFound) return matchColour(isDark);
    const isAbove = node < zoomed && graph.isWithin(zoomed, node);
    const change = matches.isSearching ? dimColour : isAbove ? fadeColour : null;
    if (isSum) return this.#frameColour({ kind: "rest", module: "" }, "rest", 0, change);
    const frame = graph.frameOf(node);
    if (colour === "self") {
      const own = isAbove ? 0 : graph.selfOf(node) / (graph.wholeTotal || 1);
      const step = Math.round(own * 400);
      const key = isNeutral(frame) ? frame.kind : `self ${step}`;
      return this.#frameColour(frame, key, step / 400, change);
    }
    const key = node < 0 ? `above ${node}` : graph.frame[node];
    return this.#frameColour(frame, key, 0, change);
  }

  // A match keeps the colour of its verdict: that colour is what the reader looks for.
  #colourOfChange(node, isSum, isFound) {
    const { isDark } = this.#scheme;
    const { graph, matches } = this.#scene;
    const key = isSum ? "" : graph.verdictOf(node);
    const colour = changeColour(key, isDark);
    if (!matches.isSearching) return colour;
    return isFound ? { ...colour, isFound } : dimColour(colour, isDark);
  }

  #frameColour(frame, key, selfShare, change) {
    const { isDark } = this.#scheme;
    if (!this.#colours.has(change)) this.#colours.set(change, new Map());
    const cache = this.#colours.get(change);
    let colour = cache.get(key);
    if (!colour) {
      colour = boxColour(frame, this.#scene.colour, isDark, selfShare);
      if (change) colour = change(colour, isDark);
      cache.set(key, colour);
    }
    return colour;
  }

  // The longest of some names that fits; the shortest one is cut if none does.
  #fitted(names, width) {
    const length = Math.floor(width / this.#cellPx);
    const key = `${length} ${names.join(" ")}`;
    let text = this.#texts.get(key);
    if (text === undefined) {
      const name = names.find((each) => each.length <= length) ?? names.at(-1);
      text = shorten(name, length);
      // Characters of other scripts are wider than the font's cell.
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

  /** Read the colours of the page again. */
  readScheme() {
    const [root, canvas] = [this.#root, this.#canvas];
    const style = getComputedStyle(root);
    const background = style.backgroundColor;
    this.#scheme = { background, foreground: style.color, isDark: isDarkColour(background) };
    canvas.classList.toggle("is-dark", this.#scheme.isDark);
    this.#colours.clear();
    this.#texts.clear();
    this.#context.font = FONT;
    this.#cellPx = this.#measure("M".repeat(20)) / 20;
  }
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
    // The ellipsis has the font's width.
    if (text.charCodeAt(i) > 126 && text[i] !== "…") return false;
  }
  return true;
}
