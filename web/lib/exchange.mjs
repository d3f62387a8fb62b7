// @ts-check
// LoRA loaders in the wrong place, and the nodes that load the same files there.

import { setWidget } from "./edit.mjs";
import { connect, endOf, linkInto, linksFrom, spot } from "./links.mjs";
import { widgetOf } from "./samplers.mjs";

/** Loader of a LoRA that runs beside SDXL's own layers, so that no swap can carry it over -> one that merges it. */
const MERGING = new Map([
  ["LoraLoaderBypass", "LoraLoader"],
  ["LoraLoaderBypassModelOnly", "LoraLoaderModelOnly"],
]);
/** Loader with a widget that chooses between the two. */
const [CHOOSING, BYPASS] = ["LoraModelLoader", "bypass"];
/** The stock loader, which puts an SDXL LoRA on wrong layers of a KOALA model, and ours. */
const [STOCK, OURS] = ["LoraLoader", "KoalaLoraLoader"];

/** Whether a node's LoRA would be lost in front of a swap. @param {ComfyNode} node */
export function isBeside(node) {
  const type = node.comfyClass ?? "";
  return MERGING.has(type) || (type === CHOOSING && widgetOf(node, BYPASS)?.value === true);
}

/** Whether KOALA LoRA Loader can take a node's place. @param {ComfyNode} node */
export function isStock(node) {
  return node.comfyClass === STOCK;
}

/**
 * Let a node's LoRA be merged into the weights: by its widget, or by another node in its place.
 * @param {ComfyNode} node
 * @param {(type: string) => ComfyNode} create a node
 */
export function merge(node, create) {
  const choice = widgetOf(node, BYPASS);
  if (choice) setWidget(choice, false);
  else exchange(node, create(MERGING.get(node.comfyClass ?? "") ?? STOCK));
}

/**
 * Put KOALA LoRA Loader in a stock loader's place.
 * @param {ComfyNode} node
 * @param {(type: string) => ComfyNode} create a node
 */
export function replace(node, create) {
  exchange(node, create(OURS));
}

/**
 * Put a node in another one's place, looking as it does, with its values and links by their names.
 * @param {ComfyNode} node
 * @param {ComfyNode} other not yet in a graph
 */
function exchange(node, other) {
  const { graph, pos, mode, color, bgcolor, flags } = node;
  Object.assign(other, { pos, mode, color, bgcolor, flags: { ...flags } });
  if (node.title !== node.constructor.title) other.title = node.title; // a person's own
  graph.add(other);
  for (const widget of other.widgets ?? []) {
    const known = widgetOf(node, widget.name);
    if (known) setWidget(widget, known.value);
  }
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
