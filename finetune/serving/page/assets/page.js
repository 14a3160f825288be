// The page's frame, its keys, and its start.
function field(name, more) {
  return h("label", {}, h("span", {}, name), h("input", { type: "number", inputMode: "decimal", id: `s-${name}`, value: state.sampling[name] ?? "", ...more,
    oninput: (event) => { state.sampling[name] = event.target.value; } }));
}

function settingsNode() {
  const system = h("textarea", { id: "system", rows: 3, value: state.system, oninput: (event) => { state.system = event.target.value; } });
  const tools = h("textarea", { id: "tools", rows: 6, value: state.tools, spellcheck: false, className: "mono", placeholder: '[{"type": "function", "function": {"name": …}}]',
    oninput: (event) => { state.tools = event.target.value; checkToolsSoon(); } });
  const hidden = h("input", { type: "checkbox", id: "hidden", checked: state.hidden, onchange: (event) => { state.hidden = event.target.checked; drawAll(); } });
  return h("div", { className: "settings-grid" },
    h("label", { className: "full" }, h("span", {}, t("System prompt")), system),
    h("label", { className: "full" }, h("span", {}, t("Tools as JSON")), tools, h("small", { id: "tools-told", role: "status" })),
    h("div", { className: "sampling", role: "group", ariaLabel: t("Sampling") }, Object.entries(SAMPLING).map(([name, more]) => field(name, more))),
    setup.needs_key && h("form", { onsubmit: (event) => { event.preventDefault(); openModels(); } }, h("label", {}, h("span", {}, t("API key")),
      h("input", { type: "password", id: "key", autocomplete: "off", value: state.key, onchange: (event) => { state.key = event.target.value; openModels(); } }))),
    h("label", { className: "check" }, hidden, h("span", {}, t("Hide the models' names until the vote"))));
}

let waiting;
function checkToolsSoon() {
  clearTimeout(waiting);
  waiting = setTimeout(checkTools, 350);
}

async function checkTools() {
  const told = byId("tools-told");
  try {
    const tools = readTools(state.tools);
    told.className = "";
    told.textContent = "";
    if (!tools.length || !state.columns.length) return;
    const found = await (await ask("tokenize", { model: state.columns[0], messages: [{ role: "user", content: "?" }], tools })).json();
    told.className = "good";
    told.textContent = `${toolNames(tools).join(", ")}: ${count(found.count)}`;
  } catch (error) {
    told.className = "bad";
    told.textContent = error.message;
  }
}

async function openModels() {
  if (setup.needs_key && !state.key) {
    byId("settings").open = true;
    return tell(t("this server wants its API key"), "bad");
  }
  try {
    const found = await (await ask("v1/models")).json();
    state.models = found.data.map((model) => ({ name: model.id, images: model.max_images }));
    const names = state.models.map((model) => model.name);
    state.columns = state.columns.filter((name) => names.includes(name));
    if (!state.columns.length) state.columns = names.slice(0, 2);
    tell("");
  } catch (error) {
    tell(error instanceof TypeError ? t("the server cannot be reached") : error.message, "bad");
  }
  drawModels();
  drawComposer();
}

function drawFrame() {
  document.documentElement.lang = state.language;
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  byId("draft").placeholder = t("Write to the models, Enter sends");
  byId("draft").ariaLabel = t("Your message");
  byId("language").textContent = state.language === "zh" ? "English" : "中文";
  byId("settings-body").replaceChildren(settingsNode());
  checkTools();
  drawAll();
}

const typing = (event) => ["TEXTAREA", "INPUT", "SELECT"].includes(event.target.tagName);

document.addEventListener("keydown", (event) => {
  if (event.isComposing || event.altKey) return;
  const last = state.turns.length - 1;
  if (event.key === "Escape") {
    if (writing().length) stopAll();
    else if (state.editing !== null) { Object.assign(state, { editing: null, draft: "", pictures: [] }); drawComposer(); }
  } else if (typing(event) || event.ctrlKey || event.metaKey || event.target.tagName === "BUTTON") return;
  else if (event.key === "/") { event.preventDefault(); byId("draft").focus(); }
  else if (last >= 0 && voteNode(last) && state.turns[last].vote === null) {
    const place = "123456789".indexOf(event.key);
    if (event.key === "0") vote(last, null);
    else if (place >= 0 && place < state.turns[last].order.length) vote(last, place);
  }
});

function begin() {
  byId("send").addEventListener("click", () => (writing().length ? stopAll() : send()));
  byId("draft").addEventListener("input", (event) => { state.draft = event.target.value; });
  byId("draft").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    else if (event.key === "ArrowUp" && !state.draft && state.turns.length && !writing().length) { event.preventDefault(); edit(state.turns.length - 1); }
  });
  byId("language").addEventListener("click", () => { state.language = state.language === "zh" ? "en" : "zh"; drawFrame(); });
  byId("new").addEventListener("click", () => { stopAll(); Object.assign(state, { turns: [], editing: null }); tell(""); drawAll(); byId("draft").focus(); });
  byId("image").addEventListener("change", (event) => { takePictures(event.target.files); event.target.value = ""; });
  document.addEventListener("paste", (event) => {
    const images = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
    if (images.length) { event.preventDefault(); takePictures(images); }
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault(); // a dropped page would replace this one
    if (event.dataTransfer.files.length) takePictures(event.dataTransfer.files);
  });
  drawFrame();
  openModels();
}
begin();
