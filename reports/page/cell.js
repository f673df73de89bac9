// The view of one cell ----------------------------------------------------------------------------------------------
function cellView(cell) {
  const panel = data.panels[cell.panel], base = baselines.get(cell.panel);
  return [
    h("p", {}, h("a", { href: "#" }, "← all cells")),
    h("h2", {}, name(cell)),
    h("p", { class: "note" }, `${cell.ids.join(", ")} (model ${panel.model}, suite ${panel.suite}, backend ${panel.backend}${cell.ids.length > 1 ? `; means over ${cell.ids.length} seeds, texts and plan of the first` : ""})`),
    ...cell.faults.map((fault) => h("p", { class: "bad" }, `broken: ${fault}`)),
    ...cell.notes.map((told) => h("p", { class: "note" }, told)),
    h("div", { class: "row" }, scoreTable(cell, base), h("div", {}, sizeTable(cell), timingTable(cell))),
    ...neighbours(cell), ...answersView(cell, base), ...planView(cell), ...layerView(cell), ...usageView(cell), ...curveView(cell, base), ...textView(cell, base), ...settings(cell),
  ].filter(Boolean);
}

const measured = (cell, section) => data.measures.filter((m) => m.section === section && cell.scores[m.name]);

function scoreTable(cell, base, section = "scores") {
  const kept = measured(cell, section);
  const compared = base && base !== cell;
  const body = kept.map((m) => {
    const [text, , , , n, difference, , paired] = cell.scores[m.name];
    const row = [m.label + (m.kind === "share" ? " (%)" : ""), text, String(n)];
    return compared ? [...row, (base.scores[m.name] || ["–"])[0], difference ? `${difference}${paired ? "" : " unpaired"}` : "–"] : row;
  });
  const header = ["measure", "score [95 % interval]", "n", ...(compared ? ["baseline", "difference"] : [])];
  if (section !== "scores") return kept.length ? table(header, body) : null;
  const none = Object.keys(cell.scores).length ? "Its scores are below." : "This cell was not evaluated (suite=none).";
  return h("div", {}, h("h3", {}, "Scores"), kept.length ? table(header, body) : h("p", {}, none));
}

function sizeTable(cell) {
  const body = Object.entries(cell.sizes).map(([key, value]) => [key.replaceAll("_", " "), typeof value === "number" ? plain(value) : value]);
  return h("div", {}, h("h3", {}, "Sizes"), body.length ? table(["", "stored"], body) : h("p", {}, "No sizes are in the record."));
}

function timingTable(cell) {
  const body = Object.entries(cell.timings).map(([stage, seconds]) => [stage.replaceAll("_", " "), plain(seconds)]);
  return h("div", {}, h("h3", {}, "Timings"), body.length ? table(["stage", "seconds"], body) : h("p", {}, "No timings are in the record."));
}

function neighbours(cell) {
  const near = data.cells.filter((c) => c !== cell && c.panel === cell.panel && !c.baseline && c.corpus === cell.corpus);
  const lines = [
    ["same method", near.filter((c) => c.method === cell.method), (c) => `ratio ${c.ratio}`],
    ["same ratio", near.filter((c) => c.ratio === cell.ratio), (c) => c.method],
  ].filter(([, found]) => found.length);
  return lines.map(([label, found, text]) => h("p", { class: "note" }, `${label}: `, found.flatMap((c, i) => [i ? ", " : "", link(c, text(c))])));
}

// Squares, a row a layer; fill and title by place. Delegated, so that thousands of squares cost one listener.
function grid(layers, squares) {
  const widest = Math.max(...layers.map((layer) => squares(layer).length)), size = widest > 150 ? 6 : 9, left = 44;
  const root = s("svg", { width: left + widest * size, height: layers.length * (size + 2) + 4, class: "experts" });
  layers.forEach((layer, row) => {
    const y = row * (size + 2) + 2;
    root.append(s("text", { x: left - 6, y: y + size, "text-anchor": "end" }, layer));
    squares(layer).forEach(({ colour, opacity = 1, title, removed }, place) => root.append(
      s("rect", { x: left + place * size, y, width: size - 1, height: size - 1, class: removed ? "removed" : "kept", fill: removed ? null : ink(colour), "fill-opacity": removed ? null : opacity, "data-title": `layer ${layer}, ${title}` })));
  });
  root.addEventListener("mousemove", (event) => tip(event, event.target.dataset.title));
  root.addEventListener("mouseleave", (event) => tip(event, ""));
  return h("div", { class: "wide" }, root);
}

const GROUPS = ["#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
// What an old expert became that is no stored one: REMOVED, CONSTANT, MAP of data.py.
const GONE = { "-1": "removed", "-2": "replaced by a constant", "-3": "replaced by a low-rank map" };
const numeric = (layers) => Object.keys(layers).sort((a, b) => a - b);

function planView(cell) {
  const layers = numeric(cell.plan);
  if (!layers.length) return [];
  const body = layers.map((layer) => {
    const { experts, rows: routed, group_sizes: groups, widths, constants, low_rank: maps, refitted } = cell.plan[layer];
    const more = [[constants, "constants"], [maps, "low-rank maps"], [refitted, "refitted"]].filter(([count]) => count);
    return [layer, [experts, ...more.map(([count, what]) => `${count} ${what}`)].join(", "), String(routed), groups.length ? `${groups.length}, largest ${groups[0]}` : "–", widths ? `${Math.min(...widths)} to ${Math.max(...widths)}` : "all"];
  });
  const known = layers.every((layer) => cell.map[layer]);
  const note = known
    ? "Every square is an expert of the uncompressed model: blue stays by itself, paler with fewer channels; a colour that is not blue is a group that was merged (colours repeat); grey was replaced by a constant or a low-rank map; empty was removed."
    : "Every square is an expert that is stored: blue alone, paler with fewer channels, another colour a merged group. Which experts of the uncompressed model they were is in the cell's plan.json, which does not lie beside these records.";
  return [h("h3", {}, "Plan"), table(["layer", "experts stored", "router rows", "merged groups", "channels"], body), h("p", { class: "note" }, note),
    grid(layers, (layer) => (known ? oldExperts(cell, layer) : storedExperts(cell, layer)))];
}

function oldExperts(cell, layer) {
  const route = cell.map[layer], widths = cell.plan[layer].widths, saliency = (data.saliency[cell.saliency] || {})[layer];
  const widest = widths && Math.max(...widths), members = new Map();
  route.forEach((to, old) => members.set(to, [...(members.get(to) || []), old]));
  const groups = [...members].filter(([to, own]) => to >= 0 && own.length > 1).map(([to]) => to);
  return route.map((to, old) => {
    const facts = [`expert ${old}`];
    const own = members.get(to), merged = to >= 0 && own.length > 1;
    facts.push(to < 0 ? GONE[to] : merged ? `merged with ${own.filter((one) => one !== old).join(", ")}` : "kept");
    if (widths && to >= 0) facts.push(`${widths[to]} channels`);
    if (saliency) facts.push(`saliency ${saliency[old]}`);
    return { removed: to === -1, colour: to < 0 ? "#999999" : merged ? GROUPS[groups.indexOf(to) % GROUPS.length] : "#0072B2", opacity: widths && to >= 0 ? 0.15 + 0.85 * widths[to] / widest : 1, title: facts.join(", ") };
  });
}

function storedExperts(cell, layer) {
  const { experts, group_sizes: groups, widths } = cell.plan[layer];
  const widest = widths && Math.max(...widths);
  return Array.from({ length: experts }, (_, place) => ({
    colour: !widths && place < groups.length ? GROUPS[place % GROUPS.length] : "#0072B2",
    opacity: widths ? 0.15 + 0.85 * widths[place] / widest : 1,
    title: !widths && place < groups.length ? `a group of ${groups[place]}` : widths ? `${widths[place]} channels` : "an expert by itself",
  }));
}

function usageView(cell) {
  const usage = data.usage[cell.usage] || {}, sources = Object.keys(usage).filter((source) => numeric(usage[source]).length);
  return sources.length === 0 ? [] : [
    h("h3", {}, "Expert usage of the uncompressed model"),
    h("p", { class: "note" }, "Routed tokens of each expert over the mean of its layer: the darker, the more (full from 3 times the mean on)."),
    ...sources.flatMap((source) => [h("p", {}, source), grid(numeric(usage[source]), (layer) => {
      const counts = usage[source][layer], mean = counts.reduce((a, b) => a + b, 0) / counts.length || 1;
      return counts.map((count, old) => ({ colour: "#0072B2", opacity: Math.min(1, count / mean / 3), title: `expert ${old}: ${count.toLocaleString("en")} tokens, ${plain(count / mean)} times the mean` }));
    })]),
  ];
}

function curveView(cell, base) {
  const drawn = data.curves.filter((curve) => cell.curves[curve.metric].length).map(({ metric, title }) => {
    const own = [cell, ...(base && base !== cell ? [base] : [])];
    const points = own.flatMap((c) => c.curves[metric].map(([x, y, low, high]) => ({ x, y, low, high, look: look(c), series: c.id, title: `${name(c)}\n${title}: ${plain(y, 4)} [${plain(low, 4)}, ${plain(high, 4)}]\nup to position ${x}` })));
    return plot(points, { xLabel: "position in the text (tokens)", yLabel: title, xLog: true, width: 460, height: 260 });
  });
  return drawn.length ? [h("h3", {}, "Drift by position"), h("p", { class: "note" }, "The star is the uncompressed model. Bars are 95 % intervals."), h("div", { class: "row", id: "drift" }, drawn)] : [];
}

// Where two texts part, in UTF-16 units, never inside a surrogate pair; -1 where they are the same.
function parting(one, other) {
  if (one === other) return -1;
  let at = 0;
  while (at < one.length && at < other.length && one[at] === other[at]) at++;
  return at && one.charCodeAt(at - 1) >= 0xd800 && one.charCodeAt(at - 1) < 0xdc00 ? at - 1 : at;
}

function marked(text, at) {
  if (at < 0) return h("pre", {}, h("span", { class: "same" }, text));
  const word = text.slice(at).match(/^\s*\S+|^\s+/)?.[0] ?? "";
  return h("pre", {}, h("span", { class: "same" }, text.slice(0, at)), h("mark", {}, word || "⏹ ends here"), text.slice(at + word.length));
}

function verdict(score) {
  const [kind, text] = score === null ? ["open", "no score"] : score >= 1 ? ["good", "right"] : score <= 0 ? ["bad", "wrong"] : ["open", plain(score)];
  return h("span", { class: `tag ${kind}` }, text);
}

function textView(cell, base) {
  const title = h("h3", {}, base ? "Texts beside the baseline's" : "Texts"), items = data.items[cell.panel];
  if (!cell.texts.length) return [title, h("p", { class: "note" }, "The texts of this cell were not stored: its samples hold scores alone, or its .parquet file does not lie beside its record.")];
  const compared = base && base !== cell && base.texts.length;
  const groups = [...new Set(items.map((item) => `${item.task} ${item.domain}`))];
  const shownItems = (group) => items.flatMap((item, i) => (`${item.task} ${item.domain}` === group && cell.texts[i] ? [i] : []));
  return [title,
    h("p", { class: "note" }, `The items with the longest texts, the same for every cell, at most ${data.text_length.toLocaleString("en")} letters of each.${base ? " The mark is where the two texts part." : ""}`),
    base && base !== cell && !compared ? h("p", { class: "note" }, "The uncompressed model's texts were not stored, so there is nothing to compare with.") : null,
    ...groups.map((group, place) => h("details", { open: place === 0 }, h("summary", {}, [...new Set(group.trim().split(" "))].join(", ")), shownItems(group).map((i) => {
      const [text, score, cut] = cell.texts[i], of = compared && base.texts[i] ? base.texts[i] : null;
      const at = of ? parting(text, of[0]) : -1;
      const same = of && at < 0 ? h("span", { class: "tag open" }, cut ? "same as far as stored" : "same text") : null;
      return h("div", { "data-item": items[i].item },
        h("p", {}, h("strong", {}, items[i].item)),
        items[i].prompt ? h("details", {}, h("summary", {}, "prompt"), h("pre", {}, items[i].prompt)) : null,
        h("div", { class: "pair" },
          of ? h("div", {}, "baseline ", verdict(of[1]), marked(of[0], at)) : null,
          h("div", {}, `${cell.method} `, verdict(score), " ", same, marked(text, at))));
    })))];
}

function settings(cell) {
  const lines = [["method", cell.settings], ["contamination", cell.contamination], ["versions", cell.versions]].filter(([, value]) => Object.keys(value).length);
  return lines.length ? [h("details", {}, h("summary", {}, "Settings and versions"), lines.map(([label, value]) => [h("p", {}, label), h("pre", {}, JSON.stringify(value, null, 1))]))] : [];
}
