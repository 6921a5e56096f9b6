// A card for each actor: its cameras, who drives, what it waits for, and the way to take its keys.

import { buttons } from "./acts.js";
import { $, age, h, number } from "./dom.js";
import { drive } from "./drive.js";

const OLD_S = 2; // a picture that is older is shown as such
const cards = new Map(); // actor -> its elements

function cardOf(name) {
  if (cards.has(name)) return cards.get(name);
  const card = { tiles: new Map() };
  card.badge = h("span", { className: "badge idle" }, "…");
  card.acts = h("span", { className: "acts" });
  card.says = h("p", { className: "says", hidden: true });
  card.pictures = h("div", { className: "tiles" });
  card.facts = h("div", { className: "facts quiet" });
  card.hand = drive.panel(name);
  card.root = h("section", { className: "card", ariaLabel: `actor ${name}` },
    h("div", { className: "top" }, h("h2", {}, name), card.badge, card.acts), card.says, card.pictures, card.facts, card.hand.root);
  cards.set(name, card);
  $("actors").append(card.root);
  return card;
}

/** After a new status: which actors there are, and whether each can be driven from here. */
export function showActors({ status, hands }) {
  const known = Object.keys(status.actors || {}).sort();
  for (const [name, card] of cards) if (!known.includes(name)) { card.root.remove(); cards.delete(name); }
  for (const name of known) {
    const card = cardOf(name), subject = { actor: name, operator: status.operator };
    card.acts.replaceChildren(...buttons("actor", subject));
    drive.show(name, hands[name]);
  }
  if (!known.length) $("actors").replaceChildren(h("p", { className: "card quiet" }, "No actor is here yet: run_actor.sh."));
  else $("actors").querySelector("p.card")?.remove();
}

function showPictures(card, name, view) {
  for (const [camera, url] of Object.entries(view.pictures || {})) {
    if (!card.tiles.has(camera)) {
      const image = h("img", { alt: `camera ${camera} of ${name}` });
      card.tiles.set(camera, image);
      card.pictures.append(h("figure", {}, image, h("figcaption", {}, camera)));
    }
    const image = card.tiles.get(camera);
    if (image.src !== url) image.src = url;
    image.classList.toggle("old", view.age_s > OLD_S);
  }
}

/** Five times a second: pictures and figures. */
export function showLive({ status, live }) {
  for (const [name, card] of cards) {
    const view = live[name] || {}, actor = status.actors?.[name] || {};
    const driver = view.age_s > OLD_S ? null : view.driver;
    const who = { operator: `${view.person || "a person"} drives`, policy: `policy v${actor.policy_version} drives` }[driver] || (actor.left ? "has left" : "nobody drives");
    if (card.badge.textContent !== who) card.badge.textContent = who;
    card.badge.className = `badge ${driver || "idle"}`;
    const says = actor.left || (view.age_s <= OLD_S ? view.says : actor.trouble);
    card.says.hidden = !says;
    card.says.textContent = says || "";
    showPictures(card, name, view);
    const facts = [
      view.stage ? `${view.stage} · tick ${view.tick ?? 0} · return ${number(view.return, 1)}` : "between episodes",
      typeof view.hz === "number" ? `${number(view.hz, 0)} Hz` : null,
      view.overruns ? `${view.overruns} late ticks` : null,
      actor.backlog ? `backlog ${actor.backlog}` : null,
      view.refused ? `${view.refused} refused` : null,
      actor.rollout ? `set by people: ${actor.rollout}` : null,
      view.age_s > OLD_S ? `picture ${age(view.age_s)} old` : null,
    ].filter(Boolean).join(" · ");
    if (card.facts.textContent !== facts) card.facts.textContent = facts;
  }
}
