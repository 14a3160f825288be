// A reply -> elements. HTML in it is text, and what the libraries make of the rest is cleaned before it is shown.
const SIGNS = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escaped = (text) => String(text).replace(/[&<>"']/g, (sign) => SIGNS[sign]);
const LONGEST_MARKDOWN = 200_000; // characters; more is shown as it is
const LONGEST_COLOURED = 20_000; // characters of code; it is read again with every token

function coloured(code, lang) {
  const language = (lang || "").trim().split(/[\s,{]/)[0];
  if (code.length > LONGEST_COLOURED || !hljs.getLanguage(language)) return escaped(code);
  return hljs.highlight(code, { language, ignoreIllegals: true }).value;
}

function formula(source, displayMode) {
  const made = katex.renderToString(source, {
    displayMode, output: "mathml", throwOnError: false, trust: false, strict: "ignore", maxSize: 20, maxExpand: 200,
  });
  // Without the source, which is there for programs that copy, and without styles, which the page's policy refuses.
  return made.replace(/<annotation [^>]*>[^<]*<\/annotation>/, "").replace(/ style="[^"]*"/g, "");
}

const BLOCKS = [/^\$\$([\s\S]+?)\$\$(?=\s|$)/, /^\\\[([\s\S]+?)\\\](?=\s|$)/];
const INLINE = [/^\$\$([^$]+)\$\$/, /^\\\(([\s\S]+?)\\\)/, /^\\\[([\s\S]+?)\\\]/, /^\$(?!\s)((?:[^$\\\n]|\\.)+?)(?<!\s)\$(?!\d)/];

const formulas = (name, level, start, patterns, wide) => ({
  name, level,
  start: (text) => text.match(start)?.index,
  tokenizer(text) {
    const found = patterns.map((pattern) => pattern.exec(text)).find(Boolean);
    return found && { type: name, raw: found[0], source: found[1].trim() };
  },
  renderer: (token) => formula(token.source, wide),
});

marked.use({
  breaks: true,
  extensions: [
    formulas("blockFormula", "block", /\$\$|\\\[/, BLOCKS, true),
    formulas("inlineFormula", "inline", /\$|\\[([]/, INLINE, false),
  ],
  tokenizer: { html() {}, tag() {} }, // none of it is HTML
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`, // nothing is fetched
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    code: ({ text, lang }) => `<pre data-lang="${escaped((lang || "").slice(0, 30))}"><code>${coloured(text, lang)}</code></pre>`,
  },
});

const CLEAN = {
  RETURN_DOM_FRAGMENT: true,
  USE_PROFILES: { html: true, mathMl: true },
  FORBID_TAGS: ["style", "form", "input", "textarea", "select", "button", "img", "picture", "video", "audio", "dialog"],
  FORBID_ATTR: ["style", "id", "name", "autofocus", "contenteditable", "popover", "popovertarget"],
  ALLOWED_URI_REGEXP: /^(?:(?:https?|mailto):|[^a-z]|[a-z+.-]+(?:[^a-z+.:-]|$))/i,
};
DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName !== "A") return;
  if (!/^(https?:\/\/|mailto:)/i.test(node.getAttribute("href") ?? "")) node.removeAttribute("href");
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

function markdown(text) {
  const shown = h("div", { className: "said" });
  if (text.length > LONGEST_MARKDOWN) {
    shown.classList.add("plain");
    shown.textContent = text;
    return shown;
  }
  shown.append(DOMPurify.sanitize(marked.parse(text), CLEAN));
  for (const code of shown.querySelectorAll("pre")) {
    const head = h("div", { className: "code-head" }, h("span", {}, code.dataset.lang || t("Code")), copying(() => code.textContent));
    code.tabIndex = 0;
    code.replaceWith(h("div", { className: "code" }, head, code.cloneNode(true)));
  }
  for (const table of shown.querySelectorAll("table")) {
    const wide = h("div", { className: "wide", tabIndex: 0 });
    table.replaceWith(wide);
    wide.append(table);
  }
  return shown;
}

// The thought of a reply and what it says; `open` while the thought goes on.
function thoughtOf(text) {
  const begun = /^\s*<think>/.test(text);
  const end = text.indexOf("</think>");
  if (!begun && end < 0) return { thought: "", said: text, open: false };
  const start = begun ? text.indexOf("<think>") + 7 : 0;
  if (end < 0) return { thought: text.slice(start), said: "", open: true };
  return { thought: text.slice(start, end).trim(), said: text.slice(end + 8).trimStart(), open: false };
}
