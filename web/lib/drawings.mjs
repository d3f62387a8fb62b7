// What is drawn on a node after it ran, from the data in its output alone: { badge, curve, coverage }, any of them.

const COLOURS = { applied: "#4caf7a", folded: "#9ccc65", removed: "#6b7280", mismatch: "#f59e0b", unknown: "#ef4444" };
const BADGE = "#2f6b4f";
const WIDGET = "koala_shown";
const WIDTH = 340; // pixels that text and drawings need
const MARGINS = 28; // pixels that the host leaves above and below a DOM widget, and ours
const SVG = "http://www.w3.org/2000/svg";
const TEXT = "font: 10px sans-serif;";

/** Make a new node as wide as what it will be shown needs, so that it does not grow over its neighbour later. */
export function makeRoom(node) {
  node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
}

/** Show what a node's output holds for the canvas: a badge, its text, and below that what is drawn. */
export function show(node, output) {
  const drawing = output?.koala?.[0] ?? {};
  const content = document.createElement("div");
  content.className = "koala-content";
  content.style.cssText = "font: 11px/1.45 sans-serif; color: var(--input-text, #ddd); overflow-wrap: anywhere;";
  if (drawing.badge && LiteGraph.vueNodesMode) content.append(pill(drawing.badge));
  if (output?.text?.[0]) content.append(note(output.text[0]));
  if (drawing.curve) content.append(curve(drawing.curve));
  if (drawing.coverage) content.append(coverage(drawing.coverage));
  if (drawing.badge && !LiteGraph.vueNodesMode) showBadge(node, drawing.badge);
  if (content.hasChildNodes()) showContent(node, content);
}

function note(text) {
  const element = document.createElement("div");
  element.className = "koala-text";
  element.style.cssText = "white-space: pre-wrap; user-select: text; margin-bottom: 4px;";
  element.textContent = text;
  return element;
}

/** A badge for Nodes 2.0, which draws only those of LiteGraph's that a node had from the beginning. */
function pill(text) {
  const element = document.createElement("span");
  element.className = "koala-badge";
  const look = `background: ${BADGE}; color: #fff; border-radius: 8px; padding: 1px 8px;`;
  element.style.cssText = `${look} display: inline-block; margin-bottom: 4px;`;
  element.textContent = text;
  return element;
}

function showBadge(node, text) {
  const badge = new LGraphBadge({ text, fgColor: "#ffffff", bgColor: BADGE });
  badge.koala = true;
  node.badges = [...node.badges.filter((known) => !known.koala), badge];
  node.setDirtyCanvas(true, true);
}

function showContent(node, content) {
  const widget = node.widgets?.find((known) => known.name === WIDGET) ?? addWidget(node);
  widget.element.firstChild.replaceChildren(content);
}

/** The node's last widget, as high as what is in it, and in no saved file: a workflow's widget values are positional. */
function addWidget(node) {
  const root = document.createElement("div");
  root.style.cssText = "overflow: hidden; padding: 2px 6px; box-sizing: border-box;";
  const inner = document.createElement("div");
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

function svg(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Noise level (logarithmic) against the part of the run that is done; behind it the published schedule. */
export function curve({ title, sigmas, published, reference }) {
  const [width, height, left, top, bottom] = [300, 150, 34, 30, 12];
  const positive = [...sigmas, ...reference].filter((sigma) => sigma > 0);
  const [low, high] = [Math.log(Math.min(...positive)), Math.log(Math.max(...positive))];
  const y = (sigma) => {
    const part = sigma > 0 ? (Math.log(sigma) - low) / (high - low || 1) : 0;
    return height - bottom - part * (height - top - bottom);
  };
  const x = (index, list) => left + (index / Math.max(1, list.length - 1)) * (width - left - 8);
  const points = (list) => list.map((sigma, index) => `${x(index, list)},${y(sigma)}`).join(" ");

  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "koala-curve", style: "display: block;" });
  root.append(
    svg("text", { x: left, y: 11, style: TEXT, fill: COLOURS.applied }, `sigmas: ${title}`),
    svg("text", { x: left, y: 23, style: TEXT, fill: "currentColor", opacity: 0.6 }, `published: ${published}`),
    svg("polyline", { points: points(reference), fill: "none", stroke: "#8b93a7", "stroke-width": 3, opacity: 0.5 }),
    svg("polyline", { points: points(sigmas), fill: "none", stroke: COLOURS.applied, "stroke-width": 1.2 }),
  );
  for (const sigma of [Math.exp(high), 1, Math.exp(low)]) {
    const label = sigma >= 10 ? sigma.toFixed(0) : sigma.toPrecision(2);
    root.append(svg("text", { x: left - 4, y: y(sigma) + 3, "text-anchor": "end", style: TEXT, fill: "currentColor", opacity: 0.7 }, label));
  }
  sigmas.forEach((sigma, step) => {
    const mark = { cx: x(step, sigmas), cy: y(sigma), r: 2.2, fill: COLOURS.applied };
    const dot = svg("circle", { ...mark, "data-step": step, "data-sigma": sigma });
    dot.append(svg("title", {}, `step ${step}: sigma ${sigma.toPrecision(4)}`));
    root.append(dot);
  });
  return root;
}

/** A bar for each stage of the U-Net: how many of a LoRA's modules had which outcome. */
export function coverage({ stages, words }) {
  const root = document.createElement("div");
  root.className = "koala-coverage";
  root.style.cssText = "display: grid; grid-template-columns: max-content 1fr max-content; gap: 3px 6px;";
  for (const [stage, outcomes] of Object.entries(stages)) {
    const counts = Object.entries(outcomes);
    const total = counts.reduce((sum, [, count]) => sum + count, 0);
    const bar = document.createElement("div");
    bar.className = "koala-bar";
    bar.dataset.stage = stage;
    bar.style.cssText = "display: flex; height: 12px; border-radius: 3px; overflow: hidden; align-self: center;";
    for (const [outcome, count] of counts) {
      const part = document.createElement("div");
      Object.assign(part.dataset, { outcome, count });
      part.title = `${stage}: ${count} ${words[outcome]}`;
      part.style.cssText = `flex: ${count} 1 0; background: ${COLOURS[outcome]};`;
      bar.append(part);
    }
    root.append(cell(stage), bar, cell(`${(outcomes.applied ?? 0) + (outcomes.folded ?? 0)} / ${total}`));
  }
  const legend = document.createElement("div");
  legend.style.cssText = "grid-column: 1 / -1; display: flex; gap: 10px; flex-wrap: wrap; opacity: 0.8;";
  const seen = new Set(Object.values(stages).flatMap(Object.keys));
  for (const outcome of Object.keys(words).filter((known) => seen.has(known))) {
    const entry = cell(`■ ${words[outcome]}`);
    entry.style.color = COLOURS[outcome];
    legend.append(entry);
  }
  root.append(legend);
  return root;
}

function cell(text) {
  const element = document.createElement("span");
  element.textContent = text;
  element.style.whiteSpace = "nowrap";
  return element;
}
