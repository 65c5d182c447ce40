// Api: the service's answers. One request per question at a time, the latest wins; nothing is
// asked again by itself.

const KEPT = 12;

/** What the service, or the way to it, says instead of an answer (RFC 9457). */
export class ApiError extends Error {
  constructor(problem, status) {
    super(problem.detail || problem.title || `the service answered with status ${status}`);
    this.problem = problem;
    this.title = problem.title || "The service failed";
    this.status = status;
    this.node = problem.node ?? null;
    this.parameter = problem.parameter ?? null;
  }

  /** Asking again later may help: the service or its store cannot be reached now. */
  get isAway() {
    return this.status === 0 || this.status === 429 || this.status >= 502;
  }
}

/** Give the address of a question; `params` is a list of pairs. */
export function address(path, params = []) {
  const query = new URLSearchParams(params).toString();
  return `/api/v1/${path}${query ? `?${query}` : ""}`;
}

/** Tell whether an error only says that somebody stopped waiting. */
export function isCancelled(error) {
  return error.name === "AbortError";
}

export class Api {
  #running = new Map();
  #kept = new Map();

  /**
   * Ask. A question with the same `slot` that still runs is cancelled (it throws an AbortError).
   * Gives {answer, arrivedAt}: JSON and the performance.now() of its arrival. Answers to questions
   * with absolute times are kept for Back; `forget` drops them.
   */
  async ask(slot, path, params, { isKept = false } = {}) {
    this.cancel(slot);
    const url = address(path, params);
    if (isKept && this.#kept.has(url))
      return { answer: this.#kept.get(url), arrivedAt: performance.now() };
    const controller = new AbortController();
    this.#running.set(slot, controller);
    try {
      const { answer, arrivedAt } = await fetchJson(url, controller.signal);
      if (isKept) this.#keep(url, answer);
      return { answer, arrivedAt };
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

  #keep(url, answer) {
    this.#kept.delete(url);
    this.#kept.set(url, answer);
    if (this.#kept.size > KEPT) this.#kept.delete(this.#kept.keys().next().value);
  }
}

async function fetchJson(url, signal) {
  let response;
  let text;
  try {
    response = await fetch(url, { signal, headers: { Accept: "application/json" } });
    text = await response.text();
  } catch (error) {
    if (isCancelled(error)) throw error;
    throw new ApiError(
      { title: "The service does not answer", detail: "The connection failed. Does it still run?" },
      0,
    );
  }
  const arrivedAt = performance.now();
  let answer;
  try {
    answer = JSON.parse(text);
  } catch {
    throw new ApiError(
      { detail: `The answer is not JSON (status ${response.status}).` },
      response.ok ? 502 : response.status,
    );
  }
  if (!response.ok) throw new ApiError(answer, response.status);
  return { answer, arrivedAt };
}
