// @ts-check
// The pack's part of the canvas: what nodes show after a run, and the two commands under Extensions > KOALA.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { makeRoom, show } from "./lib/drawings.mjs";
import { insert } from "./lib/insert.mjs";
import { isKoala, modelOutputs, SWAP } from "./lib/models.mjs";
import { setForFile, swapUNet, watchFile } from "./lib/swap.mjs";
import { ENTRY, message, translate } from "./lib/words.mjs";

/**
 * @import { Notice } from "./lib/swap.mjs"
 * @import { Translation, Words } from "./lib/words.mjs"
 */

const SWAP_COMMAND = "KOALA.SwapUNet";
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
 * @param {Notice["severity"]} severity
 * @param {Words} detail
 */
function notify(severity, detail) {
  app.extensionManager.toast.add({ severity, summary: "KOALA", detail: say(detail), life: 12000 });
}

/** @param {Notice | undefined} notice */
function tell(notice) {
  if (notice) notify(notice.severity, notice.words);
}

/** Whether a node gives a MODEL that may be SDXL's. @param {unknown} item anything that can be selected */
function isSwappable(item) {
  const node = /** @type {Partial<ComfyNode> | undefined} */ (item);
  return !isKoala(node) && modelOutputs(node ?? {}).length > 0;
}

function swapSelected() {
  const nodes = /** @type {ComfyNode[]} */ ([...app.canvas.selectedItems].filter(isSwappable));
  if (nodes.length) tell(swapUNet(app, nodes));
  else notify("info", message("Select a node with a MODEL output first, such as Load Checkpoint."));
}

async function insertTextToImage() {
  const answer = await api.fetchApi(`/workflow_templates/${PACK}/${encodeURIComponent(TEMPLATE)}.json`);
  if (answer.ok) insert(app, await answer.json());
  else {
    const values = { template: TEMPLATE, status: answer.status };
    notify("error", message('Could not load the template "{template}" (HTTP {status}).', values));
  }
}

app.registerExtension({
  name: "koalasdxl.canvas",

  commands: [
    { id: SWAP_COMMAND, label: SWAP_LABEL, icon: "pi pi-sync", function: swapSelected },
    { id: INSERT, label: "Insert KOALA text to image", icon: "pi pi-image", function: insertTextToImage },
  ],
  menuCommands: [{ path: ["Extensions", "KOALA"], commands: [SWAP_COMMAND, INSERT] }],

  async setup() {
    const answer = await api.fetchApi("/i18n");
    if (answer.ok) translations = await answer.json();
  },

  getNodeMenuItems(node) {
    if (!isSwappable(node)) return [];
    return [null, { content: SWAP_LABEL, callback: () => tell(swapUNet(app, [node])) }];
  },

  getSelectionToolboxCommands(item) {
    return isSwappable(item) ? [SWAP_COMMAND] : [];
  },

  nodeCreated(node) {
    if (!isKoala(node)) return;
    makeRoom(node);
    if (node.comfyClass === SWAP) watchFile(node, (before) => tell(setForFile(app, node, before)));
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
