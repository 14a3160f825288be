"use strict";
// What a reply has that its reference has not, and the other way round, word by word.

const LARGEST_TABLE = 2000000; // cells; longer pairs are shown unmarked
const LEAST_COMMON = 0.2; // below this share of common words marks would only be noise

// Words, numbers, single Chinese characters, spaces and signs: joined they give the text again.
function wordsOf(text) {
  return text.match(/\p{Script=Han}|[\p{L}\p{N}\p{M}]+|\s+|[^]/gu) || [];
}

// Runs of [kind, text]: "same", "extra" (only in the reply), "missing" (only in the reference);
// null when they are too long or too unlike for marks to help.
function differences(reference, reply) {
  const one = wordsOf(reference), other = wordsOf(reply);
  let start = 0, oneEnd = one.length, otherEnd = other.length;
  while (start < oneEnd && start < otherEnd && one[start] === other[start]) start++;
  while (oneEnd > start && otherEnd > start && one[oneEnd - 1] === other[otherEnd - 1]) { oneEnd--; otherEnd--; }
  const rows = oneEnd - start, columns = otherEnd - start, width = columns + 1;
  if (rows * columns > LARGEST_TABLE) return null;
  // table[i * width + j]: longest common subsequence of what follows i and j.
  const table = new Uint16Array((rows + 1) * width);
  for (let i = rows - 1; i >= 0; i--)
    for (let j = columns - 1; j >= 0; j--)
      table[i * width + j] = one[start + i] === other[start + j]
        ? table[(i + 1) * width + j + 1] + 1
        : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
  const runs = [];
  const add = (kind, text) => {
    const last = runs[runs.length - 1];
    if (last && last[0] === kind) last[1] += text; else if (text) runs.push([kind, text]);
  };
  add("same", one.slice(0, start).join(""));
  let i = 0, j = 0;
  while (i < rows || j < columns) {
    if (i < rows && j < columns && one[start + i] === other[start + j]) { add("same", one[start + i]); i++; j++; }
    else if (j >= columns || (i < rows && table[(i + 1) * width + j] >= table[i * width + j + 1])) { add("missing", one[start + i]); i++; }
    else { add("extra", other[start + j]); j++; }
  }
  add("same", one.slice(oneEnd).join(""));
  return alike(runs) < LEAST_COMMON ? null : joined(runs);
}

// Share of the longer text that stands in both, white space aside.
function alike(runs) {
  const letters = { same: 0, extra: 0, missing: 0 };
  for (const [kind, text] of runs) letters[kind] += text.replace(/\s+/g, "").length;
  return letters.same / Math.max(letters.same + Math.max(letters.extra, letters.missing), 1);
}

// Changes with nothing but space between them become one: what is missing, then what is extra.
function joined(runs) {
  const found = [];
  let missing = "", extra = "", space = "";
  const flush = () => {
    if (missing.trim()) found.push(["missing", missing]);
    if (extra) found.push([extra.trim() ? "extra" : "same", extra]);
    if (space) found.push(["same", space]);
    missing = extra = space = "";
  };
  for (const [kind, text] of runs) {
    if (kind === "same" && !text.trim() && (missing || extra)) { space += text; continue; }
    if (kind === "same") { flush(); found.push([kind, text]); continue; }
    missing += space;
    extra += space;
    space = "";
    if (kind === "missing") missing += text; else extra += text;
  }
  flush();
  return found;
}
