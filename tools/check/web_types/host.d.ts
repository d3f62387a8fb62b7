// What web/ uses of ComfyUI's canvas, and nothing else: for the type check only, not shipped.
//
// Each declaration says what the canvas of the oldest supported release and of the tested one both have. If web/ needs
// more of the host, it is declared here first; the browser tests are what shows that it is there.

declare module "*/scripts/app.js" {
  export const app: ComfyApp;
}

declare module "*/scripts/api.js" {
  export const api: { fetchApi(route: string): Promise<Response> };
}

declare const LiteGraph: {
  /** Whether the canvas draws nodes as Nodes 2.0. */
  vueNodesMode?: boolean;
  createNode(type: string): ComfyNode | null;
};

declare class LGraphBadge {
  constructor(options: { text: string; fgColor: string; bgColor: string });
}

type NodeId = number | string;
type Pair = [number, number];

interface ComfyApp {
  rootGraph?: ComfyGraph;
  canvas: ComfyCanvas;
  extensionManager: {
    /** A setting's value by its id. */
    setting: { get(id: string): any };
    toast: { add(message: { severity: string; summary: string; detail: string; life: number }): void };
  };
  registerExtension(extension: ComfyExtension): void;
}

interface ComfyCanvas {
  graph: ComfyGraph;
  /** Nodes, groups and reroutes. */
  selectedItems: Set<unknown>;
  /** ``visible_area``: left, top, width, height, in the graph's own coordinates. */
  ds: { visible_area: ArrayLike<number> };
  /** Everything up to ``emitAfterChange`` is one step for undo. */
  emitBeforeChange(): void;
  emitAfterChange(): void;
  setDirty(foreground: boolean, background: boolean): void;
  deselectAll(): void;
  selectItems(items: ComfyNode[]): void;
}

interface ComfyGraph {
  /** Of the workflow's own graph, or of a subgraph. */
  id: string;
  nodes: ComfyNode[];
  links: Map<number, ComfyLink>;
  /** Of the workflow's own graph: all subgraphs, the inner ones of others, too. */
  subgraphs?: Map<string, ComfyGraph>;
  /** Of a subgraph: its own inputs and outputs, and the node that stands for its inputs. */
  inputs?: ComfyBorder<ComfyInput>[];
  outputs?: ComfyBorder<ComfyOutputSlot>[];
  inputNode?: { pos: ArrayLike<number>; size: ArrayLike<number> };
  add(node: ComfyNode): void;
  remove(node: ComfyNode): void;
  getNodeById(id: NodeId): ComfyNode | null | undefined;
}

interface ComfyLink {
  origin_id: NodeId;
  origin_slot: number;
  target_id: NodeId;
  target_slot: number;
  /** The reroute that it goes through last. */
  parentId?: number;
}

interface ComfyInput {
  name: string;
  type: string | number;
  /** Of an input that gives a widget its value. */
  widget?: { name: string };
}

interface ComfyOutputSlot {
  name: string;
  type: string | number;
}

/** An input or output of a subgraph, and what is linked to it inside. */
interface ComfyBorder<Slot> {
  name: string;
  type: string;
  connect(slot: Slot, node: ComfyNode, reroute?: number): unknown;
}

interface ComfyNode {
  id: NodeId;
  type: string;
  title: string;
  /** The id of the node's Python class; subgraphs and the canvas's own nodes have none. */
  comfyClass?: string;
  graph: ComfyGraph;
  pos: Pair;
  size: Pair;
  inputs?: ComfyInput[];
  outputs: ComfyOutputSlot[];
  widgets?: ComfyWidget[];
  /** 0: it runs; 2: it does not; 4: it passes on what it takes. */
  mode: number;
  /** Of a node that stands for a subgraph: that one. */
  subgraph?: ComfyGraph;
  /** Whether the server never sees it. */
  isVirtualNode?: boolean;
  badges: object[];
  color?: string;
  bgcolor?: string;
  /** ``collapsed`` and ``pinned`` among them. */
  flags?: object;
  /** The class that the canvas made of the node's entry in GET /object_info. */
  constructor: Function & { title: string; nodeData: ComfyNodeDef };
  connect(output: number, target: ComfyNode, input: number | string, reroute?: number): unknown;
  configure(saved: object): void;
  computeSize(): ArrayLike<number>;
  setSize(size: Pair): void;
  setDirtyCanvas(foreground: boolean, background: boolean): void;
  addDOMWidget(name: string, type: string, element: HTMLElement, options: object): ComfyWidget;
  onExecuted?(output: ComfyOutput, ...rest: unknown[]): void;
  /** Called when a saved node has been read. */
  onConfigure?(...saved: unknown[]): void;
}

interface ComfyWidget {
  name: string;
  value?: unknown;
  callback?(value: unknown, ...rest: unknown[]): void;
  /** ``values``: what can be chosen, or a function that gives it. */
  options?: { values?: unknown };
  serialize?: boolean;
  /** Of a DOM widget: what it shows. */
  element?: HTMLElement;
}

/** An entry of GET /object_info: for each input its type, or choices, and its options. */
interface ComfyNodeDef {
  /** "nodes", "comfy_extras..." or "custom_nodes...". */
  python_module?: string;
  input: { required: Record<string, [unknown, Record<string, any>]> };
}

/** A node's output for the canvas, as a run reports it. */
interface ComfyOutput {
  text?: string[];
  koala?: object[];
}

interface ComfyExtension {
  name: string;
  commands?: { id: string; label: string; icon: string; function(): void | Promise<void> }[];
  menuCommands?: { path: string[]; commands: string[] }[];
  getNodeMenuItems?(node: ComfyNode): (null | { content: string; callback(): void })[];
  getSelectionToolboxCommands?(item: unknown): string[];
  /** Called once, before a workflow is opened. */
  setup?(): Promise<void>;
  nodeCreated?(node: ComfyNode): void;
  onNodeOutputsUpdated?(outputs: Record<string, ComfyOutput>): void;
}

/** A workflow's file. A link: id, source node, output, target node, input, type. */
interface SavedWorkflow {
  nodes: SavedNode[];
  links: [number, number, number, number, number, string][];
}

interface SavedNode {
  id: number;
  type: string;
  pos: Pair;
  size: Pair;
  inputs?: SavedSlot[];
  outputs?: SavedSlot[];
}

interface SavedSlot {
  name: string;
}
