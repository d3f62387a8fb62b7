// A canvas and a page, as much of them as web/lib asks for.

/** A graph whose nodes are made by ``Node`` below; ``links`` is filled by connecting them. */
export class Graph {
  static count = 0;
  id = `graph ${(Graph.count += 1)}`;
  last = 0;
  nodes = [];
  links = new Map();
  subgraphs = new Map();

  add(node) {
    node.graph = this;
    node.id ??= this.last += 1;
    this.nodes.push(node);
    return node;
  }

  remove(node) {
    for (const [id, link] of this.links) if ([link.origin_id, link.target_id].includes(node.id)) this.links.delete(id);
    this.nodes = this.nodes.filter((other) => other !== node);
    node.graph = null;
  }

  getNodeById(id) {
    return this.nodes.find((node) => node.id === id) ?? null;
  }

  /** As on the canvas, an input has one link at most: an earlier one goes. */
  link(origin_id, origin_slot, target_id, target_slot, parentId) {
    for (const [id, link] of this.links) {
      if (link.target_id === target_id && link.target_slot === target_slot) this.links.delete(id);
    }
    const id = Math.max(0, ...this.links.keys()) + 1;
    this.links.set(id, { origin_id, origin_slot, target_id, target_slot, parentId });
  }

  /** What MODELs and the like go through, in words. */
  get wires() {
    const name = (id) => this.getNodeById(id)?.title ?? { [-10]: "in", [-20]: "out" }[id];
    return [...this.links.values()].map((link) => `${name(link.origin_id)}>${name(link.target_id)}`).sort();
  }
}

/** A subgraph with inputs and outputs, {name: type}, and the node that stands for it in a graph. */
export function subgraph(outer, { inputs = {}, outputs = {}, title = "subgraph", widgets = {} } = {}) {
  const inner = new Graph();
  const border = (slots, connect) =>
    Object.entries(slots).map(([name, type], at) => ({ name, type, connect: connect(at) }));
  inner.inputs = border(inputs, (at) => (slot, node) => inner.link(-10, at, node.id, node.inputs.indexOf(slot)));
  inner.outputs = border(outputs, (at) => (slot, node) => inner.link(node.id, node.outputs.indexOf(slot), -20, at));
  inner.inputNode = { pos: [0, 0], size: [100, 100] };
  outer.subgraphs.set(inner.id, inner);
  return { inner, node: use(outer, inner, title, widgets) };
}

/** Another node that stands for a subgraph. */
export function use(outer, inner, title, widgets = {}) {
  const slots = (border) => Object.fromEntries(border.map(({ name, type }) => [name, type]));
  const node = new Node(undefined, { title, inputs: slots(inner.inputs), outputs: slots(inner.outputs), widgets });
  node.subgraph = inner;
  return outer.add(node);
}

/**
 * A node: its outputs by their types, its inputs and its widgets by name. Inputs and outputs may be {name: type}; each
 * widget whose name an input has gets its value from that.
 */
export class Node {
  constructor(comfyClass, options = {}) {
    const { outputs = [], inputs = [], widgets = {}, pos = [0, 0], size = [200, 100], title = comfyClass } = options;
    Object.assign(this, { comfyClass, type: comfyClass, title, pos, size, badges: [], dirty: 0, mode: 0 });
    this.outputs = entries(outputs, (type) => type).map(([name, type]) => ({ name, type }));
    this.inputs = entries(inputs, (name) => name.toUpperCase()).map(([name, type]) => ({
      name,
      type,
      ...(name in widgets ? { widget: { name } } : {}),
    }));
    this.widgets = Object.entries(widgets).map(([name, value]) => ({ name, value }));
  }

  connect(output, target, input, reroute) {
    const slot = typeof input === "string" ? target.inputs.findIndex(({ name }) => name === input) : input;
    this.graph.link(this.id, output, target.id, slot, reroute);
  }

  configure(saved) {
    Object.assign(this, saved);
  }

  setSize(size) {
    this.size = size;
  }

  computeSize() {
    return [100, 50];
  }

  setDirtyCanvas() {
    this.dirty += 1;
  }

  addDOMWidget(name, type, element, options) {
    const widget = { name, type, element, options };
    this.widgets.push(widget);
    return widget;
  }

  /** The values of its widgets, by name. */
  get values() {
    return Object.fromEntries(this.widgets.map(({ name, value }) => [name, value]));
  }

  /** [type of node, output] that an input comes from. */
  source(slot) {
    const into = ({ target_id, target_slot }) => target_id === this.id && target_slot === slot;
    const link = [...this.graph.links.values()].find(into);
    return link && [this.graph.getNodeById(link.origin_id).comfyClass, link.origin_slot];
  }
}

/** Slots as [name, type], from {name: type} or a list. */
function entries(slots, typeOf) {
  return Array.isArray(slots) ? slots.map((name) => [name, typeOf(name)]) : Object.entries(slots);
}

/** The canvas's app on a graph; ``steps`` counts what undo would go back by. */
export function app(graph, visible_area = [0, 0, 1000, 600]) {
  const state = { steps: 0, open: 0, selected: [] };
  const canvas = {
    graph,
    ds: { visible_area },
    emitBeforeChange: () => void (state.open += 1),
    emitAfterChange: () => void ((state.open -= 1), (state.steps += 1)),
    setDirty: () => {},
    deselectAll: () => void (state.selected = []),
    selectItems: (nodes) => void (state.selected = nodes),
  };
  return { canvas, state, rootGraph: graph };
}

/** An element of a page: its children, attributes and texts are kept, nothing is drawn. */
class Element {
  constructor(name) {
    Object.assign(this, { name, children: [], attributes: {}, style: {}, dataset: {} });
    Object.assign(this, { offsetHeight: 0, textContent: "" });
  }

  append(...children) {
    this.children.push(...children);
  }

  replaceChildren(...children) {
    this.children = children;
  }

  setAttribute(name, value) {
    this.attributes[name] = value;
  }

  hasChildNodes() {
    return this.children.length > 0;
  }

  get firstElementChild() {
    return this.children[0];
  }

  /** Every element inside it that a condition holds for. */
  all(condition) {
    return this.children.flatMap((child) => [...(condition(child) ? [child] : []), ...child.all(condition)]);
  }
}

export const page = {
  createElement: (name) => new Element(name),
  createElementNS: (_, name) => new Element(name),
};

/** Watches nothing by itself: a test calls ``changed`` of the latest. */
export class Observer {
  static latest;

  constructor(changed) {
    this.changed = changed;
    Observer.latest = this;
  }

  observe(element) {
    this.element = element;
  }
}
