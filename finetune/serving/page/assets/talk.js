// Dialogues: what is sent for a column, and how its reply comes in.
const SAMPLING = {
  temperature: { placeholder: "0", min: 0, max: 2, step: 0.1 }, top_p: { placeholder: "1", min: 0, max: 1, step: 0.05 }, top_k: { placeholder: "0", min: 0, step: 1 },
  min_p: { placeholder: "0", min: 0, max: 1, step: 0.01 }, presence_penalty: { placeholder: "0", min: -2, max: 2, step: 0.1 },
  frequency_penalty: { placeholder: "0", min: -2, max: 2, step: 0.1 }, repetition_penalty: { placeholder: "1", min: 0.1, max: 10, step: 0.05 },
  max_tokens: { min: 1, step: 1 }, seed: { step: 1 },
};
const LARGEST_PICTURE = 10 << 20;

// The functions in the box as a list; an Error that says what is wrong.
function readTools(text) {
  if (!text.trim()) return [];
  const found = JSON.parse(text);
  if (!Array.isArray(found)) throw new Error(t("the tools are a JSON list of functions"));
  found.forEach((tool, at) => {
    const name = tool?.function?.name ?? tool?.name;
    if (typeof name !== "string" || !name) throw new Error(`${t("no name: tool")} ${at + 1}`);
  });
  return found;
}

const toolNames = (tools) => tools.map((tool) => tool.function?.name ?? tool.name);

// The messages of a column up to and with a turn. Thoughts of replies are left out unless `whole`.
function messagesOf(column, last, whole = false) {
  const messages = state.system.trim() ? [{ role: "system", content: state.system }] : [];
  for (const turn of state.turns.slice(0, last + 1)) {
    const images = turn.pictures.map((url) => ({ type: "image_url", image_url: { url } }));
    messages.push({ role: "user", content: images.length ? [...images, { type: "text", text: turn.text }] : turn.text });
    for (const step of turn.answers[column].steps) {
      const content = whole ? step.text : thoughtOf(step.text).said;
      if (!content && !step.calls.length) continue;
      const calls = step.calls.map((call) => ({
        id: call.id, type: "function", function: { name: call.name, arguments: call.arguments },
      }));
      messages.push({ role: "assistant", content: content || null, ...(calls.length ? { tool_calls: calls } : {}) });
      for (const call of step.calls.filter((one) => one.result !== null)) {
        messages.push({ role: "tool", tool_call_id: call.id, content: call.result });
      }
    }
  }
  return messages;
}

function bodyOf(column, turn) {
  const tools = readTools(state.tools);
  const said = Object.entries(state.sampling).filter(([, value]) => value !== "" && value !== undefined);
  return {
    model: state.turns[turn].models[column], messages: messagesOf(column, turn), stream: true,
    stream_options: { include_usage: true }, ...(tools.length ? { tools } : {}),
    ...Object.fromEntries(said.map(([name, value]) => [name, Number(value)])),
  };
}

const newAnswer = () => ({ steps: [], tokens: 0, seconds: 0, ended: "", error: "", notes: "", stop: null, told: null });

// Lets the model of a column go on behind what its answer has so far.
async function goOn(turn, column) {
  const answer = state.turns[turn].answers[column];
  const begun = performance.now();
  const stop = new AbortController();
  let body;
  try { body = bodyOf(column, turn); } catch (error) { answer.error = String(error.message); drawAnswer(turn, column); return; }
  const step = { text: "", calls: [] };
  answer.steps.push(step);
  Object.assign(answer, { stop, error: "", ended: "", told: null });
  drawAnswer(turn, column);
  drawComposer();
  try {
    for await (const event of events(body, stop.signal)) {
      if (event.usage) answer.tokens += event.usage.completion_tokens;
      const choice = event.choices[0];
      if (!choice) continue;
      const { reasoning_content: thought, content, tool_calls: more } = choice.delta;
      if (thought) {
        step.text += (step.thinks ? "" : "<think>") + thought;
        step.thinks = true;
      } else if ((content || more) && step.thinks) {
        step.text += "</think>\n\n"; // where a model writes <think> into its text, it also ends it there
        step.thinks = false;
      }
      step.text += content ?? "";
      for (const call of choice.delta.tool_calls ?? []) {
        const known = (step.calls[call.index] ??= { id: call.id, name: call.function.name, arguments: "", result: null, typed: "" });
        known.arguments += call.function.arguments ?? "";
      }
      answer.ended = choice.finish_reason ?? answer.ended;
      drawSoon(turn, column);
    }
  } catch (error) {
    if (stop.signal.aborted) answer.ended = "stopped";
    else answer.error = error instanceof TypeError ? t("the server cannot be reached") : error.message;
    if (!step.text && !step.calls.length) answer.steps.pop();
  }
  answer.seconds += (performance.now() - begun) / 1000;
  answer.stop = null;
  drawAnswer(turn, column);
  drawComposer();
}

const writing = () => state.turns.flatMap((turn) => turn.answers).filter((answer) => answer.stop);
const stopAll = () => writing().forEach((answer) => answer.stop.abort());

function send() {
  const text = state.draft.trim();
  if (writing().length || !state.columns.length || (!text && !state.pictures.length)) return;
  try { readTools(state.tools); } catch { byId("tools").focus(); return; }
  if (state.editing !== null) state.turns.length = state.editing;
  const models = [...state.columns];
  const before = state.turns.at(-1);
  if (before && String(before.models) !== String(models)) state.turns.length = 0; // other models: a new dialogue
  const order = models.map((_, at) => at);
  if (state.hidden && Math.random() < 0.5) order.reverse();
  if (state.hidden && order.length > 2) order.sort(() => Math.random() - 0.5);
  const pictures = state.pictures.slice(0, roomForPictures());
  const dialogue = state.turns[0]?.dialogue ?? Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  state.turns.push({ dialogue, text, pictures, models, order, hidden: state.hidden, answers: models.map(newAnswer), vote: null });
  Object.assign(state, { draft: "", pictures: [], editing: null });
  drawAll();
  window.scrollTo(0, document.documentElement.scrollHeight);
  models.forEach((_, column) => goOn(state.turns.length - 1, column));
  byId("draft").focus();
}

function retry(turn, column) {
  Object.assign(state.turns[turn], { vote: null }).answers[column] = newAnswer();
  drawTurn(turn);
  goOn(turn, column);
}

function edit(turn) {
  Object.assign(state, { draft: state.turns[turn].text, pictures: [...state.turns[turn].pictures], editing: turn });
  drawComposer();
  byId("draft").focus();
}

// Results of an answer's calls, once all boxes are sent.
function sendResults(turn, column) {
  for (const call of state.turns[turn].answers[column].steps.at(-1).calls) call.result = call.typed || " ";
  goOn(turn, column);
}

async function vote(number, place) {
  const turn = state.turns[number];
  const names = turn.order.map((column) => turn.models[column]);
  const replies = turn.order.map((column) => turn.answers[column].steps.map((step) => step.text).join("\n"));
  try {
    if (setup.saves) {
      await ask("page/votes", { models: names, winner: place === null ? null : names[place], hidden: turn.hidden, dialogue: turn.dialogue, turn: number + 1, system: state.system, prompt: turn.text, replies });
    }
    turn.vote = place === null ? "tie" : place;
  } catch (error) { tell(error.message, "bad"); }
  drawTurn(number);
}

async function saveRow(turn, column) {
  const tools = readTools(state.tools);
  const answer = state.turns[turn].answers[column];
  try {
    const body = { model: state.turns[turn].models[column], messages: messagesOf(column, turn, true), ...(tools.length ? { tools } : {}) };
    const saved = await (await ask("page/rows", body)).json();
    answer.notes = `${t("Saved as a row of")} ${saved.file} (${saved.rows})`;
  } catch (error) { answer.notes = error.message; }
  drawAnswer(turn, column);
}

async function showTokens(turn, column) {
  const tools = readTools(state.tools);
  const answer = state.turns[turn].answers[column];
  try {
    const body = { model: state.turns[turn].models[column], messages: messagesOf(column, turn, true), ...(tools.length ? { tools } : {}) };
    answer.told = answer.told ? null : await (await ask("page/tokens", body)).json();
    answer.notes = "";
  } catch (error) { answer.notes = error.message; }
  drawAnswer(turn, column);
}

// How many pictures may go with the next message: GLM-4V sees one, with the first.
function roomForPictures() {
  const each = state.models.filter((model) => state.columns.includes(model.name)).map((model) => model.images);
  const before = state.editing === null ? state.turns : state.turns.slice(0, state.editing);
  const most = Math.min(...each);
  if (!each.some((images) => images)) return 0;
  if (most <= 1) return before.length ? 0 : 1;
  return most - before.reduce((sum, turn) => sum + turn.pictures.length, 0);
}

function takePictures(files) {
  for (const file of files) takePicture(file);
}

function takePicture(file) {
  if (!file || !file.type.startsWith("image/")) return tell(t("this is no image"), "bad");
  if (file.size > LARGEST_PICTURE) return tell(t("the image is larger than 10 MB"), "bad");
  const reader = new FileReader();
  reader.onload = () => {
    state.pictures = [...state.pictures, reader.result].slice(-Math.max(1, roomForPictures()));
    drawComposer();
  };
  reader.readAsDataURL(file);
}
