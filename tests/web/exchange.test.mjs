import assert from "node:assert/strict";
import { test } from "node:test";
import { isBeside, isStock, merge, replace } from "../../web/lib/exchange.mjs";
import { linkInto, spot } from "../../web/lib/links.mjs";
import { add, chain, empty, made } from "./sdxl.mjs";

test("a LoRA loader beside the weights is exchanged for one that merges, with its links and values", () => {
  const graph = empty();
  const { loader, lora, sampler, prompt } = add(graph, {
    loader: "loader",
    sampler: "sampler",
    prompt: ["prompt", { inputs: { clip: "CLIP" } }],
    lora: ["lora", { widgets: { lora_name: "mine", strength_model: 0.5 }, pos: [7, 8] }],
  });
  lora.comfyClass = "LoraLoaderBypass";
  lora.mode = 4;
  chain(loader, lora, sampler);
  loader.connect(1, lora, "clip");
  lora.connect(1, prompt, 0);
  assert.equal(isBeside(lora), true);
  const types = [];
  merge(lora, (type) => (types.push(type), made("lora", { title: "new" })));
  const other = graph.nodes.at(-1);
  assert.deepEqual(types, ["LoraLoader"]);
  assert.deepEqual(graph.wires, ["loader>lora", "loader>lora", "lora>prompt", "lora>sampler"]);
  assert.deepEqual(
    [other.values.lora_name, other.values.strength_model, other.pos, other.mode],
    ["mine", 0.5, [7, 8], 4],
  );
  assert.equal(linkInto(spot(other, 1)).origin_slot, 1);
  assert.equal(graph.nodes.includes(lora), false);
});

test("Load LoRA Model is told to merge", () => {
  const { node } = add(empty(), { node: ["patch", { widgets: { bypass: true } }] });
  node.comfyClass = "LoraModelLoader";
  assert.equal(isBeside(node), true);
  merge(node, () => assert.fail("no other node"));
  assert.deepEqual([node.values.bypass, isBeside(node)], [false, false]);
});

test("the stock loader is exchanged for ours, which has further widgets", () => {
  const graph = empty();
  const { koala, lora, sampler } = add(graph, {
    koala: "koala",
    lora: ["lora", { widgets: { lora_name: "mine" } }],
    sampler: "sampler",
  });
  chain(koala, lora, sampler);
  assert.deepEqual([lora, koala].map(isStock), [true, false]);
  replace(lora, (type) => made("lora", { title: type, widgets: { trained_on: "auto" } }));
  assert.deepEqual(graph.wires, ["koala>lora", "lora>sampler"]);
  const { lora_name, trained_on } = graph.nodes.at(-1).values;
  assert.deepEqual([lora_name, trained_on], ["mine", "auto"]);
});

test("what a person has made of the node stays: its title, colours and whether it is collapsed", () => {
  for (const [title, shown] of [
    ["LoraLoader", "KoalaLoraLoader"],
    ["My style", "My style"],
  ]) {
    const graph = empty();
    const { koala, lora } = add(graph, { koala: "koala", lora: "lora" });
    Object.assign(lora, { title, color: "#232", bgcolor: "#353", flags: { collapsed: true } });
    Object.defineProperty(lora, "constructor", { value: { title: "LoraLoader" } });
    chain(koala, lora);
    replace(lora, (type) => made("ours", { title: type }));
    const other = graph.nodes.at(-1);
    assert.deepEqual(
      [other.comfyClass, other.title, other.color, other.bgcolor, other.flags],
      ["KoalaLoraLoader", shown, "#232", "#353", { collapsed: true }],
    );
    assert.notEqual(other.flags, lora.flags);
  }
});

test("other loaders are left", () => assert.equal(isBeside(made("lora")), false));
