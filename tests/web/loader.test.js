// What is requested, and when a panel is drawn from what has arrived.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Loader } from "../../profiler/web/loader.js";

/** A service that responds when told to: `arrive(path)` responds to the requests of a path. */
function slowService() {
  const waiting = [];
  globalThis.fetch = (url) => new Promise((resolve) => waiting.push({ url, resolve }));
  return {
    requested: () => waiting.map(({ url }) => url),
    arrive: async (path) => {
      for (const { url, resolve } of waiting) {
        if (url.includes(path)) resolve(new Response(JSON.stringify({ path })));
      }
      await new Promise((resolve) => setTimeout(resolve)); // until the response is read
    },
  };
}

function loading() {
  const drawn = [];
  const loader = new Loader({
    onResponse: (panel) => drawn.push([panel, loader.of(panel).response]),
    onError: () => {},
    onProgress: () => {},
    onSlow: () => {},
  });
  return { loader, drawn };
}

test("a panel is not drawn before its first response, whatever else changes", async () => {
  const service = slowService();
  const { loader, drawn } = loading();
  const flame = ["flamegraph", []];

  loader.load({ flame, top: ["top", [["sort", "self"]]] });
  loader.load({ flame, top: ["top", [["sort", "name"]]] });

  assert.deepEqual(drawn, []);
  assert.deepEqual(service.requested(), [
    "/api/v1/flamegraph",
    "/api/v1/top?sort=self",
    "/api/v1/top?sort=name",
  ]);
  await service.arrive("flamegraph");
  assert.deepEqual(drawn, [["flame", { path: "flamegraph" }]]);
  loader.cancel();
});

test("a panel that has its response is drawn again with each state", async () => {
  const service = slowService();
  const { loader, drawn } = loading();

  loader.load({ flame: ["flamegraph", []] });
  await service.arrive("flamegraph");
  loader.load({ flame: ["flamegraph", []] });

  assert.equal(drawn.length, 2);
  assert.equal(service.requested().length, 1);
});
