// Requests to the service; only the latest counts.

/** Why there is no answer: the service's own words, or ours where it does not answer at all. */
export class Problem extends Error {
  constructor(message, { gone = false, busy = false } = {}) {
    super(message);
    this.gone = gone;
    this.busy = busy;
  }
}

/** The JSON answer to a GET, or to a POST where there is a body. */
export async function ask(path, body, signal) {
  const request = { signal };
  if (body !== undefined) {
    request.method = "POST";
    request.headers = { "Content-Type": "application/json" };
    request.body = JSON.stringify(body);
  }
  let response, answer;
  try {
    response = await fetch(path, request);
    answer = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    document.dispatchEvent(new Event("gone"));
    throw new Problem("The service does not answer.", { gone: true });
  }
  if (response.ok) return answer;
  const busy = response.status === 503;
  if (busy) document.dispatchEvent(new Event("busy"));
  throw new Problem(answer.error ?? `The service answered ${response.status}.`, { busy });
}

/** Runs `run(signal)` once typing has paused; a run that a newer one overtakes is aborted and its answer dropped. */
export function latest(run, pause = 120) {
  let timer, controller;
  const cancel = () => {
    clearTimeout(timer);
    controller?.abort();
  };
  const now = async () => {
    cancel();
    controller = new AbortController();
    const { signal } = controller;
    try {
      await run(signal);
    } catch (error) {
      if (!signal.aborted) throw error;
    }
  };
  return { now, cancel, soon: () => (cancel(), (timer = setTimeout(now, pause))) };
}

/** Shows a problem in its box, or nothing. */
export function show(box, problem) {
  // The top of the page already says that the service is gone.
  box.hidden = !problem || problem.gone;
  box.textContent = box.hidden ? "" : sentence(problem.message);
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

/** Raises what the service would say of a text that is too long, without asking it. */
export function checkLength(text, limits) {
  const length = [...text].length;
  if (limits && length > limits.max_characters)
    throw new Problem(`This text has ${count(length)} characters; at most ${count(limits.max_characters)} are taken.`);
}

export const count = (number) => number.toLocaleString("en");
export const score = (number) => number.toFixed(4).replace("-", "−");

/** A note that the model reads only the beginning of a text, or of both; null where it reads all. */
export function cutNote(what, limit) {
  return what && `${what} longer than the ${count(limit)} tokens that the model reads: only the beginning counts.`;
}
export const byId = (id) => document.getElementById(id);

/** An element with a class and text, or children. */
export function element(name, className, ...content) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...content);
  return made;
}
