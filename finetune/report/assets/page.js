// Ties the controls to what they show.

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  t.words = data.words;
  if (Object.keys(data.slices).length) {
    fillSelect(at("slice-metric"), data.sliceMetrics.map((name) => [name, label(name)]), data.sliceMetric);
    at("slice-metric").addEventListener("change", () => showSlices(data, at("slice-metric").value));
    showSlices(data, at("slice-metric").value);
  }

  if (at("pair-metric")) {
    const compared = [...new Set(data.comparisons.map((one) => one[2]))];
    fillSelect(at("pair-metric"), compared.map((name) => [name, label(name)]), data.sliceMetric);
    at("pair-metric").addEventListener("change", () => showPairs(data, at("pair-metric").value));
    showPairs(data, at("pair-metric").value);
  }

  if (data.samples.length) startSamples(data, at);
}

function startSamples(data, at) {
  const names = data.targets.map((target, place) => [place, target.name]);
  const other = data.base !== null ? data.base : data.targets.length > 1 ? (data.best === 0 ? 1 : 0) : 0;
  fillSelect(at("subject"), names, data.best);
  fillSelect(at("rival"), names, other);
  fillSelect(at("metric"), data.metrics.map((name) => [name, label(name)]), data.headline);
  const slices = slicesOf(data.samples);
  fillSelect(at("slice"), [["", t("all samples")], ...slices.map(([name, value], place) => [place, sliceName(name) + ": " + sliceValue(name, value)])], "");

  const view = { page: 0, places: [] };
  function read() {
    view.search = at("search").value.trim();
    view.sort = at("sort").value;
    view.subject = Number(at("subject").value);
    view.rival = Number(at("rival").value);
    view.metric = at("metric").value;
    view.slice = at("slice").value === "" ? null : slices[Number(at("slice").value)];
    view.marks = at("marks").checked;
  }
  function show() {
    const pages = Math.max(1, Math.ceil(view.places.length / PER_PAGE));
    view.page = Math.min(Math.max(view.page, 0), pages - 1);
    const from = view.page * PER_PAGE, shown = view.places.slice(from, from + PER_PAGE);
    at("cards").replaceChildren(...shown.map((place) => card(data, view, place)));
    at("count").textContent = view.places.length === data.samples.length
      ? data.samples.length.toLocaleString("en") + " " + t("samples")
      : view.places.length.toLocaleString("en") + " " + t("of") + " " + data.samples.length.toLocaleString("en") + " " + t("samples");
    at("page").textContent = t("page") + " " + (view.page + 1) + " " + t("of") + " " + pages;
    at("previous").disabled = view.page === 0;
    at("next").disabled = view.page === pages - 1;
    at("pager").hidden = pages === 1;
  }
  function change() { read(); view.page = 0; view.places = ordered(data, view); show(); }
  function turn(by) { view.page += by; show(); at("samples").scrollIntoView(); focusCard(0); }
  function focusCard(by) {
    const cards = [...document.querySelectorAll(".card")];
    if (!cards.length) return;
    const now = cards.indexOf(document.activeElement.closest(".card"));
    const next = cards[Math.min(Math.max(now + by, 0), cards.length - 1)];
    next.focus();
    if (by) next.scrollIntoView({ block: "start" });
  }

  for (const id of ["sort", "subject", "rival", "metric", "slice", "marks"]) at(id).addEventListener("change", change);
  let waiting = 0;
  at("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(change, 120); });
  at("previous").addEventListener("click", () => turn(-1));
  at("next").addEventListener("click", () => turn(1));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input, select, textarea")) { if (event.key === "Escape") event.target.blur(); return; }
    const keys = {
      "/": () => at("search").focus(),
      j: () => focusCard(1), k: () => focusCard(-1),
      n: () => at("next").disabled || turn(1), p: () => at("previous").disabled || turn(-1),
    };
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  });
  // `#sample-17` shows that sample, whatever is chosen now.
  function open() {
    const number = Number((/^#sample-(\d+)$/.exec(location.hash) || [])[1]);
    const wanted = data.samples.findIndex((sample) => sample.number === number);
    if (wanted < 0) return;
    if (!view.places.includes(wanted)) { at("search").value = at("slice").value = ""; change(); }
    view.page = Math.floor(view.places.indexOf(wanted) / PER_PAGE);
    show();
    const card = at("sample-" + number);
    card.focus({ preventScroll: true });
    card.scrollIntoView({ block: "start" });
  }
  addEventListener("hashchange", open);
  change();
  open();
}

function slicesOf(samples) {
  const seen = new Map();
  for (const sample of samples)
    for (const pair of Object.entries(sample.slices)) seen.set(JSON.stringify(pair), pair);
  return [...seen.keys()].sort().map((key) => seen.get(key));
}

start();
