"use strict";
// The page works without this but for its plots. Of Bokeh it uses the global `Bokeh.documents`, a document's
// `get_model_by_id`, the models' own properties, and that its plots listen to pointer events.
(() => {
  const colours = JSON.parse(document.getElementById("colours").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let plots = null; // the Bokeh document, once it is there

  function paint() {
    for (const [id, property, light, other] of colours) {
      plots.get_model_by_id(id)[property] = dark.matches ? other : light;
    }
    document.documentElement.dataset.plots = dark.matches ? "dark" : "light";
  }

  function await_plots() {
    plots = window.Bokeh?.documents[0] ?? null;
    if (plots === null) {
      setTimeout(await_plots, 20);
      return;
    }
    paint();
    dark.addEventListener("change", paint);
  }

  // Legends: an entry switches models, or the rows of a filter that carry its number.
  function toggle(button) {
    const pressed = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", pressed);
    const exhibit = button.closest(".exhibit");
    if (button.dataset.models !== undefined) {
      for (const id of JSON.parse(button.dataset.models)) plots.get_model_by_id(id).visible = pressed;
      return;
    }
    const shown = new Set();
    for (const key of exhibit.querySelectorAll('[data-row][aria-pressed="true"]')) shown.add(Number(key.dataset.row));
    const codes = Array.from(plots.get_model_by_id(exhibit.dataset.source).data.code);
    plots.get_model_by_id(exhibit.dataset.filter).booleans = codes.map((code) => shown.has(code));
  }

  function choose(button) {
    for (const other of button.parentElement.children) {
      other.setAttribute("aria-pressed", other === button);
      document.getElementById(other.dataset.panel).classList.toggle("tucked", other !== button);
    }
  }

  // Tables: a click on a column's name sorts by it, missing values last.
  function sort(header, column) {
    const ascending = header.getAttribute("aria-sort") !== "ascending";
    for (const other of header.parentElement.children) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const body = header.closest("table").tBodies[0];
    const numeric = Array.from(body.rows).some((row) => row.cells[column].dataset.order !== undefined);
    const value = (row) => {
      const cell = row.cells[column];
      if (!numeric) return cell.textContent;
      return cell.dataset.order === undefined ? null : Number(cell.dataset.order);
    };
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      const order = numeric ? x - y : x.localeCompare(y);
      return ascending ? order : -order;
    };
    body.append(...Array.from(body.rows).sort(compare));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    Array.from(table.tHead.rows).at(-1).querySelectorAll("th").forEach((header, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      button.addEventListener("click", () => sort(header, column));
      header.append(button);
    });
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("button");
    if (button?.dataset.panel !== undefined) choose(button);
    else if (button?.closest(".keys") && plots !== null) toggle(button);
  });

  // Bokeh's tooltips follow a pointer that moves; a finger that taps does not.
  let tapped = null;
  function pass_on(name, target, event) {
    const { clientX, clientY } = event;
    target.dispatchEvent(new PointerEvent(name, {
      view: window, clientX, clientY, isPrimary: true, bubbles: true, composed: true,
    }));
  }
  document.addEventListener("click", (event) => {
    if (event.pointerType === "mouse") return;
    if (tapped !== null) pass_on("pointerout", tapped, event);
    tapped = event.target.closest?.(".plot") ? event.composedPath()[0] : null;
    if (tapped !== null) pass_on("pointermove", tapped, event);
  });

  // On paper everything is unfolded, and plots, which keep the size that they had on the screen, shrink to fit.
  const folded = new Set();
  const PAPER = 690; // CSS pixels between the margins of A4 and Letter
  addEventListener("beforeprint", () => {
    for (const plot of document.querySelectorAll(".plot")) {
      plot.style.zoom = "";
      const room = plot.closest(".strip") === null ? PAPER : PAPER / 3 - 16; // three strips side by side
      plot.style.zoom = Math.min(1, room / plot.offsetWidth);
    }
    for (const details of document.querySelectorAll("details:not([open])")) {
      folded.add(details);
      details.open = true;
    }
  });
  addEventListener("afterprint", () => {
    for (const plot of document.querySelectorAll(".plot")) plot.style.zoom = "";
    for (const details of folded) details.open = false;
    folded.clear();
  });

  if (document.querySelector(".plot") !== null) await_plots();
})();
