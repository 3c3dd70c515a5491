import { ask, byId, checkLength, cutNote, latest, score, show } from "./api.js";

const [first, second, cosine, bar, problem] = ["first", "second", "cosine", "cosine-bar", "compare-problem"].map(byId);
const note = byId("compare-note");
let service = null;

const run = latest(async (signal) => {
  const [a, b] = [first.value.trim(), second.value.trim()];
  if (!a || !b) return draw(null);
  try {
    for (const text of [a, b]) checkLength(text, service?.limits);
    const { scores, cut_a, cut_b } = await ask("api/similarity", { a, b }, signal);
    if (signal.aborted) return;
    draw(scores[0][0]);
    const cut = ["", "The first sentence is", "The second sentence is", "Both sentences are"][cut_a[0] + 2 * cut_b[0]];
    note.textContent = cutNote(cut, service.max_length);
    show(problem, null);
  } catch (error) {
    if (signal.aborted) return;
    draw(null);
    show(problem, error);
  }
});

export function compareReady(health) {
  service = health;
}

export const compareAgain = run.now;

function draw(value) {
  cosine.textContent = value === null ? "–" : score(value);
  note.textContent = "";
  const shown = Math.min(1, Math.max(-1, value ?? 0));
  bar.style.left = `${50 + 50 * Math.min(0, shown)}%`;
  bar.style.width = `${50 * Math.abs(shown)}%`;
  show(problem, null);
}

for (const field of [first, second]) field.addEventListener("input", run.soon);
