// Tables under a chosen score: slices, and every two models.

// A text of the page in its language.
function t(text) { return (t.words || {})[text] || text; }

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function fillSelect(select, pairs, chosen) {
  select.replaceChildren(...pairs.map(([value, text]) => element("option", { value }, text)));
  if (chosen !== null && chosen !== undefined) select.value = String(chosen);
}

function label(metric) { return metric.replaceAll("_", " "); }

// What a slice is by, and a part of the data, in the page's language.
function sliceName(slice) {
  const names = { source: t("Source"), category: t("Category"), turns: t("Turns"), prompt_length: t("Length of the prompt"), kind: t("Kind"), language: t("Language") };
  return names[slice] || label(slice);
}

function sliceValue(slice, value) {
  const kinds = { plain: t("Plain reply"), tool: t("With tools") };
  const languages = { chinese: t("Chinese"), japanese: t("Japanese"), korean: t("Korean"), "latin script": t("Latin script"), "cyrillic script": t("Cyrillic script"), "arabic script": t("Arabic script"), other: t("Other") };
  const named = { kind: kinds, language: languages }[slice] || {};
  return named[value] || (["turns", "prompt_length"].includes(slice) ? value.replace(/^over /, "> ").replace(/^(\d+) or more$/, "≥ $1") : value);
}

function number(metric, value, signed) {
  if (value === null || value === undefined) return "–";
  const places = metric.endsWith("loss") ? 3 : metric === "perplexity" ? 2 : 1;
  return ((signed && value >= 0 ? "+" : "") + value.toFixed(places)).replace("-", "−");
}

function mark(target) { return element("i", { class: "mark c" + target.colour }); }

function showSlices(data, metric) {
  const lower = data.lower.includes(metric);
  const head = element("tr", null, element("th", { scope: "col" }, t("slice")), element("th", { scope: "col" }, "n"),
    ...data.targets.map((target) => element("th", { scope: "col" }, mark(target), target.name)));
  const body = [];
  for (const [slice, values] of Object.entries(data.slices)) {
    body.push(element("tr", { class: "group" }, element("th", { scope: "colgroup", colspan: data.targets.length + 2 }, sliceName(slice))));
    for (const [value, targets] of Object.entries(values)) {
      const scores = data.targets.map((target) => (targets[target.name] || {})[metric] || { value: null, n: 0 });
      const known = scores.map((score) => score.value).filter((found) => found !== null);
      const top = known.length ? (lower ? Math.min(...known) : Math.max(...known)) : 0;
      const span = data.neither.includes(metric) ? null : Math.max(...known.map((found) => Math.abs(found - top)), 0);
      body.push(element("tr", null, element("th", { scope: "row" }, sliceValue(slice, value)),
        element("td", null, String(Math.max(...scores.map((score) => score.n)))),
        ...scores.map((score) => sliceCell(metric, score, top, span))));
    }
  }
  document.getElementById("slice-table").replaceChildren(element("thead", null, head), element("tbody", null, ...body));
}

function sliceCell(metric, score, top, span) {
  if (score.value === null) return element("td", null, "–");
  const far = span ? Math.abs(score.value - top) / span : 0;
  const shade = span === null ? null : far === 0 ? "top" : "shade" + Math.min(3, Math.ceil(far * 3));
  const title = score.low === null || score.low === undefined ? null
    : number(metric, score.low) + " … " + number(metric, score.high) + ", n = " + score.n;
  return element("td", { class: shade, title }, number(metric, score.value));
}

// Every two models: the difference of the row's score to the column's, in the colour of its verdict.
function showPairs(data, metric) {
  const differences = new Map();
  for (const [a, b, name, difference, verdict, sentence] of data.comparisons) {
    if (name !== metric) continue;
    differences.set(a + " " + b, [difference, verdict, sentence]);
    const turned = { better: "worse", worse: "better" }[verdict] || verdict;
    differences.set(b + " " + a, [difference === null ? null : -difference, turned, sentence]);
  }
  const cell = (row, column) => {
    const [difference, verdict, sentence] = differences.get(row + " " + column) || [null, "none", null];
    const text = row === column || difference === null ? "" : number(metric, difference, true);
    return element("td", { class: verdict.replaceAll(" ", "-"), title: sentence }, text);
  };
  const head = element("tr", null, element("th", { scope: "col" }, t("row minus column")),
    ...data.targets.map((target) => element("th", { scope: "col" }, mark(target), target.name)));
  const body = data.targets.map((target, row) => element("tr", null,
    element("th", { scope: "row" }, mark(target), target.name), ...data.targets.map((_, column) => cell(row, column))));
  document.getElementById("pair-table").replaceChildren(element("thead", null, head), element("tbody", null, ...body));
}
