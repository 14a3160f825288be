"use strict";
// Panels come from this page's own server as HTML that is escaped there.
const every = Number(document.body.dataset.every);
async function renew() {
  const when = document.getElementById("when");
  try {
    const answer = await fetch("panels");
    document.getElementById("panels").innerHTML = await answer.text();
    when.className = "";
    when.textContent = "renewed " + new Date().toLocaleTimeString();
  } catch {
    when.className = "stale";
    when.textContent = "the board has ended; what is shown may be old";
  }
}
if (every > 0) setInterval(renew, 1000 * every);
