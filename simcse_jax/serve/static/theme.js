// Before the first paint, so that no page of the other brightness flashes up.
const chosen = localStorage.getItem("theme");
if (chosen) document.documentElement.dataset.theme = chosen;
