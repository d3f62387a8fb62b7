// @ts-check
// LoRA loaders whose LoRAs no swap can carry over, as they run beside SDXL's own layers: others load the same files.

import { setWidget } from "./edit.mjs";
import { connect, endOf, linkInto, linksFrom, spot } from "./links.mjs";
import { widgetOf } from "./samplers.mjs";

/** Loader -> the loader that merges the same LoRA into the weights. */
const MERGING = new Map([
  ["LoraLoaderBypass", "LoraLoader"],
  ["LoraLoaderBypassModelOnly", "LoraLoaderModelOnly"],
]);
/** Loader with a widget that chooses between the two. */
const [CHOOSING, BYPASS] = ["LoraModelLoader", "bypass"];

/** Whether a node's LoRA would be lost behind a swap. @param {ComfyNode} node */
export function isBeside(node) {
  const type = node.comfyClass ?? "";
  return MERGING.has(type) || (type === CHOOSING && widgetOf(node, BYPASS)?.value === true);
}

/**
 * Let a node's LoRA be merged into the weights: by its widget, or by another node in its place.
 * @param {ComfyNode} node
 * @param {(type: string) => ComfyNode} create a node
 */
export function merge(node, create) {
  const choice = widgetOf(node, BYPASS);
  if (choice) return setWidget(choice, false);
  const { graph } = node;
  const other = create(MERGING.get(node.comfyClass ?? "") ?? "");
  Object.assign(other, { pos: node.pos, mode: node.mode });
  graph.add(other);
  for (const widget of other.widgets ?? []) setWidget(widget, widgetOf(node, widget.name)?.value);
  for (const [slot, input] of (node.inputs ?? []).entries()) {
    const link = linkInto(spot(node, slot));
    const own = (other.inputs ?? []).findIndex(({ name }) => name === input.name);
    if (link && own >= 0) connect({ graph, id: link.origin_id, slot: link.origin_slot }, spot(other, own));
  }
  for (const slot of node.outputs.keys()) {
    for (const link of linksFrom(spot(node, slot))) connect(spot(other, slot), endOf(graph, link));
  }
  graph.remove(node);
}
