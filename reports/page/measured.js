// What was measured of a cell besides its scores: whether its answers can be relied on, and what became of its layers.
const span = (value, digits, factor = 1) => (value ? `${plain(factor * value[0], digits)} [${plain(factor * value[1], digits)}, ${plain(factor * value[2], digits)}]` : "–");

function answersView(cell, base) {
  const calibration = scoreTable(cell, base, "calibration"), consistency = scoreTable(cell, base, "consistency");
  return [
    ...(calibration || cell.reliability.length ? [
      h("h3", {}, "Calibration of answers"),
      h("p", { class: "note" }, `Share of right answers over mean confidence, a mark a bin of confidence, its area by the questions in it${cell.ids.length > 1 ? ", of the first seed" : ""}; bars are 95 % intervals, stars the uncompressed model. On the dotted line confidence is right, below it there is too much. ECE is the mean gap, biased upwards by what is there by chance.`),
      h("div", { class: "row", id: "calibration" }, reliabilityPlot(cell, base), calibration),
    ] : []),
    ...(consistency ? [
      h("h3", {}, "Consistency of answers"),
      h("p", { class: "note" }, "Same answer: the share of questions answered alike in every wording (paraphrased, negated, choices in another order); beside it the mean accuracy over the wordings."),
      h("div", { id: "consistency" }, consistency),
    ] : []),
  ];
}

function reliabilityPlot(cell, base) {
  const own = [...(base && base !== cell ? [base] : []), cell].filter((c) => c.reliability.length);
  const points = own.flatMap((c) => {
    const all = c.reliability.reduce((sum, bin) => sum + bin[4], 0);
    return c.reliability.map(([x, y, low, high, n]) => ({
      x, y, low, high, look: look(c), series: c.id, size: 0.5 + 1.5 * Math.sqrt(n / all),
      title: `${name(c)}\nconfidence ${plain(x, 3)}, right ${plain(y, 3)} [${plain(low, 3)}, ${plain(high, 3)}]\n${n} questions`,
    }));
  });
  return points.length ? plot(points, { xLabel: "confidence", yLabel: "share right", diagonal: true, width: 380, height: 360 }) : null;
}

function layerView(cell) {
  if (!cell.layers.length) return [];
  const [{ tokens }] = cell.layers, of = (field) => cell.layers.some((one) => one[field]);
  const pairs = (value) => (value ? `${span(value, 2)} (n ${value[3]})` : "–"), change = ([before, after]) => `${plain(before, 3)} → ${plain(after, 3)}`;
  const columns = [
    ["layer", (one) => one.layer],
    ["measured error (%)", (one) => span(one.measured, 2, 100)],
    ...(of("predicted") ? [["predicted error (%)", (one) => span(one.predicted, 2, 100)]] : []),
    ["spread", (one) => change(one.spread)],
    ["ratio of spreads", (one) => span(one.ratio, 3)],
    ...(of("distance") ? [["distance of merged pairs", (one) => pairs(one.distance)], ["of average pairs", (one) => pairs(one.average)]] : []),
    ["load entropy (nats)", (one) => change(one.entropy)],
  ];
  return [
    h("h3", {}, "Layer by layer"),
    h("p", { class: "note" }, `Each compressed layer is given what the original's is given, of ${tokens.toLocaleString("en")} calibration tokens${cell.ids.length > 1 ? " (one seed)" : ""}. Errors are those of the routed experts' output, of its energy; spread is the mean squared distance of expert outputs from their centre, before → after; distance is between weights with their channels aligned, over their norm (1.41 for unrelated ones). Brackets are 95 % intervals.`),
    h("div", { class: "wide", id: "layers" }, table(columns.map(([title]) => title), cell.layers.map((one) => columns.map(([, text]) => text(one))))),
    ...(cell.layers.length > 1 ? [h("div", { class: "row", id: "layer-charts" },
      layerPlot(cell, "error (%)", 100, { measured: look(cell), predicted: [GREY, "o"] }),
      layerPlot(cell, "ratio of spreads", 1, { ratio: look(cell) }))] : []),
  ];
}

function layerPlot(cell, yLabel, factor, series) {
  const points = Object.entries(series).flatMap(([field, own]) => cell.layers.filter((one) => one[field]).map((one) => {
    const [y, low, high] = one[field].map((value) => factor * value);
    return { x: Number(one.layer), y, low, high, look: own, series: field, title: `layer ${one.layer}\n${field}: ${span(one[field], 3, factor)}` };
  }));
  return points.length ? plot(points, { xLabel: "layer", yLabel: Object.keys(series).length > 1 ? `${yLabel}, grey: predicted` : yLabel, fromZero: true, width: 460, height: 260 }) : null;
}
