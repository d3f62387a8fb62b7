// @ts-check
// The numbers behind what is drawn on a node: pure functions of a node's output, with no page and no canvas.

export const SIZE = { width: 300, height: 150 };
const PLOT = { left: 34, right: 292, top: 30, bottom: 124, zero: 140 }; // pixels; labels stand to the left, titles above

/**
 * @import { Words } from "./words.mjs"
 *
 * Noise levels of a run, and those that the model was published with. Both descend, and may end with 0.
 * @typedef {{ title: Words, sigmas: number[], published: Words, reference: number[] }} Curve
 *
 * @typedef {"applied" | "folded" | "removed" | "mismatch" | "incomplete" | "malformed" | "unsupported" | "unknown"} Outcome
 * @typedef {Partial<Record<Outcome, number>>} Counts
 *
 * How many of a LoRA's modules had which outcome in each stage of the U-Net, and what to call each stage and outcome.
 * @typedef {{ stages: Record<string, Counts>, names: Record<string, Words>, words: Record<Outcome, Words> }} Coverage
 *
 * @typedef {{ x: number, y: number }} Point
 */

/**
 * Where the points of two schedules lie: the step to the right, the logarithm of the noise level upwards. Both have
 * the whole width, however many steps they have. A level of 0, which has no logarithm, lies below all others, at
 * ``zero``; undefined where there is none.
 * @param {Pick<Curve, "sigmas" | "reference">} curve
 */
export function plotCurve({ sigmas, reference }) {
  const logs = [...sigmas, ...reference].filter((sigma) => sigma > 0).map(Math.log);
  const [low, high] = [Math.min(...logs), Math.max(...logs)];
  /** @param {number} sigma */
  const y = (sigma) => {
    if (sigma <= 0) return PLOT.zero;
    return PLOT.bottom - ((Math.log(sigma) - low) / (high - low || 1)) * (PLOT.bottom - PLOT.top);
  };
  /** @param {number[]} schedule @returns {Point[]} */
  const place = (schedule) => {
    const width = (PLOT.right - PLOT.left) / Math.max(1, schedule.length - 1);
    return schedule.map((sigma, step) => ({ x: PLOT.left + step * width, y: y(sigma) }));
  };
  const labels = [Math.exp(high), 1, Math.exp(low)].map((sigma) => ({ y: y(sigma), text: levelText(sigma) }));
  const zero = sigmas.includes(0) || reference.includes(0) ? PLOT.zero : undefined;
  if (zero) labels.push({ y: zero, text: "0" });
  return { left: PLOT.left, right: PLOT.right, sigmas: place(sigmas), reference: place(reference), labels, zero };
}

/** A noise level as a label: 12, 1.0, 0.029. @param {number} sigma */
function levelText(sigma) {
  return sigma >= 10 ? sigma.toFixed(0) : sigma.toPrecision(2);
}

/** Points as an SVG polyline has them. @param {Point[]} points */
export function polyline(points) {
  return points.map(({ x, y }) => `${x},${y}`).join(" ");
}

/**
 * A row for each stage: its outcomes with their counts, how many of its modules have an effect, and of how many; and
 * the outcomes that occur in any stage, in the order of ``words``.
 * @param {Coverage} coverage
 */
export function tabulateCoverage({ stages, names, words }) {
  const rows = Object.entries(stages).map(([stage, counts]) => ({
    stage,
    name: names[stage],
    parts: entries(counts).map(([outcome, count]) => ({ outcome, count, words: words[outcome] })),
    effective: (counts.applied ?? 0) + (counts.folded ?? 0),
    total: entries(counts).reduce((sum, [, count]) => sum + count, 0),
  }));
  const seen = new Set(rows.flatMap((row) => row.parts.map((part) => part.outcome)));
  const all = /** @type {[Outcome, Words][]} */ (Object.entries(words));
  const legend = all.filter(([outcome]) => seen.has(outcome)).map(([outcome, text]) => ({ outcome, words: text }));
  return { rows, legend };
}

/**
 * Object.entries, with the type of the keys.
 * @template {string} K
 * @template V
 * @param {Partial<Record<K, V>>} record
 */
function entries(record) {
  return /** @type {[K, V][]} */ (Object.entries(record));
}
