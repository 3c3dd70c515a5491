import { ask, byId, checkLength, count, cutNote, element, latest, Problem, show } from "./api.js";
import { placeLabels } from "./labels.js";

const [lines, status, problem, figure] = ["lines", "plot-status", "plot-problem", "figure"].map(byId);
const [plane, caption, points] = ["plane", "plane-caption", "points"].map(byId);
const EXAMPLE = `A man is playing a flute.
Someone plays an instrument.
The orchestra rehearses a symphony.
Two dogs run across a field.
A puppy is chasing a ball.
The cat sleeps on the sofa.
Shares fell sharply on Monday.
The central bank raised interest rates.
Investors fear a recession.
She is slicing tomatoes for a salad.
He bakes bread every morning.`;
let service = null;
let answer = null;
let query = null; // the sentence that the others were found for, if any

export function plotReady(health) {
  service = health;
}

/** Plots these sentences, in place of what stands there, and marks the query among them. */
export function plotSentences(sentences, asked = null) {
  lines.value = sentences.join("\n");
  query = asked;
  run.now();
}

const run = latest(async (signal) => {
  const sentences = lines.value.split("\n").map((line) => line.trim()).filter(Boolean);
  if (sentences.length < 2) return blank("Give two sentences or more.");
  try {
    const most = service?.limits.max_plot;
    if (sentences.length > most)
      throw new Problem(`These are ${count(sentences.length)} sentences; a plot may have ${count(most)}.`);
    for (const sentence of sentences) checkLength(sentence, service?.limits);
    const given = await ask("api/plot", { sentences }, signal);
    if (signal.aborted) return;
    answer = given;
    show(problem, null);
    const cut = answer.points.filter((point) => point.cut).length;
    const note = cutNote(cut && `${count(cut)} of them ${cut > 1 ? "are" : "is"}`, service.max_length);
    status.textContent = `${count(sentences.length)} sentences${note ? `. ${note}` : ""}`;
    figure.hidden = false;
    list();
    draw();
  } catch (error) {
    if (signal.aborted) return;
    blank("");
    show(problem, error);
  }
}, 300);

export const plotAgain = run.now;

function blank(text) {
  answer = null;
  figure.hidden = true;
  points.replaceChildren();
  status.textContent = text;
  show(problem, null);
}

function list() {
  const share = (part) => `${Math.round(100 * part)} %`;
  caption.textContent = `First two principal components: ${answer.explained.map(share).join(" and ")} of the variance. `
    + "Near means alike." + (asked() < 0 ? "" : " ◆ is the query.");
  points.replaceChildren(
    ...answer.points.map(({ sentence, x, y, cut }, number) => {
      const marks = [number === asked() && "◆ query", cut && "cut", `${signed(x)}, ${signed(y)}`];
      const at = element("span", "at", marks.filter(Boolean).join(" · "));
      const item = element("li", number === asked() ? "asked" : "", element("span", "", sentence), at);
      item.tabIndex = number ? -1 : 0;
      for (const [on, off] of [["mouseenter", "mouseleave"], ["focus", "blur"]]) {
        item.addEventListener(on, () => mark(number, true));
        item.addEventListener(off, () => mark(number, false));
      }
      return item;
    }),
  );
  plane.setAttribute("aria-label", `Plot of ${answer.points.length} sentences; the list below gives their places.`);
}

/** The number of the query among the points; -1 without one. */
const asked = () => answer.points.findIndex(({ sentence }) => sentence === query);

const signed = (value) => value.toFixed(2).replace("-", "−");

function draw() {
  if (!answer || !figure.clientWidth) return;
  const size = { width: figure.clientWidth, height: Math.round(Math.min(520, Math.max(320, figure.clientWidth * 0.62))) };
  const narrow = size.width < 480;
  const margin = { x: narrow ? 34 : 90, y: 34 };
  const [xs, ys] = ["x", "y"].map((axis) => answer.points.map((point) => point[axis]));
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  // One scale for both axes: a distance is the same in any direction.
  const scale = Math.min(
    (size.width - 2 * margin.x) / (right - left || 1), (size.height - 2 * margin.y) / (high - low || 1),
  );
  const at = ({ x, y }) => ({
    x: size.width / 2 + scale * (x - (left + right) / 2), y: size.height / 2 - scale * (y - (low + high) / 2),
  });
  plane.setAttribute("viewBox", `0 0 ${size.width} ${size.height}`);
  plane.setAttribute("height", size.height);
  const origin = at({ x: 0, y: 0 });
  plane.replaceChildren(
    svg("line", { class: "axis", x1: 0, x2: size.width, y1: origin.y, y2: origin.y }),
    svg("line", { class: "axis", x1: origin.x, x2: origin.x, y1: 0, y2: size.height }),
  );
  const groups = answer.points.map(({ sentence }) => {
    const text = svg("text", {});
    text.textContent = shortened(sentence, narrow ? 18 : 34);
    const group = svg("g", {}, text);
    plane.append(group);
    return group;
  });
  const places = answer.points.map(at);
  const widths = groups.map((group) => group.firstChild.getComputedTextLength());
  placeLabels(places, widths, size).forEach((label, number) => {
    const [group, { x, y }] = [groups[number], places[number]];
    const text = group.firstChild;
    if (label) {
      text.setAttribute("x", label.x);
      text.setAttribute("y", label.y);
      const { leader } = label;
      if (leader) group.prepend(svg("line", { class: "leader", x1: x, y1: y, x2: leader.x, y2: leader.y }));
    } else text.remove();
    const title = svg("title", {});
    title.textContent = answer.points[number].sentence;
    if (number === asked()) {
      group.classList.add("asked");
      group.append(svg("path", { d: `M${x} ${y - 8}l8 8l-8 8l-8 -8z` }), title);
    } else group.append(svg("circle", { cx: x, cy: y, r: 6 }), title);
    group.addEventListener("mouseenter", () => mark(number, true));
    group.addEventListener("mouseleave", () => mark(number, false));
  });
}

function mark(number, on) {
  points.children[number]?.classList.toggle("marked", on);
  plane.querySelectorAll("g")[number]?.classList.toggle("marked", on);
}

function shortened(text, most) {
  const characters = [...text];
  return characters.length > most ? `${characters.slice(0, most - 1).join("").trimEnd()}…` : text;
}

function svg(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

points.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const next = step && (step > 0 ? event.target.nextElementSibling : event.target.previousElementSibling);
  if (!next) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
lines.addEventListener("input", run.soon);
byId("example").addEventListener("click", () => plotSentences(EXAMPLE.split("\n")));
new ResizeObserver(draw).observe(figure);
blank("Give two sentences or more.");
