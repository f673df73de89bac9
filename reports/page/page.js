"use strict";
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const data = read("data"), claims = read("claims");
const $ = (id) => document.getElementById(id);
const measures = new Map(data.measures.map((m) => [m.name, m]));
const baselines = new Map(data.cells.filter((c) => c.baseline).map((c) => [c.panel, c]));
const byId = new Map(data.cells.flatMap((c) => c.ids.map((id) => [id, c])));
const several = (values) => new Set(values).size > 1;
const GREY = "#777777";

// Elements. Strings become text nodes, so nothing that a record says can become markup.
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null));
  return element;
}
const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const cellHash = (cell) => new URLSearchParams({ cell: cell.id }).toString();
const link = (cell, text) => h("a", { href: `#${cellHash(cell)}` }, text);
const plain = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits }));
const head = (...names) => h("thead", {}, h("tr", {}, names.map((n, i) => h("th", { class: i ? null : "text", scope: "col" }, n))));
const table = (names, rows) => h("table", {}, head(...names), h("tbody", {}, rows.map((row) => h("tr", {}, row.map((x, i) => h("td", { class: i ? null : "text" }, x))))));

function tip(event, text) {
  $("tip").hidden = !text;
  if (!text) return;
  $("tip").textContent = text;
  $("tip").style.left = `${Math.min(event.clientX + 14, innerWidth - $("tip").offsetWidth - 8)}px`;
  $("tip").style.top = `${Math.min(event.clientY + 14, innerHeight - $("tip").offsetHeight - 8)}px`;
}

function name(cell) {
  const panel = data.panels[cell.panel];
  const parts = [cell.method, `ratio ${cell.ratio}`, cell.corpus && `calibrated on ${cell.corpus}`];
  if (data.panels.length > 1) parts.push(`${panel.model}, ${panel.suite}, ${panel.backend}`);
  return parts.filter(Boolean).join(", ");
}

// Filters ---------------------------------------------------------------------------------------------------------
const panelName = (cell) => Object.values(data.panels[cell.panel]).join(" / ");
const FIELDS = { method: (c) => c.look, ratio: (c) => String(c.ratio), corpus: (c) => c.corpus || "none", storage: (c) => c.storage || "not quantised", run: panelName };
const chosen = { search: "" };
let shown = data.cells;

const options = (select, values, labels = values) => (select.append(...values.map((v, i) => h("option", { value: v }, labels[i]))), select);

function drawFilters() {
  for (const [field, of] of Object.entries(FIELDS)) {
    const values = [...new Set(data.cells.filter((c) => !c.baseline || field === "run").map(of))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    if (values.length < 2) continue;
    const select = h("select", { id: `filter-${field}`, onchange: (e) => { chosen[field] = e.target.value; applyFilters(); } });
    $("filters").append(h("label", {}, field, options(select, ["", ...values], ["all", ...values])));
  }
  const search = h("input", { id: "filter-search", type: "search", placeholder: "words of the name", oninput: (e) => { chosen.search = e.target.value.toLowerCase(); applyFilters(); } });
  const groups = [...new Set(data.measures.map((m) => m.group))];
  const columns = h("select", { id: "columns", onchange: drawTable });
  const values = h("select", { id: "values", onchange: drawTable });
  $("filters").append(
    h("label", {}, "search", search),
    h("label", {}, "columns", options(columns, groups)),
    h("label", {}, "show", options(values, ...(baselines.size ? [["scores", "differences"], ["scores", "differences from the baseline"]] : [["scores"]]))));
  $("filters").addEventListener("submit", (e) => e.preventDefault());
}

// The uncompressed model stays, whatever is filtered: it is what the others are compared with. Methods that need no
// calibration stand beside every corpus, as in the tables of report.md.
function passes(cell) {
  const words = chosen.search.split(/\s+/).filter(Boolean);
  if (chosen.run && panelName(cell) !== chosen.run) return false;
  if (cell.baseline) return true;
  const fits = (field, of) => !chosen[field] || of(cell) === chosen[field] || (field === "corpus" && !cell.corpus);
  return Object.entries(FIELDS).every(([field, of]) => fits(field, of))
    && words.every((word) => `${cell.id} ${cell.method}`.toLowerCase().includes(word));
}

function applyFilters() {
  shown = data.cells.filter(passes);
  const wanted = new Set(shown);
  for (const row of rows) row.element.hidden = !wanted.has(row.cell);
  const all = data.cells.filter((c) => !c.baseline).length;
  $("count").textContent = `${shown.filter((c) => !c.baseline).length} of ${all} cells`;
  drawChart();
}

// Table -----------------------------------------------------------------------------------------------------------
let rows = [];
const order = { column: null, up: true };

function columns() {
  const differences = $("values").value === "differences";
  const fixed = [
    { label: "ratio", text: (c) => String(c.ratio), value: (c) => c.ratio },
    { label: "method", left: true, text: (c) => link(c, c.method), value: (c) => c.method },
    { label: "corpus", left: true, text: (c) => c.corpus || "–", value: (c) => c.corpus },
  ];
  if (several(data.cells.map((c) => c.storage))) fixed.push({ label: "weights", left: true, text: (c) => c.storage || "–", value: (c) => c.storage });
  if (several(data.cells.map((c) => c.ids.length))) fixed.push({ label: "seeds", text: (c) => String(c.ids.length), value: (c) => c.ids.length });
  if (data.panels.length > 1) fixed.push({ label: "run", left: true, text: panelName, value: panelName });
  const scores = data.measures.filter((m) => m.group === $("columns").value).map((m) => ({
    label: `${differences ? "Δ " : ""}${m.label}${m.kind === "share" ? (differences ? " (points)" : " (%)") : ""}`,
    text: (c) => estimate((c.scores[m.name] || [])[differences ? 5 : 0]),
    value: (c) => (c.scores[m.name] || [])[differences ? 6 : 1],
  }));
  const sizes = [
    { label: "size (MB)", text: (c) => plain(c.megabytes, 1), value: (c) => c.megabytes },
    { label: "expert parameters removed (%)", text: (c) => plain(c.removed === null ? null : 100 * c.removed, 1), value: (c) => c.removed },
  ];
  return [...fixed, ...scores, ...sizes];
}

function estimate(text) {
  if (!text) return "–";
  const [value, ...rest] = text.split(" [");
  return rest.length ? [value, h("small", {}, ` [${rest.join(" [")}`)] : value;
}

function drawTable() {
  const all = columns();
  rows = data.cells.map((cell) => ({
    cell,
    element: h("tr", { class: cell.baseline ? "baseline" : null, "data-id": cell.id }, all.map((c) => h("td", { class: c.left ? "text" : null }, c.text(cell)))),
  }));
  const headers = all.map((column) => h("th", { scope: "col", class: column.left ? "text" : null, "data-column": column.label },
    h("button", { type: "button", onclick: () => sortBy(column) }, column.label)));
  $("cells").replaceChildren(h("thead", {}, h("tr", {}, headers)), h("tbody", {}, rows.map((row) => row.element)));
  const again = all.find((column) => column.label === order.column);
  if (again) { order.up = !order.up; sortBy(again); }
  applyFilters();
}

function sortBy(column) {
  order.up = order.column === column.label ? !order.up : true;
  order.column = column.label;
  const missing = (x) => x === null || x === undefined || x === "";
  rows.sort((one, other) => {
    const [a, b] = [column.value(one.cell), column.value(other.cell)];
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    const by = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    return order.up ? by : -by;
  });
  $("cells").tBodies[0].append(...rows.map((row) => row.element));
  for (const th of $("cells").tHead.rows[0].cells)
    if (th.dataset.column === order.column) th.setAttribute("aria-sort", order.up ? "ascending" : "descending");
    else th.removeAttribute("aria-sort");
}

// Charts ----------------------------------------------------------------------------------------------------------
const SIZES = {
  "weights on disk (MB)": (c) => c.megabytes,
  "compression ratio": (c) => c.ratio,
  "expert parameters removed (%)": (c) => (c.removed === null ? null : 100 * c.removed),
  "memory reduction (×)": (c) => c.reduction,
};
const SHAPES = {
  s: "M-4-4h8v8h-8z", "^": "M0-5L5 4H-5z", v: "M0 5L5-4H-5z", "<": "M-5 0L4-5V5z", ">": "M5 0L-4-5V5z", D: "M0-5.5L5.5 0 0 5.5-5.5 0z",
  P: "M-1.7-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z", X: "M-5-3L-3-5 0-2 3-5 5-3 2 0 5 3 3 5 0 2-3 5-5 3-2 0z",
  o: "M-4.5 0a4.5 4.5 0 1 0 9 0 4.5 4.5 0 1 0-9 0z", "*": "M0-8L2-2.5 7.6-2.5 3.1 1 4.7 6.5 0 3.2-4.7 6.5-3.1 1-7.6-2.5-2-2.5z",
};
const look = (cell) => (cell.baseline ? [GREY, "*"] : data.looks[cell.look]);
const ink = (colour) => (colour === "#000000" ? "currentColor" : colour);
const mark = ([colour, shape], x, y, size = 1) => s("path", { d: SHAPES[shape], transform: `translate(${x} ${y}) scale(${size})`, fill: ink(colour) });

function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++)
      for (const step of Math.log10(high / low) > 2 ? [1] : [1, 2, 5]) found.push(step * 10 ** p);
    const inside = found.filter((t) => t >= low && t <= high);
    return inside.length > 1 ? inside : [low, high];
  }
  const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((m) => m >= raw);
  const found = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-9; t += step) found.push(Number(t.toPrecision(6)));
  return found;
}

// Points {x, y, low, high, look, title, series, cell, size}; the nearest one tells what it is. With a diagonal, both
// axes go from 0 to 1; marks of several looks are set apart unless each has to stand at its own x.
function plot(points, { xLabel, yLabel, xLog = false, yLog = false, diagonal = false, fromZero = false, width = 900, height = 380 }) {
  const [left, right, top, bottom] = [64, 20, 14, 46];
  const ends = (values, log) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    if (log) return [low / 1.08, high * 1.08];
    const pad = 0.05 * (high - low || Math.abs(high) || 1);
    return [low - pad, high + pad];
  };
  const finite = (x) => x !== null && x !== undefined;
  const [x0, x1] = diagonal ? [0, 1] : ends(points.map((p) => p.x), xLog);
  const [y0, y1] = diagonal ? [0, 1] : ends(points.flatMap((p) => [p.y, p.low, p.high, fromZero ? 0 : null]).filter(finite), yLog);
  const scale = (v, a, b, log) => (log ? Math.log(v / a) / Math.log(b / a) : (v - a) / (b - a));
  const px = (v) => left + scale(v, x0, x1, xLog) * (width - left - right);
  const py = (v) => height - bottom - scale(v, y0, y1, yLog) * (height - top - bottom);
  const root = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${yLabel} against ${xLabel}` });
  for (const t of ticks(y0, y1, yLog))
    root.append(s("line", { class: "grid", x1: left, x2: width - right, y1: py(t), y2: py(t) }), s("text", { x: left - 8, y: py(t) + 4, "text-anchor": "end" }, plain(t, 4)));
  for (const t of ticks(x0, x1, xLog)) root.append(s("text", { x: px(t), y: height - bottom + 18, "text-anchor": "middle" }, plain(t, 4)));
  root.append(
    s("path", { class: "axis", fill: "none", d: `M${left} ${top}V${height - bottom}H${width - right}` }),
    s("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, xLabel),
    s("text", { transform: `translate(16 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel));
  if (diagonal) root.append(s("line", { class: "diagonal", x1: px(0), y1: py(0), x2: px(1), y2: py(1) }));
  const names = [...new Set(points.map((p) => p.look[0] + p.look[1]))];
  const apart = (p) => (xLog || diagonal || names.length < 2 ? 0 : 16 * (names.indexOf(p.look[0] + p.look[1]) / (names.length - 1) - 0.5));
  const series = Map.groupBy ? Map.groupBy(points, (p) => p.series) : points.reduce((m, p) => m.set(p.series, [...(m.get(p.series) || []), p]), new Map());
  for (const own of series.values()) {
    own.sort((a, b) => a.x - b.x);
    if (own.length > 1) root.append(s("polyline", { points: own.map((p) => `${px(p.x) + apart(p)},${py(p.y)}`).join(" "), fill: "none", stroke: ink(own[0].look[0]), "stroke-opacity": 0.45 }));
  }
  const places = points.map((p) => {
    const [x, y] = [px(p.x) + apart(p), py(p.y)];
    if (finite(p.low) && finite(p.high)) root.append(s("line", { x1: x, x2: x, y1: py(p.low), y2: py(p.high), stroke: ink(p.look[0]), "stroke-opacity": 0.6 }));
    root.append(mark(p.look, x, y, p.size));
    return { x, y, p };
  });
  const nearest = (event) => {
    const box = root.getBoundingClientRect(), zoom = width / box.width;
    const [x, y] = [(event.clientX - box.left) * zoom, (event.clientY - box.top) * zoom];
    const found = places.reduce((best, one) => { const d = Math.hypot(one.x - x, one.y - y); return d < best.d ? { d, one } : best; }, { d: 18, one: null });
    return found.one && found.one.p;
  };
  root.addEventListener("mousemove", (event) => { const p = nearest(event); root.style.cursor = p && p.cell ? "pointer" : ""; tip(event, p && p.title); });
  root.addEventListener("mouseleave", (event) => tip(event, ""));
  root.addEventListener("click", (event) => { const p = nearest(event); if (p && p.cell) location.hash = cellHash(p.cell); });
  return root;
}

function drawControls() {
  const scored = data.measures.filter((m) => data.cells.some((c) => c.scores[m.name] && c.scores[m.name][1] !== null));
  const sizes = Object.keys(SIZES).filter((key) => several(data.cells.map(SIZES[key]).filter((x) => x !== null)));
  const score = h("select", { id: "chart-score", onchange: drawChart }), size = h("select", { id: "chart-size", onchange: drawChart });
  $("chart-controls").append(
    h("label", {}, "score", options(score, scored.map((m) => m.name), scored.map((m) => m.label))),
    h("label", {}, "size", options(size, sizes)));
}

function drawChart() {
  const measure = measures.get($("chart-score").value), of = SIZES[$("chart-size").value];
  if (!measure || !of) return;
  const factor = measure.kind === "share" ? 100 : 1, scaled = (x) => (x === null ? null : factor * x);
  const points = shown.filter((c) => of(c) !== null && c.scores[measure.name] && c.scores[measure.name][1] !== null).map((cell) => {
    const [text, value, low, high, n] = cell.scores[measure.name];
    return {
      x: of(cell), y: scaled(value), low: scaled(low), high: scaled(high), look: look(cell), cell,
      series: [cell.panel, cell.method, cell.corpus].join("|"),
      title: `${name(cell)}\n${measure.label}: ${text} (n ${n})\n${$("chart-size").value}: ${plain(of(cell))}`,
    };
  });
  const values = points.map((p) => p.y);
  const yLog = measure.kind === "perplexity" && Math.min(...values) > 0 && Math.max(...values) > 20 * Math.min(...values);
  const label = measure.label + (measure.kind === "share" ? " (%)" : "");
  $("chart").replaceChildren(points.length ? plot(points, { xLabel: $("chart-size").value, yLabel: label, yLog }) : h("p", {}, "No cell that is shown has this score and size."));
  const keys = new Map(points.map((p) => [p.cell.baseline ? "baseline" : p.cell.look, p.look]));
  $("legend").replaceChildren(...[...keys].sort().map(([text, one]) => h("li", {}, s("svg", { width: 16, height: 16, viewBox: "-8 -8 16 16" }, mark(one, 0, 0)), text)));
  $("chart-note").textContent = "Bars are 95 % intervals; methods are set apart a little so that bars do not hide each other. A line joins the ratios of one method on one corpus. Point at a mark for its cell, click to open it.";
}

// Tables that are given -------------------------------------------------------------------------------------------
function drawClaims() {
  if (!claims) return;
  const kinds = { holds: "good", reversed: "bad", "smaller than said": "bad" };
  // A contrast on other corpora and of each domain, the claim's own reading first.
  const byCorpus = (c) => c.evidence.filter((e) => e.corpora && e.corpora.length > 1).map((e) => {
    const domains = [...new Set(e.corpora.flatMap((row) => Object.keys(row.parts)))];
    return h("table", {}, head("corpus", domains.length ? "all" : "effect", ...domains), h("tbody", {}, e.corpora.map((row) =>
      h("tr", {}, h("td", { class: "text" }, row.corpus || `${c.corpus} (the claim)`), h("td", {}, row.all), ...domains.map((name) => h("td", {}, row.parts[name] || "–"))))));
  });
  $("claims-section").hidden = false;
  $("claims-tally").textContent = Object.entries(claims.reduce((m, c) => ({ ...m, [c.verdict]: (m[c.verdict] || 0) + 1 }), {})).map(([verdict, count]) => `${count} ${verdict}`).join(", ") + ". As winnow-report claims found it when it was last run.";
  const row = (c) => h("tr", { "data-claim": c.id },
    h("td", { class: "text" }, h("span", { class: `tag ${kinds[c.verdict] || "open"}` }, c.verdict)),
    h("td", { class: "prose" }, c.says, h("small", {}, ` (${c.source})`)),
    h("td", { class: "text" }, c.corpus || "–"),
    h("td", {}, c.p_corrected === null ? "–" : c.p_corrected < 0.001 ? "< 0.001" : c.p_corrected.toFixed(3)),
    h("td", { class: "prose" }, h("details", {}, h("summary", {}, c.missing.length ? `missing cells: ${c.missing.length}` : `contrasts: ${c.evidence.length}`),
      [...c.evidence.map((e) => e.alone ? `${e.text}; ${e.alone} alone carries it` : e.text), c.more, c.note && `only ${c.note}`, ...c.missing.map((m) => `${m.cell}: ${m.why}`), ...c.commands].filter(Boolean).map((line) => h("p", {}, line)), byCorpus(c))));
  const rows = (found) => [head("verdict", "claim", "corpus", "p", "what was seen"), h("tbody", {}, found.map(row))];
  const untested = claims.filter((c) => c.verdict === "not tested");
  if (untested.length < claims.length) $("claims-table").append(...rows(claims.filter((c) => !untested.includes(c))));
  $("claims-untested").hidden = !untested.length;
  $("claims-untested").firstChild.textContent = `${untested.length} not tested, and what is missing`;
  $("claims-untested").append(h("table", {}, rows(untested)));
}

function drawPublished() {
  const found = data.published;
  if (!found) return;
  $("published-section").hidden = false;
  $("published").append(head(...found.header), h("tbody", {}, found.rows.map((row) => h("tr", {}, row.map((text) => h("td", { class: "prose" }, text))))));
  $("published-note").textContent = found.note;
}

window.addEventListener("hashchange", () => route());
// #cell=ID opens a cell; #corpus=mixed&ratio=0.5 sets filters, so that a view can be linked to.
function route() {
  const asked = new URLSearchParams(location.hash.slice(1)), id = asked.get("cell");
  for (const field of Object.keys(FIELDS).filter((field) => asked.has(field) && $(`filter-${field}`)))
    chosen[field] = $(`filter-${field}`).value = asked.get(field);
  if (asked.size && id === null) applyFilters();
  tip(null, "");
  $("overview").hidden = id !== null;
  $("cell").hidden = id === null;
  $("cell").replaceChildren(...(id === null ? [] : byId.has(id) ? cellView(byId.get(id)) : [h("p", {}, `There is no cell ${id} on this page.`)]));
  if (id !== null) scrollTo(0, 0);
  document.body.dataset.ready = String(performance.now());
}

document.addEventListener("DOMContentLoaded", () => {
  $("opening").textContent = data.opening;
  $("cells-note").textContent = data.note;
  drawFilters();
  drawControls();
  drawClaims();
  drawTable();
  drawPublished();
  route();
});
