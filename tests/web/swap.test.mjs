import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";
import { INPUTS } from "../../web/lib/links.mjs";
import { setForFile, swapUNet, watchFile } from "../../web/lib/swap.mjs";
import { translate } from "../../web/lib/words.mjs";
import { app, subgraph, use } from "./fakes.mjs";
import { add, BASE, chain, empty, LIGHTNING, register, SDXL } from "./sdxl.mjs";

let graph;
let canvas;

/** Swap nodes' MODELs; returns how it went and the lines that are said. */
function swap(...nodes) {
  const { severity, words } = swapUNet(canvas, nodes);
  return [severity, ...translate(words).split("\n")];
}

/** A node of another pack. */
function foreign(node) {
  Object.defineProperty(node, "constructor", { value: { nodeData: { python_module: "custom_nodes.other" } } });
  return node;
}

function settings({ values }) {
  return Object.fromEntries(Object.keys(BASE).map((name) => [name, values[name]]));
}

beforeEach(() => {
  graph = empty();
  canvas = app(graph);
  register();
});

test("a swap behind a LoRA, the sampler set, in one step", () => {
  const { loader, lora, sampler } = add(graph, { loader: "loader", lora: "lora", sampler: "sampler" });
  chain(loader, lora, sampler);
  assert.deepEqual(swap(loader), ["success", "koala-700m in place", "the sampler is set as KOALA was published"]);
  assert.deepEqual(graph.wires, ["KoalaUNetSwap>sampler", "loader>lora", "lora>KoalaUNetSwap"]);
  assert.deepEqual(sampler.values, { seed: 1, ...BASE, denoise: 1 });
  assert.deepEqual([canvas.state.steps, canvas.state.open], [1, 0]);
  assert.deepEqual(swap(loader), ["info", '"loader" is already followed by KOALA U-Net Swap.']);
  assert.equal(canvas.state.steps, 1);
});

test("the first file with KOALA in its name is taken; where there is none, that is said", () => {
  const { loader, sampler } = add(graph, { loader: "loader", sampler: "sampler" });
  chain(loader, sampler);
  register({ "": BASE, sd3: SDXL, "sub/KOALA-lightning": LIGHTNING });
  assert.equal(swap(loader)[1], "sub/KOALA-lightning in place");
  assert.deepEqual(settings(sampler), LIGHTNING);
  graph = empty();
  canvas = app(graph);
  register({ "": BASE, sd3: SDXL });
  const other = add(graph, { loader: "loader", sampler: "sampler" });
  chain(other.loader, other.sampler);
  assert.deepEqual(swap(other.loader).slice(0, 3), [
    "warn",
    "sd3 in place",
    "no file has KOALA in its name: choose KOALA's U-Net in KOALA U-Net Swap",
  ]);
});

test("without any file the sampler is set as the base models were published, and it is said where one belongs", () => {
  register({ "": BASE });
  const { loader, sampler } = add(graph, { loader: "loader", sampler: "sampler" });
  chain(loader, sampler);
  const [severity, placed, missing] = swap(loader);
  assert.deepEqual([severity, placed], ["warn", "KOALA U-Net Swap in place"]);
  assert.match(missing, /^models\/diffusion_models has no U-Net yet/);
  assert.deepEqual(settings(sampler), BASE);
  assert.equal(graph.nodes.at(-1).values.unet_name, "");
});

test("two chains of a selection: a swap each, one step; what cannot be swapped is said beside it", () => {
  const { a, one, b, two, lonely } = add(graph, {
    a: "loader",
    one: "sampler",
    b: "loader",
    two: "sampler",
    lonely: "loader",
  });
  chain(a, one);
  chain(b, two);
  assert.deepEqual(swap(a, b, lonely), [
    "warn",
    "2 times KOALA U-Net Swap in place, one for each MODEL that is sampled",
    "2 of 2 samplers set as KOALA was published",
    'The MODEL output of "lonely" is not connected. Connect it first.',
  ]);
  assert.equal(canvas.state.steps, 1);
  assert.match(swap(lonely)[1], /is not connected/);
  assert.equal(canvas.state.steps, 1);
});

test("KOALA ControlNet is put behind the ControlNet, also where the swap is there already", () => {
  const { loader, sampler, net, apply, prompt } = add(graph, {
    loader: "loader",
    sampler: "sampler",
    net: "controlnet",
    apply: "control",
    prompt: "prompt",
  });
  chain(loader, sampler);
  prompt.connect(0, apply, "positive");
  apply.connect(0, sampler, "positive");
  net.connect(0, apply, "control_net");
  assert.equal(swap(loader).at(-1), 'KOALA ControlNet put behind "net"');
  const wires = ["KoalaControlNet>apply", "net>KoalaControlNet"];
  assert.deepEqual(
    graph.wires.filter((wire) => wire.includes("Control")),
    wires,
  );
  net.connect(0, apply, "control_net");
  sampler.widgets.find(({ name }) => name === "steps").value = 50;
  assert.deepEqual(swap(loader), ["success", 'KOALA ControlNet put behind "net"']);
  assert.equal(sampler.values.steps, 50); // a person's own
});

test("a swap from before is moved behind the LoRA; the sampler, which may be set by hand, is left", () => {
  const { loader, old, lora, sampler } = add(graph, {
    loader: "loader",
    old: "swap",
    lora: "lora",
    sampler: "sampler",
  });
  chain(loader, old, lora, sampler);
  old.widgets[0].value = "koala-lightning";
  assert.deepEqual(swap(lora), ["success", "KOALA U-Net Swap moved behind what changes SDXL's MODEL"]);
  assert.deepEqual(settings(sampler), SDXL);
});

test("a LoRA beside the weights is merged into them", () => {
  const { loader, lora, sampler } = add(graph, { loader: "loader", lora: "lora", sampler: "sampler" });
  lora.comfyClass = "LoraLoaderBypass";
  chain(loader, lora, sampler);
  assert.match(swap(loader).at(-1), /^merges its LoRA into the weights now, .*: "lora"$/);
  assert.deepEqual(graph.wires, ["KoalaUNetSwap>sampler", "loader>lora", "lora>KoalaUNetSwap"]);
  assert.equal(graph.nodes.find(({ title }) => title === "lora").comfyClass, "LoraLoader");
});

test("a stock LoRA loader on a model that is KOALA's already gives way to ours", () => {
  const { koala, patch, lora, sampler } = add(graph, {
    koala: "koala",
    patch: "patch",
    lora: "lora",
    sampler: "sampler",
  });
  chain(koala, patch, lora, sampler);
  assert.deepEqual(swap(patch), ["success", 'KOALA LoRA Loader put in the place of "lora"']);
  assert.deepEqual(graph.wires, ["koala>patch", "lora>sampler", "patch>lora"]);
  assert.equal(graph.nodes.at(-1).comfyClass, "KoalaLoraLoader");
  assert.deepEqual(settings(sampler), SDXL);
  assert.deepEqual(swap(patch), ["warn", '"patch" has a KOALA model already.']);
});

test("so does one behind KOALA's own nodes behind the swap", () => {
  const { loader, old, ours, lora, sampler } = add(graph, {
    loader: "loader",
    old: "swap",
    ours: "ours",
    lora: "lora",
    sampler: "sampler",
  });
  chain(loader, old, ours, lora, sampler);
  assert.deepEqual(swap(loader), ["success", 'KOALA LoRA Loader put in the place of "lora"']);
  assert.deepEqual(graph.wires, ["loader>old", "lora>sampler", "old>ours", "ours>lora"]);
  assert.equal(graph.nodes.at(-1).comfyClass, "KoalaLoraLoader");
});

test("what the swap cannot vouch for is named", () => {
  const nodes = add(graph, {
    loader: "loader",
    compile: "patch",
    merge: "patch",
    strange: "patch",
    sampler: "sampler",
    user: "patch",
    strangers: "sampler",
  });
  nodes.compile.comfyClass = "TorchCompileModel";
  nodes.merge.comfyClass = "ModelMergeSimple";
  nodes.user.outputs = [];
  for (const node of [nodes.strange, nodes.user, nodes.strangers]) foreign(node);
  chain(nodes.loader, nodes.compile, nodes.merge, nodes.strange, nodes.sampler);
  chain(nodes.strange, nodes.user);
  chain(nodes.strange, nodes.strangers);
  assert.deepEqual(swap(nodes.loader), [
    "warn",
    "koala-700m in place",
    "2 of 2 samplers set as KOALA was published",
    'left out by the swap, to be put behind it: "compile"',
    'left out by the swap, as it mixes SDXL\'s weights: "merge"',
    'not known: "strange"; KOALA U-Net Swap says after a run what it carried over',
    'not known: what "user" does with the MODEL',
  ]);
});

test("a swap that comes to no sampler is said to", () => {
  const { loader, old, lora } = add(graph, { loader: "loader", old: "swap", lora: "lora" });
  chain(loader, old, lora);
  assert.deepEqual(swap(lora), ["warn", 'The MODEL of "lora" comes to no sampler. Connect it first.']);
});

test("a guider that comes to no sampler is named", () => {
  const { loader, guider } = add(graph, { loader: "loader", guider: "guider" });
  chain(loader, guider);
  assert.deepEqual(swap(loader), [
    "warn",
    "koala-700m in place",
    'The MODEL of "guider" comes to no sampler. Connect it first.',
  ]);
});

test("a ControlNet that comes from outside of the subgraph is called as its input there", () => {
  const { inner } = subgraph(graph, { inputs: { my_net: "CONTROL_NET" } });
  const { loader, apply, sampler } = add(inner, { loader: "loader", apply: "control", sampler: "sampler" });
  chain(loader, sampler);
  apply.connect(0, sampler, "positive");
  inner.link(INPUTS, 0, apply.id, 1);
  assert.equal(swap(loader).at(-1), 'KOALA ControlNet put behind "my_net"');
});

test("another use of the subgraph that the swap is put into is named", () => {
  const nodes = add(graph, { loader: "loader", other: "loader" });
  const { inner, node } = subgraph(graph, { inputs: { model: "MODEL" }, title: "first" });
  const second = use(graph, inner, "second");
  const { lora, sampler } = add(inner, { lora: "lora", sampler: "sampler" });
  inner.link(INPUTS, 0, lora.id, 0);
  chain(lora, sampler);
  chain(nodes.loader, node);
  chain(nodes.other, second);
  assert.deepEqual(swap(nodes.loader), [
    "warn",
    "koala-700m in place",
    "the sampler is set as KOALA was published",
    'changed as well, being the same subgraph: "second"',
  ]);
});

test("another file sets again what still is as the one before was published, and nothing else", () => {
  const { loader, sampler, other } = add(graph, { loader: "loader", sampler: "sampler", other: "sampler" });
  chain(loader, sampler);
  loader.connect(0, other, 0);
  swap(loader);
  const node = graph.nodes.at(-1);
  const told = [];
  watchFile(node, (before) => {
    const notice = setForFile(canvas, node, before);
    told.push(notice ? [notice.severity, translate(notice.words)] : notice);
  });
  const choose = (file) => {
    node.widgets[0].value = file;
    node.widgets[0].callback(file);
  };
  choose("koala-700m"); // the same
  assert.deepEqual(told, []);
  choose("koala-lightning");
  assert.deepEqual([settings(sampler), settings(other)], [LIGHTNING, LIGHTNING]);
  sampler.widgets.find(({ name }) => name === "steps").value = 12;
  choose("koala-700m");
  assert.deepEqual(settings(sampler), { ...BASE, steps: 12 });
  assert.deepEqual(told[1], [
    "warn",
    "1 of 2 samplers set as KOALA was published\n" +
      'not set: "sampler": steps, because it is 12, not what was set before',
  ]);
  choose("unknown");
  choose("koala-700m");
  assert.deepEqual(told.slice(2), [undefined, undefined]);
});

test("a choice in a saved graph is where a later one is counted from", () => {
  const { old } = add(graph, { old: "swap" });
  const called = [];
  old.widgets[0].callback = (value) => called.push(value);
  watchFile(old, (before) => called.push(`before: ${before}`));
  old.widgets[0].value = "koala-700m";
  old.onConfigure();
  old.widgets[0].value = "koala-lightning";
  old.widgets[0].callback("koala-lightning");
  assert.deepEqual(called, ["koala-lightning", "before: koala-700m"]);
  watchFile(add(graph, { loader: "loader" }).loader, () => assert.fail("no file to watch"));
});
