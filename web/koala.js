// The canvas side of the pack: what a run left to be shown on a node, and the two commands under Extensions > KOALA.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { makeRoom, show } from "./lib/drawings.mjs";
import { insert, modelSlot, swapUNet } from "./lib/graph.mjs";

const SWAP = "KOALA.SwapUNet";
const INSERT = "KOALA.InsertTextToImage";
const SWAP_LABEL = "Swap U-Net for KOALA";
const TEMPLATE = "KOALA-tiny text to image";
const PACK = new URL(import.meta.url).pathname.split("/").at(-2); // the folder that the pack is installed in

function say(severity, detail) {
  app.extensionManager.toast.add({ severity, summary: "KOALA", detail, life: 8000 });
}

function swap(node) {
  const problem = swapUNet(app, node);
  if (problem) say("warn", problem);
}

function selectedNodes() {
  return [...app.canvas.selectedItems].filter((item) => modelSlot(item) >= 0);
}

async function insertTextToImage() {
  const answer = await api.fetchApi(`/workflow_templates/${PACK}/${encodeURIComponent(TEMPLATE)}.json`);
  if (!answer.ok) return say("error", `The template "${TEMPLATE}" could not be read (HTTP ${answer.status}).`);
  insert(app, await answer.json());
}

app.registerExtension({
  name: "koalasdxl.canvas",

  commands: [
    {
      id: SWAP,
      label: SWAP_LABEL,
      icon: "pi pi-sync",
      function: () => {
        const nodes = selectedNodes();
        if (!nodes.length) return say("info", "Select a node with a MODEL output first, such as Load Checkpoint.");
        nodes.forEach(swap);
      },
    },
    { id: INSERT, label: "Insert KOALA text to image", icon: "pi pi-image", function: insertTextToImage },
  ],
  menuCommands: [{ path: ["Extensions", "KOALA"], commands: [SWAP, INSERT] }],

  getNodeMenuItems(node) {
    return modelSlot(node) < 0 ? [] : [null, { content: SWAP_LABEL, callback: () => swap(node) }];
  },

  getSelectionToolboxCommands(item) {
    return modelSlot(item) < 0 ? [] : [SWAP];
  },

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("Koala")) return;
    makeRoom(node);
    const before = node.onExecuted;
    node.onExecuted = function (output, ...rest) {
      before?.call(this, output, ...rest);
      show(this, output);
    };
  },

  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = app.rootGraph?.getNodeById(id);
      if (node?.comfyClass?.startsWith("Koala")) show(node, output);
    }
  },
});
