// @ts-check
// Changes to a graph that one Ctrl+Z undoes.

import { connect, REROUTE, spot } from "./links.mjs";

/** @import { Place } from "./links.mjs" */

const GAP = 80; // pixels between nodes, a title's height among them

const DRAWN = 300; // milliseconds after which Nodes 2.0 has drawn new nodes

/**
 * Set a widget as a person does.
 * @param {ComfyWidget} widget
 * @param {unknown} value
 */
export function setWidget(widget, value) {
  widget.value = value;
  widget.callback?.(value);
}

/**
 * Make changes that count as one step for undo.
 *
 * Nodes 2.0 measures new nodes when it has drawn them, and their sizes belong to the step: there it ends after that.
 * @param {ComfyApp} app
 * @param {(graph: ComfyGraph) => void} change
 */
export function asOneStep(app, change) {
  const end = () => {
    app.canvas.emitAfterChange();
    app.canvas.setDirty(true, true);
  };
  app.canvas.emitBeforeChange();
  try {
    change(app.canvas.graph);
  } catch (error) {
    end();
    throw error;
  }
  if (LiteGraph.vueNodesMode) setTimeout(end, DRAWN);
  else end();
}

/**
 * A new node, not yet in the graph. Throws an Error where the canvas does not know its type.
 * @param {string} type
 * @returns {ComfyNode}
 */
export function create(type) {
  const node = LiteGraph.createNode(type);
  if (!node) throw new Error(`The node type ${type} is not registered. The server's log says why it was not loaded.`);
  return node;
}

/**
 * Add a node below the one that an output belongs to; of the border, where that stands.
 * @param {ComfyNode} node
 * @param {Place} output
 */
export function addBelow(node, { graph, id }) {
  const from = graph.getNodeById(id) ?? graph.inputNode;
  const [x, y] = from ? [from.pos[0], from.pos[1] + from.size[1] + GAP] : [0, 0];
  node.pos = freePlace(graph.nodes, [x, y], node.size);
  graph.add(node);
}

/**
 * Link an output to an input, through a reroute where both are the border's.
 * @param {Place} output
 * @param {Place} input
 */
export function lead(output, input) {
  if (output.graph.getNodeById(output.id) || input.graph.getNodeById(input.id)) return connect(output, input);
  const reroute = create(REROUTE);
  addBelow(reroute, output);
  connect(output, spot(reroute, 0));
  connect(spot(reroute, 0), input);
}

/**
 * The first place from a position downwards where a node of that size overlaps no other.
 * @param {Pick<ComfyNode, "pos" | "size">[]} nodes
 * @param {[number, number]} position
 * @param {[number, number]} size
 * @returns {[number, number]}
 */
export function freePlace(nodes, [x, y], [width, height]) {
  /** @param {Pick<ComfyNode, "pos" | "size">} node */
  const overlaps = ({ pos, size }) =>
    pos[0] < x + width && x < pos[0] + size[0] && pos[1] - GAP / 2 < y + height && y - GAP / 2 < pos[1] + size[1];
  for (let other = nodes.find(overlaps); other; other = nodes.find(overlaps)) {
    y = other.pos[1] + other.size[1] + GAP;
  }
  return [x, y];
}
