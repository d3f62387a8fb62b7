import assert from "node:assert/strict";
import { test } from "node:test";
import { addBelow, asOneStep, create, freePlace, lead, setWidget } from "../../web/lib/edit.mjs";
import { INPUTS, OUTPUTS } from "../../web/lib/links.mjs";
import { app, subgraph } from "./fakes.mjs";
import { add, empty, made, register } from "./sdxl.mjs";

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

test("the two borders of a subgraph are joined through a reroute, other ends by a link", () => {
  register();
  const { inner } = subgraph(empty(), { inputs: { model: "MODEL" }, outputs: { MODEL: "MODEL" } });
  const { patch } = add(inner, { patch: "patch" });
  const [input, output] = [INPUTS, OUTPUTS].map((id) => ({ graph: inner, id, slot: 0 }));
  lead(input, { graph: inner, id: patch.id, slot: 0 });
  assert.deepEqual(inner.wires, ["in>patch"]);
  lead(input, output);
  assert.deepEqual(inner.wires, ["Reroute>out", "in>Reroute", "in>patch"]);
});

test("a node is added below the one in front of it, or below the border", () => {
  const root = empty();
  const { loader } = add(root, { loader: "loader" });
  const swap = made("swap");
  addBelow(swap, { graph: root, id: loader.id, slot: 0 });
  assert.deepEqual([swap.graph, swap.pos], [root, [0, 180]]);
  const { inner } = subgraph(root, { inputs: { model: "MODEL" } });
  inner.inputNode.pos = [40, 100];
  const inside = made("swap");
  addBelow(inside, { graph: inner, id: INPUTS, slot: 0 });
  assert.deepEqual([inside.graph, inside.pos], [inner, [40, 280]]);
});

test("a failed change still ends its step", () => {
  const canvas = app(empty());
  const fail = () => {
    throw new Error("full");
  };
  assert.throws(() => asOneStep(canvas, fail), /full/);
  assert.deepEqual([canvas.state.steps, canvas.state.open], [1, 0]);
});

test("a widget is set as by a person", () => {
  const called = [];
  const widget = { name: "steps", value: 1, callback: (value) => called.push(value) };
  setWidget(widget, 5);
  setWidget({ name: "cfg" }, 5);
  assert.deepEqual([widget.value, called], [5, [5]]);
});

test("a node type that the canvas does not know is named", () => {
  register();
  assert.throws(() => create("Nothing"), /The node type Nothing is not registered/);
});
