"use strict";
// Draws the figures by their specs. What tells series apart is a dash and a marker, or a pattern; colour only helps.
(() => {
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
  const STROKES = ["", "9 5", "2 4", "9 4 2 4", "14 6", "14 4 2 4"];
  const SYMBOLS = ["circle", "square", "diamond", "cross", "x", "triangle-up", "star"];
  const GLYPHS = ["●", "■", "◆", "✚", "✖", "▲", "★"];
  // Of findings, by the sign that their name begins with.
  const MARKS = { "●": "circle", "▲": "triangle-up", "▼": "triangle-down", "◇": "diamond-open" };
  const PATTERNS = ["", "/", "x", ".", "-", "|", "+"];
  const root = document.documentElement;
  const narrow = () => window.innerWidth < 576;
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const hue = (i) => colour(`--c${i % 8}`);
  const chosenAxis = () => document.querySelector("input[name=axis]:checked")?.value;
  const hidden = {};

  const axisOf = (spec) => (spec.axes.includes(chosenAxis()) ? chosenAxis() : spec.axes[0]);

  function traces(id, spec) {
    const axis = axisOf(spec);
    return spec.series.map((series, i) => {
      const shared = { name: series.name, visible: !hidden[id]?.has(i) };
      const x = series.x[axis];
      if (spec.kind === "curves") {
        const thin = series.steady;
        return {
          ...shared, type: "scatter", x, y: series.y, mode: "lines+markers",
          line: { color: thin ? colour("--quiet") : hue(i), dash: thin ? "dot" : DASHES[i % 6], width: thin ? 1.5 : 2 },
          marker: { symbol: thin ? "line-ew-open" : SYMBOLS[i % 7], size: thin ? 5 : 8, maxdisplayed: 10, color: thin ? colour("--quiet") : hue(i) },
        };
      }
      if (spec.kind === "intervals") {
        const ends = series.low && {
          type: "data", symmetric: false, thickness: 2, width: 6,
          array: series.high.map((high, k) => high - series.y[k]), arrayminus: series.low.map((low, k) => series.y[k] - low),
        };
        return { ...shared, type: "scatter", mode: "markers", x: series.y, y: x, error_x: ends, marker: { symbol: MARKS[series.name[0]] ?? SYMBOLS[i % 7], size: 11, color: hue(i) } };
      }
      if (spec.kind === "shares") {
        return {
          ...shared, type: "bar", orientation: "h", x: series.y, y: x, hovertemplate: "%{y}: %{x:.1%}<extra>%{fullData.name}</extra>",
          marker: { color: hue(i), line: { color: colour("--ground"), width: 1 }, pattern: { shape: PATTERNS[i % 7], fillmode: "overlay", fgcolor: colour("--ground"), size: 8, solidity: 0.3 } },
        };
      }
      const filled = i === 0;
      return {
        ...shared, type: "scatter", mode: "markers", x, y: series.y, text: series.text, hovertemplate: "%{y}, place %{x}: %{text}<extra>%{fullData.name}</extra>",
        marker: { symbol: filled ? "square" : "circle-open", size: filled ? 8 : 3, color: filled ? hue(1) : colour("--quiet") },
      };
    });
  }

  function layout(id, spec) {
    const ink = colour("--ink"), edge = colour("--edge");
    const line = { gridcolor: edge, linecolor: edge, zerolinecolor: edge, automargin: true, tickfont: { size: narrow() ? 10 : 12 } };
    const sideways = spec.kind === "intervals" || spec.kind === "shares";
    const names = sideways ? (spec.order ?? spec.series[0].x[spec.axes[0]]) : [];
    // A long name breaks at its commas.
    const labels = names.map((name) => name.replaceAll(",", ",<br>"));
    const lines = labels.reduce((sum, label) => sum + label.split("<br>").length + 0.6, 0);
    const rows = spec.kind === "map" ? new Set(spec.series.flatMap((series) => series.y)).size : 0;
    const values = { ...line, title: { text: spec.y }, tickformat: spec.kind === "shares" ? ".0%" : undefined };
    return {
      height: sideways ? Math.max(180, 110 + 17 * lines) : rows ? 110 + 26 * rows : narrow() ? 300 : 360,
      margin: { l: 56, r: 12, t: 12, b: 48 }, paper_bgcolor: colour("--ground"), plot_bgcolor: colour("--ground"),
      font: { color: ink, family: getComputedStyle(document.body).fontFamily }, showlegend: false, barmode: "stack", hovermode: "closest",
      dragmode: window.matchMedia("(pointer: coarse)").matches ? false : "zoom",
      xaxis: sideways ? { ...values, zeroline: false } : { ...line, title: { text: axisOf(spec) }, zeroline: false },
      yaxis: sideways
        ? { ...line, type: "category", categoryorder: "array", categoryarray: names, tickvals: names, ticktext: labels, autorange: "reversed" }
        : rows ? { ...line, type: "category", autorange: "reversed", showgrid: false } : { ...values, zeroline: false },
      shapes: spec.line === undefined ? [] : [{ type: "line", xref: "x", x0: spec.line, x1: spec.line, yref: "paper", y0: 0, y1: 1, line: { color: colour("--quiet"), dash: "dash", width: 1.5 } }],
    };
  }

  const settings = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["toImage", "select2d", "lasso2d", "autoScale2d"] };
  const plotOf = (id) => document.getElementById(id).querySelector(".plot");
  const draw = (id) => Plotly.react(plotOf(id), traces(id, specs[id]), layout(id, specs[id]), settings);

  function swatch(spec, series, i) {
    const thin = series.steady;
    const fill = thin ? "var(--quiet)" : `var(--c${spec.kind === "map" ? (i === 0 ? 1 : 7) : i % 8})`;
    if (spec.kind === "shares") {
      return `<svg width="22" height="16" aria-hidden="true"><rect width="22" height="16" fill="${fill}"></rect><text x="11" y="13" text-anchor="middle" font-size="14" font-weight="bold" fill="var(--ground)">${PATTERNS[i % 7]}</text></svg>`;
    }
    const glyph = spec.kind === "intervals" ? (MARKS[series.name[0]] ? series.name[0] : GLYPHS[i % 7]) : spec.kind === "map" ? (i === 0 ? "■" : "○") : thin ? "" : GLYPHS[i % 7];
    const wide = spec.kind === "curves" ? 40 : 16;
    const stroke = spec.kind === "curves" ? `<line x1="0" x2="40" y1="8" y2="8" stroke="${fill}" stroke-width="2" stroke-dasharray="${thin ? "2 4" : STROKES[i % 6]}"></line>` : "";
    return `<svg width="${wide}" height="16" aria-hidden="true">${stroke}<text x="${wide / 2}" y="13" text-anchor="middle" font-size="13" fill="${fill}">${glyph}</text></svg>`;
  }

  function legend(id) {
    const spec = specs[id], place = document.getElementById(id).querySelector(".legend");
    if (spec.kind === "curves" && spec.series.length === 1) return;
    hidden[id] = new Set();
    spec.series.forEach((series, i) => {
      const label = document.createElement("label"), box = document.createElement("input");
      box.type = "checkbox"; box.checked = true;
      box.addEventListener("change", () => { hidden[id][box.checked ? "delete" : "add"](i); draw(id); });
      label.append(box);
      label.insertAdjacentHTML("beforeend", swatch(spec, series, i));
      label.append(MARKS[series.name[0]] ? series.name.slice(2) : series.name);
      place.append(label);
    });
  }

  const quoted = (cell) => (/[",\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell);
  function csv(spec) {
    const extra = ["low", "high", "text"].filter((name) => spec.series.some((series) => series[name]));
    const rows = [["series", ...spec.axes, spec.y, ...extra]];
    for (const series of spec.series) {
      series.y.forEach((y, i) => rows.push([series.name, ...spec.axes.map((axis) => series.x[axis][i]), y, ...extra.map((name) => series[name]?.[i] ?? "")]));
    }
    return rows.map((row) => row.map((cell) => quoted(String(cell ?? ""))).join(",") + "\n").join("");
  }

  // The legend beside the plot is the page's own; a picture has plotly's.
  const picture = (id, width = 1000) => {
    const spec = specs[id], own = layout(id, spec);
    const shown = { ...own, width, height: own.height + 24 * Math.ceil(spec.series.length / 4) + 50, showlegend: spec.series.length > 1, title: { text: spec.title }, margin: { ...own.margin, t: 48 }, legend: { orientation: "h", y: -60 / own.height, yanchor: "top" } };
    return Plotly.toImage({ data: traces(id, spec), layout: shown }, { format: "png", width, height: shown.height, scale: 2 });
  };
  window.palmette = { specs, csv: (id) => csv(specs[id]), picture };

  function save(href, name) {
    const link = document.createElement("a");
    link.href = href; link.download = name;
    link.click();
  }

  function theme(dark) {
    root.dataset.theme = dark ? "dark" : "light";
    const button = document.getElementById("theme");
    button.setAttribute("aria-pressed", String(dark));
  }

  const wished = window.matchMedia("(prefers-color-scheme: dark)");
  theme(wished.matches);
  const again = () => Object.keys(specs).forEach(draw);
  wished.addEventListener("change", () => { theme(wished.matches); again(); });
  document.getElementById("theme").addEventListener("click", () => { theme(root.dataset.theme !== "dark"); again(); });
  document.querySelectorAll("input[name=axis]").forEach((input) => input.addEventListener("change", again));
  let was = narrow();
  window.addEventListener("resize", () => { if (was !== narrow()) { was = narrow(); again(); } });

  (async () => {
    for (const id of Object.keys(specs)) {
      const figure = document.getElementById(id);
      legend(id);
      await draw(id);
      figure.querySelector(".png").addEventListener("click", async () => save(await picture(id), `${id}.png`));
      figure.querySelector(".csv").addEventListener("click", (event) => {
        event.currentTarget.href = URL.createObjectURL(new Blob([csv(specs[id])], { type: "text/csv" }));
      });
      // The page answers between two figures.
      await new Promise((resolve) => setTimeout(resolve));
    }
    root.dataset.ready = "true";
  })();
})();
