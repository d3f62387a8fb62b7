import assert from "node:assert/strict";
import { test } from "node:test";
import {
  connect,
  graphs,
  INPUTS,
  linkInto,
  linksFrom,
  OUTPUTS,
  sources,
  spot,
  targets,
  uses,
} from "../../web/lib/links.mjs";
import { Graph, Node, subgraph, use } from "./fakes.mjs";
import { add, chain, empty } from "./sdxl.mjs";

const MODEL = { inputs: { model: "MODEL" }, outputs: { model: "MODEL" } };
const titles = (spots) => spots.map(({ node }) => node.title).sort();

test("links are read from the graph, not from slots, whose lists the canvas deprecates", () => {
  const graph = empty();
  const { loader, lora, sampler } = add(graph, { loader: "loader", lora: "lora", sampler: "sampler" });
  for (const node of [loader, lora, sampler]) {
    for (const slot of [...node.inputs, ...node.outputs]) {
      for (const name of ["link", "links"]) Object.defineProperty(slot, name, { get: () => assert.fail(name) });
    }
  }
  chain(loader, lora, sampler);
  assert.equal(linksFrom(spot(loader, 0)).length, 1);
  assert.equal(linkInto(spot(sampler, 0)).origin_id, lora.id);
  assert.equal(linkInto(spot(loader, 0)), undefined);
});

test("ids may be numbers here and texts there", () => {
  const graph = empty();
  const { loader, sampler } = add(graph, { loader: "loader", sampler: "sampler" });
  chain(loader, sampler);
  for (const link of graph.links.values()) link.origin_id = String(link.origin_id);
  assert.equal(linksFrom(spot(loader, 0)).length, 1);
});

test("reroutes are passed, both ways, also in a row", () => {
  const graph = empty();
  const { loader, a, b, sampler, other } = add(graph, {
    loader: "loader",
    a: "reroute",
    b: "reroute",
    sampler: "sampler",
    other: "sampler",
  });
  chain(loader, a, b, sampler);
  b.connect(0, other, 0);
  assert.deepEqual(titles(targets(graph, spot(loader, 0))), ["other", "sampler"]);
  assert.deepEqual(titles(sources(graph, spot(sampler, 0))), ["loader"]);
});

test("what is set and got by name is linked", () => {
  const graph = empty();
  const { loader, sampler } = add(graph, { loader: "loader", sampler: "sampler" });
  const virtual = (type, name, options) => {
    const node = graph.add(new Node(undefined, { ...options, widgets: { Constant: name }, title: type }));
    return Object.assign(node, { type, isVirtualNode: true });
  };
  const set = virtual("SetNode", "model", { inputs: { MODEL: "MODEL" }, outputs: { MODEL: "MODEL" } });
  const get = virtual("GetNode", "model", { outputs: { MODEL: "MODEL" } });
  const stranger = virtual("GetNode", "other", { outputs: { MODEL: "MODEL" } });
  chain(loader, set);
  chain(get, sampler);
  assert.deepEqual(titles(targets(graph, spot(loader, 0))), ["sampler"]);
  assert.deepEqual(titles(sources(graph, spot(sampler, 0))), ["loader"]);
  chain(stranger, sampler);
  assert.deepEqual(titles(sources(graph, spot(sampler, 0))), ["GetNode"]);
});

test("a subgraph is gone into and out of, through inner ones too", () => {
  const root = empty();
  const { loader, sampler } = add(root, { loader: "loader", sampler: "sampler" });
  const outer = subgraph(root, { ...MODEL, title: "outer" });
  const inner = subgraph(outer.inner, { ...MODEL, title: "inner" });
  root.subgraphs.set(inner.inner.id, inner.inner);
  const { lora } = add(inner.inner, { lora: "lora" });
  chain(loader, outer.node, sampler);
  outer.inner.link(INPUTS, 0, inner.node.id, 0);
  outer.inner.link(inner.node.id, 0, OUTPUTS, 0);
  inner.inner.link(INPUTS, 0, lora.id, 0);
  inner.inner.link(lora.id, 0, OUTPUTS, 0);
  assert.deepEqual(graphs(root).length, 3);
  const [into] = targets(root, spot(loader, 0));
  assert.deepEqual([into.node, into.path], [lora, [outer.node, inner.node]]);
  const [out] = targets(root, spot(lora, 0, into.path));
  assert.deepEqual([out.node, out.path], [sampler, []]);
  assert.deepEqual(titles(sources(root, spot(sampler, 0))), ["lora"]);
  assert.deepEqual(titles(sources(root, spot(lora, 0, into.path))), ["loader"]);
});

test("a subgraph that is used twice is left where one came in, and everywhere where one began inside", () => {
  const root = empty();
  const { loader, a, b } = add(root, { loader: "loader", a: "sampler", b: "sampler" });
  const { inner, node } = subgraph(root, MODEL);
  const second = use(root, inner, "second");
  const { patch } = add(inner, { patch: "patch" });
  inner.link(INPUTS, 0, patch.id, 0);
  inner.link(patch.id, 0, OUTPUTS, 0);
  chain(loader, node, a);
  chain(second, b);
  assert.deepEqual(uses(root, inner), [node, second]);
  assert.deepEqual(titles(targets(root, spot(patch, 0, [second]))), ["b"]);
  assert.deepEqual(titles(targets(root, spot(patch, 0))), ["a", "b"]);
});

test("an input of a subgraph's node that nothing is linked to gives its widget", () => {
  const root = empty();
  const { inner, node } = subgraph(root, { inputs: { steps: "INT" }, widgets: { steps: 30 } });
  const { sampler } = add(inner, { sampler: "sampler" });
  const steps = sampler.inputs.findIndex(({ name }) => name === "steps");
  inner.link(INPUTS, 0, sampler.id, steps);
  const [source] = sources(root, spot(sampler, steps));
  assert.deepEqual([source.node, source.slot, source.unlinked], [node, 0, true]);
});

test("links are made from a border, to a border and between nodes", () => {
  const root = new Graph();
  const { inner } = subgraph(root, MODEL);
  const { patch, lora } = add(inner, { patch: "patch", lora: "lora" });
  connect({ graph: inner, id: INPUTS, slot: 0 }, spot(patch, 0));
  connect(spot(patch, 0), spot(lora, 0), 7);
  connect(spot(lora, 0), { graph: inner, id: OUTPUTS, slot: 0 });
  assert.deepEqual(inner.wires, ["in>patch", "lora>out", "patch>lora"]);
  assert.equal(linkInto(spot(lora, 0)).parentId, 7);
});

test("a subgraph that is used twice in a row is gone through twice", () => {
  const root = empty();
  const { loader, sampler } = add(root, { loader: "loader", sampler: "sampler" });
  const { inner, node } = subgraph(root, MODEL);
  const second = use(root, inner, "second");
  const { reroute } = add(inner, { reroute: "reroute" });
  inner.link(INPUTS, 0, reroute.id, 0);
  inner.link(reroute.id, 0, OUTPUTS, 0);
  chain(loader, node, second, sampler);
  assert.deepEqual(titles(targets(root, spot(loader, 0))), ["sampler"]);
  assert.deepEqual(titles(sources(root, spot(sampler, 0))), ["loader"]);
  chain(second, node); // a circle
  assert.deepEqual(titles(targets(root, spot(second, 0))), ["sampler"]);
  assert.deepEqual(titles(sources(root, spot(sampler, 0))), []);
});

test("a link without a node at either end is refused", () => {
  const { inner } = subgraph(empty(), MODEL);
  const [output, input] = [INPUTS, OUTPUTS].map((id) => ({ graph: inner, id, slot: 0 }));
  assert.throws(() => connect(output, input), /a node at neither end/);
});
