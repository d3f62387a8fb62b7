import assert from "node:assert/strict";
import { test } from "node:test";
import { samplersOf } from "../../web/lib/samplers.mjs";
import { apply, plan, report } from "../../web/lib/settings.mjs";
import { translate } from "../../web/lib/words.mjs";
import { add, BASE, empty, SDXL } from "./sdxl.mjs";

function planned(graph, nodes, may) {
  return plan(
    graph,
    samplersOf(
      graph,
      nodes.map((node) => ({ node, path: [] })),
      BASE,
    ),
    may,
  );
}

const said = (settings) => report(settings).map((words) => translate(words));

test("nothing is changed until it is applied; callbacks are called as for a person", () => {
  const graph = empty();
  const { sampler } = add(graph, { sampler: "sampler" });
  const called = [];
  sampler.widgets.find(({ name }) => name === "scheduler").callback = (value) => called.push(value);
  const settings = planned(graph, [sampler]);
  assert.deepEqual(sampler.values, { seed: 1, ...SDXL, denoise: 1 });
  apply(settings);
  assert.deepEqual(sampler.values, { seed: 1, ...BASE, denoise: 1 });
  assert.deepEqual(called, ["ddim_uniform"]);
  assert.deepEqual(said(settings), ["the sampler is set as KOALA was published"]);
  assert.deepEqual(planned(graph, [sampler])[0].changes, []);
});

test("one number for two samplers is set, one for other things as well is named", () => {
  const graph = empty();
  const { number, one, two } = add(graph, { number: "number", one: "sampler", two: "sampler" });
  for (const node of [one, two]) number.connect(0, node, "steps");
  const both = planned(graph, [one, two]);
  apply(both);
  assert.equal(number.values.value, 25);
  assert.deepEqual(said(both), ["2 of 2 samplers set as KOALA was published"]);
  number.widgets[0].value = 30;
  const first = planned(graph, [one]);
  apply(first);
  assert.equal(number.values.value, 30);
  assert.deepEqual(said(first), [
    "0 of 1 samplers set as KOALA was published",
    'not set: "one": steps, because it comes from "number", which feeds other nodes, too',
  ]);
  number.connect(0, two, "cfg");
  number.connect(0, one, "steps");
  assert.match(said(planned(graph, [one, two]))[1], /which feeds other nodes, too/); // 25 and 7.5
});

test("shares of steps that cannot be set stay", () => {
  const graph = empty();
  const { number, base, other } = add(graph, {
    number: "number",
    other: "sampler",
    base: ["advanced", { widgets: { end_at_step: 24 } }],
  });
  for (const node of [base, other]) number.connect(0, node, "steps");
  apply(planned(graph, [base]));
  assert.deepEqual([base.values.end_at_step, base.values.cfg], [24, 7.5]);
});

test("a value that a node does not offer is named", () => {
  const graph = empty();
  const { sampler } = add(graph, { sampler: "sampler" });
  sampler.widgets.find(({ name }) => name === "scheduler").options = { values: ["karras", "simple"] };
  assert.match(said(planned(graph, [sampler]))[1], /scheduler, because "ddim_uniform" is not among its choices/);
});

test("what may not be set is named with its value", () => {
  const graph = empty();
  const { sampler } = add(graph, { sampler: "sampler" });
  const settings = planned(graph, [sampler], (name) => name !== "steps");
  apply(settings);
  assert.deepEqual([sampler.values.steps, sampler.values.cfg], [30, 7.5]);
  assert.match(said(settings)[1], /steps, because it is 30, not what was set before/);
});

test("no samplers, no words", () => assert.deepEqual(report([]), []));
