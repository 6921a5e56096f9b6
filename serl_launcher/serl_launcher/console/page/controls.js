// What may be changed of the running training: a line a key with its value of now, what it may be, and Set.

import { act } from "./acts.js";
import { $, h } from "./dom.js";

const GROUPS = [["algo.", "What is imitated"], ["trainer.", "Training"], ["schedule.stages.", "Lengths of stages"], ["rollout.", "Robots"]];
const lines = new Map(); // key -> its line
const groups = new Map(); // prefix -> elements

function groupOf(key) {
  const [prefix, title] = GROUPS.find(([start]) => key.startsWith(start)) || ["", "More"];
  if (!groups.has(prefix)) {
    const changed = h("span", { className: "quiet" });
    const root = h("details", {}, h("summary", {}, `${title} `, changed));
    groups.set(prefix, { prefix, root, changed });
    $("controls").append(root);
  }
  return groups.get(prefix);
}

/** A value as the input has it: nothing for null, JSON for what is no plain value. */
const text = (value) => (value === null ? "" : typeof value === "object" ? JSON.stringify(value) : String(value));

/** What was typed, as the gateway takes it. */
function typed(row, input) {
  if (input.value === "" && row.null) return null;
  if (row.kind === "flag") return input.value === "true";
  if (row.kind === "number" || row.kind === "whole") return Number(input.value);
  try { return JSON.parse(input.value); } catch { return input.value; }
}

/** `0 to 1 of success; empty: never`: what it may be. */
function range({ low, high, unit, null: meaning }) {
  const ends = low === undefined ? "" : high >= 1e6 ? (low > -1e6 ? `${low} or more` : "") : `${low} to ${high}`;
  return [[ends, unit].filter(Boolean).join(" "), meaning && `empty: ${meaning}`].filter(Boolean).join("; ");
}

function inputOf(row, name) {
  const props = { name: row.key, ariaLabel: `${row.key}, ${range(row)}`, autocomplete: "off" };
  if (row.kind === "flag") return h("select", props, h("option", { value: "true" }, "yes"), h("option", { value: "false" }, "no"));
  if (row.kind === "text") return h("input", { ...props, required: true });
  const ends = row.low === undefined ? {} : { min: row.low, max: row.high };
  return h("input", { ...props, type: "number", step: row.kind === "whole" ? "1" : "any", ...ends, required: !row.null, placeholder: row.null || name });
}

function lineOf(row) {
  if (lines.has(row.key)) return lines.get(row.key);
  const group = groupOf(row.key), name = row.key.slice(group.prefix.length);
  const line = { group, shown: null, input: inputOf(row, name), note: h("small", { className: "quiet" }), button: h("button", { disabled: true }, "Set") };
  line.root = h("form", { className: "control", title: row.key }, h("label", {}, h("span", {}, name), line.note, line.input), line.button);
  line.input.oninput = () => { line.button.disabled = line.input.value === line.shown; };
  line.root.onsubmit = (event) => {
    event.preventDefault();
    act({ request: "set", label: `${row.key} = ${line.input.value || line.row.null}` }, { key: row.key, value: typed(line.row, line.input) });
  };
  lines.set(row.key, line);
  group.root.append(line.root);
  return line;
}

/** After a change of one of them; what a person is typing stays. */
export function showControls(rows) {
  const known = new Set(rows.map((row) => row.key));
  for (const [key, line] of lines) if (!known.has(key)) { line.root.remove(); lines.delete(key); }
  const counts = new Map();
  for (const row of rows) {
    const line = lineOf(row), now = text(row.value);
    if (line.shown === null || line.input.value === line.shown) line.input.value = now;
    [line.row, line.shown] = [row, now];
    line.button.disabled = line.input.value === now;
    line.note.textContent = [range(row), row.by && `set by ${row.by}; the config says ${text(row.was) || row.null}`].filter(Boolean).join(" · ");
    if (row.by) counts.set(line.group, (counts.get(line.group) || 0) + 1);
  }
  for (const group of groups.values()) {
    group.changed.textContent = counts.has(group) ? `${counts.get(group)} changed` : "";
    group.root.hidden = ![...lines.values()].some((line) => line.group === group);
  }
}
