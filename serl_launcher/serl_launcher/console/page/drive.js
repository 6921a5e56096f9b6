// The page as an operator's device: what is pressed goes to one actor, 30 times a second, as long as a person is at it.
// Hidden tab, another window, Esc, a lost connection: let go. The actor lets go by itself when nothing comes any more.

import { named, person } from "./acts.js";
import { h } from "./dom.js";
import { axesOf, buttonsOf, padIn } from "./pad.js";

const PERIOD_MS = 33, TAP_MS = 250, SLOW_MS = 150, CROWDED = 4096;
const NAMES = { " ": "space", Enter: "enter", Backspace: "backspace" };

class Drive {
  socket = null;
  #panels = new Map(); // actor -> elements
  #actor = null; // that this page drives
  #timer = 0;

  /** The part of an actor's card from which it is driven. */
  panel(name) {
    const panel = { key: "" };
    panel.button = h("button", { type: "button", onclick: () => (this.#actor === name ? this.letGo("") : this.#take(name)) }, "Take the keys");
    panel.text = h("span", { className: "quiet" });
    panel.latency = h("span", { className: "latency" });
    panel.table = h("ul", { hidden: true });
    panel.root = h("div", { className: "hand", tabIndex: -1 }, h("div", { className: "line" }, panel.button, panel.latency, panel.text), panel.table);
    this.#panels.set(name, panel);
    return panel;
  }

  /** What the gateway says of this actor's keys: {person, table}, or nothing: it listens to no page. */
  show(name, hands) {
    const panel = this.#panels.get(name), mine = this.#actor === name, key = JSON.stringify([hands, mine]);
    if (panel.key === key) return;
    panel.key = key;
    panel.root.classList.toggle("held", mine);
    panel.button.hidden = !hands && !mine;
    panel.button.className = mine ? "" : "strong";
    panel.button.textContent = mine ? "Let go (Esc)" : "Take the keys";
    panel.button.disabled = !mine && Boolean(hands?.person);
    panel.table.hidden = !mine;
    panel.table.replaceChildren(...(hands?.table || []).map(keyLine));
    if (!mine) {
      panel.latency.textContent = "";
      panel.text.textContent = !hands ? "not to be driven from here: start this actor with operator=browser"
        : hands.person ? `${hands.person} drives it from a page` : panel.why || "for simulations and slow arms; it lets go when you leave this page";
    }
  }

  #take(name) {
    if (!named()) return;
    this.letGo("");
    this.#actor = name;
    this.#echo = 0;
    this.#held = new Map(); // place on the keyboard -> name
    this.#padHeld = new Set();
    this.#taps = [];
    this.#sent = new Map();
    this.#stale = null;
    this.#known(name).why = "";
    document.activeElement?.blur();
    this.#known(name).root.focus();
    this.#timer = setInterval(() => this.#send(), PERIOD_MS);
    this.#again(name);
    this.#send();
  }

  /** Let go now; why: for the person. */
  letGo(why) {
    const name = this.#actor;
    if (!name) return;
    clearInterval(this.#timer);
    this.#actor = null;
    if (this.socket?.readyState === WebSocket.OPEN) this.#tell(name, null);
    this.#known(name).why = why && `let go: ${why}`;
    this.#again(name);
  }

  /** The actor's newest beat came: what of ours has reached it, and how long that took. */
  beaten(beat) {
    const name = this.#actor;
    if (!name) return;
    if (beat.error) return this.letGo(beat.error);
    const panel = this.#known(name), sent = this.#sent.get(beat.seq);
    this.#echo = beat.beat;
    this.#taps = this.#taps.filter((tap) => tap.number > beat.tap || !beat.holds);
    if (beat.holds && sent !== undefined) {
      this.#latency = performance.now() - sent;
      for (const seq of this.#sent.keys()) if (seq <= beat.seq) this.#sent.delete(seq);
    }
    const late = this.#stale !== null && beat.stale > this.#stale;
    this.#stale = beat.stale;
    panel.latency.textContent = beat.holds ? `${Math.round(this.#latency)} ms to the robot and back` : "";
    panel.latency.classList.toggle("slow", this.#latency > SLOW_MS);
    panel.text.textContent = !beat.holds ? (late ? "too slow: the robot takes nothing that is this late" : "reaching the robot …")
      : beat.driving ? "you drive" : "the policy drives; press a key that moves, or take over";
  }

  #seq = 0; #echo = 0; #tap = 0; #latency = 0; #stale = null;
  #held = new Map(); #padHeld = new Set(); #taps = []; #sent = new Map();

  // seq and taps are counted for the whole life of the page: the actor tells an old frame from a new one by them.
  #known(name) { return this.#panels.get(name); }

  #again(name) { const panel = this.#known(name); panel.key = ""; this.show(name, { person: null, table: [] }); }

  #press(key) { this.#taps.push({ number: ++this.#tap, key, at: performance.now() }); }

  #send() {
    if (!this.#actor || this.socket?.readyState !== WebSocket.OPEN) return;
    if (this.socket.bufferedAmount > CROWDED) return; // the next one will say the same
    const pad = padIn(), down = pad ? buttonsOf(pad) : [];
    for (const button of down) if (!this.#padHeld.has(button)) this.#press(button);
    this.#padHeld = new Set(down);
    const oldest = performance.now() - TAP_MS;
    this.#taps = this.#taps.filter((tap) => tap.at > oldest).slice(-16);
    this.#sent.set(++this.#seq, performance.now());
    if (this.#sent.size > 100) this.#sent.delete(this.#sent.keys().next().value);
    this.#tell(this.#actor, {
      seq: this.#seq, echo: this.#echo, held: [...new Set([...this.#held.values(), ...down])].slice(0, 16), axes: pad ? axesOf(pad) : {},
      taps: this.#taps.map((tap) => [tap.number, tap.key]),
    });
  }

  #tell(actor, frame) { this.socket.send(JSON.stringify({ drive: { actor, person: person(), frame } })); }

  /** A key of the keyboard; true: it was ours. */
  key(event) {
    if (!this.#actor) return false;
    if (event.key === "Escape") { this.letGo("Esc"); return true; }
    // By its place: with another key down meanwhile (shift) the same one may come up under another name.
    const wasHeld = event.type === "keyup" && this.#held.delete(event.code);
    if (["Meta", "Control", "Alt"].includes(event.key)) this.#held.clear(); // some systems tell no release beside these
    if (wasHeld) this.#send();
    if (event.ctrlKey || event.metaKey || event.altKey) return wasHeld;
    const name = NAMES[event.key] || (event.key.length === 1 ? event.key.toLowerCase() : null);
    if (!name) return false;
    if (event.type === "keydown" && !event.repeat) {
      this.#held.set(event.code, name);
      this.#press(name);
      this.#send();
    }
    return true;
  }
}

function keyLine(text) {
  const cut = text.indexOf(": ");
  return cut < 0 ? h("li", {}, text) : h("li", {}, h("kbd", {}, text.slice(0, cut)), ` ${text.slice(cut + 2)}`);
}

export const drive = new Drive();
for (const type of ["keydown", "keyup"]) document.addEventListener(type, (event) => { if (drive.key(event)) event.preventDefault(); });
document.addEventListener("focusin", ({ target }) => { if (target.matches("input, select")) drive.letGo("you are typing"); });
window.addEventListener("blur", () => drive.letGo("another window has the keys"));
window.addEventListener("pagehide", () => drive.letGo("the page was left"));
document.addEventListener("visibilitychange", () => { if (document.hidden) drive.letGo("the tab was hidden"); });
