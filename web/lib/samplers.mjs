// @ts-check
// Which widgets hold the settings that a MODEL is sampled with, wherever in the graph they are.

import { linkInto, nodeKey, passedOn, sources, spot, targets } from "./links.mjs";
import { isKoala, isSampler } from "./models.mjs";
import { message } from "./words.mjs";

/**
 * @import { Path, Source, Spot } from "./links.mjs"
 * @import { Words } from "./words.mjs"
 *
 * Values for a KSampler's widgets, by name.
 * @typedef {Record<string, string | number>} Settings
 *
 * What a widget of a node should be. ``part``: it is a number of steps, and follows them.
 * @typedef {{ node: ComfyNode, path: Path, name: string, value: string | number, part?: true }} Wish
 *
 * A sampler, its settings, and why some cannot be set.
 * @typedef {{ node: ComfyNode, wishes: Wish[], faults: Words[] }} Sampler
 *
 * A node that takes a MODEL, in one of the uses of its subgraph.
 * @typedef {{ node: ComfyNode, path: Path }} Taker
 */

const PARTS = ["start_at_step", "end_at_step"]; // widgets of a sampler of some of the steps
const LEFTOVER = "return_with_leftover_noise";
const SPLIT = "SplitSigmas";

/** @param {ComfyNode | undefined} node @param {string} name @returns {ComfyWidget | undefined} */
export function widgetOf(node, name) {
  return node?.widgets?.find((widget) => widget.name === name);
}

/** The slot of an input of a type; -1 where there is none. @param {ComfyNode} node @param {string} type */
function inputOf(node, type) {
  return (node.inputs ?? []).findIndex((input) => input.type === type);
}

/** @param {ComfyNode} node @param {string} type */
function gives(node, type) {
  return (node.outputs ?? []).findIndex((output) => output.type === type);
}

/** Whether a node guides a sampler that it is linked to. @param {ComfyNode} node */
export function isGuider(node) {
  return gives(node, "GUIDER") >= 0;
}

/**
 * The samplers that a MODEL's takers are or belong to, each once, and what each has to be set to in all its uses.
 * @param {ComfyGraph} root
 * @param {Taker[]} takers
 * @param {Settings} settings
 * @returns {Sampler[]}
 */
export function samplersOf(root, takers, settings) {
  /** @type {Map<ComfyNode, Sampler>} */
  const found = new Map();
  const seen = new Set();
  for (const { node, path, guider } of takers.flatMap((taker) => samplersAt(root, taker))) {
    const use = nodeKey({ node, path });
    if (seen.has(use)) continue;
    seen.add(use);
    const { wishes, faults } = describe(root, { node, path }, guider, settings);
    const before = found.get(node);
    before?.wishes.push(...wishes);
    before?.faults.push(...faults);
    if (!before) found.set(node, { node, wishes, faults });
  }
  return [...found.values()];
}

/**
 * The samplers that one taker is or belongs to; ``guider``: the node that holds the guidance scale.
 * @param {ComfyGraph} root
 * @param {Taker} taker
 * @returns {(Taker & { guider: ComfyNode })[]}
 */
export function samplersAt(root, { node, path }) {
  if (isSampler(node) || inputOf(node, "SIGMAS") >= 0 || node.comfyClass === "KoalaSampler") {
    return [{ node, path, guider: node }];
  }
  const slot = gives(node, "GUIDER");
  if (slot < 0) return [];
  return targets(root, spot(node, slot, path)).map((at) => ({ node: at.node, path: at.path, guider: node }));
}

/**
 * @param {ComfyGraph} root
 * @param {Taker} sampler
 * @param {ComfyNode} guider
 * @param {Settings} settings
 * @returns {Sampler}
 */
function describe(root, { node, path }, guider, settings) {
  const { steps, cfg, sampler_name, scheduler } = settings;
  if (node.comfyClass === "KoalaSampler") return { node, wishes: [], faults: presetFaults(node) };
  if (isSampler(node)) {
    const whole = Object.entries(settings).filter(([name]) => widgetOf(node, name));
    const wishes = whole.map(([name, value]) => ({ node, path, name, value }));
    const coupled = stagesWith(root, { node, path });
    const others = coupled
      .filter((stage) => nodeKey(stage) !== nodeKey({ node, path }))
      .flatMap((stage) => [
        { ...stage, name: "steps", value: steps },
        { ...stage, name: "scheduler", value: scheduler },
      ]);
    return {
      node,
      wishes: [...coupled.flatMap((stage) => partsOf(root, stage, PARTS, stage, steps)), ...wishes, ...others],
      faults: [],
    };
  }
  /** @type {Sampler} */
  const sampler = { node, wishes: [], faults: [] };
  /** @param {ComfyNode | undefined} at @param {string} name @param {Settings[string]} value @param {Path} [along] */
  const wish = (at, name, value, along = path) => {
    if (at && widgetOf(at, name)) sampler.wishes.push({ node: at, path: along, name, value });
    else
      sampler.faults.push(message('{setting}, because "{node}" has none', { setting: name, node: (at ?? node).title }));
  };
  wish(guider, "cfg", cfg);
  const [chooser] = sources(root, spot(node, inputOf(node, "SAMPLER"), path));
  wish(chooser?.node, "sampler_name", sampler_name, chooser?.path);
  let [source] = sources(root, spot(node, inputOf(node, "SIGMAS"), path));
  /** @type {Taker[]} */
  const between = []; // nodes that change the noise levels
  while (source && inputOf(source.node, "SIGMAS") >= 0 && !between.some((known) => nodeKey(known) === nodeKey(source))) {
    between.push(source);
    [source] = sources(root, spot(source.node, inputOf(source.node, "SIGMAS"), source.path));
  }
  const splits = between.filter(({ node }) => node.comfyClass === SPLIT);
  sampler.wishes.push(...splits.flatMap((split) => partsOf(root, split, ["step"], source, steps)));
  wish(source?.node, "steps", steps, source?.path);
  if (source?.node.comfyClass !== "KoalaScheduler") wish(source?.node, "scheduler", scheduler, source?.path);
  return sampler;
}

/** KOALA Sampler takes the settings from the MODEL, unless it is told other ones. @param {ComfyNode} node */
function presetFaults(node) {
  const preset = String(widgetOf(node, "preset")?.value);
  return preset === "auto" ? [] : [message('preset, because it is "{preset}"; "auto" follows the model', { preset })];
}

/**
 * Where a sampler's steps begin and end keeps its share of them; what is behind the last step stays there.
 * @param {ComfyGraph} root
 * @param {Taker} taker
 * @param {string[]} names
 * @param {Taker | undefined} stepper the node with the steps
 * @param {Settings[string]} steps that are to be set
 * @returns {Wish[]}
 */
function partsOf(root, { node, path }, names, stepper, steps) {
  const [holder] = stepper ? holdersOf(root, { ...stepper, name: "steps" }, () => true) : [];
  const before = holder && "widget" in holder ? Number(holder.widget.value) : NaN;
  return names.flatMap((name) => {
    const old = Number(widgetOf(node, name)?.value);
    const last = Number(steps);
    if (!(old <= before || (old > before && old < last))) return []; // none, or 10000, which stands for the last step
    return [{ node, path, name, value: old > before ? last : Math.round((old * last) / before), part: true }];
  });
}

/**
 * A sampler and those that go on from the noise it leaves, or that it goes on from: they share the steps.
 * @param {ComfyGraph} root
 * @param {Taker} first
 * @returns {Taker[]}
 */
function stagesWith(root, first) {
  const stages = [first];
  for (const { node, path } of stages) {
    const latent = spot(node, inputOf(node, "LATENT"), path);
    const before = sources(root, latent).filter((at) => leaves(at.node));
    const after = leaves(node) ? targets(root, spot(node, gives(node, "LATENT"), path)) : [];
    const further = [...before, ...after].filter((at) => PARTS.every((name) => widgetOf(at.node, name)));
    stages.push(...further.filter((at) => !stages.some((stage) => nodeKey(stage) === nodeKey(at))));
  }
  return stages;
}

/** Whether a sampler stops before the last step. @param {ComfyNode} node */
function leaves(node) {
  return widgetOf(node, LEFTOVER)?.value === "enable";
}

/**
 * The widget that gives a setting its value: the node's own, that of a node that feeds nothing else, or that of the
 * subgraph's node outside; or why there is none.
 * @typedef {{ node: ComfyNode, widget: ComfyWidget } | { fault: Words }} Holder
 */

/**
 * @param {ComfyGraph} root
 * @param {Omit<Wish, "value"> & { value?: Wish["value"] }} wish
 * @param {(end: Spot) => boolean} wanted whether an input is to have the same value
 * @returns {Holder[]}
 */
export function holdersOf(root, { node, path, name, value }, wanted) {
  const own = widgetOf(node, name);
  const slot = (node.inputs ?? []).findIndex((input) => (input.widget?.name ?? input.name) === name);
  if (slot < 0 || !linkInto(spot(node, slot))) return own ? [{ node, widget: own }] : [];
  const input = spot(node, slot, path);
  return sources(root, input).map((source) => {
    const { title } = source.node;
    const widget = source.unlinked
      ? widgetOf(
          source.node,
          source.node.inputs?.[source.slot].widget?.name ?? source.node.inputs?.[source.slot].name ?? "",
        )
      : constant(source.node);
    if (!widget) return { fault: message('it comes from "{node}", which computes it', { node: title }) };
    if (widget.value !== value && !feeds(root, source).every(wanted)) {
      return { fault: message('it comes from "{node}", which feeds other nodes, too', { node: title }) };
    }
    return { node: source.node, widget };
  });
}

/** The widget of a node that gives a value and nothing else. @param {ComfyNode} node */
function constant(node) {
  const linked = (node.inputs ?? []).some((_, slot) => linkInto(spot(node, slot)));
  return linked || isKoala(node) || (node.outputs?.length ?? 0) !== 1 ? undefined : widgetOf(node, "value");
}

/** What an output feeds, or an input of a subgraph's node. @param {ComfyGraph} root @param {Source} source */
function feeds(root, source) {
  return (source.unlinked ? passedOn(root, source) : [source]).flatMap((output) => targets(root, output));
}
