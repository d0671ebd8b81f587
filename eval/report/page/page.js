"use strict";
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
// A row opens to its details; without this script all of them are shown.
const moreOf = (row) => row.nextElementSibling?.classList.contains("more") ? row.nextElementSibling : null;
for (const more of all("tr.more")) more.hidden = true;
for (const button of all("button.open")) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(on));
    document.getElementById(button.getAttribute("aria-controls")).hidden = !on;
  });
}
// Sorting: a click (or Enter, Space) on a heading; empty cells stay last. Details stay under their row.
for (const table of all("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", (event) => {
    const now = head.getAttribute("aria-sort"), first = event.currentTarget.dataset.first;
    const order = now ? (now === "ascending" ? "descending" : "ascending") : first;
    const numeric = head.classList.contains("n"), sign = order === "ascending" ? 1 : -1;
    const rows = [...table.tBodies[0].rows].filter((row) => !row.classList.contains("more"));
    const pairs = rows.map((row) => [row, moreOf(row)].filter(Boolean));
    pairs.sort(([a], [b]) => {
      const [x, y] = [a.cells[column].dataset.v, b.cells[column].dataset.v];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (numeric ? x - y : x.localeCompare(y, "en", { numeric: true }));
    });
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    table.tBodies[0].append(...pairs.flat());
  }));
}
// Models, and what each was asked, are tabs; without this script they stand one below the other.
for (const list of all('[role="tablist"]')) {
  const tabs = all('[role="tab"]', list);
  const open = (tab) => tabs.forEach((other) => {
    other.setAttribute("aria-selected", String(other === tab));
    other.tabIndex = other === tab ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = other !== tab;
  });
  tabs.forEach((tab, at) => {
    tab.addEventListener("click", () => open(tab));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = tabs[(to + tabs.length) % tabs.length];
      open(next);
      next.focus();
    });
  });
  open(tabs[0]);
}
// Of the first screen's figures one is shown.
const press = (buttons, one) => buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === one)));
for (const bar of all(".models .filter")) {
  const buttons = all("button", bar);
  const show = (one) => {
    press(buttons, one);
    for (const other of buttons) document.getElementById(other.getAttribute("aria-controls")).hidden = other !== one;
  };
  buttons.forEach((button) => button.addEventListener("click", () => show(button)));
  show(buttons[0]);
}
// A group of policies: rows, marks and radars of others go. No reduction stays.
for (const bar of all("section .filter")) {
  const buttons = all("button", bar), part = bar.closest("section"), says = bar.querySelector(".count");
  const grouped = all("tr[data-group]", part), groups = new Map(grouped.map((row) => [row.dataset.name, row.dataset.group]));
  buttons.forEach((button) => button.addEventListener("click", () => {
    press(buttons, button);
    const out = (name) => button.dataset.group !== undefined && groups.has(name) && groups.get(name) !== button.dataset.group;
    for (const row of all("tr[data-name]", part)) {
      const more = moreOf(row);
      row.hidden = out(row.dataset.name);
      if (more) more.hidden = row.hidden || row.querySelector(".open").getAttribute("aria-expanded") !== "true";
    }
    for (const one of all(".plots .mark, .radars figure", part)) one.classList.toggle("out", out(one.dataset.name));
    const shown = grouped.filter((row) => !row.hidden).length;
    says.textContent = shown === 1 ? "1 policy" : `${shown} policies`;
  }));
}
// A point says what it is under its plot; a legend's entry lights up its policy everywhere.
for (const mark of all("figure .plot .mark")) {
  const says = mark.closest("figure").querySelector("figcaption"), title = mark.querySelector("title");
  for (const kind of ["pointerenter", "click"]) mark.addEventListener(kind, () => { says.textContent = title.textContent; });
}
for (const chip of all(".chip")) {
  chip.addEventListener("click", () => {
    const on = chip.getAttribute("aria-pressed") !== "true";
    for (const other of all(".chip"))
      other.setAttribute("aria-pressed", String(on && other.dataset.name === chip.dataset.name));
    document.body.classList.toggle("one", on);
    for (const part of all(".mark, tr[data-name]"))
      part.classList.toggle("lit", on && part.dataset.name === chip.dataset.name);
  });
}
