// @ts-check
// Settings of samplers: what changes, what cannot be set and why, and what a person has set since.

import { setWidget } from "./edit.mjs";
import { holdersOf } from "./samplers.mjs";
import { joined, message } from "./words.mjs";

/**
 * @import { Spot } from "./links.mjs"
 * @import { Sampler, Wish } from "./samplers.mjs"
 * @import { Words } from "./words.mjs"
 *
 * What becomes of a sampler: the widgets that change, and which settings are not set, with the reasons.
 * @typedef {{ node: ComfyNode, changes: { widget: ComfyWidget, value: unknown }[], faults: Words[] }} Setting
 */

/**
 * What becomes of samplers; nothing is changed yet.
 * @param {ComfyGraph} root
 * @param {Sampler[]} samplers
 * @param {(name: string, value: unknown) => boolean} [may] whether a widget with that value may be set
 * @returns {Setting[]}
 */
export function plan(root, samplers, may = () => true) {
  const wishes = new Map(
    samplers.flatMap((sampler) => sampler.wishes.map((wish) => [inputKey(wish.node, wish.name), wish])),
  );
  return samplers.map((sampler) => {
    /** @type {Setting} */
    const setting = { node: sampler.node, changes: [], faults: [] };
    let stepsStay = false;
    const parts = sampler.wishes.filter(({ part }) => part);
    for (const wish of [...sampler.wishes.filter(({ part }) => !part), ...parts]) {
      if (wish.part && stepsStay) continue; // its share of steps that stay as they are
      /** @param {Spot} end */
      const wanted = (end) => wishes.get(endKey(end))?.value === wish.value;
      for (const holder of holdersOf(root, wish, wanted)) {
        const fault = "fault" in holder ? holder.fault : obstacle(holder.widget, wish, may);
        if (fault) setting.faults.push(message("{setting}, because {reason}", { setting: wish.name, reason: fault }));
        else if ("widget" in holder && holder.widget.value !== wish.value) {
          setting.changes.push({ widget: holder.widget, value: wish.value });
        }
        stepsStay ||= wish.name === "steps" && !!fault;
      }
    }
    return { ...setting, faults: distinct([...sampler.faults, ...setting.faults]) };
  });
}

/** Each text once: those of several uses of a subgraph are the same. @param {Words[]} texts */
function distinct(texts) {
  return [...new Map(texts.map((text) => [JSON.stringify(text), text])).values()];
}

/**
 * Why a widget is not set; undefined where it can be, or has the value.
 * @param {ComfyWidget} widget
 * @param {Wish} wish
 * @param {(name: string, value: unknown) => boolean} may
 * @returns {Words | undefined}
 */
function obstacle(widget, { name, value, part }, may) {
  if (widget.value === value) return undefined;
  const choices = widget.options?.values;
  if (Array.isArray(choices) && !choices.includes(value))
    return message('"{value}" is not among its choices', { value });
  if (!part && !may(name, widget.value)) {
    return message("it is {value}, not what was set before", { value: String(widget.value) });
  }
}

/** @param {ComfyNode} node @param {string} name */
function inputKey(node, name) {
  return `${node.graph.id}:${node.id}:${name}`;
}

/** @param {Spot} end */
function endKey({ graph, id, slot }) {
  const node = graph.getNodeById(id);
  const input = node?.inputs?.[slot];
  return node && input ? inputKey(node, input.widget?.name ?? input.name) : "";
}

/** @param {Setting[]} settings */
export function apply(settings) {
  for (const { changes } of settings) {
    for (const { widget, value } of changes) setWidget(widget, value);
  }
}

/**
 * How many samplers are set, and which settings are not.
 * @param {Setting[]} settings
 * @returns {Words[]}
 */
export function report(settings) {
  if (!settings.length) return [];
  const set = settings.filter(({ faults }) => !faults.length).length;
  const values = { set, total: settings.length };
  const counted =
    settings.length === 1 && set
      ? message("the sampler is set as KOALA was published")
      : message("{set} of {total} samplers set as KOALA was published", values);
  const unset = settings.flatMap(({ node, faults }) =>
    faults.length ? [message('not set: "{node}": {faults}', { node: node.title, faults: joined("; ", faults) })] : [],
  );
  return [counted, ...unset];
}
