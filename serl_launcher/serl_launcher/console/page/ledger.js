// The ledger: a row an episode, the newest first; filtered here, its video one click away.

import { buttons } from "./acts.js";
import { $, h, number, percent } from "./dom.js";

const PAGE = 60;
const rows = new Map(); // ordinal -> row
let shown = PAGE, opened = null; // rows; the episode that the dialog shows

const KINDS = {
  success: (r) => r.ok, failure: (r) => !r.ok && r.cut !== "discard", helped: (r) => r.mode !== "demo" && r.help > 0,
  accepted: (r) => imitated(r)[1], rejected: (r) => imitated(r)[0] && !imitated(r)[1], discarded: (r) => r.cut === "discard" || r.word?.use === "discard",
  eval: (r) => r.mode === "eval", video: (r) => r.video,
};

function outcome(row) {
  const word = row.word, said = word && word.success !== null;
  const label = said ? ` → ${word.success ? "success" : "failure"}, said ${word.by}` : "";
  const by = row.judge ? `, said ${row.judge}` : "";
  if (row.cut === "discard") return [`discarded${by}${label}`, "quiet"];
  if (row.ok) return [`success${by}${label}`, "good"];
  return [`${row.cut ? row.cut.replace("_", " ") : "failure"}${by}${label}`, "bad"];
}

/** Is it learned from, in a word, and why. A person's word comes before the rule's. */
function imitated(row) {
  const use = row.word?.use;
  if (use) return [`${{ accept: "yes", reject: "no", discard: "thrown away" }[use]}, said ${row.word.by}`, use === "accept"];
  if (row.accepted === null) return ["", false];
  return [row.accepted ? "yes" : `no${row.reason ? `: ${row.reason}` : ""}`, row.accepted];
}

/** What is said of the episode in the dialog, and may be said of it now. */
function tell(row) {
  $("episode-name").textContent = `episode ${row.n}`;
  $("episode-facts").textContent = [row.id, outcome(row)[0], imitated(row)[0] && `imitated: ${imitated(row)[0]}`, row.rule].filter(Boolean).join(" · ");
  $("episode-acts").replaceChildren(...buttons("episode", row));
}

function watch(row) {
  const video = $("episode").querySelector("video");
  $("episode-make").hidden = true;
  video.hidden = false;
  video.src = `/video/${encodeURIComponent(row.id)}`;
}

/** Its actor recorded none in this folder: the console makes one of the dataset's pictures. */
async function make(row) {
  const button = $("episode-make");
  [button.disabled, button.textContent] = [true, "making the video …"];
  try {
    const answer = await fetch(`/video/${encodeURIComponent(row.id)}`, { headers: { Range: "bytes=0-0" } });
    if (!answer.ok) button.textContent = await answer.text();
    else if (opened === row.n) watch(row);
  } catch (error) {
    button.textContent = `the console does not answer: ${error.message}`;
  }
  button.disabled = false;
}

function open(row) {
  const dialog = $("episode"), video = dialog.querySelector("video");
  opened = row.n;
  $("episode-make").textContent = "Make a video of the dataset's pictures";
  tell(row);
  video.hidden = $("episode-make").hidden = true;
  if (row.video) watch(row);
  else {
    $("episode-make").hidden = false;
    $("episode-make").onclick = () => make(row);
  }
  dialog.onclose = () => { opened = null; video.removeAttribute("src"); video.load(); };
  dialog.showModal();
}

function line(row) {
  const [result, style] = outcome(row);
  const [use, used] = imitated(row);
  const cell = (name, text, props = {}) => h("td", { ...props, data: { name } }, text);
  return h("tr", { title: row.rule ? `${row.id}\n${row.rule}` : row.id },
    cell("#", String(row.n)), cell("", new Date(1000 * row.time).toLocaleTimeString([], { hour12: false })), cell("", row.actor || ""),
    cell("", row.stage || row.mode), cell("", result, { className: style }), cell("return", number(row.ret, 1)), cell("ticks", String(row.ticks)),
    cell("help", row.ticks ? [percent(row.help / row.ticks), row.drivers.join(", ")].filter(Boolean).join(" ") : "–"), cell("policy", row.version >= 0 ? `v${row.version}` : "–"),
    use ? cell("imitated", use, { className: used ? "good" : "quiet" }) : h("td"),
    h("td", {}, h("button", { type: "button", ariaLabel: `${row.video ? "watch and " : ""}judge episode ${row.n}`, onclick: () => open(row) }, row.video ? "▶ judge" : "judge")));
}

function show() {
  const kind = KINDS[$("filter-kind").value] || (() => true), text = $("filter-text").value.trim().toLowerCase();
  const fits = (row) => kind(row) && (!text || `${row.id} ${row.actor} ${row.stage} ${row.reason} ${row.drivers.join(" ")} ${row.judge || ""} ${row.word?.by || ""}`.toLowerCase().includes(text));
  const found = [...rows.values()].filter(fits).sort((a, b) => b.n - a.n);
  $("count").textContent = `${found.length} of ${rows.size}`;
  $("rows").replaceChildren(...found.slice(0, shown).map(line));
  $("more").hidden = found.length <= shown;
}

/** Rows that are new or have changed. */
export function showRows(news) {
  for (const row of news) {
    rows.set(row.n, row);
    if (row.n === opened) tell(row);
  }
  if (!$("rows").contains(document.activeElement)) show(); // a button that has the focus stays where it is
}

$("filter-kind").onchange = $("filter-text").oninput = () => { shown = PAGE; show(); };
$("more").onclick = () => { shown += PAGE; show(); };
$("rows").addEventListener("focusout", () => setTimeout(() => { if (!$("rows").contains(document.activeElement)) show(); }));
