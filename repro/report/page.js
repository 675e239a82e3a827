"use strict";
// Filters, search and sorting of a page that is whole without them. Nothing here makes markup from text.
const at = (id) => document.getElementById(id), all = (selector, of = document) => [...of.querySelectorAll(selector)];
const form = document.querySelector(".controls"), queries = all(".query"), STEP = 8;
let most = STEP;

const iterations = all(".answer").map((a) => Number(a.dataset.iteration)), last = Math.max(...iterations, 0);
for (const name of new Set(all("[data-constitution]").map((c) => c.dataset.constitution))) {
  at("f-constitution").append(new Option(name, name));
}

function fits(answer, text) {
  const { iteration, followed } = answer.dataset, when = at("f-iteration").value, how = at("f-followed").value;
  return (when === "" || (when === "ends" ? iteration === "0" || Number(iteration) === last : iteration === when))
    && (how === "" || (how === "some" ? followed === "some" || followed === "none" : followed === how))
    && (text === "" || answer.textContent.toLowerCase().includes(text));
}

function show() {
  const text = at("f-text").value.trim().toLowerCase(), constitution = at("f-constitution").value;
  const group = at("f-group") ? at("f-group").value : "";
  let found = 0, answers = 0;
  for (const query of queries) {
    const inGroup = group === "" || query.closest("[data-group]").dataset.group === group;
    const asked = text !== "" && query.querySelector("h4").textContent.toLowerCase().includes(text);
    let own = 0;
    for (const column of all("[data-constitution]", query)) {
      const here = constitution === "" || column.dataset.constitution === constitution;
      let shown = 0;
      for (const answer of all(".answer", column)) {
        answer.hidden = !(inGroup && here && fits(answer, asked ? "" : text));
        shown += !answer.hidden;
      }
      column.hidden = shown === 0;
      own += shown;
    }
    found += own > 0;
    answers += own;
    query.hidden = own === 0 || found > most;
  }
  for (const section of all("[data-group]")) section.hidden = !all(".query", section).some((q) => !q.hidden);
  at("more").hidden = found <= most;
  at("f-count").textContent = `${Math.min(found, most)} of ${found} queries shown, ${answers} responses fit`;
}

form.hidden = false;
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", () => { most = STEP; show(); });
at("more").addEventListener("click", () => { most += STEP; show(); });
at("f-marks").addEventListener("input", () => at("answers").classList.toggle("plain", !at("f-marks").checked));
show();

for (const table of all("table.sortable")) {
  const body = table.tBodies[0];
  all("thead th", table).forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => { const text = row.cells[column].textContent, n = parseFloat(text); return [text, n]; };
      const rows = [...body.rows].sort((a, b) => {
        const [s, x] = value(a), [t, y] = value(b);
        if ((s === "") !== (t === "")) return s === "" ? 1 : -1;  // what is not there stands last either way
        const order = Number.isNaN(x) || Number.isNaN(y) ? s.localeCompare(t) : x - y;
        return up ? order : -order;
      });
      body.append(...rows);
    });
  });
}
