// What is seen: the columns of every turn, the settings, the box to write in.
const letter = (place) => String.fromCharCode(65 + place);
const nodes = { turns: [] }; // per turn { whole, answers }

function nameOf(turn, column) {
  const place = turn.order.indexOf(column);
  const hidden = turn.hidden && turn.vote === null;
  return hidden ? letter(place) : turn.models.length > 1 ? `${letter(place)} · ${turn.models[column]}` : turn.models[column];
}

function stateOf(answer) {
  if (answer.stop) return t("writing …");
  if (answer.error) return t("It failed");
  const parts = answer.tokens ? [count(answer.tokens), `${answer.seconds.toFixed(1)} s`] : [];
  if (answer.ended === "stopped") parts.push(t("was stopped"));
  if (answer.ended === "length") parts.push(t("cut at the longest reply"));
  return parts.join(" · ");
}

function stepNode(step, goesOn) {
  const { thought, said, open } = thoughtOf(step.text);
  return h("div", { className: "step" },
    thought && h("details", { className: "thought", open: open && goesOn },
      h("summary", {}, open ? t("thinking …") : t("Thought")), h("div", { className: "plain" }, thought)),
    said && markdown(said));
}

function pretty(text) {
  try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; }
}

function callNode(call, send) {
  const box = h("textarea", { rows: 2, value: call.typed, ariaLabel: `${t("Result of")} ${call.name}`, placeholder: t("what the function returns"),
    oninput: (event) => { call.typed = event.target.value; },
    onkeydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(); } });
  return h("div", { className: "call" },
    h("p", { className: "call-name" }, h("span", { className: "role" }, t("Tool call")), h("b", {}, call.name)),
    h("pre", { tabIndex: 0 }, h("code", {}, pretty(call.arguments))),
    call.result !== null ? h("div", {}, h("span", { className: "role" }, t("Result")), h("div", { className: "plain result" }, call.result)) : send ? box : null);
}

function tokensNode(told) {
  const shown = h("p", { className: "tokens" }, told.tokens.map(({ text, trained, control, ids }) =>
    h("span", { className: `${trained ? "trained" : ""} ${control ? "control" : ""}`, title: ids.slice(0, 8).join(" ") }, text.replaceAll("\n", "⏎\n"))));
  return h("div", { className: "told" }, h("p", { className: "note" }, `${count(told.num_tokens)}, ${told.num_trained} ${t("of them trained (green)")}`), shown);
}

function answerNode(number, column) {
  const turn = state.turns[number];
  const answer = turn.answers[column];
  const isLast = number === state.turns.length - 1;
  const waits = !answer.stop && answer.steps.length > 0 && answer.steps.at(-1).calls.some((call) => call.result === null);
  const deliver = isLast && waits && answer.ended !== "stopped" ? () => sendResults(number, column) : null;
  const body = h("div", { className: "steps" }, answer.steps.map((step, at) => {
    const goesOn = answer.stop !== null && at === answer.steps.length - 1;
    return [stepNode(step, goesOn), step.calls.map((call) => callNode(call, deliver))];
  }));
  const actions = answer.stop ? [button(t("Stop"), () => answer.stop.abort(), { className: "small" })] : [
    copying(() => answer.steps.map((step) => step.text).join("\n")),
    isLast && button(t("Retry"), () => retry(number, column), { className: "small" }),
    answer.steps.length > 0 && setup.saves && button(t("Save as training row"), () => saveRow(number, column), { className: "small" }),
    answer.steps.length > 0 && button(t("Tokens"), () => showTokens(number, column), { className: "small", ariaExpanded: String(answer.told !== null) }),
  ];
  const place = turn.order.indexOf(column);
  return h("article", { className: `answer c${place + 1}`, ariaBusy: String(answer.stop !== null), ariaLabel: nameOf(turn, column) },
    h("header", {}, h("i", { className: "mark" }), h("b", {}, nameOf(turn, column)), h("small", {}, stateOf(answer))),
    body,
    answer.error && h("p", { className: "error", role: "alert" }, answer.error),
    deliver && button(t("Send the results"), deliver),
    answer.told && tokensNode(answer.told),
    h("footer", { className: "actions" }, actions, answer.notes && h("span", { className: "note", role: "status" }, answer.notes)));
}

function voteNode(number) {
  const turn = state.turns[number];
  const ready = turn.models.length > 1 && new Set(turn.models).size === turn.models.length && turn.answers.every((answer) => !answer.stop && !answer.error && answer.steps.length);
  if (!ready) return null;
  if (turn.vote !== null) {
    const said = turn.vote === "tie" ? t("a tie") : `${nameOf(turn, turn.order[turn.vote])} ${t("is better")}`;
    return h("p", { className: "vote voted", role: "status" }, said);
  }
  const choices = turn.order.map((_, place) => button(`${letter(place)} ${t("is better")}`, () => vote(number, place)));
  choices.splice(1, 0, button(t("Tie"), () => vote(number, null)));
  return h("div", { className: "vote", role: "group", ariaLabel: t("Which reply is better?") }, choices);
}

function turnNode(number) {
  const turn = state.turns[number];
  const answers = turn.order.map((column) => answerNode(number, column));
  nodes.turns[number] = { answers: Object.fromEntries(turn.order.map((column, place) => [column, answers[place]])) };
  return h("section", { className: "turn" },
    h("div", { className: "question" },
      turn.pictures.map((src) => h("img", { src, alt: t("the image of this dialogue"), className: "picture" })),
      h("div", { className: "plain" }, turn.text),
      button(t("Edit"), () => edit(number), { className: "small" })),
    h("div", { className: `columns n${turn.models.length}` }, answers),
    voteNode(number));
}

// Puts a node in the place of another; what had the focus has it again, and whoever was at the end stays there.
function replace(old, made) {
  const atEnd = window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 80;
  const controls = (node) => [...node.querySelectorAll("button, textarea, summary")];
  const place = controls(old).indexOf(document.activeElement);
  old.replaceWith(made);
  const same = place >= 0 ? controls(made)[place] : null;
  same?.focus({ preventScroll: true });
  if (same?.tagName === "TEXTAREA") same.setSelectionRange(same.value.length, same.value.length);
  if (atEnd) window.scrollTo(0, document.documentElement.scrollHeight);
}

function drawTurn(number) {
  replace(byId("turns").children[number], turnNode(number));
}

// An answer anew; the turn with it where that changes what can be voted on.
function drawAnswer(turn, column) {
  if (!nodes.turns[turn] || !state.turns[turn]) return;
  if (!state.turns[turn].answers.some((answer) => answer.stop)) return drawTurn(turn);
  const made = answerNode(turn, column);
  replace(nodes.turns[turn].answers[column], made);
  nodes.turns[turn].answers[column] = made;
}

// While a reply comes it is drawn as often as the page can, and seldom where that takes long.
const soon = new Map();
function drawSoon(turn, column) {
  const key = `${turn}/${column}`;
  if (soon.has(key)) return;
  soon.set(key, true);
  setTimeout(() => requestAnimationFrame(() => {
    soon.delete(key);
    const begun = performance.now();
    if (state.turns[turn]?.answers[column]?.stop) drawAnswer(turn, column);
    drawSoon.took = performance.now() - begun;
  }), Math.min(2000, 40 + 6 * (drawSoon.took ?? 0)));
}

function drawComposer() {
  const busy = writing().length > 0;
  const shows = roomForPictures() > 0;
  byId("draft").value = state.draft;
  byId("send").textContent = busy ? t("Stop") : state.editing !== null ? t("Send again") : t("Send");
  byId("send").disabled = !busy && !state.columns.length;
  byId("image-row").hidden = !shows && !state.pictures.length;
  byId("picture-box").replaceChildren(...state.pictures.flatMap((src, at) => [
    h("img", { src, alt: t("the image to be sent"), className: "thumbnail" }),
    button(t("Remove the image"), () => { state.pictures.splice(at, 1); drawComposer(); }, { className: "small" })]));
}

function drawModels() {
  const choices = state.columns.map((name, place) => {
    const select = h("select", { ariaLabel: `${t("Model")} ${letter(place)}`, onchange: (event) => { state.columns[place] = event.target.value; drawAll(); } },
      state.models.map((model) => h("option", { value: model.name, selected: model.name === name }, model.name)));
    const drop = state.columns.length > 1 && button("×", () => { state.columns.splice(place, 1); drawAll(); }, { className: "small", ariaLabel: `${t("Take away")} ${name}` });
    return h("span", { className: `choice c${place + 1}` }, h("i", { className: "mark" }), state.hidden ? null : letter(place), select, drop);
  });
  const others = state.models.filter((model) => !state.columns.includes(model.name));
  const more = others.length > 0 && state.columns.length < 4 && button(t("+ model"), () => { state.columns.push(others[0].name); drawAll(); }, { className: "small" });
  byId("models").replaceChildren(...choices, ...(more ? [more] : []));
}

function drawAll() {
  drawModels();
  nodes.turns = [];
  byId("turns").replaceChildren(...state.turns.map((_, number) => turnNode(number)));
  byId("empty").hidden = state.turns.length > 0;
  drawComposer();
}
