"use strict";
// Elements, words, and what the server is asked.
const setup = JSON.parse(document.getElementById("setup").textContent);
const state = {
  language: setup.language ?? (navigator.language.startsWith("zh") ? "zh" : "en"),
  models: [], // { name, images: how many of a dialogue }
  columns: [], // names of the models side by side
  system: setup.system, tools: "", sampling: { ...setup.sampling }, hidden: false,
  key: "", // lives here only
  turns: [], // { text, pictures, order, answers, vote }
  draft: "", pictures: [], editing: null,
};
const byId = (id) => document.getElementById(id);
const t = (text) => (state.language === "zh" ? setup.words[text] ?? text : text);

const count = (number) => t("{} tokens").replace("{}", number);

function h(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.flat(4).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

const button = (text, onclick, more = {}) => h("button", { type: "button", onclick, ...more }, text);

function copying(text) {
  return button(t("Copy"), async (event) => {
    await navigator.clipboard.writeText(text());
    event.target.textContent = t("Copied");
    setTimeout(() => { event.target.textContent = t("Copy"); }, 1200);
  }, { className: "small" });
}

function tell(text, kind = "") {
  const line = byId("told");
  line.textContent = text;
  line.className = kind;
}

// The server's answer; an Error with its own words otherwise.
async function ask(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  const asked = body === undefined ? { method: "GET" } : { method: "POST", body: JSON.stringify(body) };
  const answer = await fetch(path, { ...asked, headers, signal, credentials: "omit", cache: "no-store", redirect: "error" });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Error(said.error?.message ?? `${answer.status} ${answer.statusText}`);
}

// The events of a reply as they come.
async function* events(body, signal) {
  const answer = await ask("v1/chat/completions", body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = "", over = false; !over; ) {
    const { value, done } = await reader.read();
    const parts = (held + (value ?? "")).split("\n\n");
    held = parts.pop();
    over = done;
    for (const data of parts.map((part) => part.replace(/^data: /, ""))) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
  throw new Error(t("the connection ended before the reply did"));
}
