import assert from "node:assert/strict";
import { test } from "node:test";
import { controlsOf } from "../../web/lib/controls.mjs";
import { INPUTS } from "../../web/lib/links.mjs";
import { Node, subgraph, use } from "./fakes.mjs";
import { add, empty } from "./sdxl.mjs";

const described = (graph, node) =>
  controlsOf(graph, [{ node, path: [] }]).map(({ from, to }) => [
    graph.getNodeById(from.id).title,
    to.map((input) => graph.getNodeById(input.id).title),
  ]);

test("ControlNets in a sampler's conditioning are found, each output once, however far up", () => {
  const graph = empty();
  const nodes = add(graph, {
    net: "controlnet",
    prompt: "prompt",
    first: "control",
    second: "control",
    sampler: "sampler",
    other: "control",
  });
  nodes.prompt.connect(0, nodes.first, "positive");
  nodes.first.connect(0, nodes.second, "positive");
  nodes.second.connect(0, nodes.sampler, "positive");
  for (const apply of [nodes.first, nodes.second, nodes.other]) nodes.net.connect(0, apply, "control_net");
  assert.deepEqual(described(graph, nodes.sampler), [["net", ["second", "first"]]]);
});

test("what comes through KOALA ControlNet is left, also with a node behind it", () => {
  const graph = empty();
  const { net, adapter, apply, sampler } = add(graph, {
    net: "controlnet",
    adapter: "adapter",
    apply: "control",
    sampler: "sampler",
  });
  const type = graph.add(
    new Node("SetUnionControlNetType", {
      inputs: { control_net: "CONTROL_NET" },
      outputs: { CONTROL_NET: "CONTROL_NET" },
    }),
  );
  apply.connect(0, sampler, "positive");
  net.connect(0, type, 0);
  type.connect(0, apply, "control_net");
  assert.deepEqual(described(graph, sampler), [["SetUnionControlNetType", ["apply"]]]);
  net.connect(0, adapter, 0);
  adapter.connect(0, type, 0);
  assert.deepEqual(described(graph, sampler), []);
});

test("a subgraph that is used twice has the ControlNets of both uses", () => {
  const root = empty();
  const { inner, node } = subgraph(root, { inputs: { positive: "CONDITIONING" } });
  const second = use(root, inner, "second");
  const { sampler, area } = add(inner, {
    sampler: "sampler",
    area: ["prompt", { inputs: { positive: "CONDITIONING" } }],
  });
  inner.link(INPUTS, 0, area.id, 0);
  area.connect(0, sampler, "positive");
  const { prompt, net, apply } = add(root, { prompt: "prompt", net: "controlnet", apply: "control" });
  prompt.connect(0, node, 0);
  apply.connect(0, second, 0);
  net.connect(0, apply, "control_net");
  const found = controlsOf(
    root,
    [node, second].map((outer) => ({ node: sampler, path: [outer] })),
  );
  assert.deepEqual(
    found.map(({ from }) => from.id),
    [net.id],
  );
});

test("ControlNets in a circle end the search", () => {
  const graph = empty();
  const { apply, sampler } = add(graph, { apply: "control", sampler: "sampler" });
  const slots = { inputs: { control_net: "CONTROL_NET" }, outputs: { CONTROL_NET: "CONTROL_NET" } };
  const [one, two] = ["one", "two"].map((title) => graph.add(new Node("SetUnionControlNetType", { ...slots, title })));
  one.connect(0, two, 0);
  two.connect(0, one, 0);
  two.connect(0, apply, "control_net");
  apply.connect(0, sampler, "positive");
  assert.deepEqual(described(graph, sampler), [["two", ["apply"]]]);
});

test("a ControlNet is left where all uses of the subgraph have adapted it, not where one has", () => {
  const root = empty();
  const { inner, node } = subgraph(root, { inputs: { net: "CONTROL_NET" } });
  const second = use(root, inner, "second");
  const { apply, sampler } = add(inner, { apply: "control", sampler: "sampler" });
  inner.link(INPUTS, 0, apply.id, 1);
  apply.connect(0, sampler, "positive");
  const { net, adapter, type } = add(root, { net: "controlnet", adapter: "adapter", type: "adapter" });
  type.comfyClass = "SetUnionControlNetType";
  net.connect(0, adapter, 0);
  adapter.connect(0, type, 0);
  type.connect(0, node, 0);
  const found = () => controlsOf(root, [{ node: sampler, path: [] }]).length;
  net.connect(0, second, 0);
  assert.equal(found(), 1);
  type.connect(0, second, 0);
  assert.equal(found(), 0);
});
