// Changes to the graph, each undone by one Ctrl+Z.

const SWAP = "KoalaUNetSwap";
const GAP = 80; // pixels between nodes, a title's height among them

/** The output slot of a node's MODEL, -1 where it has none or is one of ours (which give KOALA models already). */
export function modelSlot(node) {
  if (!node?.outputs || node.comfyClass?.startsWith("Koala")) return -1;
  return node.outputs.findIndex((output) => output.type === "MODEL");
}

/** Make changes that count as one step for undo. */
function asOneStep(app, change) {
  app.canvas.emitBeforeChange();
  try {
    return change(app.canvas.graph);
  } finally {
    app.canvas.emitAfterChange();
    app.canvas.setDirty(true, true);
  }
}

/**
 * Put KOALA U-Net Swap behind a node's MODEL, in front of all that took it, and set the samplers behind it as the
 * U-Net was published. Returns what went wrong, for a person, or undefined.
 */
export function swapUNet(app, node) {
  const slot = modelSlot(node);
  const targets = links(node, slot);
  if (!targets.length) return `Nothing takes the MODEL of "${node.title}"; connect it first.`;
  if (targets.some(([target]) => target.comfyClass === SWAP)) return `"${node.title}" has KOALA U-Net Swap behind it.`;
  return asOneStep(app, (graph) => {
    const swap = LiteGraph.createNode(SWAP);
    swap.pos = freePlace(graph, [node.pos[0], node.pos[1] + node.size[1] + GAP], swap.size);
    graph.add(swap);
    node.connect(slot, swap, 0);
    for (const [target, socket] of targets) swap.connect(0, target, socket);
    return setPublished(swap);
  });
}

/** The first place from ``start`` downwards where a node of that size stands on no other. */
function freePlace(graph, [x, y], [width, height]) {
  const inTheWay = ({ pos, size }) =>
    pos[0] < x + width && x < pos[0] + size[0] && pos[1] - GAP / 2 < y + height && y - GAP / 2 < pos[1] + size[1];
  for (let other = graph.nodes.find(inTheWay); other; other = graph.nodes.find(inTheWay)) {
    y = other.pos[1] + other.size[1] + GAP;
  }
  return [x, y];
}

/** Choose a KOALA file and set the samplers downstream as it was published. Returns what went wrong, or undefined. */
function setPublished(swap) {
  const chooser = swap.widgets.find((widget) => widget.name === "unet_name");
  const published = swap.constructor.nodeData.input.required.unet_name[1].koala_published ?? {};
  const files = Object.keys(published);
  const file = files.find((name) => /koala/i.test(name)) ?? files[0];
  if (!file) return "There is no U-Net in models/diffusion_models yet. Put KOALA's there and press R, then choose it.";
  chooser.value = file;
  for (const sampler of samplersBehind(swap)) {
    for (const [name, value] of Object.entries(published[file])) {
      const widget = sampler.widgets.find((known) => known.name === name);
      widget.value = value;
      widget.callback?.(value);
    }
  }
}

/** Every node with a KSampler's widgets that a MODEL reaches, through other nodes that hand it on. */
function samplersBehind(start) {
  const [found, seen, open] = [[], new Set([start]), [start]];
  while (open.length) {
    const node = open.pop();
    const slot = node.outputs.findIndex((output) => output.type === "MODEL");
    for (const [target] of slot < 0 ? [] : links(node, slot)) {
      if (seen.has(target)) continue;
      seen.add(target);
      open.push(target);
      const names = new Set(target.widgets?.map((widget) => widget.name));
      if (["steps", "cfg", "sampler_name", "scheduler"].every((name) => names.has(name))) found.push(target);
    }
  }
  return found;
}

/** The nodes and their sockets that an output is linked to. */
function links(node, slot) {
  const ids = node.outputs[slot]?.links ?? [];
  return ids
    .map((id) => node.graph.getLink(id))
    .map((link) => [node.graph.getNodeById(link.target_id), link.target_slot]);
}

/** Add a saved workflow's nodes and links to the graph, in the middle of what is seen, and select them. */
export function insert(app, workflow) {
  const [left, top, width, height] = app.canvas.ds.visible_area;
  const xs = workflow.nodes.map((saved) => saved.pos[0]);
  const ends = workflow.nodes.map((saved) => saved.pos[0] + saved.size[0]);
  const bottoms = workflow.nodes.map((saved) => saved.pos[1] + saved.size[1]);
  const shift = [
    left + (width - (Math.min(...xs) + Math.max(...ends))) / 2,
    top + (height - Math.max(...bottoms)) / 2,
  ];
  asOneStep(app, (graph) => {
    const added = new Map();
    for (const saved of workflow.nodes) {
      const node = LiteGraph.createNode(saved.type);
      graph.add(node);
      const unlinked = (slots) => slots?.map((slot) => ({ ...slot, link: null, links: null }));
      const pos = [saved.pos[0] + shift[0], saved.pos[1] + shift[1]];
      node.configure({
        ...structuredClone(saved),
        id: node.id,
        pos,
        inputs: unlinked(saved.inputs),
        outputs: unlinked(saved.outputs),
      });
      added.set(saved.id, node);
    }
    for (const [, from, output, to, input] of workflow.links) {
      added.get(from).connect(output, added.get(to), workflow.nodes.find((saved) => saved.id === to).inputs[input].name);
    }
    app.canvas.deselectAll();
    app.canvas.selectItems([...added.values()]);
  });
}
