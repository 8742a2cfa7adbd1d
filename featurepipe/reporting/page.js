"use strict";
// The page works without this but for its plots. Of Bokeh it uses the global `Bokeh.documents`, a document's
// `get_model_by_id`, the models' own properties, `Bokeh.index`, a view's `bbox`,
// `export`, `renderer_views` and their `set_visuals`, and that its plots listen to pointer events.
(() => {
  const colours = JSON.parse(document.getElementById("colours").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let plots = null; // the Bokeh document, once it is there

  function paint(is_dark) {
    for (const [id, property, light, other] of colours) {
      plots.get_model_by_id(id)[property] = is_dark ? other : light;
    }
    document.documentElement.dataset.plots = is_dark ? "dark" : "light";
  }

  // A few names below a plot stand level, in two lines each, where they fit side by side; elsewhere slanted, in one.
  const pen = document.createElement("canvas").getContext("2d");
  const slants = new Map();
  function level(plot) {
    const axis = plots.get_model_by_id(plot.closest(".panel").id.slice("panel-".length)).below[0];
    if (!axis?.tags.includes("level where it fits") || plot.clientWidth === 0) return;
    const labels = Array.from(axis.major_label_overrides.values());
    if (!slants.has(axis)) slants.set(axis, { slant: axis.major_label_orientation, names: labels.map((label) => label.text) });
    const { slant, names } = slants.get(axis);
    pen.font = `${axis.major_label_text_font_size} ${axis.major_label_text_font}`;
    const widest = Math.max(...names.flatMap((name) => name.split("\n")).map((line) => pen.measureText(line).width));
    const frame = plot.clientWidth - 60;
    const fits = widest + 10 <= Math.min(frame / names.length, 0.13 * frame);
    labels.forEach((label, k) => { label.text = fits ? names[k] : names[k].replaceAll(":\n", ":").replaceAll("\n", " "); });
    axis.major_label_orientation = fits ? 0 : slant;
  }

  function await_plots() {
    plots = window.Bokeh?.documents[0] ?? null;
    if (plots === null) {
      setTimeout(await_plots, 20);
      return;
    }
    paint(dark.matches);
    dark.addEventListener("change", () => paint(dark.matches));
    const sizes = new ResizeObserver((changes) => changes.forEach((change) => level(change.target)));
    for (const plot of document.querySelectorAll(".plot")) sizes.observe(plot);
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

  // Figures on paper and in files: drawn anew in the colours of a light page, with the legend below, as one SVG.
  // The name of the SVG namespace, asked of the browser: a page of ours has no address in it, fetched or not.
  const SVG = new DOMParser().parseFromString("<svg></svg>", "text/html").querySelector("svg").namespaceURI;
  const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
  const KEY = 22; // pixels that a line of a legend is high

  function drawing_of(plot) {
    const view = Bokeh.index.get_by_id(plot.closest(".panel").id.slice("panel-".length));
    for (const renderer of view.renderer_views.values()) renderer.set_visuals?.(); // else marks keep their colours until later
    const drawn = new DOMParser().parseFromString(view.export("svg").ctx.get_serialized_svg(true), "image/svg+xml");
    return { drawing: document.importNode(drawn.documentElement, true), width: view.bbox.width, height: view.bbox.height };
  }

  function made(name, attributes, ...children) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  function svg_of(plot) {
    const { drawing, width, height } = drawing_of(plot);
    return made("svg", { xmlns: SVG, width, height, viewBox: `0 0 ${width} ${height}`, role: "img" }, drawing);
  }

  // All plots of a figure that are shown, where they stand on the page, under their titles, with the legend below.
  function figure_of(panels) {
    const around = panels.getBoundingClientRect();
    const [parts, ends] = [[], []];
    for (const plot of panels.querySelectorAll(".panel:not(.tucked) .plot")) {
      const { drawing, width, height } = drawing_of(plot);
      const box = plot.getBoundingClientRect();
      const [x, y] = [Math.round(box.left - around.left), Math.round(box.top - around.top)];
      const title = plot.parentElement.querySelector(".panel-title");
      if (title?.offsetHeight) {
        parts.push(made("text", { x: x + 4, y: y - 6, fill: "#1d2329", "font-size": 13, "font-weight": 600, "font-family": FONT }, title.textContent));
      }
      parts.push(made("g", { transform: `translate(${x} ${y})` }, drawing));
      ends.push([x + width, y + height]);
    }
    const [width, height] = [0, 1].map((k) => Math.max(...ends.map((end) => end[k])));
    const keys = legend_of(panels, width);
    keys.group.setAttribute("transform", `translate(8 ${height + 4})`);
    const whole = height + keys.height;
    return made("svg", { xmlns: SVG, width, height: whole, viewBox: `0 0 ${width} ${whole}`, role: "img" }, ...parts, keys.group);
  }

  // The entries of a legend that are switched on, side by side as far as they fit.
  function legend_of(panels, width) {
    const group = made("g", {});
    let [x, y] = [0, 0];
    for (const key of panels.closest(".exhibit").querySelectorAll('.keys button[aria-pressed="true"]')) {
      const label = key.querySelector("span").textContent;
      const wide = 46 + 7.2 * label.length;
      if (x > 0 && x + wide > width - 16) [x, y] = [0, y + KEY];
      const swatch = key.querySelector(".swatch");
      const colour = swatch.style.getPropertyValue("--light");
      const entry = made("g", { transform: `translate(${x} ${y})` });
      for (const path of swatch.querySelectorAll("path")) {
        entry.append(made("path", {
          d: path.getAttribute("d") ?? "", "stroke-dasharray": path.getAttribute("stroke-dasharray") ?? "none", stroke: colour,
          "stroke-width": 2, fill: path.classList.contains("filled") ? colour : "#ffffff",
        }));
      }
      entry.append(made("text", { x: 34, y: 12, fill: "#1d2329", "font-size": 12, "font-family": FONT }, label));
      group.append(entry);
      x += wide;
    }
    return { group, height: group.childElementCount ? y + KEY + 8 : 0 };
  }

  function in_light(work) {
    paint(false);
    try {
      return work();
    } finally {
      paint(dark.matches);
    }
  }

  // Files: made here, and fetched from nowhere.
  function save(name, blob) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  const file_name = (text) => text.normalize("NFKD").replace(/[^\w.-]+/g, "-").replace(/^[-.]+|[-.]+$/g, "").slice(0, 80) || "figure";

  function save_figure(panels, kind) {
    const exhibit = panels.closest(".exhibit");
    const panel = exhibit.querySelector(".chosen .panel:not(.tucked) .panel-title")?.textContent;
    const name = file_name(panel ? `${exhibit.dataset.title} ${panel}` : exhibit.dataset.title);
    const svg = in_light(() => figure_of(panels));
    const text = new Blob([new XMLSerializer().serializeToString(svg)], { type: "image/svg+xml" });
    if (kind === "svg") {
      save(`${name}.svg`, text);
      return;
    }
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [2 * image.width, 2 * image.height]; // sharp in print, too
      const context = canvas.getContext("2d");
      context.fillStyle = "#ffffff";
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => save(`${name}.png`, blob), "image/png");
      URL.revokeObjectURL(image.src);
    };
    image.src = URL.createObjectURL(text);
  }

  function cell_of(cell) {
    const copy = cell.cloneNode(true);
    const note = copy.querySelector("small")?.textContent ?? "";
    for (const other of copy.querySelectorAll("small, .mark")) other.remove();
    return { text: copy.textContent.replace(/\s+/g, " ").trim(), note, order: cell.tagName === "TD" ? cell.dataset.order : undefined };
  }

  // Names of the columns, with the group above each where there is one, and the rows' cells.
  function read_table(table) {
    const rows = Array.from(table.tHead.rows);
    const groups = rows.length > 1 ? Array.from(rows[0].cells).flatMap((c) => Array(c.colSpan).fill(c.textContent.trim())) : [];
    const names = Array.from(rows.at(-1).cells, (c, k) => (groups[k] ? `${groups[k]}: ` : "") + cell_of(c).text);
    return { names, rows: Array.from(table.tBodies[0].rows, (row) => Array.from(row.cells, cell_of)) };
  }

  // Numbers in full, and what stands small below them in a column of its own; no cell is a formula to a spreadsheet.
  function csv_of(table) {
    const { names, rows } = read_table(table);
    const noted = names.map((_, k) => rows.some((row) => row[k].note));
    const lines = [names.flatMap((name, k) => (noted[k] ? [name, `${name}, note`] : [name]))];
    for (const row of rows) lines.push(row.flatMap((cell, k) => (noted[k] ? [cell.order ?? cell.text, cell.note] : [cell.order ?? cell.text])));
    const quoted = (text) => {
      const safe = /^\s*[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
      return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
    };
    return lines.map((line) => line.map((value) => quoted(String(value))).join(",")).join("\r\n") + "\r\n";
  }

  const TEX = {
    "\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", "&": "\\&", "%": "\\%", $: "\\$", "#": "\\#", _: "\\_",
    "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "\u2013": "--", "\u2212": "$-$", "\u00a0": "~", "\u2026": "\\dots{}",
  };
  const tex = (text) => text.replace(/[\\{}&%$#_~^\u2013\u2212\u00a0\u2026]/g, (sign) => TEX[sign]);

  function latex_of(table) {
    const { names, rows } = read_table(table);
    const numeric = names.map((_, k) => rows.some((row) => row[k].order !== undefined));
    const line = (cells) => `${cells.join(" & ")} \\\\`;
    const told = (cell) => tex(cell.text) + (cell.note ? ` {\\footnotesize (${tex(cell.note)})}` : "");
    return [
      "% needs \\usepackage{booktabs}", "\\begin{table}", `\\caption{${tex(table.caption.textContent.trim())}}`,
      `\\begin{tabular}{${numeric.map((one) => (one ? "r" : "l")).join("")}}`, "\\toprule", line(names.map(tex)), "\\midrule",
      ...rows.map((row) => line(row.map(told))), "\\bottomrule", "\\end{tabular}", "\\end{table}", "",
    ].join("\n");
  }

  function save_table(table, kind) {
    const text = kind === "csv" ? csv_of(table) : latex_of(table);
    const name = file_name(table.caption.textContent.trim());
    save(`${name}.${kind}`, new Blob([text], { type: kind === "csv" ? "text/csv;charset=utf-8" : "text/x-tex;charset=utf-8" }));
  }

  function offer(after, what, kinds, act) {
    const group = document.createElement("div");
    group.className = "downloads";
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", `Save ${what} as a file`);
    for (const [kind, label] of kinds) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = label;
      button.title = `Save ${what} as ${label}`;
      button.addEventListener("click", () => act(kind));
      group.append(button);
    }
    after.after(group);
  }

  for (const table of document.querySelectorAll(".scroll > table")) {
    offer(table, "this table", [["csv", "CSV"], ["tex", "LaTeX"]], (kind) => save_table(table, kind));
  }
  for (const panels of document.querySelectorAll(".panels")) {
    offer(panels.lastElementChild, "this figure", [["svg", "SVG"], ["png", "PNG"]], (kind) => {
      if (plots !== null) save_figure(panels, kind);
    });
  }

  // On paper everything is unfolded, and each plot is its figure, which shrinks to fit.
  const folded = new Set();
  addEventListener("beforeprint", () => {
    if (plots !== null) {
      in_light(() => {
        for (const plot of document.querySelectorAll(".plot")) {
          const paper = document.createElement("div");
          paper.className = "paper";
          paper.append(svg_of(plot));
          plot.after(paper);
        }
      });
    }
    for (const details of document.querySelectorAll("details:not([open])")) {
      folded.add(details);
      details.open = true;
    }
  });
  addEventListener("afterprint", () => {
    for (const paper of document.querySelectorAll(".paper")) paper.remove();
    for (const details of folded) details.open = false;
    folded.clear();
  });

  if (document.querySelector(".plot") !== null) await_plots();
})();
