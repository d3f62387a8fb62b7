// @ts-check
// What is drawn on a node after it ran, from the data in its output alone: { badge, curve, coverage }, any of them.

import { plotCurve, polyline, SIZE, tabulateCoverage } from "./figures.mjs";

/**
 * @import { Coverage, Curve, Point } from "./figures.mjs"
 * @typedef {{ badge?: string, curve?: Curve, coverage?: Coverage }} Drawing
 */

const COLOURS = {
  applied: "#4caf7a",
  folded: "#9ccc65",
  removed: "#6b7280",
  mismatch: "#f59e0b",
  incomplete: "#f97316",
  malformed: "#ec4899",
  unsupported: "#a855f7",
  unknown: "#ef4444",
};
const BADGE = "#2f6b4f";
const WIDGET = "koala_shown";
const WIDTH = 340; // pixels that text and drawings need
const MARGINS = 28; // pixels that the host leaves above and below a DOM widget, and ours
const SVG = "http://www.w3.org/2000/svg";
const TEXT = "font: 10px sans-serif;";

/**
 * Make a new node as wide as its text and drawings need, so that it does not grow over its neighbour later.
 * @param {ComfyNode} node
 */
export function makeRoom(node) {
  node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
}

/**
 * Show what a node's output holds for the canvas: a badge, its text, and its drawings below.
 * @param {ComfyNode} node
 * @param {ComfyOutput | undefined} output
 */
export function show(node, output) {
  /** @type {Drawing} */
  const drawing = output?.koala?.[0] ?? {};
  const content = div("font: 11px/1.45 sans-serif; color: var(--input-text, #ddd); overflow-wrap: anywhere;");
  content.className = "koala-content";
  if (drawing.badge && LiteGraph.vueNodesMode) content.append(pill(drawing.badge));
  if (output?.text?.[0]) content.append(note(output.text[0]));
  if (drawing.curve) content.append(curve(drawing.curve));
  if (drawing.coverage) content.append(coverage(drawing.coverage));
  if (drawing.badge && !LiteGraph.vueNodesMode) showBadge(node, drawing.badge);
  if (content.hasChildNodes()) showContent(node, content);
}

/** @param {string} text */
function note(text) {
  const element = div("white-space: pre-wrap; user-select: text; margin-bottom: 4px;");
  element.className = "koala-text";
  element.textContent = text;
  return element;
}

/**
 * A badge for Nodes 2.0, which draws LiteGraph's badges only where a node had them when it was created.
 * @param {string} text
 */
function pill(text) {
  const element = document.createElement("span");
  element.className = "koala-badge";
  const look = `background: ${BADGE}; color: #fff; border-radius: 8px; padding: 1px 8px;`;
  element.style.cssText = `${look} display: inline-block; margin-bottom: 4px;`;
  element.textContent = text;
  return element;
}

/** @type {WeakSet<object>} */
const ownBadges = new WeakSet();

/**
 * A badge for the classic canvas, in place of an earlier one of ours.
 * @param {ComfyNode} node
 * @param {string} text
 */
function showBadge(node, text) {
  const badge = new LGraphBadge({ text, fgColor: "#ffffff", bgColor: BADGE });
  ownBadges.add(badge);
  node.badges = [...node.badges.filter((known) => !ownBadges.has(known)), badge];
  node.setDirtyCanvas(true, true);
}

/**
 * @param {ComfyNode} node
 * @param {HTMLElement} content
 */
function showContent(node, content) {
  const widget = node.widgets?.find((known) => known.name === WIDGET) ?? addWidget(node);
  widget.element?.firstElementChild?.replaceChildren(content);
}

/**
 * The node's last widget, as high as its content, and in no saved file: a workflow's widget values are positional.
 * @param {ComfyNode} node
 */
function addWidget(node) {
  const root = div("overflow: hidden; padding: 2px 6px; box-sizing: border-box;");
  const inner = div("");
  root.append(inner);
  let needed = 0;
  const height = () => needed;
  const options = { serialize: false, hideOnZoom: false, getMinHeight: height, getMaxHeight: height };
  const widget = node.addDOMWidget(WIDGET, "koala", root, options);
  widget.serialize = false;
  new ResizeObserver(() => {
    if (!inner.offsetHeight || inner.offsetHeight + MARGINS === needed) return; // 0: not on the page at present
    needed = inner.offsetHeight + MARGINS;
    node.setSize([Math.max(node.size[0], WIDTH), Math.max(node.size[1], node.computeSize()[1])]);
    node.setDirtyCanvas(true, true);
  }).observe(inner);
  return widget;
}

/**
 * Noise level (logarithmic) over the steps of the run; behind it the published schedule.
 * @param {Curve} data
 */
function curve(data) {
  const plot = plotCurve(data);
  const viewBox = `0 0 ${SIZE.width} ${SIZE.height}`;
  const root = svg("svg", { viewBox, class: "koala-curve", style: "display: block;" });
  const title = { x: plot.left, style: TEXT };
  root.append(
    svg("text", { ...title, y: 11, fill: COLOURS.applied }, `sigmas: ${data.title}`),
    svg("text", { ...title, y: 23, fill: "currentColor", opacity: 0.6 }, `published: ${data.published}`),
    line(plot.reference, { stroke: "#8b93a7", "stroke-width": 3, opacity: 0.5 }),
    line(plot.sigmas, { stroke: COLOURS.applied, "stroke-width": 1.2 }),
  );
  const label = { x: plot.left - 4, "text-anchor": "end", style: TEXT, fill: "currentColor", opacity: 0.7 };
  root.append(...plot.labels.map(({ y, text }) => svg("text", { ...label, y: y + 3 }, text)));
  plot.sigmas.forEach(({ x, y }, step) => {
    const sigma = data.sigmas[step];
    const dot = svg("circle", { cx: x, cy: y, r: 2.2, fill: COLOURS.applied, "data-step": step, "data-sigma": sigma });
    dot.append(svg("title", {}, `step ${step}: sigma ${sigma.toPrecision(4)}`));
    root.append(dot);
  });
  return root;
}

/**
 * @param {Point[]} points
 * @param {Record<string, string | number>} look
 */
function line(points, look) {
  return svg("polyline", { points: polyline(points), fill: "none", ...look });
}

/**
 * A bar for each stage of the U-Net: how many of a LoRA's modules had which outcome.
 * @param {Coverage} data
 */
function coverage(data) {
  const { rows, legend } = tabulateCoverage(data);
  const root = div("display: grid; grid-template-columns: max-content 1fr max-content; gap: 3px 6px;");
  root.className = "koala-coverage";
  for (const { stage, parts, effective, total } of rows) {
    const bar = div("display: flex; height: 12px; border-radius: 3px; overflow: hidden; align-self: center;");
    bar.className = "koala-bar";
    bar.dataset.stage = stage;
    for (const { outcome, count, words } of parts) {
      const segment = div(`flex: ${count} 1 0; background: ${COLOURS[outcome]};`);
      segment.dataset.outcome = outcome;
      segment.dataset.count = String(count);
      segment.title = `${stage}: ${count} ${words}`;
      bar.append(segment);
    }
    root.append(cell(stage), bar, cell(`${effective} / ${total}`));
  }
  const key = div("grid-column: 1 / -1; display: flex; gap: 10px; flex-wrap: wrap; opacity: 0.8;");
  key.append(...legend.map(({ outcome, words }) => cell(`■ ${words}`, COLOURS[outcome])));
  root.append(key);
  return root;
}

/** @param {string} text @param {string} [colour] */
function cell(text, colour = "") {
  const element = document.createElement("span");
  element.textContent = text;
  element.style.whiteSpace = "nowrap";
  element.style.color = colour;
  return element;
}

/** @param {string} style */
function div(style) {
  const element = document.createElement("div");
  element.style.cssText = style;
  return element;
}

/**
 * @param {string} name
 * @param {Record<string, string | number>} attributes
 * @param {string} [text]
 */
function svg(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  if (text !== undefined) element.textContent = text;
  return element;
}
