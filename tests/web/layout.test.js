// The tree of a response, its boxes, and the ids that the service shares with the page.

import assert from "node:assert/strict";
import { test } from "node:test";

import {
  boxOf,
  comparedTo,
  hit,
  LEAST_PX,
  layOut,
  neighbour,
  sumOf,
} from "../../profiler/web/layout.js";
import { stepMatch } from "../../profiler/web/matches.js";
import { Graph, graphOf, nodeId, ROOT_ID, viewOf } from "../../profiler/web/tree.js";

const FRAMES = [
  ["all", "", "label", "", 0],
  ["api", "", "label", "", 0],
  ["main", "api", "native", "api.c", 40],
  ["work", "api", "native", "api.c", 22],
  ["memcpy", "libc.so.6", "native", "", 0],
  ["(too narrow to draw)", "", "rest", "", 0],
];

// Rows of [frame, depth, total, self].
function response(rows, { frames = FRAMES, path = [], total = rows[0][2] } = {}) {
  return {
    total,
    frames,
    path,
    nodes: {
      frame: rows.map((row) => row[0]),
      depth: rows.map((row) => row[1]),
      total: rows.map((row) => row[2]),
      self: rows.map((row) => row[3]),
      samples: rows.map((row) => 3 * row[2]),
    },
  };
}

// all > api > main > (work > memcpy, memcpy, rest)
const SMALL = [
  [0, 0, 1000, 0],
  [1, 1, 1000, 0],
  [2, 2, 1000, 100],
  [3, 3, 600, 200],
  [4, 4, 400, 400],
  [4, 3, 250, 250],
  [5, 3, 50, 50],
];

// The same, zoomed to work.
const ZOOMED = response(
  [
    [3, 0, 600, 200],
    [4, 1, 400, 400],
  ],
  {
    total: 1000,
    path: [FRAMES[1], FRAMES[2], FRAMES[3]].map((frame, i) => ({
      id: "",
      frame,
      total: [1000, 1000, 600][i],
      samples: [100, 100, 60][i],
    })),
  },
);

function chain(depth) {
  return response(Array.from({ length: depth + 1 }, (_, i) => [2 + (i % 2), i, 100, 0]));
}

function names(graph, nodes) {
  return nodes.map((node) => graph.frameOf(node).function);
}

test("node ids are the service's", () => {
  const api = ["api", "", "label"];
  const main = ["main", "api", "native"];
  const work = ["work", "api", "native"];
  const handler = ["handler", "[python]", "python"];
  const japanese = "漢字 wide 🔥";
  const escaped = "right-to-left \\u202e gnp.exe";

  // From FlameGraph.ids() of profiler/flamegraph/flamegraph.py.
  assert.equal(nodeId([]), "cbf29ce484222325");
  assert.equal(nodeId([api]), "b6532b671fe739e7");
  assert.equal(nodeId([api, main]), "fc198849504c84c6");
  assert.equal(nodeId([api, main, work]), "786f16edd41f238b");
  assert.equal(nodeId([api, main, work, ["clamp", "api", "inlined"], work]), "66a1661d141da65b");
  assert.equal(
    nodeId([[japanese, "", "label"], handler, [japanese, japanese, "python"]]),
    "5df07658e6409a31",
  );
  assert.equal(
    nodeId([[escaped, "", "label"], handler, [escaped, escaped, "python"]]),
    "f7aeb97396624fc0",
  );
  assert.equal(
    nodeId([["[no comm]", "", "label"], handler, ["", "", "python"]]),
    "380a31a678f1058a",
  );
});

test("an id with leading zeros keeps its 16 digits", () => {
  const work = ["work", "api", "native"];
  const clamp = ["clamp", "api", "inlined"];
  const path = [["api", "", "label"], ["main", "api", "native"], work, clamp, work, clamp];

  assert.equal(nodeId(path), "0c54aab304aeb1c6");
  assert.equal(nodeId([...path, ["memcpy", "libc.so.6", "native"]]), "04aa97831a23ef43");
});

test("parents and ends of subtrees follow from the depths", () => {
  const graph = new Graph(response(SMALL));

  assert.deepEqual([...graph.parent], [0, 0, 1, 2, 3, 2, 2]);
  assert.deepEqual([...graph.end], [7, 7, 7, 5, 5, 6, 7]);
});

test("children start where their parent starts, own time lies right of them", () => {
  const graph = new Graph(response(SMALL));

  assert.deepEqual([...graph.left], [0, 0, 0, 0, 0, 600, 850]);
});

test("boxes stand row by row, as wide as their share", () => {
  const graph = new Graph(response(SMALL));

  const boxes = layOut(graph, 0, 500);

  assert.deepEqual([...boxes.rowStart], [0, 1, 2, 3, 6, 7]);
  assert.deepEqual([...boxes.node], [0, 1, 2, 3, 5, 6, 4]);
  assert.deepEqual([...boxes.x], [0, 0, 0, 0, 300, 425, 0]);
  assert.deepEqual([...boxes.width], [500, 500, 500, 300, 125, 25, 200]);
});

test("a zoomed box and what stands above it are as wide as the graph", () => {
  const graph = new Graph(response(SMALL));

  const boxes = layOut(graph, 3, 500);

  assert.deepEqual([...boxes.node], [0, 1, 2, 3, 4]);
  assert.deepEqual([...boxes.width].slice(0, 4), [500, 500, 500, 500]);
  assert.ok(Math.abs(boxes.width[4] - (500 * 400) / 600) < 1e-9);
});

test("a response for a zoomed node is drawn like a zoom into the whole response", () => {
  const whole = new Graph(response(SMALL));
  const zoomed = new Graph(ZOOMED);

  const near = layOut(zoomed, 0, 500);
  const far = layOut(whole, 3, 500);

  assert.deepEqual(names(zoomed, [...near.node]), names(whole, [...far.node]));
  assert.deepEqual([...near.rowStart], [...far.rowStart]);
  assert.deepEqual([...near.width], [...far.width]);
});

test("paths and ids of a node do not depend on the response's root", () => {
  const whole = new Graph(response(SMALL));
  const zoomed = new Graph(ZOOMED);

  assert.deepEqual(zoomed.pathOf(1), whole.pathOf(4));
  assert.equal(zoomed.idOf(0), whole.idOf(3));
  assert.equal(zoomed.idOf(zoomed.top), ROOT_ID);
  assert.equal(zoomed.rowOf(1), whole.rowOf(4));
});

test("a node is found by path and by id, above the response's root too", () => {
  const graph = new Graph(ZOOMED);

  assert.equal(graph.findPath(graph.pathOf(1)), 1);
  assert.equal(graph.findPath([["api", "", "label"]]), -2);
  for (const node of [-3, -2, -1, 0, 1]) assert.equal(graph.findId(graph.idOf(node)), node);
  assert.equal(graph.findId("0123456789abcdef"), null);
});

test("the id of every node is that of its path", () => {
  for (const graph of [new Graph(response(SMALL)), new Graph(ZOOMED), new Graph(chain(300))]) {
    for (let node = graph.top; node < graph.size; node += 1) {
      assert.equal(graph.idOf(node), nodeId(graph.pathOf(node)));
    }
  }
});

test("the ids that a response tells of its root and what stands above lead there", () => {
  const told = ["00000000000000a1", "00000000000000a2", "00000000000000a3"];
  const path = ZOOMED.path.map((each, i) => ({ ...each, id: told[i] }));
  const graph = new Graph({ ...ZOOMED, path });

  assert.deepEqual(
    told.map((id) => graph.findId(id)),
    [-2, -1, 0],
  );
  assert.equal(graph.findId(ROOT_ID), graph.top);
});

test("a path that ends early in this response gives the deepest node on it", () => {
  const graph = new Graph(response(SMALL));

  const node = graph.findPath([...graph.pathOf(3), ["gone", "api", "native"]]);

  assert.equal(node, 3);
});

test("totals of what stands above come from the response's path", () => {
  const graph = new Graph(ZOOMED);

  assert.deepEqual(
    [-3, -2, -1, 0].map((node) => graph.totalOf(node)),
    [1000, 1000, 1000, 600],
  );
  assert.deepEqual(
    [-3, -1, 0].map((node) => graph.selfOf(node)),
    [null, null, 200],
  );
});

test("children that are too narrow become one box with their sum", () => {
  const rows = [
    [0, 0, 1000, 0],
    [2, 1, 990, 990],
  ];
  for (let i = 0; i < 10; i += 1) rows.push([4, 1, 1, 1]);
  const graph = new Graph(response(rows));

  const boxes = layOut(graph, 0, 400);

  assert.deepEqual([...boxes.node], [0, 1, 2]);
  assert.deepEqual([...boxes.cutEnd], [0, 0, 12]);
  assert.deepEqual(sumOf(graph, boxes, 2), { nodes: 10, total: 10, samples: 30 });
  assert.equal(boxOf(graph, boxes, 2), -1);
});

test("no box is narrower than half a pixel", () => {
  const rows = [[0, 0, 5000, 0]];
  for (let i = 0; i < 100; i += 1) rows.push([2, 1, 100 - i, 0], [4, 2, 100 - i, 100 - i]);
  const graph = new Graph(response(rows));

  for (const width of [1, 40, 333, 2000]) {
    assert.ok(layOut(graph, 0, width).width.every((each) => each >= LEAST_PX));
  }
});

test("a place hits the box that is drawn there", () => {
  const graph = new Graph(response(SMALL));
  const boxes = layOut(graph, 0, 500);
  const at = (x, row) => {
    const i = hit(boxes, x, row);
    return i < 0 ? null : boxes.node[i];
  };

  assert.equal(at(299.9, 3), 3);
  assert.equal(at(300, 3), 5);
  assert.equal(at(449, 3), 6);
  assert.equal(at(451, 3), null);
  assert.equal(at(250, 4), null);
  assert.equal(at(0, 0), 0);
  assert.equal(at(-1, 0), null);
  assert.equal(at(0, -1), null);
  assert.equal(at(0, 5), null);
});

test("every box is hit in its middle", () => {
  const rows = [[0, 0, 3000, 0]];
  for (let i = 0; i < 60; i += 1) rows.push([2, 1, 50, 0], [3, 2, 30, 30], [4, 2, 20, 20]);
  const graph = new Graph(response(rows));
  const boxes = layOut(graph, 0, 900);

  for (let row = 0; row < boxes.rows; row += 1) {
    for (let i = boxes.rowStart[row]; i < boxes.rowStart[row + 1]; i += 1) {
      assert.equal(hit(boxes, boxes.x[i] + boxes.width[i] / 2, row), i);
    }
  }
});

test("keys lead to parent, first child and siblings", () => {
  const graph = new Graph(response(SMALL));
  const boxes = layOut(graph, 0, 500);
  const from = (node, direction) => neighbour(graph, boxes, node, direction);

  assert.equal(from(3, "parent"), 2);
  assert.equal(from(0, "parent"), null);
  assert.equal(from(2, "child"), 3);
  assert.equal(from(4, "child"), null);
  assert.equal(from(3, "next"), 5);
  assert.equal(from(5, "previous"), 3);
  assert.equal(from(3, "previous"), null);
});

test("above a zoomed box the first child is the one on the way to it", () => {
  const rows = [
    [0, 0, 100, 0],
    [2, 1, 60, 60],
    [3, 1, 40, 0],
    [4, 2, 40, 40],
  ];
  const graph = new Graph(response(rows));
  const boxes = layOut(graph, 3, 500);

  assert.equal(neighbour(graph, boxes, 0, "child"), 2);
  assert.equal(neighbour(graph, boxes, 2, "child"), 3);
  assert.equal(neighbour(graph, boxes, 2, "previous"), null);
});

test("a search finds function and module in any case, in preorder", () => {
  const graph = new Graph(response(SMALL));

  assert.deepEqual(graph.matches("MEM"), [4, 5]);
  assert.deepEqual(graph.matches("libc"), [4, 5]);
  assert.deepEqual(graph.matches(""), []);
});

test("a search takes its text literally", () => {
  const graph = new Graph(response(SMALL));

  assert.deepEqual(graph.matches(".*"), []);
  assert.deepEqual(graph.matches("c.so"), [4, 5]);
});

test("a search finds neither the overall root nor sums of what is too narrow", () => {
  const graph = new Graph(response(SMALL));

  assert.deepEqual(graph.matches("all"), []);
  assert.deepEqual(graph.matches("narrow"), []);
});

test("a search finds what stands above the response's root", () => {
  const graph = new Graph(ZOOMED);

  assert.deepEqual(names(graph, graph.matches("main")), ["main"]);
});

test("stepping goes through the matches and wraps around", () => {
  assert.equal(stepMatch([4, 5, 9], null, 1), 0);
  assert.equal(stepMatch([4, 5, 9], null, -1), 2);
  assert.equal(stepMatch([4, 5, 9], 5, 1), 2);
  assert.equal(stepMatch([4, 5, 9], 9, 1), 0);
  assert.equal(stepMatch([4, 5, 9], 5, -1), 0);
  assert.equal(stepMatch([4, 5, 9], 4, -1), 2);
  assert.equal(stepMatch([4, 5, 9], 7, 1), 2);
  assert.equal(stepMatch([4, 5, 9], 7, -1), 1);
  assert.equal(stepMatch([], 7, 1), -1);
});

test("4,096 boxes upon each other are laid out and found", () => {
  const graph = new Graph(chain(4096));

  const boxes = layOut(graph, 0, 1200);

  assert.equal(boxes.rows, 4097);
  assert.equal(graph.findId(graph.idOf(4096)), 4096);
  assert.equal(layOut(graph, 4096, 1200).rows, 4097);
});

test("a hundred thousand boxes keep their sums", () => {
  const rows = [[0, 0, 50_000, 0]];
  for (let i = 0; i < 50_000; i += 1) rows.push([2, 1, 1, 0], [3, 2, 1, 1]);
  const graph = new Graph(response(rows));

  const boxes = layOut(graph, 0, 1000);

  assert.deepEqual(sumOf(graph, boxes, 1), { nodes: 50_000, total: 50_000, samples: 150_000 });
  assert.equal(layOut(graph, 0, 1e6).node.length, 100_001);
});

test("a response without boxes is laid out as none", () => {
  const graph = new Graph(response([], { total: 0, frames: [] }));

  assert.equal(layOut(graph, 0, 500).rows, 0);
  assert.deepEqual(graph.matches("x"), []);
});

test("a root without time has no boxes below it", () => {
  const graph = new Graph(
    response([
      [0, 0, 0, 0],
      [1, 1, 0, 0],
    ]),
  );

  assert.deepEqual([...layOut(graph, 0, 500).node], [0]);
});

const VERDICTS = ["unchanged", "more", "gone", "new"];

// Rows of [frame, depth, before, after, verdict]; the after side has half the CPU time.
function diff(rows, { scale = { before: 1, after: 2 } } = {}) {
  const column = (i) => rows.map((row) => row[i]);
  return {
    scale,
    common_change: { relative: 0 },
    totals: { before: rows[0][2], after: rows[0][3] },
    frames: FRAMES,
    path: [],
    verdicts: VERDICTS,
    nodes: {
      frame: column(0),
      depth: column(1),
      before: column(2),
      after: column(3),
      verdict: column(4),
    },
  };
}

// all > api > main > (work, memcpy), where memcpy is gone and work costs more.
const COMPARED = [
  [0, 0, 1000, 600, 0],
  [1, 1, 1000, 600, 0],
  [2, 2, 1000, 600, 0],
  [3, 3, 500, 600, 1],
  [4, 3, 300, 0, 2],
];

test("a comparison's boxes are as wide as both sides on average, or as one of them", () => {
  const response = diff(COMPARED);
  const widths = (side) => viewOf(response, side).nodes.total;

  assert.deepEqual(widths(""), [1100, 1100, 1100, 850, 150]);
  assert.deepEqual(widths("before"), [1000, 1000, 1000, 500, 300]);
  assert.deepEqual(widths("after"), [1200, 1200, 1200, 1200, 0]);
  assert.equal(viewOf(response, "after"), viewOf(response, "after"));
});

test("boxes keep their order on each side, and what is not there has none", () => {
  const response = diff([
    [0, 0, 1000, 600, 0],
    [3, 1, 300, 500, 1],
    [4, 1, 600, 100, 0],
  ]);
  const drawn = (side) => {
    const boxes = layOut(graphOf(viewOf(response, side)), 0, 1000);
    return [...boxes.node].map((node, i) => [node, Math.round(boxes.x[i])]);
  };

  assert.deepEqual(drawn("before"), [
    [0, 0],
    [1, 0],
    [2, 300],
  ]);
  assert.deepEqual(drawn("after"), [
    [0, 0],
    [1, 0],
    [2, 833],
  ]);
  const gone = layOut(graphOf(viewOf(diff(COMPARED), "after")), 0, 1000);
  assert.ok(![...gone.node].includes(4));
});

test("an ancestor that did not change itself names what changed below it", () => {
  const graph = graphOf(viewOf(diff(COMPARED), ""));

  assert.equal(graph.frameOf(graph.causeOf(0)).function, "work");
  assert.deepEqual(comparedTo(graph, 1), {
    before: 1000,
    after: 600,
    verdict: "unchanged",
    cause: graph.frameOf(3),
  });
  assert.equal(graph.causeOf(4), null);
  assert.deepEqual(comparedTo(graph, 3, 5), { before: 800, after: 600, verdict: "", cause: null });
});

test("a function's boxes are found by its name and module, not by a part of them", () => {
  const frames = [
    ["all", "", "label"],
    ["work", "api", "native"],
    ["work", "b", "native"],
  ];
  const graph = new Graph({
    total: 9,
    frames: [...frames, ["rework", "api", "native"], ["work", "api", "label"]],
    nodes: { frame: [0, 1, 2, 3, 4], depth: [0, 1, 2, 3, 4], total: [9, 9, 9, 9, 9] },
  });

  assert.deepEqual(graph.matches({ function: "work", module: "api" }), [1]);
  assert.deepEqual(graph.matches("WORK"), [1, 2, 3, 4]);
});
