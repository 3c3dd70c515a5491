import { ask, byId, checkLength, latest, score, show } from "./api.js";

const [first, second, cosine, bar, problem] = ["first", "second", "cosine", "cosine-bar", "compare-problem"].map(byId);
let limits = null;

const run = latest(async (signal) => {
  const [a, b] = [first.value.trim(), second.value.trim()];
  if (!a || !b) return draw(null);
  try {
    for (const text of [a, b]) checkLength(text, limits);
    const { scores } = await ask("api/similarity", { a, b }, signal);
    if (signal.aborted) return;
    draw(scores[0][0]);
    show(problem, null);
  } catch (error) {
    if (signal.aborted) return;
    draw(null);
    show(problem, error);
  }
});

export function compareReady(health) {
  limits = health.limits;
}

export const compareAgain = run.now;

function draw(value) {
  cosine.textContent = value === null ? "–" : score(value);
  const shown = Math.min(1, Math.max(-1, value ?? 0));
  bar.style.left = `${50 + 50 * Math.min(0, shown)}%`;
  bar.style.width = `${50 * Math.abs(shown)}%`;
  show(problem, null);
}

for (const field of [first, second]) field.addEventListener("input", run.soon);
