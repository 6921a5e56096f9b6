// Everything a person may ask of the run, one line each; the gateway decides and answers. docs/contracts/requests.md.

import { $, h, say } from "./dom.js";

const asks = (text) => () => window.confirm(text);

/** where: run. show(status): is it of use now? payload(): what goes along; ask(): the person's second word. */
export const ACTS = [
  { where: "run", request: "pause", label: "Pause", title: "actors wait between episodes", show: (s) => !s.operator?.paused },
  { where: "run", request: "resume", label: "Resume", title: "actors go on", strong: true, show: (s) => s.operator?.paused },
  { where: "run", request: "publish", label: "Publish", title: "the trainer publishes its parameters now" },
  { where: "run", request: "stop", label: "Stop", title: "the run ends as if its schedule were done", grave: true,
    ask: asks("End this run as if its schedule were done?"), show: (s) => !s.done },
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
    const body = JSON.stringify({ request: entry.request, payload, person: person() });
    const answer = await fetch("/act", { method: "POST", body, headers: { "Content-Type": "application/json" } });
    const told = answer.headers.get("Content-Type")?.startsWith("application/json") ? await answer.json() : { error: await answer.text() };
    say(answer.ok ? `${what}: done` : `${what} was refused: ${told.error}`, !answer.ok);
  } catch (error) {
    say(`${what} did not reach the console: ${error.message}`, true);
  }
}

/** The buttons of one place. subject: what `show` looks at and `payload` is made from. */
export function buttons(where, subject) {
  return ACTS.filter((entry) => entry.where === where && (!entry.show || entry.show(subject))).map((entry) =>
    h("button", { type: "button", title: entry.title || "", className: entry.strong ? "strong" : entry.grave ? "grave" : "",
      onclick: () => act(entry, entry.payload ? entry.payload(subject) : {}) }, entry.label));
}
