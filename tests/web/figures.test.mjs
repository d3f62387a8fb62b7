import assert from "node:assert/strict";
import { test } from "node:test";
import { plotCurve, polyline, tabulateCoverage } from "../../web/lib/figures.mjs";

const round = (number) => Math.round(number * 1e6) / 1e6;
const WORDS = {
  applied: "applied",
  folded: "folded into a neighbour",
  removed: "removed",
  mismatch: "of another shape",
  unknown: "unknown",
};

const NAMES = { "down 2": "Down 2", middle: "Middle", up: "Up", down: "Down" };

test("a schedule goes from the plot's top left to its bottom right, equal ratios being equal heights", () => {
  const { sigmas, left } = plotCurve({ sigmas: [16, 4, 1], reference: [16, 1] });
  assert.equal(left, 34);
  assert.deepEqual(sigmas.map(({ x, y }) => [round(x), round(y)]), [[34, 30], [163, 77], [292, 124]]);
});

test("both schedules have the whole width and one scale", () => {
  const { sigmas, reference } = plotCurve({ sigmas: [4, 2], reference: [16, 4, 2, 1] });
  assert.deepEqual(sigmas.map(({ x }) => x), [34, 292]);
  assert.deepEqual(reference.map(({ x }) => x), [34, 120, 206, 292]);
  assert.equal(sigmas[0].y, reference[1].y);
  assert.equal(sigmas[1].y, reference[2].y);
});

test("a level of 0 lies below the lowest level, with a label of its own", () => {
  const { sigmas, labels, zero } = plotCurve({ sigmas: [10, 0.1, 0], reference: [10, 0.1] });
  assert.deepEqual(sigmas.map(({ y }) => round(y)), [30, 124, 140]);
  assert.deepEqual(labels.at(-1), { y: 140, text: "0" });
  assert.equal(zero, 140);
  const without = plotCurve({ sigmas: [10, 0.1], reference: [10, 0.1] });
  assert.equal(without.zero, undefined);
  assert.equal(without.labels.length, 3);
});

test("the highest level, 1 and the lowest level are labelled, each at its height", () => {
  const { labels, reference } = plotCurve({ sigmas: [2], reference: [14.6146, 1, 0.0292] });
  assert.deepEqual(labels.map(({ text }) => text), ["15", "1.0", "0.029"]);
  assert.deepEqual(labels.map(({ y }) => round(y)), reference.map(({ y }) => round(y)));
});

test("one level, equal levels and no levels at all have finite places", () => {
  for (const sigmas of [[], [5], [5, 5]]) {
    const plot = plotCurve({ sigmas, reference: [5, 5] });
    assert.equal(plot.sigmas.length, sigmas.length);
    for (const { x, y } of [...plot.sigmas, ...plot.reference]) assert.ok(Number.isFinite(x) && Number.isFinite(y));
  }
});

test("a polyline has its points as SVG writes them", () => {
  assert.equal(polyline([{ x: 1, y: 2.5 }, { x: 3, y: 4 }]), "1,2.5 3,4");
  assert.equal(polyline([]), "");
});

test("each stage has a row with its outcomes in their order, what has an effect, and the total", () => {
  const stages = { "down 2": { applied: 3, folded: 1, removed: 4 }, middle: { removed: 2 } };
  assert.deepEqual(tabulateCoverage({ stages, names: NAMES, words: WORDS }).rows, [
    {
      stage: "down 2",
      name: "Down 2",
      parts: [
        { outcome: "applied", count: 3, words: "applied" },
        { outcome: "folded", count: 1, words: "folded into a neighbour" },
        { outcome: "removed", count: 4, words: "removed" },
      ],
      effective: 4,
      total: 8,
    },
    { stage: "middle", name: "Middle", parts: [{ outcome: "removed", count: 2, words: "removed" }], effective: 0, total: 2 },
  ]);
});

test("the legend names the outcomes that occur, in the order of their words", () => {
  const stages = { up: { unknown: 1 }, down: { removed: 1, applied: 2 } };
  const { legend } = tabulateCoverage({ stages, names: NAMES, words: WORDS });
  assert.deepEqual(legend.map(({ outcome }) => outcome), ["applied", "removed", "unknown"]);
  assert.equal(legend[1].words, WORDS.removed);
  assert.deepEqual(tabulateCoverage({ stages: {}, names: NAMES, words: WORDS }), { rows: [], legend: [] });
});
