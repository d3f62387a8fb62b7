import assert from "node:assert/strict";
import { test } from "node:test";
import { INPUTS, OUTPUTS, spot } from "../../web/lib/links.mjs";
import { allBranches, follow, isKoala, isMerge, isSampler, modelOutputs, upstream } from "../../web/lib/models.mjs";
import { Node, subgraph, use } from "./fakes.mjs";
import { add, chain, empty, made } from "./sdxl.mjs";

const MODEL = { inputs: { model: "MODEL" }, outputs: { MODEL: "MODEL" } };
const kinds = (wire) => Object.fromEntries(allBranches([wire]).map(({ node, kind }) => [node?.title, kind]));

test("MODEL outputs are found by their type; what has none, has none", () => {
  assert.deepEqual(modelOutputs(new Node("Both", { outputs: { CLIP: "CLIP", a: "MODEL", b: "MODEL" } })), [1, 2]);
  assert.deepEqual([made("sampler"), {}].map(modelOutputs), [[], []]);
});

test("our nodes are told by their class, samplers by their widgets, merges by core's names", () => {
  assert.deepEqual([made("swap"), made("lora"), {}, null, undefined].map(isKoala), [true, false, false, false, false]);
  assert.deepEqual([made("sampler"), made("advanced"), made("scheduler")].map(isSampler), [true, true, false]);
  assert.deepEqual([new Node("ModelMergeSimple"), new Node("ModelSave")].map(isMerge), [true, false]);
});

test("LoRAs and patches change a MODEL, samplers use it, schedulers look at its noise levels", () => {
  const graph = empty();
  const { loader, lora, patch, sampler, scheduler, guider } = add(graph, {
    loader: "loader",
    lora: "lora",
    patch: "patch",
    sampler: "sampler",
    scheduler: "scheduler",
    guider: "guider",
  });
  chain(loader, lora, patch, sampler);
  chain(loader, scheduler);
  chain(patch, guider);
  assert.deepEqual(kinds(follow(graph, spot(loader, 0))), {
    lora: "change",
    patch: "change",
    sampler: "use",
    scheduler: "look",
    guider: "use",
  });
});

test("a node that gives a MODEL and samples itself is a sampler", () => {
  const graph = empty();
  const { loader, efficient } = add(graph, {
    loader: "loader",
    efficient: ["sampler", { outputs: { MODEL: "MODEL" } }],
  });
  chain(loader, efficient);
  assert.deepEqual(kinds(follow(graph, spot(loader, 0))), { efficient: "use" });
});

test("torch.compile is right behind a swap, but not in front of a LoRA", () => {
  const graph = empty();
  const { loader, lora, sampler, compile } = add(graph, {
    loader: "loader",
    lora: "lora",
    sampler: "sampler",
    compile: "patch",
  });
  compile.comfyClass = "TorchCompileModel";
  chain(loader, lora, compile, sampler);
  assert.equal(kinds(follow(graph, spot(loader, 0))).compile, "use");
  chain(loader, compile, lora, sampler);
  assert.equal(kinds(follow(graph, spot(loader, 0))).compile, "change");
});

test("what needs SDXL's own U-Net keeps it", () => {
  const graph = empty();
  const { loader, diff } = add(graph, { loader: "loader", diff: ["controlnet", { inputs: { model: "MODEL" } }] });
  diff.comfyClass = "DiffControlNetLoader";
  chain(loader, diff);
  assert.deepEqual(kinds(follow(graph, spot(loader, 0))), { diff: "keep" });
});

test("links of a swap count as those of the output in front of it", () => {
  const graph = empty();
  const { loader, swap, other, lora, sampler } = add(graph, {
    loader: "loader",
    swap: "swap",
    other: "swap",
    lora: "lora",
    sampler: "sampler",
  });
  chain(loader, swap, lora);
  chain(loader, other, sampler);
  const wire = follow(graph, spot(loader, 0));
  assert.deepEqual(wire.swaps, [swap, other]);
  assert.deepEqual(
    wire.branches.map(({ node, swap: by }) => [node, by]),
    [
      [lora, swap],
      [sampler, other],
    ],
  );
  const only = follow(graph, spot(loader, 0), other);
  assert.deepEqual([only.swaps, only.branches.map(({ node }) => node)], [[other], [sampler]]);
});

test("a circle of nodes is walked once", () => {
  const graph = empty();
  const { loader, a, b } = add(graph, { loader: "loader", a: "lora", b: "lora" });
  chain(loader, a, b);
  b.connect(0, a, "clip");
  assert.equal(allBranches([follow(graph, spot(loader, 0))]).length, 3);
  assert.deepEqual(
    upstream(graph, b).map(({ title }) => title),
    ["b", "a", "loader"],
  );
});

test("a subgraph that is used twice in a row is followed through both uses, down and up", () => {
  const root = empty();
  const { loader, sampler } = add(root, { loader: "loader", sampler: "sampler" });
  const { inner, node } = subgraph(root, MODEL);
  const second = use(root, inner, "second");
  const { patch } = add(inner, { patch: "patch" });
  inner.link(INPUTS, 0, patch.id, 0);
  inner.link(patch.id, 0, OUTPUTS, 0);
  chain(loader, node, second, sampler);
  assert.equal(kinds(follow(root, spot(loader, 0))).sampler, "use");
  assert.deepEqual(upstream(root, second), [second, patch, patch, loader]);
  chain(second, node); // a circle of subgraphs
  assert.equal(kinds(follow(root, spot(second, 0))).sampler, "use");
  assert.deepEqual(upstream(root, second), [second, patch, patch]);
});

test("a MODEL is followed up to its loader, through subgraphs", () => {
  const root = empty();
  const { sampler, lora } = add(root, { sampler: "sampler", lora: "lora" });
  const { inner, node } = subgraph(root, MODEL);
  const { loader, patch } = add(inner, { loader: "loader", patch: "patch" });
  chain(loader, patch);
  inner.link(patch.id, 0, OUTPUTS, 0);
  chain(node, lora, sampler);
  assert.deepEqual(upstream(root, lora), [lora, patch, loader]);
  assert.deepEqual(upstream(root, node), [node, patch, loader]);
  inner.link(INPUTS, 0, patch.id, 0);
  assert.deepEqual(upstream(root, lora), [lora, patch, node]);
});
