import assert from "node:assert/strict";
import { test } from "node:test";
import { centring, insert } from "../../web/lib/insert.mjs";
import { app, Graph, Node } from "./fakes.mjs";

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
  const graph = new Graph();
  graph.add(new Node("CheckpointLoaderSimple", { outputs: ["MODEL", "CLIP", "VAE"] }));
  globalThis.LiteGraph = {
    createNode: (type) => new Node(type, { inputs: ["model", "positive"], outputs: ["VAE"] }),
  };
  const canvas = app(graph);
  const before = structuredClone(WORKFLOW);
  insert(canvas, WORKFLOW);
  const [, loader, end] = graph.nodes;
  assert.deepEqual([loader.id, end.id], [2, 3]);
  assert.deepEqual(
    [loader.pos, end.pos],
    [
      [300, 250],
      [600, 250],
    ],
  );
  assert.deepEqual(graph.wires, ["VAELoader>KSampler"]);
  assert.deepEqual([...graph.links.values()][0].target_slot, 1);
  assert.deepEqual(
    end.inputs.map(({ link }) => link),
    [null, null],
  ); // until the canvas links them
  assert.notEqual(loader.properties, WORKFLOW.nodes[0].properties);
  assert.deepEqual(canvas.state.selected, [loader, end]);
  assert.equal(canvas.state.steps, 1);
  assert.deepEqual(WORKFLOW, before);
});

test("a node type that the canvas does not know is named", () => {
  globalThis.LiteGraph = { createNode: () => null };
  assert.throws(() => insert(app(new Graph()), WORKFLOW), /The node type VAELoader is not registered/);
});
