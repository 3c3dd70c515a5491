import { ask, byId, checkLength, count, cutNote, element, latest, score, show } from "./api.js";

const [query, hits, status, problem] = ["query", "hits", "search-status", "search-problem"].map(byId);
const [topK, threshold, plotHits] = ["top-k", "threshold", "plot-hits"].map(byId);
let service = null;
let found = null; // the answer on show

/** Takes the service's answer about its health. */
export function searchReady(health) {
  service = health;
  if (!health.index_size) {
    query.disabled = true;
    blank("No sentences to search: start the service with a file of them. Compare and Plot work without it.");
  } else if (!found) run.now();
}

export const focusSearch = () => (query.focus(), query.select());

const run = latest(async (signal) => {
  const text = query.value.trim();
  if (!service?.index_size) return;
  if (!text) return blank(`Type to search ${count(service.index_size)} sentences.`);
  hits.setAttribute("aria-busy", "true");
  try {
    checkLength(text, service.limits);
    const start = performance.now();
    const least = Number(threshold.value);
    const body = { query: text, top_k: Number(topK.value), ...(least > 0 && { threshold: least }) };
    const { results } = await ask("api/search", body, signal);
    if (signal.aborted) return;
    list(results[0], performance.now() - start);
    show(problem, null);
  } catch (error) {
    if (signal.aborted) return;
    if (!error.gone) blank("");
    show(problem, error);
  } finally {
    if (!signal.aborted) hits.removeAttribute("aria-busy");
  }
});

export const searchAgain = run.now;

function blank(text) {
  found = null;
  hits.replaceChildren();
  hits.removeAttribute("aria-busy");
  status.textContent = text;
  plotHits.hidden = true;
  show(problem, null);
}

function list(result, milliseconds) {
  found = result;
  hits.replaceChildren(...result.hits.map(row));
  plotHits.hidden = result.hits.length < 2;
  const [number, time] = [result.hits.length, `${Math.max(1, Math.round(milliseconds))} ms`];
  const said = number
    ? `${number} nearest of ${count(service.index_size)} sentences, in ${time}`
    : `No sentence has a score of ${Number(threshold.value).toFixed(2)} or more: lower the least score.`;
  const note = cutNote(result.cut && "This query is", service.max_length);
  status.textContent = note ? `${said.replace(/\.$/, "")}. ${note}` : said;
}

function row(hit, place) {
  const line = `line ${hit.index + 1}${hit.cut ? `, cut at ${count(service.max_length)} tokens` : ""}`; // as `simcse-jax search` counts
  const text = element("span", "text", hit.sentence || "(an empty line)", " ", element("span", "number", line));
  const bar = element("div");
  bar.style.width = `${100 * Math.min(1, Math.max(0, hit.score))}%`;
  const track = element("div", "track", bar);
  track.setAttribute("aria-hidden", "true");
  const button = element("button", "hit", text, element("span", "score", score(hit.score), track));
  button.type = "button";
  const note = cutNote(hit.cut && "This sentence is", service.max_length);
  button.title = ["Search for this sentence", note].filter(Boolean).join(". ");
  button.tabIndex = place ? -1 : 0; // one stop for Tab; arrows go on from there
  button.addEventListener("click", () => {
    query.value = hit.sentence;
    query.focus();
    run.now();
  });
  return element("li", "", button);
}

function move(from, step) {
  const buttons = [...hits.querySelectorAll(".hit")];
  const place = buttons.indexOf(from) + step;
  if (place < 0) return query.focus();
  const next = buttons[Math.min(place, buttons.length - 1)];
  for (const button of buttons) button.tabIndex = button === next ? 0 : -1;
  next?.focus();
}

query.addEventListener("input", () => (query.value.trim() ? run.soon() : run.now()));
query.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter") run.now();
  else if (event.key === "ArrowDown" && found?.hits.length) (event.preventDefault(), move(null, 1));
});
hits.addEventListener("keydown", (event) => {
  const steps = { ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  if (event.key === "Escape") return focusSearch();
  if (!(event.key in steps)) return;
  event.preventDefault();
  if (event.key === "Home") move(null, 1);
  else move(event.target.closest(".hit"), steps[event.key]);
});
topK.addEventListener("change", run.now);
threshold.addEventListener("input", () => {
  const least = Number(threshold.value);
  byId("threshold-value").textContent = least ? least.toFixed(2) : "any";
  run.soon();
});
plotHits.addEventListener("click", () => {
  const sentences = [...new Set([found.query, ...found.hits.map((hit) => hit.sentence)])];
  document.dispatchEvent(new CustomEvent("plot", { detail: { sentences, query: found.query } }));
});
