import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";
import * as graphs from "../../web/lib/graph.mjs";
import { app, Graph, Node } from "./fakes.mjs";

const { centring, freePlace, insert, modelSlot, planSwap, samplersAfter, swapProblem, swapUNet } = graphs;
const BASE = { steps: 25, cfg: 7.5, sampler_name: "euler", scheduler: "ddim_uniform" };
const LIGHTNING = { steps: 10, cfg: 3.5, sampler_name: "euler", scheduler: "simple" };
const OTHER = { steps: 30, cfg: 6, sampler_name: "dpmpp_2m", scheduler: "karras" };
const OUT = -20; // the id of a subgraph's output in its links

let graph;
let published;

/** KOALA U-Net Swap as the canvas makes it: what its files were published with is in its class. */
class Swap extends Node {
  static nodeData;

  constructor() {
    const widgets = { unet_name: "", weight_dtype: "default" };
    super("KoalaUNetSwap", { outputs: ["MODEL", "STRING"], inputs: ["model"], widgets, size: [300, 120] });
  }
}

function sampler() {
  const widgets = { seed: 1, ...OTHER, denoise: 1 };
  const slots = { inputs: ["model", "positive"], outputs: ["LATENT"] };
  return graph.add(new Node("KSampler", { ...slots, widgets, pos: [600, 0] }));
}

function lora() {
  const slots = { inputs: ["model", "clip"], outputs: ["MODEL", "CLIP"] };
  return graph.add(new Node("LoraLoader", { ...slots, widgets: { lora_name: "a", strength_model: 1 }, pos: [300, 0] }));
}

function checkpoint() {
  return graph.add(new Node("CheckpointLoaderSimple", { outputs: ["MODEL", "CLIP", "VAE"] }));
}

beforeEach(() => {
  graph = new Graph();
  published = {
    "sd3.safetensors": { ...OTHER },
    "sub/KOALA-700m.safetensors": { ...BASE },
    "koala-lightning.safetensors": { ...LIGHTNING },
  };
  Swap.nodeData = { input: { required: { unet_name: [[], { koala_published: published }] } } };
  globalThis.LiteGraph = { createNode: (type) => (type === "KoalaUNetSwap" ? new Swap() : null) };
});

test("the MODEL of an SDXL node is found by its type", () => {
  assert.equal(modelSlot(new Node("LoraLoader", { outputs: ["CLIP", "MODEL"] })), 1);
  assert.equal(modelSlot(new Node(undefined, { outputs: ["MODEL"] })), 0);
});

test("no MODEL: other nodes, KOALA's own, groups, nothing", () => {
  const others = [new Node("KSampler", { outputs: ["LATENT"] }), new Node("KoalaLoader", { outputs: ["MODEL"] })];
  assert.deepEqual([...others, {}, null, undefined].map(modelSlot), [-1, -1, -1, -1, -1]);
});

test("samplers are found through LoRAs and patches, each once, and not beyond what takes no MODEL", () => {
  const [loader, first, second, near, far] = [checkpoint(), lora(), lora(), sampler(), sampler()];
  loader.connect(0, first, 0);
  loader.connect(0, near, 0);
  first.connect(0, second, 0);
  second.connect(0, far, 0);
  assert.deepEqual(new Set(samplersAfter(loader)), new Set([near, far]));
  assert.equal(samplersAfter(loader).length, 2);
  const refiner = sampler();
  near.connect(0, refiner, 1); // its LATENT, not a MODEL
  assert.equal(samplersAfter(loader).length, 2);
});

test("a node with some of a sampler's widgets is none", () => {
  const loader = checkpoint();
  const scheduler = new Node("BasicScheduler", { inputs: ["model"], widgets: { scheduler: "simple", steps: 20 } });
  loader.connect(0, graph.add(scheduler), 0);
  assert.deepEqual(samplersAfter(loader), []);
});

test("a circle of nodes is walked once", () => {
  const [loader, first, second] = [checkpoint(), lora(), lora()];
  loader.connect(0, first, 0);
  first.connect(0, second, 0);
  second.connect(0, first, 1);
  assert.deepEqual(samplersAfter(loader), []);
});

test("a plan names the place, the inputs, KOALA's first file and the samplers, and changes nothing", () => {
  const [loader, between, end] = [checkpoint(), lora(), sampler()];
  loader.connect(0, between, 0);
  between.connect(0, end, 0);
  const links = structuredClone([...graph.links]);
  const plan = planSwap(loader, [300, 120], published);
  assert.deepEqual(plan, {
    position: [0, 180], // below the loader
    targets: [{ node: between, slot: 0 }],
    file: "sub/KOALA-700m.safetensors",
    samplers: [end],
  });
  assert.deepEqual([...graph.links], links);
  assert.equal(graph.nodes.length, 3);
  assert.deepEqual(end.values, { seed: 1, ...OTHER, denoise: 1 });
});

test("without a file of KOALA's name the first is chosen; without any, none", () => {
  const loader = checkpoint();
  loader.connect(0, sampler(), 0);
  assert.equal(planSwap(loader, [1, 1], { "b.safetensors": OTHER, "c.safetensors": BASE }).file, "b.safetensors");
  assert.equal(planSwap(loader, [1, 1], {}).file, undefined);
});

test("a swap takes over every input, chooses the file and sets the samplers, as one step", () => {
  const [loader, between, first, second] = [checkpoint(), lora(), sampler(), sampler()];
  const called = [];
  first.widgets.find(({ name }) => name === "scheduler").callback = (value) => called.push(value);
  loader.connect(0, between, 0);
  loader.connect(0, second, 0);
  loader.connect(1, between, 1);
  between.connect(0, first, 0);
  const canvas = app(graph);
  assert.equal(swapUNet(canvas, loader), undefined);
  const swap = graph.nodes.at(-1);
  assert.deepEqual(swap.source(0), ["CheckpointLoaderSimple", 0]);
  assert.deepEqual(between.source(0), ["KoalaUNetSwap", 0]);
  assert.deepEqual(second.source(0), ["KoalaUNetSwap", 0]);
  assert.equal(loader.outputs[0].links.length, 1);
  assert.deepEqual(between.source(1), ["CheckpointLoaderSimple", 1]); // CLIP stays
  assert.deepEqual(swap.values, { unet_name: "sub/KOALA-700m.safetensors", weight_dtype: "default" });
  for (const node of [first, second]) assert.deepEqual(node.values, { seed: 1, ...BASE, denoise: 1 });
  assert.deepEqual(called, ["ddim_uniform"]);
  assert.deepEqual([canvas.state.steps, canvas.state.open], [1, 0]);
});

test("a published setting that a sampler has no widget for is left out", () => {
  for (const settings of Object.values(published)) settings.shift = 3;
  const [loader, end] = [checkpoint(), sampler()];
  loader.connect(0, end, 0);
  assert.equal(swapUNet(app(graph), loader), undefined);
  assert.equal(end.values.steps, 25);
  assert.equal(end.values.shift, undefined);
});

test("a swap without any U-Net file is put in and says where one belongs", () => {
  for (const file of Object.keys(published)) delete published[file];
  const [loader, end] = [checkpoint(), sampler()];
  loader.connect(0, end, 0);
  assert.match(swapUNet(app(graph), loader), /models\/diffusion_models has no U-Net yet/);
  assert.deepEqual(end.source(0), ["KoalaUNetSwap", 0]);
  assert.deepEqual(end.values, { seed: 1, ...OTHER, denoise: 1 });
});

test("a MODEL that goes nowhere, or into a swap, or out of its subgraph is not swapped, and that is said", () => {
  const loader = checkpoint();
  assert.equal(
    swapProblem(loader),
    'The MODEL output of "CheckpointLoaderSimple" is not connected. Connect it first.',
  );
  loader.connect(0, sampler(), 0);
  assert.equal(swapProblem(loader), undefined);
  graph.links.set(99, { origin_id: loader.id, origin_slot: 0, target_id: OUT, target_slot: 0 });
  loader.outputs[0].links.push(99);
  assert.match(swapProblem(loader), /leaves this subgraph/);
  assert.match(swapUNet(app(graph), loader), /leaves this subgraph/);
  assert.equal(graph.nodes.length, 2);
  loader.connect(0, graph.add(new Swap()), 0);
  assert.match(swapProblem(loader), /is already followed by KOALA U-Net Swap/);
});

test("a link that the graph no longer has counts as none", () => {
  const loader = checkpoint();
  loader.outputs[0].links = [7];
  assert.match(swapProblem(loader), /is not connected/);
});

test("a failed change still ends its step", () => {
  const loader = checkpoint();
  loader.connect(0, sampler(), 0);
  const canvas = app(graph);
  graph.add = () => {
    throw new Error("full");
  };
  assert.throws(() => swapUNet(canvas, loader), /full/);
  assert.deepEqual([canvas.state.steps, canvas.state.open], [1, 0]);
});

test("a free place is the one asked for, or the first below what is in the way", () => {
  const node = (x, y, width = 200, height = 100) => ({ pos: [x, y], size: [width, height] });
  assert.deepEqual(freePlace([], [10, 20], [200, 100]), [10, 20]);
  assert.deepEqual(freePlace([node(300, 20)], [10, 20], [200, 100]), [10, 20]);
  assert.deepEqual(freePlace([node(-300, 20)], [10, 20], [200, 100]), [10, 20]);
  assert.deepEqual(freePlace([node(150, 60)], [10, 20], [200, 100]), [10, 240]);
  assert.deepEqual(freePlace([node(0, 260), node(0, 0)], [10, 20], [200, 100]), [10, 440]);
  assert.deepEqual(freePlace([node(0, -90)], [0, 30], [200, 100]), [0, 90]); // a title has to fit in between
  assert.deepEqual(freePlace([node(0, 150)], [0, 20], [200, 100]), [0, 330]);
});

test("saved nodes are moved to the middle of what is visible", () => {
  const nodes = [
    { pos: [0, 0], size: [100, 50] },
    { pos: [300, 100], size: [100, 100] },
  ];
  assert.deepEqual(centring(nodes, [1000, 500, 800, 400]), [1200, 600]);
});

const WORKFLOW = {
  nodes: [
    {
      id: 7,
      type: "VAELoader",
      pos: [0, 0],
      size: [100, 100],
      properties: { models: [] },
      outputs: [{ name: "VAE", type: "VAE", links: [3] }],
    },
    {
      id: 9,
      type: "KSampler",
      pos: [300, 0],
      size: [100, 100],
      inputs: [
        { name: "model", type: "MODEL", link: null },
        { name: "positive", type: "VAE", link: 3 },
      ],
      outputs: [{ name: "LATENT", type: "LATENT", links: null }],
    },
  ],
  links: [[3, 7, 0, 9, 1, "VAE"]],
};

test("a workflow is inserted with ids and links of its own, selected, as one step", () => {
  checkpoint();
  globalThis.LiteGraph.createNode = (type) => new Node(type, { inputs: ["model", "positive"], outputs: ["VAE"] });
  const canvas = app(graph);
  const before = structuredClone(WORKFLOW);
  insert(canvas, WORKFLOW);
  const [, loader, end] = graph.nodes;
  assert.deepEqual([loader.id, end.id], [2, 3]);
  assert.deepEqual([loader.pos, end.pos], [[300, 250], [600, 250]]);
  assert.deepEqual([...graph.links.values()], [{ origin_id: 2, origin_slot: 0, target_id: 3, target_slot: 1 }]);
  assert.deepEqual(loader.outputs[0].links, [1]);
  assert.deepEqual(end.inputs.map(({ link }) => link), [null, null]); // until the canvas links them
  assert.notEqual(loader.properties, WORKFLOW.nodes[0].properties);
  assert.deepEqual(canvas.state.selected, [loader, end]);
  assert.equal(canvas.state.steps, 1);
  assert.deepEqual(WORKFLOW, before);
});

test("a node type that the canvas does not know is named", () => {
  assert.throws(() => insert(app(graph), WORKFLOW), /The node type VAELoader is not registered/);
});
