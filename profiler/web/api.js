// Api: requests to the service. One request per slot at a time, the latest wins; only what the
// service says is not complete yet is requested again automatically.

const KEPT = 12;

/** An error that the service returned (RFC 9457), or a connection that failed. */
export class ApiError extends Error {
  constructor(problem, status) {
    super(problem.detail || problem.title || `the service responded with status ${status}`);
    this.problem = problem;
    this.title = problem.title || "The service failed";
    this.status = status;
    this.node = problem.node ?? null;
    this.parameter = problem.parameter ?? null;
  }

  /** Whether a later retry may succeed: the service or its store cannot be reached now. */
  get isAway() {
    return this.status === 0 || this.status === 429 || this.status >= 502;
  }
}

/** Return the address of a request; `params` is a list of pairs. */
export function address(path, params = []) {
  const query = new URLSearchParams(params).toString();
  return `/api/v1/${path}${query ? `?${query}` : ""}`;
}

/** Return whether an error only says that the request was cancelled. */
export function isCancelled(error) {
  return error.name === "AbortError";
}

export class Api {
  #running = new Map();
  #kept = new Map();

  /**
   * Send a request. One with the same `slot` that still runs is cancelled (it throws an AbortError).
   * Returns {response, arrivedAt}: JSON and the performance.now() of its arrival. With `isKept` the
   * response is kept for Back; `forget` drops all of them. With `isRenewed` it replaces the one kept.
   */
  async request(slot, path, params, { isKept = false, isRenewed = false } = {}) {
    this.cancel(slot);
    const url = address(path, params);
    if (isKept && !isRenewed && this.#kept.has(url))
      return { response: this.#kept.get(url), arrivedAt: performance.now() };
    const controller = new AbortController();
    this.#running.set(slot, controller);
    try {
      const { response, arrivedAt } = await fetchJson(url, controller.signal);
      if (isKept) this.#keep(url, response);
      return { response, arrivedAt };
    } finally {
      if (this.#running.get(slot) === controller) this.#running.delete(slot);
    }
  }

  cancel(slot) {
    this.#running.get(slot)?.abort();
    this.#running.delete(slot);
  }

  forget() {
    this.#kept.clear();
  }

  #keep(url, response) {
    this.#kept.delete(url);
    this.#kept.set(url, response);
    if (this.#kept.size > KEPT) this.#kept.delete(this.#kept.keys().next().value);
  }
}

async function fetchJson(url, signal) {
  let reply;
  let text;
  try {
    reply = await fetch(url, { signal, headers: { Accept: "application/json" } });
    text = await reply.text();
  } catch (error) {
    if (isCancelled(error)) throw error;
    throw new ApiError(
      {
        title: "The service does not respond",
        detail: "The connection failed. Is the service still running?",
      },
      0,
    );
  }
  const arrivedAt = performance.now();
  let response;
  try {
    response = JSON.parse(text);
  } catch {
    throw new ApiError(
      { detail: `The response is not JSON (status ${reply.status}).` },
      reply.ok ? 502 : reply.status,
    );
  }
  if (!reply.ok) throw new ApiError(response, reply.status);
  return { response, arrivedAt };
}
