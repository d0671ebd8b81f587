"use strict";
// Sorting: a click (or Enter, Space) on a heading; empty cells stay last.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", (event) => {
    const now = head.getAttribute("aria-sort"), first = event.currentTarget.dataset.first;
    const order = now ? (now === "ascending" ? "descending" : "ascending") : first;
    const numeric = head.classList.contains("n"), sign = order === "ascending" ? 1 : -1;
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => {
      const [x, y] = [a.cells[column].dataset.v, b.cells[column].dataset.v];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (numeric ? x - y : x.localeCompare(y, "en", { numeric: true }));
    });
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    table.tBodies[0].append(...rows);
  }));
}
// Leaderboards of several results are tabs; without this script they stand one below the other.
const tabs = [...document.querySelectorAll('[role="tab"]')];
const open = (tab) => tabs.forEach((other) => {
  other.setAttribute("aria-selected", String(other === tab));
  other.tabIndex = other === tab ? 0 : -1;
  document.getElementById(other.getAttribute("aria-controls")).hidden = other !== tab;
});
tabs.forEach((tab, at) => {
  tab.addEventListener("click", () => open(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(at + step + tabs.length) % tabs.length];
    open(next);
    next.focus();
  });
});
if (tabs.length) open(tabs[0]);
// A point says what it is under its plot; a legend's entry lights up its policy everywhere.
for (const mark of document.querySelectorAll(".plots .mark")) {
  const says = mark.closest("figure").querySelector("figcaption"), title = mark.querySelector("title");
  for (const kind of ["pointerenter", "click"]) mark.addEventListener(kind, () => { says.textContent = title.textContent; });
}
for (const chip of document.querySelectorAll(".chip")) {
  chip.addEventListener("click", () => {
    const on = chip.getAttribute("aria-pressed") !== "true";
    for (const other of document.querySelectorAll(".chip"))
      other.setAttribute("aria-pressed", String(on && other.dataset.name === chip.dataset.name));
    document.body.classList.toggle("one", on);
    for (const part of document.querySelectorAll(".mark, tr[data-name]"))
      part.classList.toggle("lit", on && part.dataset.name === chip.dataset.name);
  });
}
