// Loader: requests what the panels show from the service, and keeps the last response of each.

import { address, Api, isCancelled } from "./api.js";

/** The parts of the page that have a request of their own, drawn when its response arrives. */
export const PANELS = [
  ...["flame", "diff", "fleet", "timeline", "services", "top", "changes", "deployments", "trend"],
];
const SLOW_MS = 300;

export class Loader {
  #api = new Api();
  #callbacks;
  /** By panel: {key, response, error, isOld}; `key` is the address of the last request. */
  #panels = Object.fromEntries(
    PANELS.map((name) => [name, { key: null, response: null, error: null, isOld: false }]),
  );
  #pending = new Set();
  #refreshing = null;
  #slowTimer = 0;
  #labels = new Map();
  #clockSkewMs = 0;
  /** The response of /api/v1/status, null until it arrives. */
  status = null;
  /** The service's clock at the last refresh. */
  nowMs = Date.now();

  /**
   * Callbacks: onResponse(panel, arrivedAt) draws a panel, `arrivedAt` is null if its response is not
   * new; onError(panel); onProgress() after a request starts or ends; onSlow(isSlow).
   */
  constructor(callbacks) {
    this.#callbacks = callbacks;
  }

  /** Return {response, error, isOld} of a panel. */
  of(panel) {
    return this.#panels[panel];
  }

  get isBusy() {
    return this.#pending.size > 0;
  }

  isPending(panel) {
    return this.#pending.has(panel);
  }

  /** Fetch the clock and the status again, and forget the rest. Return false if it was cancelled. */
  async refresh() {
    const refresh = {};
    this.#refreshing = refresh;
    this.#setBusy("status", true);
    try {
      const { response } = await this.#api.request("status", "status");
      this.status = response;
      this.#clockSkewMs = response.now_ms - Date.now();
    } catch (error) {
      if (isCancelled(error)) {
        if (this.#refreshing === refresh) this.#setBusy("status", false);
        return false;
      }
      // The other requests will show the error.
    }
    this.nowMs = Date.now() + this.#clockSkewMs;
    this.#api.forget();
    this.#labels.clear();
    for (const name of PANELS) this.#panels[name].key = null;
    this.#setBusy("status", false);
    return true;
  }

  /** Request what is not shown yet; `requests` has [path, parameters] or null by panel. */
  load(requests) {
    for (const name of PANELS) {
      const request = requests[name];
      if (!request) continue;
      const panel = this.#panels[name];
      const key = address(...request);
      if (panel.key !== key || panel.error) this.#request(name, key, request);
      else if (panel.response) this.#callbacks.onResponse(name, null);
      // Otherwise it is drawn when its first response arrives.
    }
    this.#callbacks.onProgress();
  }

  async #request(name, key, [path, params]) {
    const panel = this.#panels[name];
    const request = {}; // the same request again has the same key
    panel.request = request;
    panel.asked = [path, params];
    panel.key = key;
    panel.isOld = true;
    this.#setBusy(name, true);
    let arrivedAt = null;
    try {
      const arrived = await this.#api.request(name, path, params, { isKept: true });
      if (panel.request !== request) return; // a later one replaced it
      ({ arrivedAt } = arrived);
      panel.response = arrived.response;
      panel.isOld = false;
      panel.error = null;
    } catch (error) {
      if (panel.request !== request) return;
      if (isCancelled(error)) panel.key = null;
      else panel.error = error;
    }
    this.#callbacks.onProgress(); // the graph must be visible to have a width
    try {
      if (panel.error) this.#callbacks.onError(name);
      else if (arrivedAt !== null) this.#callbacks.onResponse(name, arrivedAt);
    } finally {
      this.#setBusy(name, false);
    }
  }

  /**
   * Request what a panel shows once more, in the background: what is shown stays until the response
   * arrives. Return false if there is no new response.
   */
  async renew(name) {
    const panel = this.#panels[name];
    const { request, asked } = panel;
    if (!asked || this.isPending(name)) return false;
    try {
      const options = { isKept: true, isRenewed: true };
      const arrived = await this.#api.request(`${name} again`, ...asked, options);
      if (panel.request !== request) return false; // the page shows something else by now
      panel.response = arrived.response;
      this.#callbacks.onResponse(name, arrived.arrivedAt);
      return true;
    } catch {
      return false; // what is shown is still true
    }
  }

  cancel() {
    for (const name of ["status", ...PANELS]) this.#api.cancel(name);
  }

  /** Return labels or a label's values for suggestions; null if the request fails. */
  async labels(path, { from, until }) {
    const key = `${path} ${from} ${until}`;
    if (!this.#labels.has(key)) {
      const params = [
        ["from", String(from)],
        ["until", String(until)],
      ];
      try {
        this.#labels.set(key, (await this.#api.request("labels", path, params)).response);
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
