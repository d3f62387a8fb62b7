// @ts-check
// What is drawn on a node after it ran, from the data in its output alone: { text, badge, curve, coverage }, any of them.

import { plotCurve, polyline, SIZE, tabulateCoverage } from "./figures.mjs";
import { message, translate } from "./words.mjs";

/**
 * @import { Coverage, Curve, Outcome, Point } from "./figures.mjs"
 * @import { Words } from "./words.mjs"
 * @typedef {{ text?: Words, badge?: Words, curve?: Curve, coverage?: Coverage }} Drawing
 *
 * Puts a text into the canvas's language.
 * @typedef {(words: Words) => string} Say
 */

/**
 * How the segments of a bar look: told apart by their patterns alone, and by a hue besides.
 * @type {Record<Outcome, { hue?: string, pattern: string }>}
 */
const LOOKS = {
  applied: { hue: "#22b573", pattern: "linear-gradient(currentColor, currentColor)" },
  folded: { hue: "#8fae2c", pattern: stripes(45) },
  removed: { pattern: "none" },
  mismatch: { hue: "#e08a1e", pattern: stripes(90) },
  incomplete: { hue: "#f58352", pattern: "radial-gradient(currentColor 1px, transparent 1.5px) 0 0 / 5px 4px" },
  malformed: { hue: "#f27fb8", pattern: `${stripes(45)}, ${stripes(135)}` },
  unsupported: { hue: "#bd92f4", pattern: stripes(0) },
  unknown: { hue: "#f67f7a", pattern: stripes(135) },
};
const LINE = shade(LOOKS.applied.hue); // of a curve
const BADGE = "#2f6b4f";
const WIDGET = "koala_shown";
const WIDTH = 340; // pixels that text and drawings need
const MARGINS = 28; // pixels that the host leaves above and below a DOM widget, and ours
const SVG = "http://www.w3.org/2000/svg";
const TEXT = "font: 10px sans-serif;";
const RUN = { "stroke-width": 1.2 };
const PUBLISHED = { "stroke-width": 3, "stroke-dasharray": "1.5 3" }; // seen where the other line covers it, too
const ZERO = { "stroke-width": 0.5, "stroke-dasharray": "4 3" };

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
 * @param {Say} say
 */
export function show(node, output, say = translate) {
  /** @type {Drawing} */
  const drawing = output?.koala?.[0] ?? {};
  const content = div("font: 11px/1.45 sans-serif; color: var(--input-text, #ddd); overflow-wrap: anywhere;");
  content.className = "koala-content";
  if (drawing.badge && LiteGraph.vueNodesMode) content.append(pill(say(drawing.badge)));
  if (drawing.text) content.append(note(say(drawing.text)));
  if (drawing.curve) content.append(curve(drawing.curve, say));
  if (drawing.coverage) content.append(coverage(drawing.coverage, say));
  if (drawing.badge && !LiteGraph.vueNodesMode) showBadge(node, say(drawing.badge));
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
 * A hue in the theme: mixed with the colour of its texts, so that it stands out from a light node and from a dark one.
 * @param {string} [hue] none: the colour of texts
 */
function shade(hue) {
  const text = "var(--input-text, #ddd)";
  return hue ? `color-mix(in srgb, ${hue} 55%, ${text})` : text;
}

/** Stripes in the colour of the text, as a CSS background. @param {number} angle in degrees */
function stripes(angle) {
  return `repeating-linear-gradient(${angle}deg, currentColor 0 1.5px, transparent 1.5px 4px)`;
}

/**
 * Noise level (logarithmic, with 0 below a gap) over the steps of the run; behind it the published schedule, dashed.
 * @param {Curve} data
 * @param {Say} say
 */
function curve(data, say) {
  const plot = plotCurve(data);
  const viewBox = `0 0 ${SIZE.width} ${SIZE.height}`;
  // of one height, however wide the host makes its place at first: the node grows with it, and never shrinks
  const style = `display: block; max-width: 100%; height: ${SIZE.height}px;`;
  const root = svg("svg", { viewBox, class: "koala-curve", style });
  const run = svg("g", { style: `color: ${LINE};` });
  const key = (/** @type {number} */ y) => [plot.left, plot.left + 18].map((x) => ({ x, y: y - 3 }));
  const title = { x: plot.left + 24, style: TEXT, fill: "currentColor" };
  root.append(
    svg("text", { ...title, y: 11 }, say(message("sigmas: {schedule}", { schedule: data.title }))),
    svg("text", { ...title, y: 23 }, say(message("published: {schedule}", { schedule: data.published }))),
    ...[key(23), plot.reference].map((points) => line(points, PUBLISHED)),
    run,
  );
  run.append(...[key(11), plot.sigmas].map((points) => line(points, RUN)));
  if (plot.zero) root.append(line([plot.left, plot.right].map((x) => ({ x, y: plot.zero ?? 0 })), ZERO));
  const label = { x: plot.left - 4, "text-anchor": "end", style: TEXT, fill: "currentColor" };
  root.append(...plot.labels.map(({ y, text }) => svg("text", { ...label, y: y + 3 }, text)));
  plot.sigmas.forEach(({ x, y }, step) => {
    const sigma = data.sigmas[step];
    const dot = svg("circle", { cx: x, cy: y, r: 2.2, fill: "currentColor", "data-step": step, "data-sigma": sigma });
    dot.append(svg("title", {}, say(message("step {step}: sigma {sigma}", { step, sigma: sigma.toPrecision(4) }))));
    run.append(dot);
  });
  return root;
}

/**
 * @param {Point[]} points
 * @param {Record<string, string | number>} look
 */
function line(points, look) {
  return svg("polyline", { points: polyline(points), fill: "none", stroke: "currentColor", ...look });
}

/**
 * A bar for each stage of the U-Net: how many of a LoRA's modules had which outcome.
 * @param {Coverage} data
 * @param {Say} say
 */
function coverage(data, say) {
  const { rows, legend } = tabulateCoverage(data);
  const root = div("display: grid; grid-template-columns: max-content 1fr max-content; gap: 3px 6px;");
  root.className = "koala-coverage";
  for (const { stage, name, parts, effective, total } of rows) {
    const bar = div("display: flex; gap: 1px; height: 12px; align-self: center;");
    bar.className = "koala-bar";
    bar.dataset.stage = stage;
    for (const { outcome, count, words } of parts) {
      const segment = swatch(outcome, `flex: ${count} 1 0;`);
      segment.dataset.count = String(count);
      segment.title = say(message("{stage}: {count} {outcome}", { stage: name, count, outcome: words }));
      bar.append(segment);
    }
    root.append(cell(say(name)), bar, cell(`${effective} / ${total}`));
  }
  const key = div("grid-column: 1 / -1; display: flex; gap: 2px 10px; flex-wrap: wrap;");
  for (const { outcome, words } of legend) {
    const entry = div("display: flex; align-items: center; gap: 4px;");
    entry.append(swatch(outcome, "width: 14px; height: 10px;"), cell(say(words)));
    key.append(entry);
  }
  root.append(key);
  return root;
}

/**
 * A piece of a bar, or of its legend. Its outline shows how far it goes where the pattern has gaps.
 * @param {Outcome} outcome
 * @param {string} size
 */
function swatch(outcome, size) {
  const { hue, pattern } = LOOKS[outcome];
  const element = div(`${size} color: ${shade(hue)}; background: ${pattern}; box-shadow: inset 0 0 0 1px;`);
  element.className = "koala-swatch";
  element.dataset.outcome = outcome;
  return element;
}

/** @param {string} text */
function cell(text) {
  const element = document.createElement("span");
  element.textContent = text;
  element.style.whiteSpace = "nowrap";
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
