// Loader: asks the service for what the panels show, and keeps the last response of each.

import { address, Api, isCancelled } from "./api.js";

/** What is asked for on its own, and drawn as soon as it is there. */
export const PANELS = ["flame", "diff", "timeline", "services", "top", "changes", "deployments"];
const SLOW_MS = 300;

export class Loader {
  #api = new Api();
  #callbacks;
  /** By panel: {key, response, error, isOld}; `key` is the address that was asked last. */
  #panels = Object.fromEntries(
    PANELS.map((name) => [name, { key: null, response: null, error: null, isOld: false }]),
  );
  #pending = new Set();
  #refreshing = null;
  #slowTimer = 0;
  #labels = new Map();
  #clockSkewMs = 0;
  /** The answer of /api/v1/status, null until it is there. */
  status = null;
  /** The service's clock at the last refresh. */
  nowMs = Date.now();

  /**
   * Callbacks: onResponse(panel, arrivedAt) to draw a panel, `arrivedAt` null where nothing new has
   * arrived; onError(panel); onProgress() after anything has begun or ended; onSlow(isSlow).
   */
  constructor(callbacks) {
    this.#callbacks = callbacks;
  }

  /** Give {response, error, isOld} of a panel. */
  of(panel) {
    return this.#panels[panel];
  }

  get isBusy() {
    return this.#pending.size > 0;
  }

  isPending(panel) {
    return this.#pending.has(panel);
  }

  /** Read the clock and the status anew and forget the rest; tell whether nothing came between. */
  async refresh() {
    const refresh = {};
    this.#refreshing = refresh;
    this.#setBusy("status", true);
    try {
      const { answer } = await this.#api.ask("status", "status");
      this.status = answer;
      this.#clockSkewMs = answer.now_ms - Date.now();
    } catch (error) {
      if (isCancelled(error)) {
        if (this.#refreshing === refresh) this.#setBusy("status", false);
        return false;
      }
      // The other responses say what is wrong.
    }
    this.nowMs = Date.now() + this.#clockSkewMs;
    this.#api.forget();
    this.#labels.clear();
    for (const name of PANELS) this.#panels[name].key = null;
    this.#setBusy("status", false);
    return true;
  }

  /** Ask for what is not shown yet; `requests` has [path, parameters] or null by panel. */
  load(requests) {
    for (const name of PANELS) {
      const request = requests[name];
      if (!request) continue;
      const panel = this.#panels[name];
      const key = address(...request);
      if (panel.key === key && !panel.error) this.#callbacks.onResponse(name, null);
      else this.#ask(name, key, request);
    }
    this.#callbacks.onProgress();
  }

  async #ask(name, key, [path, params]) {
    const panel = this.#panels[name];
    const request = {}; // what is asked again has the same key
    panel.request = request;
    panel.key = key;
    panel.isOld = true;
    this.#setBusy(name, true);
    let arrivedAt = null;
    try {
      const arrived = await this.#api.ask(name, path, params, { isKept: true });
      if (panel.request !== request) return; // a later one took its place
      ({ arrivedAt } = arrived);
      panel.response = arrived.answer;
      panel.isOld = false;
      panel.error = null;
    } catch (error) {
      if (panel.request !== request) return;
      if (isCancelled(error)) panel.key = null;
      else panel.error = error;
    }
    this.#callbacks.onProgress(); // what is hidden has no width to draw in
    try {
      if (panel.error) this.#callbacks.onError(name);
      else if (arrivedAt !== null) this.#callbacks.onResponse(name, arrivedAt);
    } finally {
      this.#setBusy(name, false);
    }
  }

  cancel() {
    for (const name of ["status", ...PANELS]) this.#api.cancel(name);
  }

  /** Give labels or a label's values for suggestions; null if the service does not answer. */
  async labels(path, { from, until }) {
    const key = `${path} ${from} ${until}`;
    if (!this.#labels.has(key)) {
      const params = [
        ["from", String(from)],
        ["until", String(until)],
      ];
      try {
        this.#labels.set(key, (await this.#api.ask("labels", path, params)).answer);
      } catch {
        return null;
      }
    }
    return this.#labels.get(key);
  }

  #setBusy(name, isBusy) {
    if (isBusy) this.#pending.add(name);
    else this.#pending.delete(name);
    if (this.isBusy && !this.#slowTimer) {
      this.#slowTimer = setTimeout(() => this.#callbacks.onSlow(true), SLOW_MS);
    }
    if (!this.isBusy) {
      clearTimeout(this.#slowTimer);
      this.#slowTimer = 0;
      this.#callbacks.onSlow(false);
    }
    this.#callbacks.onProgress();
  }
}
