// Line charts as SVG: a few lines over a common x, an interval as a band, the last value beside its line.

const NS = "http://www.w3.org/2000/svg";
const W = 420, H = 170, LEFT = 38, RIGHT = 64, TOP = 8, BOTTOM = 20;

function make(tag, attributes, text) {
  const element = document.createElementNS(NS, tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const short = (v) => (v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(0) : String(Number(v.toPrecision(3))));

/** Where the labels at the lines' ends go so that none covers another. */
function spread(labels) {
  labels.sort((a, b) => a.y - b.y);
  for (let i = 1; i < labels.length; i++) labels[i].y = Math.max(labels[i].y, labels[i - 1].y + 13);
  return labels;
}

/**
 * Draw into `svg`. lines: [{name, points: [[x, y, low?, high?], …]}]; low, high: y's range, null: the points'.
 * x: what the axis counts.
 */
export function draw(svg, lines, { low = null, high = null, x = "" } = {}) {
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  const shown = lines.filter((line) => line.points.length);
  if (!shown.length) {
    svg.replaceChildren(make("text", { x: LEFT, y: H / 2 }, "nothing yet"));
    svg.setAttribute("aria-label", "nothing yet");
    return;
  }
  const all = shown.flatMap((line) => line.points);
  const xs = all.map((p) => p[0]), ys = all.flatMap((p) => p.slice(1, 2));
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
  let y0 = low ?? Math.min(...ys), y1 = high ?? Math.max(...ys);
  if (y1 - y0 < 1e-9) { y1 += 0.5 * Math.abs(y1) || 0.5; if (low === null) y0 -= 0.5 * Math.abs(y0) || 0.5; }
  const px = (v) => LEFT + ((v - x0) / (x1 - x0)) * (W - LEFT - RIGHT);
  const py = (v) => H - BOTTOM - ((v - y0) / (y1 - y0)) * (H - TOP - BOTTOM);
  const parts = [];
  for (const v of [y0, (y0 + y1) / 2, y1]) {
    parts.push(make("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: py(v), y2: py(v) }));
    parts.push(make("text", { x: LEFT - 5, y: py(v) + 4, "text-anchor": "end" }, short(v)));
  }
  parts.push(make("text", { x: LEFT, y: H - 4 }, short(x0)));
  parts.push(make("text", { x: W - RIGHT, y: H - 4, "text-anchor": "end" }, `${x} ${short(x1)}`));
  const labels = [];
  shown.forEach((line, k) => {
    const at = (p, column) => `${px(p[0]).toFixed(1)},${py(p[column]).toFixed(1)}`;
    if (line.points[0].length > 3) {
      const edge = [...line.points.map((p) => at(p, 3)), ...line.points.map((p) => at(p, 2)).reverse()];
      parts.push(make("polygon", { class: "band", points: edge.join(" ") }));
    }
    parts.push(make("polyline", { class: `line c${k % 4}`, points: line.points.map((p) => at(p, 1)).join(" ") }));
    const last = line.points[line.points.length - 1];
    labels.push({ y: py(last[1]) + 4, k, text: `${short(last[1])} ${line.name}` });
  });
  for (const { y, k, text } of spread(labels)) parts.push(make("text", { class: `t${k % 4}`, x: W - RIGHT + 4, y }, text));
  svg.replaceChildren(...parts);
  svg.setAttribute("aria-label", labels.map((label) => label.text).join(", "));
}
