// @ts-check
// The pack's part of the canvas: what nodes show after a run, and the two commands under Extensions > KOALA.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { makeRoom, show } from "./lib/drawings.mjs";
import { insert, modelSlot, swapUNet } from "./lib/graph.mjs";
import { ENTRY, message, translate } from "./lib/words.mjs";

/** @import { Translation, Words } from "./lib/words.mjs" */

const SWAP = "KOALA.SwapUNet";
const INSERT = "KOALA.InsertTextToImage";
const SWAP_LABEL = "Swap U-Net for KOALA";
const TEMPLATE = "01 KOALA-tiny text to image";
const PACK = new URL(import.meta.url).pathname.split("/").at(-2); // the folder that the pack is installed in

/**
 * Language -> all packs' translations, as the server has them.
 * @type {Record<string, Record<string, Translation>>}
 */
let translations = {};

/** A text in the canvas's language. @param {Words} words */
function say(words) {
  return translate(words, translations[app.extensionManager.setting.get("Comfy.Locale")]?.[ENTRY]);
}

/**
 * Tell the person at the canvas.
 * @param {"info" | "warn" | "error"} severity
 * @param {Words} detail
 */
function notify(severity, detail) {
  app.extensionManager.toast.add({ severity, summary: "KOALA", detail: say(detail), life: 8000 });
}

/** @param {ComfyNode} node */
function swap(node) {
  const problem = swapUNet(app, node);
  if (problem) notify("warn", problem);
}

function swapSelected() {
  const nodes = [...app.canvas.selectedItems].filter((item) => modelSlot(item) >= 0);
  if (!nodes.length) notify("info", message("Select a node with a MODEL output first, such as Load Checkpoint."));
  for (const node of nodes) swap(/** @type {ComfyNode} */ (node));
}

async function insertTextToImage() {
  const answer = await api.fetchApi(`/workflow_templates/${PACK}/${encodeURIComponent(TEMPLATE)}.json`);
  if (answer.ok) insert(app, await answer.json());
  else {
    const values = { template: TEMPLATE, status: answer.status };
    notify("error", message('Could not load the template "{template}" (HTTP {status}).', values));
  }
}

/** Whether a node is one of ours. @param {ComfyNode | null | undefined} node */
function isKoala(node) {
  return node?.comfyClass?.startsWith("Koala") ?? false;
}

app.registerExtension({
  name: "koalasdxl.canvas",

  commands: [
    { id: SWAP, label: SWAP_LABEL, icon: "pi pi-sync", function: swapSelected },
    { id: INSERT, label: "Insert KOALA text to image", icon: "pi pi-image", function: insertTextToImage },
  ],
  menuCommands: [{ path: ["Extensions", "KOALA"], commands: [SWAP, INSERT] }],

  async setup() {
    const answer = await api.fetchApi("/i18n");
    if (answer.ok) translations = await answer.json();
  },

  getNodeMenuItems(node) {
    return modelSlot(node) < 0 ? [] : [null, { content: SWAP_LABEL, callback: () => swap(node) }];
  },

  getSelectionToolboxCommands(item) {
    return modelSlot(item) < 0 ? [] : [SWAP];
  },

  nodeCreated(node) {
    if (!isKoala(node)) return;
    makeRoom(node);
    const before = node.onExecuted;
    node.onExecuted = function (output, ...rest) {
      before?.call(this, output, ...rest);
      show(this, output, say);
    };
  },

  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = app.rootGraph?.getNodeById(id);
      if (node && isKoala(node)) show(node, output, say);
    }
  },
});
