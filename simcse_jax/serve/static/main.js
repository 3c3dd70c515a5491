// Tabs, theme, keys, and whether the service is there.
import { ask, byId, count } from "./api.js";
import { compareAgain, compareReady } from "./compare.js";
import { plotAgain, plotReady, plotSentences } from "./plot.js";
import { focusSearch, searchAgain, searchReady } from "./search.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const again = { search: searchAgain, compare: compareAgain, plot: plotAgain };

function open(name, focus = false) {
  for (const tab of tabs) {
    const chosen = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = !chosen;
    if (chosen && focus) tab.focus();
  }
  history.replaceState(null, "", `#/${name}`); // no id, to which a browser would scroll
}

tabs.forEach((tab, place) => {
  tab.addEventListener("click", () => open(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    open(tabs.at(to % tabs.length).getAttribute("aria-controls"), true);
  });
});

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input:not([type=range]), textarea, select");
  if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  open("search");
  focusSearch();
});
document.addEventListener("plot", (event) => {
  open("plot", true);
  plotSentences(event.detail.sentences, event.detail.query);
});

const theme = byId("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
// The button shows and names the theme that it changes to.
const ICONS = {
  Dark: "M20 14.5A8.5 8.5 0 0 1 9.5 4a8.5 8.5 0 1 0 10.5 10.5Z",
  Light: "M12 7.5a4.5 4.5 0 1 0 0 9a4.5 4.5 0 0 0 0-9ZM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6 19 19M5 19l1.4-1.4"
    + "M17.6 6.4 19 5",
};
const showTheme = () => {
  const other = isDark() ? "Light" : "Dark";
  theme.querySelector("path").setAttribute("d", ICONS[other]);
  theme.querySelector("span").textContent = theme.ariaLabel = theme.title = `${other} theme`;
};
theme.addEventListener("click", () => {
  const chosen = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = chosen;
  localStorage.setItem("theme", chosen);
  showTheme();
});
system.addEventListener("change", showTheme);
showTheme();

// While the service is away or not ready, the page asks every second; then it asks again for what stands in the fields.
const [service, about, gone] = ["service", "about", "gone"].map(byId);
let timer = null;
let waiting = true;

async function look() {
  timer = null;
  try {
    const health = await ask("api/health");
    const size = health.index_size ? `${count(health.index_size)} sentences` : "no sentences to search";
    about.textContent = `${health.model} · width ${health.width} · ${health.ready ? size : "being made ready…"}`;
    service.dataset.state = health.ready ? "ready" : "compiling";
    gone.hidden = true;
    byId("version").textContent = `Version ${health.version}.`;
    if (!health.ready) return lookAgain();
    compareReady(health);
    plotReady(health);
    searchReady(health);
    if (waiting) again[tabs.find((tab) => tab.tabIndex === 0).getAttribute("aria-controls")]();
    waiting = false;
  } catch {
    lookAgain();
  }
}

function lookAgain() {
  waiting = true;
  timer ??= setTimeout(look, 1000);
}

document.addEventListener("gone", () => {
  service.dataset.state = "gone";
  about.textContent = "no connection";
  gone.hidden = false;
  gone.textContent = "The service does not answer: it may have been stopped. This page goes on once the service is back.";
  lookAgain();
});
document.addEventListener("busy", lookAgain);

const named = location.hash.slice(2);
open(named in again ? named : "search");
if (!byId("search").hidden) focusSearch();
look();
