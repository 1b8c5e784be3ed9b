"use strict";
(() => {
  const root = document.documentElement;
  const errors = [];
  const failed = (event) => {
    errors.push(String(event.message || event.reason || event.violatedDirective));
    root.dataset.errors = errors.join("; ");
  };
  addEventListener("error", failed);
  addEventListener("unhandledrejection", failed);
  addEventListener("securitypolicyviolation", failed);

  // One mask at a time; without scripts all of them are shown.
  const picker = document.querySelector("#mask-picker");
  const panels = [...document.querySelectorAll(".explorer")];
  const show = () => panels.forEach((panel, i) => { panel.hidden = i !== Number(picker.value); });
  if (picker) {
    picker.closest(".picker").hidden = false;
    picker.addEventListener("change", show);
    show();
  }

  // Sort by a column: numbers by data-value, names as text; a second click turns the order.
  document.querySelectorAll("table.sortable").forEach((table) => {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    const key = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent.trim();
    const compare = (a, b) => (a === "" ? 1 : b === "" ? -1
      : isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    heads.forEach((head, i) => {
      const button = document.createElement("button");
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...body.rows].sort((a, b) => compare(key(a, i), key(b, i)));
        body.append(...(down ? rows.reverse() : rows));
      });
    });
  });

  const filter = document.querySelector("#module-filter");
  if (filter) {
    filter.closest(".picker").hidden = false;
    filter.addEventListener("input", () => {
      const wanted = filter.value.toLowerCase();
      document.querySelectorAll("#modules tbody tr").forEach((row) => {
        row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
      });
    });
  }

  const copy = document.querySelector("#copy");
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(document.querySelector("#command").textContent);
        copy.textContent = "copied";
      } catch {
        copy.textContent = "select it";
      }
    });
  }
  root.dataset.ready = "true";
})();
