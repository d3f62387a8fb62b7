// A canvas and a page, as much of them as web/lib asks for.

/** A graph whose nodes are made by ``node`` below; ``links`` is filled by connecting them. */
export class Graph {
  nodes = [];
  links = new Map();

  add(node) {
    node.graph = this;
    node.id ??= this.nodes.length + 1;
    this.nodes.push(node);
    return node;
  }

  getLink(id) {
    return this.links.get(id);
  }

  getNodeById(id) {
    return this.nodes.find((node) => node.id === id) ?? null;
  }
}

/** A node: its outputs by their types, its inputs and its widgets by name. */
export class Node {
  constructor(comfyClass, { outputs = [], inputs = [], widgets = {}, pos = [0, 0], size = [200, 100] } = {}) {
    Object.assign(this, { comfyClass, title: comfyClass, pos, size, badges: [], dirty: 0 });
    this.outputs = outputs.map((type) => ({ type, links: null }));
    this.inputs = inputs.map((name) => ({ name, link: null }));
    this.widgets = Object.entries(widgets).map(([name, value]) => ({ name, value }));
  }

  /** As on the canvas, an input has one link at most: an earlier one goes. */
  connect(output, target, input) {
    const slot = typeof input === "string" ? target.inputs.findIndex(({ name }) => name === input) : input;
    for (const [id, link] of this.graph.links) {
      if (link.target_id !== target.id || link.target_slot !== slot) continue;
      this.graph.links.delete(id);
      const source = this.graph.getNodeById(link.origin_id);
      source.outputs[link.origin_slot].links = source.outputs[link.origin_slot].links.filter((known) => known !== id);
    }
    const id = Math.max(0, ...this.graph.links.keys()) + 1;
    this.graph.links.set(id, { origin_id: this.id, origin_slot: output, target_id: target.id, target_slot: slot });
    this.outputs[output].links = [...(this.outputs[output].links ?? []), id];
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
  return { canvas, state };
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
