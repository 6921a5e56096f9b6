// The ledger: a row an episode, the newest first; filtered here, its video one click away.

import { buttons } from "./acts.js";
import { $, h, number, percent } from "./dom.js";

const PAGE = 60;
const rows = new Map(); // ordinal -> row
let shown = PAGE;

const KINDS = {
  success: (r) => r.ok, failure: (r) => !r.ok && r.cut !== "discard", helped: (r) => r.mode !== "demo" && r.help > 0,
  accepted: (r) => r.accepted === true, rejected: (r) => r.accepted === false, discarded: (r) => r.cut === "discard",
  eval: (r) => r.mode === "eval", video: (r) => r.video,
};

function outcome(row) {
  const label = row.label && row.label.success !== undefined ? ` → ${row.label.success ? "success" : "failure"} (${row.label.by})` : "";
  if (row.cut === "discard") return [`discarded${label}`, "quiet"];
  if (row.ok) return [`success${label}`, "good"];
  return [`${row.cut ? row.cut.replace("_", " ") : "failure"}${label}`, "bad"];
}

function play(row) {
  const dialog = $("video"), video = dialog.querySelector("video");
  $("video-name").textContent = `${row.id}: ${outcome(row)[0]}`;
  video.src = `/video/${encodeURIComponent(row.id)}`;
  dialog.onclose = () => { video.removeAttribute("src"); video.load(); };
  dialog.showModal();
}

function line(row) {
  const [result, style] = outcome(row);
  const imitated = row.accepted === null ? "" : row.accepted ? "yes" : "no";
  const cell = (name, text, props = {}) => h("td", { ...props, data: { name } }, text);
  return h("tr", { title: row.rule ? `${row.id}\n${row.rule}` : row.id },
    cell("#", String(row.n)), cell("", new Date(1000 * row.time).toLocaleTimeString([], { hour12: false })), cell("", row.actor || ""),
    cell("", row.stage || row.mode), cell("", result, { className: style }), cell("return", number(row.ret, 1)), cell("ticks", String(row.ticks)),
    cell("help", row.ticks ? percent(row.help / row.ticks) : "–"), cell("policy", row.version >= 0 ? `v${row.version}` : "–"),
    imitated ? cell("imitated", row.accepted || !row.reason ? imitated : `${imitated}: ${row.reason}`, { className: row.accepted ? "good" : "quiet" }) : h("td"),
    row.video ? h("td", {}, h("button", { type: "button", ariaLabel: `video of episode ${row.n}`, onclick: () => play(row) }, "▶")) : h("td"),
    h("td", {}, ...actsOf(row)));
}

function actsOf(row) {
  const all = buttons("episode", row);
  return all.length ? [h("span", { className: "acts" }, ...all)] : [];
}

function show() {
  const kind = KINDS[$("filter-kind").value] || (() => true), text = $("filter-text").value.trim().toLowerCase();
  const fits = (row) => kind(row) && (!text || `${row.id} ${row.actor} ${row.stage} ${row.reason}`.toLowerCase().includes(text));
  const found = [...rows.values()].filter(fits).sort((a, b) => b.n - a.n);
  $("count").textContent = `${found.length} of ${rows.size}`;
  $("rows").replaceChildren(...found.slice(0, shown).map(line));
  $("more").hidden = found.length <= shown;
}

/** Rows that are new or have changed. */
export function showRows(news) {
  for (const row of news) rows.set(row.n, row);
  if (!$("rows").contains(document.activeElement)) show(); // a button that has the focus stays where it is
}

$("filter-kind").onchange = $("filter-text").oninput = () => { shown = PAGE; show(); };
$("more").onclick = () => { shown += PAGE; show(); };
$("rows").addEventListener("focusout", () => setTimeout(() => { if (!$("rows").contains(document.activeElement)) show(); }));
