// The browser of samples: find, order, and one page of cards at a time.

const PER_PAGE = 10;

// Places of the samples to show, in the order asked for. All of it for 5,000 samples takes milliseconds.
function ordered(data, view) {
  const metric = data.metrics.indexOf(view.metric), sign = data.lower.includes(view.metric) ? -1 : 1;
  const score = (place, target) => {
    const value = metric < 0 ? null : data.samples[place].scores[target][metric];
    return value === null || value === undefined ? null : sign * value;
  };
  const gain = (place) => {
    const mine = score(place, view.subject), other = score(place, view.rival);
    return mine === null || other === null ? null : mine - other;
  };
  const keys = {
    data: () => 0,
    worst: (place) => score(place, view.subject),
    best: (place) => negative(score(place, view.subject)),
    gain: (place) => negative(gain(place)),
    loss: gain,
    longest: (place) => -data.samples[place].replies[view.subject].length,
  };
  const wanted = view.search.toLowerCase();
  const places = [];
  for (let place = 0; place < data.samples.length; place++)
    if (inSlice(data.samples[place], view.slice) && matches(data, place, wanted)) places.push(place);
  const key = new Float64Array(data.samples.length);
  for (const place of places) { const value = keys[view.sort](place); key[place] = value === null ? Infinity : value; }
  // A sample without a score comes last; equal ones stay as in the data.
  return places.sort((one, other) => (key[one] === key[other] ? one - other : key[one] - key[other]));
}

function negative(value) { return value === null ? null : -value; }

function inSlice(sample, slice) { return !slice || sample.slices[slice[0]] === slice[1]; }

function matches(data, place, wanted) {
  if (!wanted) return true;
  data.lowered = data.lowered || [];
  if (data.lowered[place] === undefined) {
    const sample = data.samples[place];
    data.lowered[place] = [sample.where, sample.prompt, sample.reference, ...sample.replies].join("\n").toLowerCase();
  }
  return data.lowered[place].includes(wanted);
}

// The turns of a prompt: [[role, text], …].
function turnsOf(prompt) {
  const parts = prompt.split(/<\|(system|user|assistant|observation)\|>/);
  const turns = [];
  const begin = parts[0].replace(/^\[gMASK\]\s*<sop>/, "").trim();
  if (begin) turns.push(["", begin]);
  for (let at = 1; at < parts.length; at += 2) if (parts[at + 1].trim()) turns.push([parts[at], parts[at + 1].trim()]);
  return turns;
}

function card(data, view, place) {
  const sample = data.samples[place];
  const slices = Object.entries(sample.slices).map(([name, value]) => element("span", null, sliceName(name) + ": " + sliceValue(name, value)));
  const asked = element("div", null,
    ...(sample.images || []).map((picture) => pictureOf(data, picture)),
    element("div", { class: "prompt text", tabindex: "0", role: "group", "aria-label": t("Prompt") },
      ...turnsOf(sample.prompt).flatMap(([role, text]) => [role ? element("span", { class: "role" }, role) : null, ...found(text, view.search)])),
    element("div", { class: "reference" }, element("span", { class: "role" }, t("reference")),
      element("div", { class: "text" }, ...found(sample.reference, view.search))));
  const given = element("div", { class: "given" }, ...data.targets.map((_, target) => replyOf(data, view, sample, target)));
  return element("article", { class: "card", tabindex: "-1", "aria-label": t("Sample") + " " + sample.number, id: "sample-" + sample.number },
    element("header", null, element("b", null, element("a", { href: "#sample-" + sample.number, title: t("A permanent link to this sample") }, "#" + sample.number)), element("span", null, sample.where), ...slices),
    element("div", { class: "columns" }, element("div", { class: "asked" }, asked), given));
}

function pictureOf(data, picture) {
  return typeof picture === "number"
    ? element("img", { class: "picture", src: data.pictures[picture], alt: t("The picture of the prompt"), loading: "lazy" })
    : element("p", { class: "empty" }, picture);
}

function replyOf(data, view, sample, target) {
  const reply = sample.replies[target], at = data.metrics.indexOf(view.metric);
  const value = at < 0 ? null : sample.scores[target][at];
  const other = at < 0 || target === view.rival ? null : sample.scores[view.rival][at];
  const head = element("p", null, element("b", null, mark(data.targets[target]), data.targets[target].name),
    at < 0 ? null : element("span", { class: "chip" }, label(view.metric) + " " + number(view.metric, value)));
  if (value !== null && value !== undefined && other !== null && other !== undefined && value !== other) {
    const up = (value > other) !== data.lower.includes(view.metric);
    head.append(element("span", { class: "chip " + (up ? "up" : "down") }, number(view.metric, value - other, true)));
  }
  const runs = view.marks && reply ? differences(sample.reference, reply) : null;
  if (view.marks && reply && !runs) head.append(element("span", { class: "chip" }, t("little in common, not marked")));
  const body = runs ? runs.flatMap(([kind, text]) => marked(kind, text, view.search)) : found(reply, view.search);
  return element("div", { class: "reply c" + data.targets[target].colour + (target === view.subject ? " subject" : "") }, head,
    reply ? element("div", { class: "text" }, ...body) : element("div", { class: "empty" }, t("an empty reply")));
}

function marked(kind, text, wanted) {
  const inside = found(text, wanted);
  if (kind === "same") return inside;
  return [kind === "extra" ? element("mark", { title: t("not in the reference") }, ...inside)
    : element("del", { title: t("only in the reference") }, ...inside)];
}

// The text in pieces, what was searched for marked. Always text nodes: nothing in a sample is markup.
function found(text, wanted) {
  if (!wanted) return [text];
  const lowered = text.toLowerCase(), needle = wanted.toLowerCase();
  if (lowered.length !== text.length) return [text]; // lower case moved the places
  const pieces = [];
  let from = 0;
  for (let at = lowered.indexOf(needle); at >= 0; at = lowered.indexOf(needle, from)) {
    pieces.push(text.slice(from, at), element("mark", { class: "found" }, text.slice(at, at + needle.length)));
    from = at + needle.length;
  }
  pieces.push(text.slice(from));
  return pieces;
}
