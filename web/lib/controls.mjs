// @ts-check
// ControlNets that a sampler gets with its conditioning, and that go by SDXL's layers.

import { key, linkInto, nodeKey, sources, spot, useKey } from "./links.mjs";
import { isKoala } from "./models.mjs";

/**
 * @import { Path, Place, Spot } from "./links.mjs"
 * @import { Taker } from "./samplers.mjs"
 *
 * A ControlNet's output and the inputs that it goes to without KOALA ControlNet.
 * @typedef {{ from: Place, to: Place[] }} Control
 */

export const ADAPTER = "KoalaControlNet";
const [CONDITIONING, CONTROL] = ["CONDITIONING", "CONTROL_NET"];

/**
 * The ControlNets in the conditioning of a MODEL's takers that have no KOALA ControlNet behind them.
 * @param {ComfyGraph} root
 * @param {Taker[]} takers
 * @returns {Control[]}
 */
export function controlsOf(root, takers) {
  /** @type {Map<string, Control>} */
  const found = new Map();
  const nodes = [...takers];
  for (const { node, path } of nodes) {
    for (const input of linked(node, CONTROL, path)) {
      const link = linkInto(input);
      if (!link || adapted(root, input)) continue;
      const from = { graph: input.graph, id: link.origin_id, slot: link.origin_slot };
      const control = found.get(key(from)) ?? { from, to: [] };
      if (!control.to.some((known) => key(known) === key(input))) control.to.push(input);
      found.set(key(from), control);
    }
    const before = linked(node, CONDITIONING, path).flatMap((input) => sources(root, input));
    nodes.push(...before.filter((source) => !nodes.some((known) => nodeKey(known) === nodeKey(source))));
  }
  return [...found.values()];
}

/**
 * A node's inputs of a type that something is linked to.
 * @param {ComfyNode} node
 * @param {string} type
 * @param {Path} path
 */
function linked(node, type, path) {
  const inputs = (node.inputs ?? []).map((input, slot) => ({ type: input.type, at: spot(node, slot, path) }));
  return inputs.filter((input) => input.type === type && linkInto(input.at)).map(({ at }) => at);
}

/**
 * Whether what comes to an input has been through KOALA ControlNet, in every use of its subgraph.
 * @param {ComfyGraph} root
 * @param {Spot} input
 * @returns {boolean}
 */
function adapted(root, input, behind = /** @type {string[]} */ ([])) {
  if (behind.includes(useKey(input))) return false; // a circle
  const from = sources(root, input);
  const next = [...behind, useKey(input)];
  /** @param {Taker} source */
  const passed = ({ node, path }) => linked(node, CONTROL, path).some((before) => adapted(root, before, next));
  return from.length > 0 && from.every((source) => isKoala(source.node) || passed(source));
}
