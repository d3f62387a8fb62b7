// @ts-check
// Where a MODEL goes: through reroutes and borders of subgraphs, nodes that change it, to the nodes that use it.

import { endOf, linkInto, linksFrom, nodeKey, OUTPUTS, passedOn, sources, spot, useKey, uses } from "./links.mjs";

/** @import { Path, Spot } from "./links.mjs" */

export const SWAP = "KoalaUNetSwap";
export const MODEL = "MODEL";
const SAMPLER = ["steps", "cfg", "sampler_name", "scheduler"]; // the widgets that make a node a sampler

/** Core's nodes that set something with SDXL's U-Net in it, which the swap leaves out: they belong behind it. */
const BEHIND = new Set(["TorchCompileModel", "RenormCFG"]);
/** Those that mix SDXL's weights with another model's, which are none of KOALA's: the swap leaves them out. */
const MERGE = /^ModelMerge/;
/** What needs SDXL's own U-Net. */
const OF_SDXL = new Set(["DiffControlNetLoader"]);

/**
 * What becomes of a MODEL where a link ends:
 * - pass: it goes on unchanged, along ``below``
 * - change: the node gives another MODEL of SDXL's, along ``below``
 * - use: it is sampled, or used in another way; what the node gives itself goes along ``below``
 * - look: only its noise levels are asked for, which KOALA has in common with SDXL
 * - keep: the node needs SDXL's own
 * @typedef {"pass" | "change" | "use" | "look" | "keep"} Kind
 *
 * A link that a MODEL takes. ``swap``: the KOALA U-Net Swap that it begins at now.
 * @typedef {object} Branch
 * @property {ComfyLink} link
 * @property {Kind} kind
 * @property {ComfyNode | undefined} node that it ends at
 * @property {ComfyNode | undefined} swap
 * @property {Path} path
 * @property {Wire[]} below
 *
 * An output with a MODEL, and where that goes. Of a KOALA U-Net Swap that takes it, the links count as the output's.
 * ``shared``: the MODEL has come into a subgraph that is used elsewhere, too.
 * @typedef {Spot & { branches: Branch[], swaps: ComfyNode[], shared: boolean }} Wire
 */

/** The slots of a node's MODEL outputs. @param {Partial<ComfyNode>} node */
export function modelOutputs(node) {
  return (node.outputs ?? []).flatMap((output, slot) => (output.type === MODEL ? [slot] : []));
}

/** Whether a node is one of ours. @param {Partial<ComfyNode> | null | undefined} node */
export function isKoala(node) {
  return node?.comfyClass?.startsWith("Koala") ?? false;
}

/** Whether a node has a sampler's widgets. @param {ComfyNode} node */
export function isSampler(node) {
  const names = new Set(node.widgets?.map((widget) => widget.name));
  return SAMPLER.every((name) => names.has(name));
}

/** Whether a node belongs behind a swap. @param {ComfyNode} node */
export function isBehind(node) {
  return BEHIND.has(node.comfyClass ?? "");
}

/** Whether a node merges models. @param {ComfyNode} node */
export function isMerge(node) {
  return MERGE.test(node.comfyClass ?? "");
}

/**
 * Where the MODEL of an output goes.
 * @param {ComfyGraph} root
 * @param {Spot} output
 * @param {ComfyNode} [only] a KOALA U-Net Swap behind it: the links of others are left out
 * @returns {Wire}
 */
export function follow(root, output, only, seen = new Set()) {
  const shared = output.path.some(({ subgraph }) => subgraph && uses(root, subgraph).length > 1);
  /** @type {Wire} */
  const wire = { ...output, branches: [], swaps: [], shared };
  if (seen.has(useKey(output))) return wire; // a circle, or a node with several MODELs
  seen.add(useKey(output));
  const { graph, path } = output;
  /** @param {Spot} from @param {ComfyNode} [swap] */
  const add = (from, swap) => {
    for (const link of linksFrom(from)) {
      const node = graph.getNodeById(link.target_id) ?? undefined;
      if (node?.comfyClass === SWAP && !swap) {
        if (only && node !== only) continue;
        wire.swaps.push(node);
        add(spot(node, 0, path), node);
      } else if (!only || swap) {
        wire.branches.push(branch(root, { ...endOf(graph, link), path }, link, node, swap, seen));
      }
    }
  };
  add(output);
  return wire;
}

/**
 * @param {ComfyGraph} root
 * @param {Spot} end
 * @param {ComfyLink} link
 * @param {ComfyNode | undefined} node
 * @param {ComfyNode | undefined} swap
 * @param {Set<string>} seen
 * @returns {Branch}
 */
function branch(root, end, link, node, swap, seen) {
  /** @param {Spot[]} spots */
  const along = (spots) => spots.map((next) => follow(root, next, undefined, seen));
  const passed = passedOn(root, end);
  if (passed.length || !node) return { link, kind: "pass", node, swap, path: end.path, below: along(passed) };
  const below = along(modelOutputs(node).map((slot) => spot(node, slot, end.path)));
  return { link, kind: kindOf(node, below), node, swap, path: end.path, below };
}

/** @param {ComfyNode} node @param {Wire[]} below @returns {Kind} */
function kindOf(node, below) {
  if (OF_SDXL.has(node.comfyClass ?? "")) return "keep";
  if (isKoala(node) || isSampler(node)) return "use";
  if (below.length) return isBehind(node) && !below.some(needsSDXL) ? "use" : "change";
  return node.outputs?.some((output) => output.type === "SIGMAS") ? "look" : "use";
}

/** Whether something that a MODEL reaches has to be in front of a swap. @param {Wire} wire @returns {boolean} */
function needsSDXL(wire) {
  return wire.branches.some(({ kind, below }) => kind === "change" || kind === "keep" || below.some(needsSDXL));
}

/** All branches of wires, however far. @param {Wire[]} wires @returns {Branch[]} */
export function allBranches(wires) {
  return wires.flatMap(({ branches }) => branches.flatMap((found) => [found, ...allBranches(found.below)]));
}

/**
 * Where a MODEL that leaves a node comes from: the nodes that it goes through, from this one up.
 * @param {ComfyGraph} root
 * @param {ComfyNode} node
 */
export function upstream(root, node) {
  /** @type {Map<string, ComfyNode>} */
  const found = new Map();
  /** @type {{ node: ComfyNode, path: Path } | undefined} */
  let next = { node, path: [] };
  for (; next && !found.has(nodeKey(next)); next = above(root, next.node, next.path)) {
    found.set(nodeKey(next), next.node);
  }
  return [...found.values()];
}

/** @param {ComfyGraph} root @param {ComfyNode} node @param {Path} path */
function above(root, node, path) {
  const inner = node.subgraph;
  if (inner) {
    const slot = (inner.outputs ?? []).findIndex((output) => output.type === MODEL);
    return sources(root, { graph: inner, id: OUTPUTS, slot, path: [...path, node] })[0];
  }
  const slot = (node.inputs ?? []).findIndex((input, at) => input.type === MODEL && linkInto(spot(node, at)));
  return slot < 0 ? undefined : sources(root, spot(node, slot, path))[0];
}
