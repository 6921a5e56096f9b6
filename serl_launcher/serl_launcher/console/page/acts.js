// Everything a person may ask of the run, one line each; the gateway decides and answers. docs/operating.md.

import { $, h, say } from "./dom.js";

const asks = (text) => () => window.confirm(text);

const verdict = (word, label, title, more = {}) => ({ where: "episode", request: "verdict", label, title, ...more,
  payload: (row) => ({ episode_id: row.id, word }) });

/** The value that was typed: a number, true, null …, or the text itself. */
function typed(text) {
  try { return JSON.parse(text); } catch { return text; }
}

/**
 * where: run, actor, episode, form. show(subject): is it of use now? payload(subject): what goes along; ask(): the
 * person's second word. The subject is the status document; an actor's part of it; a row of the ledger. A form has
 * fields {name: placeholder} and makes its payload of their texts.
 */
export const ACTS = [
  { where: "run", request: "pause", label: "Pause", title: "every actor waits between episodes", show: (s) => !s.operator?.paused },
  { where: "run", request: "resume", label: "Resume", title: "every actor goes on", strong: true, show: (s) => s.operator?.paused },
  { where: "run", request: "training_pause", label: "Pause training", title: "the trainer takes no step, actors go on", show: (s) => !s.operator?.training_paused },
  { where: "run", request: "training_resume", label: "Resume training", strong: true, show: (s) => s.operator?.training_paused },
  { where: "run", request: "publish", label: "Publish", title: "the trainer publishes its parameters now" },
  { where: "run", request: "serve", label: "Serve the newest", title: "no version is pinned any more", payload: () => ({ version: null }),
    show: (s) => Number.isInteger(s.operator?.served) },
  { where: "run", request: "end_stage", label: "End stage", payload: (s) => ({ stage: s.stage.name }), show: (s) => s.stage?.name && !s.done,
    ask: asks("End the current stage now?") },
  { where: "run", request: "stop", label: "Stop", title: "the run ends as if its schedule were done", grave: true,
    ask: asks("End this run as if its schedule were done?"), show: (s) => !s.done },
  { where: "actor", request: "pause", label: "Pause", title: "this actor waits between episodes", payload: ({ actor }) => ({ actor }),
    show: ({ actor, operator }) => !operator?.paused && !operator?.paused_actors?.[actor] },
  { where: "actor", request: "resume", label: "Resume", strong: true, payload: ({ actor }) => ({ actor }),
    show: ({ actor, operator }) => !operator?.paused && operator?.paused_actors?.[actor] },
  verdict("accept", "Imitate", "in place of the rule's word", { show: (row) => row.mode !== "eval" }),
  verdict("reject", "Do not imitate", "in place of the rule's word", { show: (row) => row.mode !== "eval" }),
  verdict("success", "Success", "as if the key had been pressed at its last tick"),
  verdict("failure", "Failure", "as if the key had been pressed at its last tick"),
  verdict("discard", "Throw away", "nothing learns from it", { grave: true, show: (row) => row.mode !== "eval" }),
  verdict("clear", "Take back", "all that was said of it", { show: (row) => row.word }),
  { where: "form", request: "serve", label: "Serve this version", title: "every actor is driven by it until the newest is served again",
    fields: { version: "version, such as 12" }, payload: ({ version }) => ({ version: typed(version) }) },
];

export const person = () => $("person").value.trim();

/** The person's name, or the place to type it gets the focus. */
export function named() {
  if (person()) return true;
  say("Type your name first: the ledger says who it was.", true);
  $("person").focus();
  return false;
}

/** Ask the gateway; says what came of it. */
export async function act(entry, payload) {
  if (!named() || (entry.ask && !entry.ask())) return;
  const what = `${entry.label}${payload.episode_id ? ` ${payload.episode_id}` : ""}`;
  say(`${what} …`);
  try {
    const id = [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    const body = JSON.stringify({ request: entry.request, payload: { ...payload, id }, person: person() });
    const answer = await fetch("/act", { method: "POST", body, headers: { "Content-Type": "application/json" } });
    const told = answer.headers.get("Content-Type")?.startsWith("application/json") ? await answer.json() : { error: await answer.text() };
    say(answer.ok ? `${what}: done` : `${what} was refused: ${told.error}`, !answer.ok);
  } catch (error) {
    say(`${what} did not reach the console: ${error.message}`, true);
  }
}

/** The forms: a line of fields and a button each. */
export function forms() {
  return ACTS.filter((entry) => entry.where === "form").map((entry) => {
    const fields = Object.entries(entry.fields).map(([name, placeholder]) => h("input", { name, placeholder, required: true, ariaLabel: placeholder, autocomplete: "off" }));
    const form = h("form", { className: "acts", title: entry.title }, ...fields, h("button", {}, entry.label));
    form.onsubmit = (event) => {
      event.preventDefault();
      act(entry, entry.payload(Object.fromEntries(fields.map((field) => [field.name, field.value.trim()]))));
    };
    return form;
  });
}

/** The buttons of one place. subject: what `show` looks at and `payload` is made from. */
export function buttons(where, subject) {
  return ACTS.filter((entry) => entry.where === where && (!entry.show || entry.show(subject))).map((entry) =>
    h("button", { type: "button", title: entry.title || "", className: entry.strong ? "strong" : entry.grave ? "grave" : "",
      onclick: () => { $("episode").close(); act(entry, entry.payload ? entry.payload(subject) : {}); } }, entry.label));
}
