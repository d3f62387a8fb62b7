// @ts-check
// Links of a graph, and where they lead across the borders of its subgraphs.
//
// Links are read from the graph's own list: the canvas's newest versions deprecate the lists in a node's slots.

/** Ids that stand in a link for the subgraph's own inputs, where it begins, and outputs, where it ends. */
export const INPUTS = -10;
export const OUTPUTS = -20;
export const REROUTE = "Reroute";
/** Links by name, of the pack KJNodes: what goes into the one comes out of each of the others with the same name. */
const [SET, GET] = ["SetNode", "GetNode"];

/**
 * An output or an input: a node's, by the node's id, or the border's of the subgraph, by INPUTS or OUTPUTS.
 * @typedef {{ graph: ComfyGraph, id: NodeId, slot: number }} Place
 *
 * The nodes that one has gone into to come to a graph, the innermost last; empty where one began in it.
 * @typedef {ComfyNode[]} Path
 *
 * A place in one of the uses of its subgraph.
 * @typedef {Place & { path: Path }} Spot
 */

/**
 * Where an input's value comes from: an output, or (``unlinked``) an input of a subgraph's node with a widget.
 * @typedef {Spot & { node: ComfyNode, unlinked: boolean }} Source
 */

/** A node's input or output. @param {ComfyNode} node @param {number} slot @param {Path} [path] @returns {Spot} */
export function spot(node, slot, path = []) {
  return { graph: node.graph, id: node.id, slot, path };
}

/** A place in a word: the same for the same place. @param {Place} place */
export function key({ graph, id, slot }) {
  return `${graph.id}:${id}:${slot}`;
}

/** The same for a place in one of the uses of its subgraph. @param {Spot} at */
export function useKey(at) {
  return [...at.path.map(({ id }) => id), key(at)].join("/");
}

/** The same for a node. @param {{ node: ComfyNode, path: Path }} at */
export function nodeKey({ node, path }) {
  return useKey(spot(node, 0, path));
}

/** @param {NodeId} one @param {NodeId} other */
function same(one, other) {
  return String(one) === String(other);
}

/** The links that begin at an output. @param {Place} output @returns {ComfyLink[]} */
export function linksFrom({ graph, id, slot }) {
  return [...graph.links.values()].filter((link) => same(link.origin_id, id) && link.origin_slot === slot);
}

/** The link that ends at an input. @param {Place} input @returns {ComfyLink | undefined} */
export function linkInto({ graph, id, slot }) {
  return [...graph.links.values()].find((link) => same(link.target_id, id) && link.target_slot === slot);
}

/** Where a link ends. @param {ComfyGraph} graph @param {ComfyLink} link @returns {Place} */
export function endOf(graph, link) {
  return { graph, id: link.target_id, slot: link.target_slot };
}

/** Whether a node only passes on what it takes, as the canvas's reroutes do. @param {ComfyNode} node */
export function isReroute(node) {
  return (
    node.type === REROUTE || (node.isVirtualNode === true && node.inputs?.length === 1 && node.outputs?.length === 1)
  );
}

/** All graphs of a workflow. @param {ComfyGraph} root */
export function graphs(root) {
  return [root, ...(root.subgraphs?.values() ?? [])];
}

/** The nodes that stand for a subgraph. @param {ComfyGraph} root @param {ComfyGraph} subgraph */
export function uses(root, subgraph) {
  return graphs(root).flatMap((graph) => graph.nodes.filter((node) => node.subgraph === subgraph));
}

/**
 * The way out of a subgraph: the node that one came in by, else every node that stands for it; each with the rest of
 * the path.
 * @param {ComfyGraph} root
 * @param {Spot} from
 * @returns {{ node: ComfyNode, path: Path }[]}
 */
export function outside(root, { graph, path }) {
  const node = path.at(-1);
  return node ? [{ node, path: path.slice(0, -1) }] : uses(root, graph).map((found) => ({ node: found, path: [] }));
}

/**
 * Where what comes to an input goes on unchanged: a reroute's output, the inside of a subgraph, its outside. Empty
 * where the input is that of a node that does something.
 * @param {ComfyGraph} root
 * @param {Spot} end the input
 * @returns {Spot[]}
 */
export function passedOn(root, end) {
  const { graph, id, slot, path } = end;
  if (same(id, OUTPUTS)) {
    const name = graph.outputs?.[slot]?.name;
    return outside(root, end).map(({ node, path }) => spot(node, named(node.outputs, name), path));
  }
  const node = graph.getNodeById(id);
  if (!node) return [];
  const inner = node.subgraph;
  if (inner)
    return [{ graph: inner, id: INPUTS, slot: named(inner.inputs, node.inputs?.[slot].name), path: [...path, node] }];
  if (!isReroute(node)) return [];
  return [node, ...(node.type === SET ? namesakes(node, GET) : [])].map((next) => spot(next, 0, path));
}

/** The nodes of a type with the same name in their first widget. @param {ComfyNode} node @param {string} type */
function namesakes(node, type) {
  const name = node.widgets?.[0]?.value;
  return node.graph.nodes.filter((other) => other.type === type && other.widgets?.[0]?.value === name);
}

/** @param {{ name: string }[] | undefined} slots @param {string | undefined} name */
function named(slots, name) {
  return (slots ?? []).findIndex((slot) => slot.name === name);
}

/**
 * The inputs of nodes that an output reaches through reroutes and borders.
 * @param {ComfyGraph} root
 * @param {Spot} output
 * @returns {(Spot & { node: ComfyNode })[]}
 */
export function targets(root, output, seen = new Set()) {
  if (seen.has(useKey(output))) return [];
  seen.add(useKey(output));
  return linksFrom(output).flatMap((link) => {
    const end = { ...endOf(output.graph, link), path: output.path };
    const further = passedOn(root, end);
    if (further.length) return further.flatMap((next) => targets(root, next, seen));
    const node = output.graph.getNodeById(end.id);
    return node ? [{ ...end, node }] : [];
  });
}

/**
 * Where an input's value comes from, behind reroutes and borders. Empty where nothing is linked to it.
 * @param {ComfyGraph} root
 * @param {Spot} input
 * @returns {Source[]}
 */
export function sources(root, input, seen = new Set()) {
  const link = linkInto(input);
  if (!link || seen.has(useKey(input))) return [];
  seen.add(useKey(input));
  const { graph, path } = input;
  if (same(link.origin_id, INPUTS)) {
    const name = graph.inputs?.[link.origin_slot]?.name;
    return outside(root, input).flatMap(({ node, path }) => {
      const outer = spot(node, named(node.inputs, name), path);
      return linkInto(outer) ? sources(root, outer, seen) : [{ ...outer, node, unlinked: true }];
    });
  }
  const node = graph.getNodeById(link.origin_id);
  if (!node) return [];
  const inner = node.subgraph;
  if (inner) {
    const slot = named(inner.outputs, node.outputs[link.origin_slot].name);
    return sources(root, { graph: inner, id: OUTPUTS, slot, path: [...path, node] }, seen);
  }
  const from = node.type === GET ? namesakes(node, SET)[0] : node;
  if (from && isReroute(from) && linkInto(spot(from, 0))) return sources(root, spot(from, 0, path), seen);
  return [{ ...spot(node, link.origin_slot, path), node, unlinked: false }];
}

/**
 * Link an output to an input; what was linked to the input before is not any more. Throws an Error where neither end is
 * a node's: no link joins two borders.
 * @param {Place} output
 * @param {Place} input
 * @param {number} [reroute] id of the canvas's reroute that the link is to go through
 */
export function connect(output, input, reroute) {
  const [from, to] = [output.graph.getNodeById(output.id), input.graph.getNodeById(input.id)];
  if (from && to) from.connect(output.slot, to, input.slot, reroute);
  else if (to?.inputs) output.graph.inputs?.[output.slot].connect(to.inputs[input.slot], to, reroute);
  else if (from) input.graph.outputs?.[input.slot].connect(from.outputs[output.slot], from, reroute);
  else throw new Error(`There is a node at neither end of the link from ${key(output)} to ${key(input)}.`);
}
