// Small helpers of the other files: elements are built from text, never from markup, whatever an actor is called.

export const $ = (id) => document.getElementById(id);

/** An element: h("p", {className: "bad"}, "text", child, …). */
export function h(tag, props = {}, ...children) {
  const element = Object.assign(document.createElement(tag), props);
  for (const [key, value] of Object.entries(props.data || {})) element.dataset[key] = value;
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const number = (value, digits = 2) => (typeof value === "number" ? value.toFixed(digits) : "–");
export const percent = (value) => (typeof value === "number" ? `${Math.round(100 * value)}%` : "–");
export const age = (s) => (typeof s !== "number" ? "–" : s < 100 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`);

/** The rows of a <dl>: [[term, value], …] under a title. */
export function list(dl, title, rows) {
  dl.replaceChildren(h("h2", {}, title), ...rows.flatMap(([term, value]) => [h("dt", {}, term), h("dd", {}, String(value))]));
}

/** One line for the person: what was done, or why not. */
export function say(text, refused = false) {
  $("said").hidden = !text;
  $("said").textContent = text;
  $("said").className = refused ? "refused" : "";
}
