// @ts-check
// Changes to the graph, each undone by one Ctrl+Z.

const SWAP = "KoalaUNetSwap";
const GAP = 80; // pixels between nodes, a title's height among them
const SAMPLER = ["steps", "cfg", "sampler_name", "scheduler"]; // the widgets that make a node a sampler

/**
 * An input that an output is linked to.
 * @typedef {{ node: ComfyNode, slot: number }} Target
 *
 * Values for a KSampler's widgets, by name.
 * @typedef {Record<string, string | number>} Settings
 *
 * What swapping a U-Net changes: where the new node goes, the MODEL inputs that it takes over, the U-Net's file
 * (undefined where none is installed), and the samplers that get the settings that this file was published with.
 * @typedef {object} SwapPlan
 * @property {[number, number]} position
 * @property {Target[]} targets
 * @property {string | undefined} file
 * @property {ComfyNode[]} samplers
 */

/**
 * The output slot of a node's MODEL; -1 where it has none, or is a KOALA node and gives a KOALA model already.
 * @param {unknown} item anything that can be selected on the canvas
 */
export function modelSlot(item) {
  const node = /** @type {Partial<ComfyNode> | undefined} */ (item);
  if (!node?.outputs || node.comfyClass?.startsWith("Koala")) return -1;
  return node.outputs.findIndex((output) => output.type === "MODEL");
}

/**
 * Why a node's MODEL cannot be swapped, in words for a person; undefined where it can.
 * @param {ComfyNode} node
 */
export function swapProblem(node) {
  const links = outgoing(node, modelSlot(node));
  if (!links.length) return `The MODEL output of "${node.title}" is not connected. Connect it first.`;
  const targets = linked(node, modelSlot(node));
  if (targets.some((target) => target.node.comfyClass === SWAP)) {
    return `"${node.title}" is already followed by KOALA U-Net Swap.`;
  }
  if (targets.length < links.length) {
    return `The MODEL of "${node.title}" leaves this subgraph. Go back to the graph around it and swap it there.`;
  }
}

/**
 * What swapping a node's MODEL would change; nothing is changed yet.
 * @param {ComfyNode} node
 * @param {[number, number]} size of the node to be added
 * @param {Record<string, Settings>} published U-Net file -> the settings that it was published with
 * @returns {SwapPlan}
 */
export function planSwap(node, size, published) {
  const files = Object.keys(published);
  return {
    position: freePlace(node.graph.nodes, [node.pos[0], node.pos[1] + node.size[1] + GAP], size),
    targets: linked(node, modelSlot(node)),
    file: files.find((name) => /koala/i.test(name)) ?? files[0],
    samplers: samplersAfter(node),
  };
}

/**
 * Put KOALA U-Net Swap between a node's MODEL and everything that it is connected to, and set the samplers downstream
 * as the U-Net was published. Returns the problem, in words for a person, or undefined.
 * @param {ComfyApp} app
 * @param {ComfyNode} node
 */
export function swapUNet(app, node) {
  const problem = swapProblem(node);
  if (problem) return problem;
  const swap = create(SWAP);
  const published = swap.constructor.nodeData.input.required.unet_name[1].koala_published ?? {};
  const { position, targets, file, samplers } = planSwap(node, swap.size, published);
  asOneStep(app, (graph) => {
    swap.pos = position;
    graph.add(swap);
    node.connect(modelSlot(node), swap, 0);
    for (const target of targets) swap.connect(0, target.node, target.slot);
    if (!file) return;
    setWidgets(swap, { unet_name: file });
    for (const sampler of samplers) setWidgets(sampler, published[file]);
  });
  if (!file) {
    return "models/diffusion_models has no U-Net yet. Put KOALA's there, press R, and choose it in KOALA U-Net Swap.";
  }
}

/**
 * Set a node's widgets; those that it does not have are left out.
 * @param {ComfyNode} node
 * @param {Settings} values
 */
function setWidgets(node, values) {
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets?.find((known) => known.name === name);
    if (!widget) continue;
    widget.value = value;
    widget.callback?.(value);
  }
}

/**
 * Make changes that count as one step for undo.
 * @param {ComfyApp} app
 * @param {(graph: ComfyGraph) => void} change
 */
function asOneStep(app, change) {
  app.canvas.emitBeforeChange();
  try {
    change(app.canvas.graph);
  } finally {
    app.canvas.emitAfterChange();
    app.canvas.setDirty(true, true);
  }
}

/**
 * A new node, not yet in the graph. Throws an Error where the canvas does not know its type.
 * @param {string} type
 */
function create(type) {
  const node = LiteGraph.createNode(type);
  if (!node) throw new Error(`The node type ${type} is not registered. The server's log says why it was not loaded.`);
  return node;
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

/**
 * Every node with a KSampler's widgets that a node's MODEL reaches, directly or through nodes that pass a MODEL on.
 * @param {ComfyNode} start
 */
export function samplersAfter(start) {
  /** @type {ComfyNode[]} */
  const samplers = [];
  const seen = new Set([start]);
  const open = [start];
  for (let node = open.pop(); node; node = open.pop()) {
    const slot = node.outputs.findIndex((output) => output.type === "MODEL");
    for (const { node: target } of linked(node, slot)) {
      if (seen.has(target)) continue;
      seen.add(target);
      open.push(target);
      const names = new Set(target.widgets?.map((widget) => widget.name));
      if (SAMPLER.every((name) => names.has(name))) samplers.push(target);
    }
  }
  return samplers;
}

/**
 * The links that start at an output.
 * @param {ComfyNode} node
 * @param {number} slot
 */
function outgoing(node, slot) {
  return (node.outputs[slot]?.links ?? []).flatMap((id) => node.graph.getLink(id) ?? []);
}

/**
 * The inputs that an output is linked to. A link to the output of the subgraph around the node leads to none.
 * @param {ComfyNode} node
 * @param {number} slot
 * @returns {Target[]}
 */
function linked(node, slot) {
  return outgoing(node, slot).flatMap((link) => {
    const target = node.graph.getNodeById(link.target_id);
    return target ? { node: target, slot: link.target_slot } : [];
  });
}

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
