(() => {
  "use strict";
  const collator = new Intl.Collator("en", { numeric: true });
  const value = (row, at) => {
    const cell = row.cells[at], key = cell.dataset.v;
    return key === undefined ? cell.textContent.trim() : key === "" ? null : Number(key);
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b);

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
    // On a narrow screen a row is a list, and its cells need their names.
    const names = heads.map((head) => head.textContent.trim());
    for (const row of body.rows) [...row.cells].forEach((cell, at) => { if (at) cell.dataset.label = names[at]; });
    table.parentElement.classList.add("stacked");
    heads.forEach((head, at) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const keyed = [...body.rows].map((row) => [value(row, at), row]);
        const older = (row) => row.classList.contains("older");  // never ranked among the others
        keyed.sort(([a, one], [b, other]) => older(one) - older(other) || (a === null || b === null
          ? (a === null) - (b === null)
          : up ? compare(a, b) : compare(b, a)));
        body.append(...keyed.map(([, row]) => row));
      });
    });
  }

  // Columns of a group are hidden until they are asked for, so that a table fits the page.
  for (const line of document.querySelectorAll(".columns")) {
    const rows = [...document.getElementById(line.dataset.table).rows], heads = [...rows[0].cells];
    const show = ({ value, checked }) => heads.forEach((head, at) => {
      if (head.dataset.group === value) for (const row of rows) row.cells[at].hidden = !checked;
    });
    line.hidden = false;
    line.querySelectorAll("input").forEach(show);  // a browser may remember what was checked
    line.addEventListener("input", (event) => show(event.target));
  }

  for (const line of document.querySelectorAll(".filter:not(.columns)")) {
    const rows = [...document.getElementById(line.dataset.table).tBodies[0].rows];
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const told = line.querySelector("output");
    line.hidden = false;
    const typed = line.querySelector("input"), chosen = [...line.querySelectorAll("select")];
    const fits = (row) => chosen.every(({ value, dataset }) => !value || row.cells[dataset.column].dataset.f === value);
    line.addEventListener("input", () => {
      const words = typed.value.toLowerCase().split(/\s+/);
      let shown = 0;
      rows.forEach((row, at) => {
        row.hidden = !words.every((word) => texts[at].includes(word)) || !fits(row);
        shown += !row.hidden;
      });
      told.textContent = `${shown} of ${rows.length} rows`;
    });
  }
})();
