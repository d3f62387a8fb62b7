// @ts-check
// A saved workflow, put into the graph that is open.

import { asOneStep, create } from "./edit.mjs";

/**
 * How far to move saved nodes so that they lie in the middle of what is visible.
 * @param {Pick<SavedNode, "pos" | "size">[]} nodes
 * @param {ArrayLike<number>} visible left, top, width, height
 * @returns {[number, number]}
 */
export function centring(nodes, visible) {
  /** @param {0 | 1} axis */
  const shift = (axis) => {
    const start = Math.min(...nodes.map((node) => node.pos[axis]));
    const end = Math.max(...nodes.map((node) => node.pos[axis] + node.size[axis]));
    return visible[axis] + (visible[axis + 2] - (start + end)) / 2;
  };
  return [shift(0), shift(1)];
}

/**
 * Add a saved workflow's nodes and links to the graph, in the middle of what is visible, and select them.
 * @param {ComfyApp} app
 * @param {SavedWorkflow} workflow
 */
export function insert(app, workflow) {
  const [right, down] = centring(workflow.nodes, app.canvas.ds.visible_area);
  asOneStep(app, (graph) => {
    /** @type {Map<number, { node: ComfyNode, saved: SavedNode }>} */
    const added = new Map();
    for (const saved of workflow.nodes) {
      const node = create(saved.type);
      graph.add(node);
      node.configure({
        ...structuredClone(saved),
        id: node.id,
        pos: [saved.pos[0] + right, saved.pos[1] + down],
        inputs: unlinked(saved.inputs),
        outputs: unlinked(saved.outputs),
      });
      added.set(saved.id, { node, saved });
    }
    for (const [, from, output, to, input] of workflow.links) {
      const [source, target] = [added.get(from), added.get(to)];
      if (source && target) source.node.connect(output, target.node, target.saved.inputs?.[input].name ?? input);
    }
    app.canvas.deselectAll();
    app.canvas.selectItems([...added.values()].map(({ node }) => node));
  });
}

/**
 * Saved slots without their links, whose ids mean nothing in another graph.
 * @param {SavedSlot[] | undefined} slots
 */
function unlinked(slots) {
  return slots?.map((slot) => ({ ...slot, link: null, links: null }));
}
