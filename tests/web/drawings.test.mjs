import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";
import { makeRoom, show } from "../../web/lib/drawings.mjs";
import { message, translate } from "../../web/lib/words.mjs";
import { Node, Observer, page } from "./fakes.mjs";

const CURVE = { title: "3 steps, leading", sigmas: [10, 1, 0], published: "25 steps", reference: [10, 0.1, 0] };
const COVERAGE = {
  stages: { "down 2": { applied: 3, folded: 1, removed: 4 }, middle: { removed: 2 } },
  names: { "down 2": message("stage {number}", { number: 2 }), middle: "middle" },
  words: { applied: message("applied"), folded: "folded", removed: "removed", mismatch: "mismatch", unknown: "unknown" },
};

let node;

beforeEach(() => {
  node = new Node("KoalaLoraLoader", { widgets: { lora_name: "a" } });
  globalThis.document = page;
  globalThis.ResizeObserver = Observer;
  globalThis.LiteGraph = { vueNodesMode: false };
  globalThis.LGraphBadge = class {
    constructor(options) {
      Object.assign(this, options);
    }
  };
});

const widget = () => node.widgets.at(-1);
const content = () => widget().element.children[0].children[0];
const byClass = (name) => content().all((element) => [element.className, element.attributes.class].includes(name));
const texts = (element) => element.all((inner) => inner.textContent).map((inner) => inner.textContent);

test("a new node is widened, never narrowed", () => {
  makeRoom(node);
  assert.deepEqual(node.size, [340, 100]);
  node.size = [500, 80];
  makeRoom(node);
  assert.deepEqual(node.size, [500, 80]);
});

test("nothing to show leaves a node as it is", () => {
  for (const output of [undefined, {}, { images: [] }, { koala: [{}], text: ["for the history"] }]) show(node, output);
  assert.deepEqual([node.widgets.length, node.badges.length], [1, 0]);
});

test("text is shown in a widget that is not saved", () => {
  show(node, { koala: [{ text: "two\nlines" }] });
  assert.deepEqual(texts(content()), ["two\nlines"]);
  assert.equal(widget().serialize, false);
  assert.equal(widget().options.serialize, false);
});

test("a second run replaces what is shown", () => {
  show(node, { koala: [{ text: "first", badge: "one" }] });
  show(node, { koala: [{ text: "second", badge: "two" }] });
  assert.equal(node.widgets.length, 2);
  assert.deepEqual(texts(content()), ["second"]);
  assert.deepEqual(node.badges.map(({ text }) => text), ["two"]);
});

test("the classic canvas gets a badge beside those that are there, Nodes 2.0 gets it in the content", () => {
  const other = { text: "another pack's" };
  node.badges = [other];
  show(node, { koala: [{ badge: "KOALA-700M" }] });
  assert.deepEqual(node.badges.map(({ text }) => text), [other.text, "KOALA-700M"]);
  assert.equal(node.widgets.length, 1);
  LiteGraph.vueNodesMode = true;
  show(node, { koala: [{ badge: "KOALA-1B" }] });
  assert.deepEqual(node.badges.map(({ text }) => text), [other.text, "KOALA-700M"]);
  assert.deepEqual(byClass("koala-badge").map((element) => element.textContent), ["KOALA-1B"]);
});

test("the widget is as high as its content, and the node grows with it", () => {
  show(node, { koala: [{ text: "text" }] });
  const { getMinHeight, getMaxHeight } = widget().options;
  assert.deepEqual([getMinHeight(), getMaxHeight()], [0, 0]);
  const before = node.dirty;
  Observer.latest.changed(); // not on the page yet
  assert.equal(node.dirty, before);
  Observer.latest.element.offsetHeight = 60;
  Observer.latest.changed();
  assert.deepEqual([getMinHeight(), getMaxHeight()], [88, 88]);
  assert.deepEqual(node.size, [340, 100]);
  assert.equal(node.dirty, before + 1);
  Observer.latest.changed(); // the same height again
  assert.equal(node.dirty, before + 1);
});

test("a curve has a point for each noise level, with its number, and both titles", () => {
  show(node, { koala: [{ curve: CURVE }] });
  const [curve] = byClass("koala-curve");
  const dots = curve.all(({ name }) => name === "circle");
  assert.deepEqual(dots.map(({ attributes }) => [attributes["data-step"], attributes["data-sigma"]]), [
    ["0", "10"],
    ["1", "1"],
    ["2", "0"],
  ]);
  assert.deepEqual(dots.map((dot) => dot.children[0].textContent)[1], "step 1: sigma 1.000");
  assert.deepEqual(texts(curve).slice(0, 2), ["sigmas: 3 steps, leading", "published: 25 steps"]);
  const lines = curve.all(({ name }) => name === "polyline").map(({ attributes }) => attributes.points);
  const [, reference, , sigmas, zero] = lines; // before each of the two: its piece in the legend
  assert.equal(zero, "34,140 292,140");
  assert.equal(sigmas, dots.map(({ attributes }) => `${attributes.cx},${attributes.cy}`).join(" "));
  assert.notEqual(reference, sigmas);
});

test("a bar has a segment for each outcome, as wide as its share", () => {
  show(node, { koala: [{ coverage: COVERAGE }] });
  const bars = byClass("koala-bar");
  assert.deepEqual(bars.map(({ dataset }) => dataset.stage), ["down 2", "middle"]);
  assert.deepEqual(bars[0].children.map(({ dataset }) => [dataset.outcome, dataset.count]), [
    ["applied", "3"],
    ["folded", "1"],
    ["removed", "4"],
  ]);
  assert.match(bars[0].children[2].style.cssText, /^flex: 4 1 0; color: /);
  assert.equal(bars[0].children[2].title, "stage 2: 4 removed");
  const shown = texts(byClass("koala-coverage")[0]);
  assert.deepEqual(shown, ["stage 2", "4 / 8", "middle", "0 / 2", "applied", "folded", "removed"]);
});

test("each outcome has a pattern of its own, in the bars as in the legend", () => {
  const outcomes = ["applied", "folded", "removed", "mismatch", "incomplete", "malformed", "unsupported", "unknown"];
  const words = Object.fromEntries(outcomes.map((outcome) => [outcome, outcome]));
  const stages = { down: Object.fromEntries(outcomes.map((outcome) => [outcome, 1])) };
  show(node, { koala: [{ coverage: { stages, names: { down: "down" }, words } }] });
  const swatches = byClass("koala-swatch");
  const pattern = ({ style }) => style.cssText.match(/background: (.*?); box-shadow/)[1];
  const [bar, legend] = [swatches.slice(0, 8), swatches.slice(8)];
  assert.deepEqual(bar.map(({ dataset }) => dataset.outcome), outcomes);
  assert.equal(new Set(bar.map(pattern)).size, outcomes.length);
  assert.deepEqual(legend.map(pattern), bar.map(pattern));
});

test("every text is shown in the language of the canvas", () => {
  const translation = { applied: "적용됨", "stage {number}": "{number}단계", "sigmas: {schedule}": "시그마: {schedule}" };
  const drawing = { badge: message("applied"), text: message("applied"), curve: CURVE, coverage: COVERAGE };
  show(node, { koala: [drawing] }, (words) => translate(words, translation));
  assert.deepEqual(node.badges.map(({ text }) => text), ["적용됨"]);
  const shown = texts(content());
  for (const text of ["적용됨", "2단계", "시그마: 3 steps, leading", "folded"]) assert.ok(shown.includes(text), text);
});

/** The host's palettes: the colour of texts, and that of a node. Nodes 2.0 has nodes of its own in dark and light. */
const PALETTES = {
  dark: ["#dddddd", "#353535"],
  "dark, Nodes 2.0": ["#dddddd", "#262729"],
  light: ["#222222", "#f5f5f5"],
  "light, Nodes 2.0": ["#222222", "#ffffff"],
  arc: ["#dddddd", "#242730"],
  github: ["#bcc2c8", "#13171d"],
  nord: ["#bcc2c8", "#161b22"],
  solarized: ["#93a1a1", "#073642"],
};

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

/** Relative luminance, as WCAG 2 defines it. */
function luminance(rgb) {
  const [red, green, blue] = rgb
    .map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

function contrast(one, other) {
  const [high, low] = [luminance(one), luminance(other)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}

/** A colour of ours under a palette: that of texts, or a hue mixed with it. */
function mixed(css, text) {
  const found = css.match(/^color-mix\(in srgb, (#\w{6}) (\d+)%, var\(--input-text/);
  if (!found) {
    assert.match(css, /^var\(--input-text/);
    return channels(text);
  }
  const share = Number(found[2]) / 100;
  return channels(found[1]).map((value, at) => share * value + (1 - share) * channels(text)[at]);
}

test("every colour stands out from a node by 4.5 at least, in every palette of the host", () => {
  const outcomes = ["applied", "folded", "removed", "mismatch", "incomplete", "malformed", "unsupported", "unknown"];
  const words = Object.fromEntries(outcomes.map((outcome) => [outcome, outcome]));
  const stages = { down: Object.fromEntries(outcomes.map((outcome) => [outcome, 1])) };
  LiteGraph.vueNodesMode = true;
  show(node, { koala: [{ badge: "b", text: "t", curve: CURVE, coverage: { stages, names: { down: "down" }, words } }] });
  const styles = content().all(() => true).map(({ style, attributes }) => style.cssText || attributes.style || "");
  assert.ok(styles.every((style) => !/opacity/.test(style)));
  const drawn = styles.flatMap((style) => [...style.matchAll(/(?:^|[ ;])color: (.+?);/g)].map(([, colour]) => colour));
  const own = drawn.filter((colour) => colour.startsWith("color-mix") || colour.startsWith("var"));
  assert.equal(new Set(own).size, 8); // seven hues, one of them also the curve's, and the colour of texts
  for (const [palette, [text, behind]] of Object.entries(PALETTES)) {
    for (const colour of own) {
      const found = contrast(mixed(colour, text), channels(behind));
      assert.ok(found >= 4.5, `${palette}: ${colour}: ${found}`);
    }
  }
  const badge = byClass("koala-badge")[0].style.cssText.match(/background: (#\w{6}); color: #fff;/);
  assert.ok(contrast(channels(badge[1]), [255, 255, 255]) >= 4.5);
});
