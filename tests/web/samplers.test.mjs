import assert from "node:assert/strict";
import { test } from "node:test";
import { INPUTS } from "../../web/lib/links.mjs";
import { holdersOf, samplersOf } from "../../web/lib/samplers.mjs";
import { apply, plan } from "../../web/lib/settings.mjs";
import { translate } from "../../web/lib/words.mjs";
import { Node, subgraph, use } from "./fakes.mjs";
import { add, BASE, chain, empty } from "./sdxl.mjs";

/** [node, widget, value] of everything that is to be set for nodes that take a MODEL. */
function wishes(root, ...nodes) {
  const samplers = samplersOf(
    root,
    nodes.map((node) => ({ node, path: [] })),
    BASE,
  );
  return samplers.flatMap((sampler) => sampler.wishes.map(({ node, name, value }) => [node.title, name, value]));
}

function faults(root, ...nodes) {
  const samplers = samplersOf(
    root,
    nodes.map((node) => ({ node, path: [] })),
    BASE,
  );
  return samplers.flatMap((sampler) => sampler.faults.map((fault) => translate(fault)));
}

/** The linked `steps` of a sampler. @returns {string[]} titles of the nodes that hold the value, or why there is none */
function stepsOf(root, node, wanted = () => true, path = []) {
  const found = holdersOf(root, { node, path, name: "steps" }, wanted);
  return found.map((holder) =>
    "fault" in holder ? translate(holder.fault) : `${holder.node.title}.${holder.widget.name}`,
  );
}

/** A whole chain for SamplerCustomAdvanced. */
function custom(graph, further = {}) {
  const nodes = add(graph, {
    scheduler: "scheduler",
    guider: "guider",
    chooser: "chooser",
    custom: "custom",
    ...further,
  });
  nodes.guider.connect(0, nodes.custom, "guider");
  nodes.chooser.connect(0, nodes.custom, "sampler");
  nodes.scheduler.connect(0, nodes.custom, "sigmas");
  return nodes;
}

test("a sampler with all widgets is set itself, and nothing that it has no widget for", () => {
  const graph = empty();
  const { sampler } = add(graph, { sampler: "sampler" });
  assert.deepEqual(
    wishes(graph, sampler),
    Object.entries(BASE).map(([name, value]) => ["sampler", name, value]),
  );
});

test("a chain of custom sampling is set where each value is", () => {
  const graph = empty();
  const { guider } = custom(graph);
  assert.deepEqual(wishes(graph, guider), [
    ["guider", "cfg", 7.5],
    ["chooser", "sampler_name", "euler"],
    ["scheduler", "steps", 25],
    ["scheduler", "scheduler", "ddim_uniform"],
  ]);
});

test("a split of the noise levels keeps its share of the steps, for both halves", () => {
  const graph = empty();
  const { scheduler, guider, custom: first, split, second } = custom(graph, { split: "split", second: "custom" });
  scheduler.connect(0, split, 0);
  split.connect(0, first, "sigmas");
  split.connect(1, second, "sigmas");
  guider.connect(0, second, "guider");
  const parts = wishes(graph, guider).filter(([node]) => node === "split");
  assert.deepEqual(parts, [
    ["split", "step", 13],
    ["split", "step", 13],
  ]); // 15 of 30 -> 12.5 of 25
});

test("what a chain has no widget for is said", () => {
  const graph = empty();
  const { scheduler, guider, chooser } = custom(graph);
  guider.widgets = [];
  scheduler.title = "KarrasScheduler";
  scheduler.widgets = scheduler.widgets.filter(({ name }) => name === "steps");
  chooser.widgets = [];
  assert.deepEqual(faults(graph, guider), [
    'cfg, because "guider" has none',
    'sampler_name, because "chooser" has none',
    'scheduler, because "KarrasScheduler" has none',
  ]);
});

test("SamplerCustom has its own guidance scale; KOALA Scheduler knows its spacing", () => {
  const graph = empty();
  const { scheduler, one } = add(graph, {
    scheduler: "scheduler",
    one: ["custom", { inputs: { model: "MODEL", sampler: "SAMPLER", sigmas: "SIGMAS" }, widgets: { cfg: 6 } }],
  });
  scheduler.comfyClass = "KoalaScheduler";
  scheduler.widgets = scheduler.widgets.filter(({ name }) => name === "steps");
  scheduler.connect(0, one, "sigmas");
  assert.deepEqual(wishes(graph, one), [
    ["one", "cfg", 7.5],
    ["scheduler", "steps", 25],
  ]);
  assert.deepEqual(faults(graph, one), ['sampler_name, because "one" has none']);
});

test("KOALA Sampler sets itself, unless it is told otherwise", () => {
  const graph = empty();
  const sampler = graph.add(new Node("KoalaSampler", { widgets: { preset: "auto" } }));
  assert.deepEqual(faults(graph, sampler), []);
  sampler.widgets[0].value = "custom";
  assert.match(faults(graph, sampler)[0], /^preset, because it is "custom"/);
});

test("base and refiner share the steps; where one ends and the other begins keeps its share", () => {
  const graph = empty();
  const { base, refiner, upscale } = add(graph, {
    base: ["advanced", { widgets: { end_at_step: 24, return_with_leftover_noise: "enable" } }],
    refiner: ["advanced", { widgets: { start_at_step: 24 } }],
    upscale: "advanced",
  });
  base.connect(0, refiner, "latent_image");
  refiner.connect(0, upscale, "latent_image"); // nothing is left over: it has steps of its own
  const coupled = [
    ["base", "start_at_step", 0],
    ["base", "end_at_step", 20],
    ["refiner", "start_at_step", 20],
    ["base", "steps", 25],
    ["base", "cfg", 7.5],
    ["base", "sampler_name", "euler"],
    ["base", "scheduler", "ddim_uniform"],
    ["refiner", "steps", 25],
    ["refiner", "scheduler", "ddim_uniform"],
  ];
  assert.deepEqual(wishes(graph, base), coupled);
  const own = wishes(graph, base, refiner)
    .filter(([node]) => node === "refiner")
    .map(([, name]) => name);
  assert.ok(own.includes("cfg"));
  assert.ok(
    wishes(graph, refiner).some(([node, name, value]) => node === "base" && name === "end_at_step" && value === 20),
  );
});

test("steps that end, or split, behind the last one do so with more steps, too", () => {
  const graph = empty();
  const few = { steps: 4, end_at_step: 10 };
  const { sampler, all } = add(graph, {
    sampler: ["advanced", { widgets: few }],
    all: ["advanced", { widgets: { steps: 4 } }],
  });
  const ends = (node) => wishes(graph, node).filter(([, name]) => name === "end_at_step");
  assert.deepEqual(ends(sampler), [["sampler", "end_at_step", 25]]);
  sampler.widgets.find(({ name }) => name === "end_at_step").value = 40;
  assert.deepEqual([ends(sampler), ends(all)], [[], []]);
  const { scheduler, guider, split, custom: first } = custom(graph, { split: "split" });
  scheduler.widgets.find(({ name }) => name === "steps").value = 10;
  scheduler.connect(0, split, 0);
  split.connect(0, first, "sigmas");
  const parts = wishes(graph, guider).filter(([node]) => node === "split");
  assert.deepEqual(parts, [["split", "step", 25]]);
});

test("a sampler in a subgraph that is used twice is one, set in every use", () => {
  const root = empty();
  const { inner, node } = subgraph(root, { inputs: { steps: "INT" }, widgets: { steps: 30 }, title: "first" });
  const second = use(root, inner, "second", { steps: 40 });
  const { sampler } = add(inner, { sampler: "sampler" });
  const slot = sampler.inputs.findIndex(({ name }) => name === "steps");
  inner.link(INPUTS, 0, sampler.id, slot);
  const takers = [node, second, second].map((outer) => ({ node: sampler, path: [outer] }));
  const settings = plan(root, samplersOf(root, takers, BASE));
  assert.equal(settings.length, 1);
  apply(settings);
  assert.deepEqual([node.values.steps, second.values.steps, sampler.values.cfg], [25, 25, BASE.cfg]);
});

test("a fault that a sampler has in every use is said once", () => {
  const root = empty();
  const { inner, node } = subgraph(root);
  const second = use(root, inner, "second");
  const { guider } = custom(inner);
  guider.widgets = [];
  const takers = [node, second].map((outer) => ({ node: guider, path: [outer] }));
  const [{ faults }] = plan(root, samplersOf(root, takers, BASE));
  assert.deepEqual(faults.map((fault) => translate(fault)), ['cfg, because "guider" has none']);
});

test("a linked setting is set where it comes from, if that feeds nothing else", () => {
  const graph = empty();
  const { number, sampler, other, reroute } = add(graph, {
    number: "number",
    sampler: "sampler",
    other: "sampler",
    reroute: "reroute",
  });
  chain(number, reroute);
  reroute.connect(0, sampler, "steps");
  assert.deepEqual(stepsOf(graph, sampler), ["number.value"]);
  number.connect(0, other, "steps");
  const ours = (end) => end.id === sampler.id;
  assert.deepEqual(stepsOf(graph, sampler, ours), ['it comes from "number", which feeds other nodes, too']);
  assert.deepEqual(
    stepsOf(graph, sampler, () => true),
    ["number.value"],
  );
});

test("a setting that is computed is not set", () => {
  const graph = empty();
  const { number, sum, sampler } = add(graph, {
    number: "number",
    sampler: "sampler",
    sum: ["number", { inputs: { a: "INT" } }],
  });
  number.connect(0, sum, 0);
  sum.connect(0, sampler, "steps");
  assert.deepEqual(stepsOf(graph, sampler), ['it comes from "sum", which computes it']);
});

test("a setting that a subgraph shows outside is set there, in every use of it", () => {
  const root = empty();
  const { inner, node } = subgraph(root, { inputs: { steps: "INT" }, widgets: { steps: 30 }, title: "first" });
  const second = use(root, inner, "second", { steps: 40 });
  const { sampler, other } = add(inner, { sampler: "sampler", other: "sampler" });
  const slot = sampler.inputs.findIndex(({ name }) => name === "steps");
  inner.link(INPUTS, 0, sampler.id, slot);
  assert.deepEqual(stepsOf(root, sampler), ["first.steps", "second.steps"]);
  assert.deepEqual(
    stepsOf(root, sampler, () => true, [second]),
    ["second.steps"],
  );
  inner.link(INPUTS, 0, other.id, slot);
  const ours = (end) => end.id === sampler.id;
  assert.match(stepsOf(root, sampler, ours, [node])[0], /feeds other nodes, too/);
  const { number } = add(root, { number: "number" });
  number.connect(0, node, 0);
  assert.deepEqual(
    stepsOf(root, sampler, () => true, [node]),
    ["number.value"],
  );
});
