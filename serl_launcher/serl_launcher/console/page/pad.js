// The first gamepad of the standard layout, by the names that config/operator/browser.yaml uses.

const BUTTONS = ["south", "east", "west", "north", "LB", "RB", "LT", "RT", "select", "start", "LS", "RS"];
const STICKS = ["LX", "LY", "RX", "RY"];
const UP = 12, DOWN = 13, LEFT = 14, RIGHT = 15;

/** The gamepad that is used; null: none, or only such as the browser does not know the layout of. */
export function padIn() {
  return [...(navigator.getGamepads?.() || [])].find((pad) => pad?.connected && pad.mapping === "standard") || null;
}

/** Names of the buttons that are down. */
export const buttonsOf = (pad) => BUTTONS.filter((_, place) => pad.buttons[place]?.pressed);

/** Deflections in [-1, 1] by name; the cross counts as two axes, down and right positive as the sticks. */
export function axesOf(pad) {
  const cross = (plus, minus) => Number(Boolean(pad.buttons[plus]?.pressed)) - Number(Boolean(pad.buttons[minus]?.pressed));
  const axes = { HX: cross(RIGHT, LEFT), HY: cross(DOWN, UP) };
  STICKS.forEach((name, place) => { axes[name] = Math.max(-1, Math.min(1, Math.round(1000 * (pad.axes[place] || 0)) / 1000)); });
  return axes;
}
