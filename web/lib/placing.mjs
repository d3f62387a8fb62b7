// @ts-check
// Where KOALA U-Net Swaps belong: behind everything that changes SDXL's MODEL, in front of everything that uses it.

import { lead } from "./edit.mjs";
import { connect, endOf, key, linkInto, linksFrom, spot, uses } from "./links.mjs";
import { allBranches, follow, isKoala, modelOutputs, SWAP, upstream } from "./models.mjs";
import { widgetOf } from "./samplers.mjs";
import { message } from "./words.mjs";

/**
 * @import { Branch, Kind, Wire } from "./models.mjs"
 * @import { Words } from "./words.mjs"
 *
 * Where a swap belongs, and the links that are to begin at it.
 * @typedef {{ wire: Wire, branches: Branch[] }} Placement
 *
 * What a person wants to be swapped, or why it cannot be; ``koala``: where a MODEL that is KOALA's already goes.
 * @typedef {{ wires: Wire[], problem?: Words, koala?: Wire[] }} Start
 */

const FILES = ["unet_name", "ckpt_name"]; // widgets of loaders that give a MODEL

/**
 * What swapping a node's MODEL is about. Where it has been swapped on its way already, all that the swap serves.
 * @param {ComfyGraph} root
 * @param {ComfyNode} node
 * @returns {Start}
 */
export function startOf(root, node) {
  const before = upstream(root, node);
  const swap = before.filter((found) => found.comfyClass === SWAP).at(-1); // the first on the way
  const link = swap && linkInto(spot(swap, 0));
  if (swap && link) {
    return sampled(node, [
      follow(root, { graph: swap.graph, id: link.origin_id, slot: link.origin_slot, path: [] }, swap),
    ]);
  }
  const loader = before.filter((found) => isKoala(found) || loadsKoala(found)).at(-1);
  if (loader) {
    const koala = modelOutputs(loader).map((slot) => follow(root, spot(loader, slot)));
    return { wires: [], koala, problem: message('"{node}" has a KOALA model already.', { node: node.title }) };
  }
  const outputs = modelOutputs(node).map((slot) => spot(node, slot));
  if (!outputs.some((output) => linksFrom(output).length)) {
    const problem = message('The MODEL output of "{node}" is not connected. Connect it first.', { node: node.title });
    return { wires: [], problem };
  }
  return sampled(
    node,
    outputs.map((output) => follow(root, output)),
  );
}

/** A node's MODELs, or that they come to no sampler. @param {ComfyNode} node @param {Wire[]} wires @returns {Start} */
function sampled(node, wires) {
  return placements(wires).length ? { wires } : { wires: [], problem: noSampler(node) };
}

/** @param {ComfyNode} node */
export function noSampler({ title }) {
  return message('The MODEL of "{node}" comes to no sampler. Connect it first.', { node: title });
}

/** Whether a loader of another's has a KOALA file, by its name. @param {ComfyNode} node */
function loadsKoala(node) {
  return FILES.some((name) => /koala[^/\\]*$/i.test(String(widgetOf(node, name)?.value)));
}

/**
 * What a person wants to be swapped, each output once: those that another one leads to are left out.
 * @param {Wire[]} wires
 * @returns {Wire[]}
 */
export function distinct(wires) {
  const largest = [...wires].sort((one, other) => allBranches([other]).length - allBranches([one]).length);
  return largest.filter((wire, at) => {
    const before = allWires(largest.slice(0, at)).map(key);
    return !before.includes(key(wire));
  });
}

/**
 * Where swaps belong: one behind each MODEL that is used, in front of nothing that changes SDXL's.
 * @param {Wire[]} wires that a person wants to be swapped
 * @returns {Placement[]}
 */
export function placements(wires) {
  const all = wires.flatMap(values);
  const stay = new Set(allWires(wires).flatMap((wire) => unswapped(wire).map(({ link }) => link)));
  const found = all.flatMap((wire) => place(wire, ["use"], stay));
  const chosen = found.length ? found : all.flatMap((wire) => place(wire, ["use", "look"], stay));
  return [...new Map(chosen.map((placement) => [key(placement.wire), placement])).values()];
}

/**
 * The links of an output that are not to begin at a swap: what they lead to needs SDXL's MODEL, or is outside of a
 * subgraph whose other uses would be swapped, too.
 * @param {Wire} wire
 */
function unswapped({ branches, shared, path }) {
  return branches.filter(
    (branch) => meets(branch, ["change", "keep"]) || (shared && !branch.swap && leaves(branch, path.length)),
  );
}

/**
 * Whether an unchanged MODEL leaves a subgraph that is so many deep.
 * @param {Branch} branch
 * @param {number} depth
 * @returns {boolean}
 */
function leaves({ kind, below }, depth) {
  return (
    kind === "pass" &&
    below.some(({ path, branches }) => path.length < depth || branches.some((next) => leaves(next, depth)))
  );
}

/** An output, and those of every node behind it that changes its MODEL. @param {Wire} wire @returns {Wire[]} */
function values(wire) {
  return [wire, ...changed(wire).flatMap(values)];
}

/** @param {Wire} wire @returns {Wire[]} */
function changed(wire) {
  return wire.branches.flatMap(({ kind, below }) =>
    kind === "change" ? below : kind === "pass" ? below.flatMap(changed) : [],
  );
}

/**
 * @param {Wire} wire
 * @param {Kind[]} using
 * @param {Set<ComfyLink>} stay the links that cannot begin at a swap, in one of the uses of their subgraph at least
 * @returns {Placement[]}
 */
function place(wire, using, stay) {
  /** @param {Branch} branch */
  const used = (branch) => meets(branch, using);
  const { branches } = wire;
  const swapped = branches.filter(({ link }) => !stay.has(link));
  const deeper = branches.filter((branch) => used(branch) && stay.has(branch.link)).flatMap(({ below }) => below);
  return [
    ...(swapped.some(used) ? [{ wire, branches: swapped }] : []),
    ...deeper.flatMap((further) => place(further, using, stay)),
  ];
}

/**
 * Whether an unchanged MODEL comes to one of these ends.
 * @param {Branch} branch
 * @param {Kind[]} kinds
 * @returns {boolean}
 */
function meets({ kind, below }, kinds) {
  if (kind !== "pass") return kinds.includes(kind);
  return below.some((wire) => wire.branches.some((next) => meets(next, kinds)));
}

/** All outputs that MODELs reach. @param {Wire[]} wires @returns {Wire[]} */
function allWires(wires) {
  return wires.flatMap((wire) => [wire, ...allWires(wire.branches.flatMap(({ below }) => below))]);
}

/**
 * The links that begin at a swap and should not: what they lead to is to be in front of it.
 * @param {Wire[]} wires
 * @param {Placement[]} found
 */
function strays(wires, found) {
  const right = new Set(found.flatMap(({ branches }) => branches.map(({ link }) => link)));
  const wrong = allWires(wires).flatMap((wire) =>
    wire.branches.flatMap((branch) => (branch.swap && !right.has(branch.link) ? [{ wire, branch }] : [])),
  );
  return [...new Map(wrong.map((stray) => [stray.branch.link, stray])).values()];
}

/**
 * Whether the swaps are where they belong, and switched on.
 * @param {Wire[]} wires
 * @param {Placement[]} found
 */
export function inPlace(wires, found) {
  const swaps = found.flatMap(({ branches }) => branches.map(({ swap }) => swap));
  return swaps.every((swap) => swap && !swap.mode) && !strays(wires, found).length;
}

/**
 * The nodes of subgraphs that get or lose a swap for another use's sake.
 * @param {ComfyGraph} root
 * @param {Wire[]} wires
 * @param {Placement[]} found
 */
export function alsoChanged(root, wires, found) {
  const all = allWires(wires);
  const right = new Set(found.map(({ wire }) => key(wire)));
  const changed = all.filter((wire) => wire.shared && right.has(key(wire)) !== wire.swaps.length > 0);
  const nodes = changed.flatMap(({ path }) => path.flatMap(({ subgraph }) => (subgraph ? uses(root, subgraph) : [])));
  const followed = new Set(all.flatMap(({ path }) => path));
  return [...new Set(nodes)].filter((node) => !followed.has(node));
}

/**
 * What was done with swaps.
 * @typedef {{ swaps: ComfyNode[], added: ComfyNode[], moved: ComfyNode[] }} Placed
 */

/**
 * Put swaps where they belong: those that are there stay, others are moved, missing ones are made.
 * @param {Wire[]} wires
 * @param {Placement[]} found
 * @param {(output: Wire, like: ComfyNode | undefined) => ComfyNode} add a swap to an output's graph, set like another
 * @returns {Placed}
 */
export function placeSwaps(wires, found, add) {
  const present = [...new Set(allWires(wires).flatMap(({ swaps }) => swaps))];
  const spare = present.filter((swap) => !found.some(({ wire }) => wire.swaps.includes(swap)));
  const wrong = strays(wires, found);
  /** @type {Placed} */
  const placed = { swaps: [], added: [], moved: [] };
  for (const { wire, branches } of found) {
    let [swap] = wire.swaps;
    if (!swap) {
      const at = spare.findIndex((other) => other.graph === wire.graph);
      swap = at < 0 ? add(wire, present[0]) : spare.splice(at, 1)[0];
      placed[at < 0 ? "added" : "moved"].push(swap);
      connect(wire, spot(swap, 0), sharedReroute(branches));
    }
    if (swap.mode) swap.mode = 0;
    placed.swaps.push(swap);
    for (const branch of branches) {
      if (!branch.swap || !wire.swaps.includes(branch.swap)) connect(spot(swap, 0), endOf(wire.graph, branch.link));
    }
  }
  for (const { wire, branch } of wrong) lead(wire, endOf(wire.graph, branch.link));
  for (const swap of spare) swap.graph.remove(swap);
  return placed;
}

/** The canvas's reroute that all links go through last, so that it stays. @param {Branch[]} branches */
function sharedReroute(branches) {
  const [first, ...others] = branches.map(({ link }) => link.parentId);
  return others.every((id) => id === first) ? first : undefined;
}
