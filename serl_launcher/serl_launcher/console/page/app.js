// The page: one websocket, what comes in goes to the part that shows it. Nothing is asked for twice.

import { showActors, showLive } from "./actors.js";
import { buttons, forms } from "./acts.js";
import { draw } from "./charts.js";
import { showControls } from "./controls.js";
import { $, age, h, list, number, percent } from "./dom.js";
import { drive } from "./drive.js";
import { showRows } from "./ledger.js";

const state = { status: {}, metrics: {}, alarms: [], live: {}, hands: {}, connected: false };

function showRun() {
  const s = state.status, stage = s.stage || {}, trouble = state.alarms.filter((alarm) => !alarm.asks).length;
  document.title = `${trouble ? `⚠ ${trouble} · ` : ""}${s.run || "FlowSERL"} console`;
  $("run").textContent = s.run || "console";
  const goals = [["steps", stage.steps, stage.steps_goal], ["episodes", stage.episodes, stage.episodes_goal]].filter(([, , goal]) => goal);
  const [unit, done, goal] = goals.sort((a, b) => (a[1] || 0) / a[2] - (b[1] || 0) / b[2])[0] || [];
  const said = s.done ? "every stage is done" : stage.name ? `stage ${stage.index + 1} ${stage.name} (${stage.mode})` : "idle";
  const o = s.operator || {}, paused = [
    o.paused && `PAUSED by ${o.paused_by}: actors wait between episodes`, o.training_paused && `TRAINING PAUSED by ${o.training_paused}`,
    Number.isInteger(o.served) && `version ${o.served} is pinned`,
  ].filter(Boolean).map((text) => ` · ${text}`).join("");
  $("stage").textContent = `${said}${goal ? ` · ${done || 0}/${goal} ${unit}` : ""}${paused}`;
  $("progress").hidden = !goal || s.done;
  if (goal) $("progress").value = Math.min(1, (done || 0) / goal);
  $("acts").replaceChildren(...buttons("run", s));
}

function showAlarms() {
  const all = state.connected ? state.alarms : [{ who: "console", text: "does not answer: what you see is old" }, ...state.alarms];
  $("alarms").hidden = !all.length;
  $("alarms").className = all.every((alarm) => alarm.asks) ? "asks" : "";
  $("alarms").replaceChildren(...all.map(({ who, text, asks }) => h("p", { className: asks ? "asks" : "" }, h("strong", {}, `⚠ ${who} `), text)));
}

function showFigures() {
  const s = state.status, trainer = s.trainer || {}, counts = s.counts || {}, rates = s.rates || {}, serving = s.serving || {};
  const m = { ...trainer.metrics, ...state.metrics };
  const evaluations = Object.entries(s.eval || {}).filter(([, e]) => e.episodes)
    .map(([name, e]) => [`evaluation ${name}`, `${percent(e.successes / e.episodes)} of ${e.episodes}, v${e.version}`]);
  list($("policy"), "Policy", [
    ["version trained", `v${trainer.version ?? "–"}, step ${trainer.step ?? "–"}`],
    ["version served", serving.alive ? `v${serving.version ?? "–"}` : "nobody serves"],
    ...Object.entries(s.actors || {}).map(([name, a]) => [`on ${name}`, a.policy_version < 0 ? "none yet" : `v${a.policy_version}${a.version_age_s == null ? "" : `, ${age(a.version_age_s)} old`}`]),
    ["success without help", rates.success_rate == null ? "–" : `${percent(rates.success_rate)} [${percent(rates.success_low)}, ${percent(rates.success_high)}]`],
    ["helped episodes", percent(rates.intervention_rate)],
    ...evaluations,
  ]);
  list($("replay"), "Data", [
    ["demonstrations", counts.demos ?? "–"], ["online episodes", counts.online ?? "–"], ["evaluations", counts.eval ?? "–"],
    ["transitions", `${counts.transitions ?? "–"} (${number(rates.transitions_per_s, 1)}/s)`],
    ["driven by operators, ticks", counts.interventions ?? "–"],
    ...Object.entries(m).filter(([key]) => key.startsWith("replay/")).map(([key, v]) => [key.slice(7).replaceAll("_", " "), number(v, 0)]),
    ["in the dataset", `${s.exporter?.episodes ?? "–"} episodes${s.exporter?.quarantined ? `, ${s.exporter.quarantined} in quarantine` : ""}`],
  ]);
  const asked = Object.entries(state.live).filter(([, v]) => typeof v.infer_ms === "number");
  list($("latency"), "Latency of an action", [
    ["policy server, median", `${number(serving.p50_ms, 1)} ms`], ["99th percentile", `${number(serving.p99_ms, 1)} ms`],
    ["waiting there", serving.waiting ?? "–"], ["answered together", number(serving.batch_mean, 1)],
    ...asked.map(([name, v]) => [`${name}: asked to answered`, `${number(v.infer_ms, 1)} ms`]),
    ...asked.filter(() => typeof serving.p50_ms === "number").map(([name, v]) => [`${name}: wire and gateway`, `${number(Math.max(0, v.infer_ms - serving.p50_ms), 1)} ms`]),
    ["optimizer step", typeof m["time/step_s"] === "number" ? `${number(1e3 * m["time/step_s"], 0)} ms` : "–"],
  ]);
}

function showCurves(curves) {
  draw($("chart-success"), [{ name: "", points: curves.success }], { low: 0, high: 1, x: "episode" });
  draw($("chart-help"), [{ name: "help", points: curves.help }, { name: "return", points: curves.return }], { low: 0, x: "episode" });
}

function showLosses(losses) {
  const lines = Object.entries(losses).slice(0, 4).map(([key, points]) => ({ name: key.slice(7), points }));
  draw($("chart-losses"), lines, { x: "step" });
}

function showActs(acts) {
  const line = ({ n, time, by, text }) => h("li", { value: n }, `${new Date(time).toLocaleTimeString([], { hour12: false })} `, h("strong", {}, by), ` ${text}`);
  $("done").replaceChildren(...(acts.length ? acts.map(line) : [h("li", { className: "quiet" }, "nothing yet")]));
}

function take(news) {
  if (news.beat) drive.beaten(news.beat);
  for (const key of ["status", "metrics", "alarms", "hands"]) if (news[key]) state[key] = news[key];
  Object.assign(state.live, news.live);
  for (const [name, seconds] of Object.entries(news.ages || {})) if (state.live[name]) state.live[name].age_s = seconds;
  if (news.status || news.alarms) { showRun(); showAlarms(); }
  if (news.status || news.metrics) showFigures();
  if (news.status || news.hands) showActors(state);
  if (news.ages) showLive(state);
  if (news.curves) showCurves(news.curves);
  if (news.losses) showLosses(news.losses);
  if (news.controls) showControls(news.controls);
  if (news.acts) showActs(news.acts);
  if (news.rows) showRows(news.rows);
}

function connect() {
  const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws`);
  socket.onopen = () => { state.connected = true; drive.socket = socket; showAlarms(); };
  socket.onmessage = (message) => take(JSON.parse(message.data));
  socket.onclose = () => {
    drive.letGo("the console is gone");
    state.connected = false;
    showAlarms();
    setTimeout(connect, 1000);
  };
}

history.replaceState(null, "", "/"); // the word of the address stays out of sight and of the history
$("person").value = localStorage.getItem("person") || "";
$("person").onchange = () => localStorage.setItem("person", $("person").value.trim());
showCurves({ success: [], help: [], return: [] });
showLosses({});
$("forms").replaceChildren(...forms());
connect();
