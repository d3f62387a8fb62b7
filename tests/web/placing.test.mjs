import assert from "node:assert/strict";
import { test } from "node:test";
import { INPUTS, linkInto, OUTPUTS, spot } from "../../web/lib/links.mjs";
import { alsoChanged, distinct, inPlace, placements, placeSwaps, startOf } from "../../web/lib/placing.mjs";
import { translate } from "../../web/lib/words.mjs";
import { subgraph, use } from "./fakes.mjs";
import { add, chain, empty, made, register } from "./sdxl.mjs";

const MODEL = { inputs: { model: "MODEL" }, outputs: { MODEL: "MODEL" } };

/** Place the swaps for nodes; returns what placeSwaps gives. */
function swap(root, ...nodes) {
  const wires = distinct(nodes.flatMap((node) => startOf(root, node).wires));
  return placeSwaps(wires, placements(wires), (output, like) => {
    const node = made("swap", { title: "new", widgets: { unet_name: like?.values.unet_name ?? "file" } });
    output.graph.add(node);
    return node;
  });
}

function ready(root, node) {
  const { wires } = startOf(root, node);
  return inPlace(wires, placements(wires));
}

test("behind the last LoRA or patch, in front of every sampler", () => {
  const graph = empty();
  const { loader, lora, patch, sampler, other } = add(graph, {
    loader: "loader",
    lora: "lora",
    patch: "patch",
    sampler: "sampler",
    other: "sampler",
  });
  chain(loader, lora, patch, sampler);
  chain(patch, other);
  assert.equal(ready(graph, loader), false);
  const { added } = swap(graph, loader);
  assert.equal(added.length, 1);
  assert.deepEqual(graph.wires, ["loader>lora", "lora>patch", "new>other", "new>sampler", "patch>new"]);
  assert.equal(ready(graph, loader), true);
});

test("one behind each MODEL that is sampled", () => {
  const graph = empty();
  const { loader, lora, sampler, plain } = add(graph, {
    loader: "loader",
    lora: "lora",
    sampler: "sampler",
    plain: "sampler",
  });
  chain(loader, lora, sampler);
  chain(loader, plain);
  assert.equal(swap(graph, loader).added.length, 2);
  assert.deepEqual(graph.wires, ["loader>lora", "loader>new", "lora>new", "new>plain", "new>sampler"]);
});

test("what asks for noise levels only comes along, but wants no swap of its own", () => {
  const graph = empty();
  const { loader, lora, guider, scheduler, near } = add(graph, {
    loader: "loader",
    lora: "lora",
    guider: "guider",
    scheduler: "scheduler",
    near: "scheduler",
  });
  chain(loader, lora, guider);
  chain(loader, scheduler);
  chain(lora, near);
  assert.equal(swap(graph, loader).added.length, 1);
  assert.deepEqual(graph.wires, ["loader>lora", "loader>scheduler", "lora>new", "new>guider", "new>near"]);
});

test("only noise levels are asked for: a swap, as there is nothing else to do", () => {
  const graph = empty();
  const { loader, scheduler } = add(graph, { loader: "loader", scheduler: "scheduler" });
  chain(loader, scheduler);
  swap(graph, loader);
  assert.deepEqual(graph.wires, ["loader>new", "new>scheduler"]);
});

test("behind a reroute that leads to samplers only, in front of one that leads to LoRAs as well", () => {
  const graph = empty();
  const { loader, a, b, lora, sampler, other, plain } = add(graph, {
    loader: "loader",
    a: "reroute",
    b: "reroute",
    lora: "lora",
    sampler: "sampler",
    other: "sampler",
    plain: "sampler",
  });
  chain(loader, a, plain);
  chain(loader, b, lora, sampler);
  b.connect(0, other, 0);
  swap(graph, loader);
  assert.deepEqual(graph.wires, [
    "a>plain",
    "b>lora",
    "b>new",
    "loader>b",
    "loader>new",
    "lora>new",
    "new>a",
    "new>other",
    "new>sampler",
  ]);
});

test("the canvas's reroutes stay where all links go through the same", () => {
  const graph = empty();
  const { loader, a, b } = add(graph, { loader: "loader", a: "sampler", b: "sampler" });
  loader.connect(0, a, 0, 3);
  loader.connect(0, b, 0, 3);
  const [node] = swap(graph, loader).added;
  assert.deepEqual(
    [node, a, b].map((end) => linkInto(spot(end, 0)).parentId),
    [3, undefined, undefined],
  );
  loader.connect(0, a, 0, 3);
  loader.connect(0, b, 0, 4);
  assert.equal(linkInto(spot(swap(graph, loader).swaps[0], 0)).parentId, 3); // it was there before
});

test("in front of a subgraph that only samples, inside one that has LoRAs too", () => {
  const root = empty();
  const { loader } = add(root, { loader: "loader" });
  const one = subgraph(root, { inputs: { model: "MODEL" }, title: "one" });
  const two = subgraph(root, { inputs: { model: "MODEL" }, title: "two" });
  const { sampler } = add(one.inner, { sampler: "sampler" });
  const { lora, refined, plain } = add(two.inner, { lora: "lora", refined: "sampler", plain: "sampler" });
  one.inner.link(INPUTS, 0, sampler.id, 0);
  two.inner.link(INPUTS, 0, lora.id, 0);
  two.inner.link(INPUTS, 0, plain.id, 0);
  chain(lora, refined);
  chain(loader, one.node);
  chain(loader, two.node);
  assert.equal(swap(root, loader).added.length, 3);
  assert.deepEqual(root.wires, ["loader>new", "loader>two", "new>one"]);
  assert.deepEqual(one.inner.wires, ["in>sampler"]);
  assert.deepEqual(two.inner.wires, ["in>lora", "in>new", "lora>new", "new>plain", "new>refined"]);
  assert.equal(ready(root, loader), true);
});

test("a MODEL that leaves its subgraph: inside where nothing changes it outside, else behind that", () => {
  for (const [between, inside, outside] of [
    [[], ["loader>new", "new>out"], ["node>sampler"]],
    [["lora"], ["loader>out"], ["lora>new", "new>sampler", "node>lora"]],
  ]) {
    const root = empty();
    const { lora, sampler } = add(root, { lora: "lora", sampler: "sampler" });
    const { inner, node } = subgraph(root, { outputs: { MODEL: "MODEL" }, title: "node" });
    const { loader } = add(inner, { loader: "loader" });
    inner.link(loader.id, 0, OUTPUTS, 0);
    chain(node, ...between.map(() => lora), sampler);
    assert.equal(swap(root, loader).added.length, 1);
    assert.deepEqual([inner.wires, root.wires], [inside, outside]);
    assert.equal(ready(root, loader), true);
    assert.equal(ready(root, node), true);
  }
});

test("a MODEL that leaves a subgraph used twice is followed out of both", () => {
  const root = empty();
  const { a, b, lora } = add(root, { a: "sampler", b: "sampler", lora: "lora" });
  const { inner, node } = subgraph(root, { outputs: { MODEL: "MODEL" }, title: "first" });
  const second = use(root, inner, "second");
  const { loader } = add(inner, { loader: "loader" });
  inner.link(loader.id, 0, OUTPUTS, 0);
  chain(node, a);
  chain(second, lora, b);
  swap(root, loader);
  assert.deepEqual(root.wires, ["first>new", "lora>new", "new>a", "new>b", "second>lora"]);
});

test("in a subgraph used twice, a swap is where it is right for both uses", () => {
  for (const [linked, inside, outside] of [
    ["both", ["in>patch", "patch>out"], ["first>new", "lora>new", "new>a", "new>b", "second>lora"]],
    ["in a row", ["in>patch", "patch>out"], ["first>second", "new>a", "second>new"]],
  ]) {
    const root = empty();
    const { loader, a, b, lora } = add(root, { loader: "loader", a: "sampler", b: "sampler", lora: "lora" });
    const { inner, node } = subgraph(root, { ...MODEL, title: "first" });
    const second = use(root, inner, "second");
    const { patch } = add(inner, { patch: "patch" });
    inner.link(INPUTS, 0, patch.id, 0);
    inner.link(patch.id, 0, OUTPUTS, 0);
    if (linked === "both") {
      chain(loader, node, a);
      chain(loader, second, lora, b);
    } else chain(loader, node, second, a);
    swap(root, loader);
    assert.deepEqual(inner.wires, inside);
    assert.deepEqual(root.wires.filter((wire) => !wire.startsWith("loader")), outside);
    assert.equal(ready(root, loader), true);
  }
});

test("a subgraph that another MODEL goes through, too, is left: the swap is behind its node", () => {
  for (const nested of [false, true]) {
    const root = empty();
    const nodes = add(root, { loader: "loader", other: "loader", a: "sampler", b: "sampler" });
    const outer = subgraph(root, { ...MODEL, title: "first" });
    const second = use(root, outer.inner, "second");
    const inner = nested ? subgraph(outer.inner, { ...MODEL, title: "nested" }) : undefined;
    if (inner) {
      root.subgraphs.set(inner.inner.id, inner.inner);
      outer.inner.link(INPUTS, 0, inner.node.id, 0);
      outer.inner.link(inner.node.id, 0, OUTPUTS, 0);
    }
    const at = (inner ?? outer).inner;
    const { patch } = add(at, { patch: "patch" });
    at.link(INPUTS, 0, patch.id, 0);
    at.link(patch.id, 0, OUTPUTS, 0);
    chain(nodes.loader, outer.node, nodes.a);
    chain(nodes.other, second, nodes.b);
    const { wires } = startOf(root, nodes.loader);
    assert.deepEqual(alsoChanged(root, wires, placements(wires)), []);
    swap(root, nodes.loader);
    assert.deepEqual(at.wires, ["in>patch", "patch>out"]);
    assert.deepEqual(root.wires, ["first>new", "loader>first", "new>a", "other>second", "second>b"]);
    assert.equal(ready(root, nodes.loader), true);
  }
});

test("where another MODEL gets a swap, too, or loses one, its subgraph's node is known", () => {
  const root = empty();
  const { loader, other, lora, a } = add(root, { loader: "loader", other: "loader", lora: "lora", a: "sampler" });
  const { inner, node } = subgraph(root, { ...MODEL, title: "first" });
  const second = use(root, inner, "second");
  const { patch, sampler } = add(inner, { patch: "patch", sampler: "sampler" });
  inner.link(INPUTS, 0, patch.id, 0);
  chain(patch, sampler);
  chain(loader, node);
  chain(other, second);
  const also = () => {
    const { wires } = startOf(root, loader);
    return alsoChanged(root, wires, placements(wires)).map(({ title }) => title);
  };
  assert.deepEqual(also(), ["second"]);
  swap(root, loader);
  assert.deepEqual(inner.wires, ["in>patch", "new>sampler", "patch>new"]);
  assert.deepEqual(also(), []);
  inner.remove(sampler);
  inner.link(inner.nodes.at(-1).id, 0, OUTPUTS, 0);
  chain(node, a);
  assert.deepEqual([also(), ready(root, loader)], [[], true]); // it is in place
  chain(node, lora, a);
  assert.deepEqual(also(), ["second"]);
});

test("several nodes of one chain: one swap", () => {
  const graph = empty();
  const { loader, lora, sampler, second, other } = add(graph, {
    loader: "loader",
    lora: "lora",
    sampler: "sampler",
    second: "loader",
    other: "sampler",
  });
  chain(loader, lora, sampler);
  chain(second, other);
  const wires = () => distinct([lora, loader, second].flatMap((node) => startOf(graph, node).wires));
  assert.equal(wires().length, 2);
  assert.equal(swap(graph, lora, loader, second).added.length, 2);
  assert.deepEqual(graph.wires, ["loader>lora", "lora>new", "new>other", "new>sampler", "second>new"]);
  const again = wires();
  assert.equal(inPlace(again, placements(again)), true);
});

test("a swap in front of LoRAs is moved behind them, from wherever it is asked for", () => {
  for (const from of ["loader", "lora"]) {
    const graph = empty();
    const nodes = add(graph, { loader: "loader", old: "swap", lora: "lora", sampler: "sampler", compared: "sampler" });
    chain(nodes.loader, nodes.old, nodes.lora, nodes.sampler);
    assert.equal(ready(graph, nodes[from]), false);
    assert.deepEqual(swap(graph, nodes[from]), { swaps: [nodes.old], added: [], moved: [nodes.old] });
    assert.deepEqual(graph.wires, ["loader>lora", "lora>old", "old>sampler"]);
  }
});

test("a MODEL beside a swap joins it; asked for from behind it, it is left alone", () => {
  const graph = empty();
  const { loader, old, patch, sampler, plain } = add(graph, {
    loader: "loader",
    old: "swap",
    patch: "patch",
    sampler: "sampler",
    plain: "sampler",
  });
  chain(loader, old, patch, sampler);
  chain(loader, plain);
  assert.deepEqual(swap(graph, patch).moved, [old]);
  assert.deepEqual(graph.wires, ["loader>patch", "loader>plain", "old>sampler", "patch>old"]);
  assert.equal(swap(graph, loader).added.length, 1);
  assert.deepEqual(graph.wires, ["loader>new", "loader>patch", "new>plain", "old>sampler", "patch>old"]);
});

test("a new swap is set like the one that is there; one that is not needed any more goes", () => {
  const graph = empty();
  const { loader, old, other, lora, sampler, refined } = add(graph, {
    loader: "loader",
    old: ["swap", { widgets: { unet_name: "mine" } }],
    other: "swap",
    lora: "lora",
    sampler: "sampler",
    refined: "sampler",
  });
  chain(loader, old, sampler);
  chain(loader, lora, other, refined);
  chain(old, lora);
  chain(lora, refined);
  graph.remove(other);
  const { added } = swap(graph, loader);
  assert.deepEqual(
    added.map(({ values }) => values.unet_name),
    ["mine"],
  );
  assert.deepEqual(graph.wires, ["loader>lora", "loader>old", "lora>new", "new>refined", "old>sampler"]);
});

test("a swap that is all there is in a subgraph leaves the MODEL its way through it", () => {
  register();
  const root = empty();
  const { loader, lora, sampler } = add(root, { loader: "loader", lora: "lora", sampler: "sampler" });
  const { inner, node } = subgraph(root, { ...MODEL, title: "node" });
  const { old } = add(inner, { old: "swap" });
  inner.link(INPUTS, 0, old.id, 0);
  inner.link(old.id, 0, OUTPUTS, 0);
  chain(loader, node, lora, sampler);
  swap(root, lora);
  assert.deepEqual(inner.wires, ["Reroute>out", "in>Reroute"]);
  assert.deepEqual(root.wires, ["loader>node", "lora>new", "new>sampler", "node>lora"]);
  assert.equal(ready(root, lora), true);
});

test("two swaps side by side, to compare, are left", () => {
  const graph = empty();
  const { loader, one, two, a, b } = add(graph, {
    loader: "loader",
    one: "swap",
    two: "swap",
    a: "sampler",
    b: "sampler",
  });
  chain(loader, one, a);
  chain(loader, two, b);
  assert.equal(ready(graph, loader), true);
});

test("a swap that is switched off is switched on", () => {
  const graph = empty();
  const { loader, old, sampler } = add(graph, { loader: "loader", old: "swap", sampler: "sampler" });
  chain(loader, old, sampler);
  old.mode = 4;
  assert.equal(ready(graph, loader), false);
  swap(graph, loader);
  assert.deepEqual([old.mode, graph.wires], [0, ["loader>old", "old>sampler"]]);
});

test("a stock loader with a KOALA file has KOALA's MODEL already", () => {
  const graph = empty();
  const { loader, lora, sampler } = add(graph, {
    loader: ["unet", { widgets: { unet_name: "KOALA/sd_xl.safetensors" } }],
    lora: "lora",
    sampler: "sampler",
  });
  chain(loader, lora, sampler);
  assert.equal(startOf(graph, lora).wires.length, 1); // the folder's name is none of the file's
  for (const name of ["koala-700m.safetensors", "sub/KOALA_1B.safetensors", "sub\\my-koala.sft"]) {
    loader.widgets[0].value = name;
    const { wires, problem, koala } = startOf(graph, lora);
    assert.deepEqual([wires, translate(problem)], [[], '"lora" has a KOALA model already.']);
    assert.equal(koala.length, 1);
  }
});

test("what is not to be swapped is said", () => {
  const graph = empty();
  const { loader, lora, koala, sampler, patch } = add(graph, {
    loader: "loader",
    lora: "lora",
    koala: "koala",
    sampler: "sampler",
    patch: "patch",
  });
  const said = (node) => translate(startOf(graph, node).problem ?? "");
  assert.equal(said(loader), 'The MODEL output of "loader" is not connected. Connect it first.');
  chain(loader, lora);
  assert.equal(said(loader), 'The MODEL of "loader" comes to no sampler. Connect it first.');
  const { old } = add(graph, { old: "swap" });
  chain(loader, old, lora);
  assert.equal(said(lora), 'The MODEL of "lora" comes to no sampler. Connect it first.');
  chain(koala, patch, sampler);
  assert.equal(said(patch), '"patch" has a KOALA model already.');
});
