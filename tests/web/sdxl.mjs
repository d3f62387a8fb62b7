// SDXL graphs of fake nodes, and the published settings that a swap finds in its class.

import { Graph, Node } from "./fakes.mjs";

export const BASE = { steps: 25, cfg: 7.5, sampler_name: "euler", scheduler: "ddim_uniform" };
export const LIGHTNING = { steps: 10, cfg: 3.5, sampler_name: "euler", scheduler: "simple" };
export const SDXL = { steps: 30, cfg: 6, sampler_name: "dpmpp_2m", scheduler: "karras" };
export const FILES = { "": BASE, "koala-700m": BASE, "koala-lightning": LIGHTNING };

const KINDS = {
  loader: ["CheckpointLoaderSimple", { outputs: { MODEL: "MODEL", CLIP: "CLIP", VAE: "VAE" } }],
  unet: ["UNETLoader", { outputs: { MODEL: "MODEL" }, widgets: { unet_name: "", weight_dtype: "default" } }],
  lora: [
    "LoraLoader",
    {
      inputs: { model: "MODEL", clip: "CLIP" },
      outputs: { MODEL: "MODEL", CLIP: "CLIP" },
      widgets: { lora_name: "a", strength_model: 1, strength_clip: 1 },
    },
  ],
  ours: [
    "KoalaLoraLoader",
    {
      inputs: { model: "MODEL", clip: "CLIP" },
      outputs: { MODEL: "MODEL", CLIP: "CLIP", report: "STRING" },
      widgets: { lora_name: "", strength_model: 1, strength_clip: 1, trained_on: "auto" },
    },
  ],
  patch: ["FreeU", { inputs: { model: "MODEL" }, outputs: { MODEL: "MODEL" } }],
  sampler: [
    "KSampler",
    {
      inputs: { model: "MODEL", positive: "CONDITIONING", latent_image: "LATENT", steps: "INT", cfg: "FLOAT" },
      outputs: { LATENT: "LATENT" },
      widgets: { seed: 1, ...SDXL, denoise: 1 },
    },
  ],
  advanced: [
    "KSamplerAdvanced",
    {
      inputs: { model: "MODEL", positive: "CONDITIONING", latent_image: "LATENT", steps: "INT" },
      outputs: { LATENT: "LATENT" },
      widgets: { ...SDXL, start_at_step: 0, end_at_step: 10000, return_with_leftover_noise: "disable" },
    },
  ],
  scheduler: [
    "BasicScheduler",
    {
      inputs: { model: "MODEL", steps: "INT" },
      outputs: { SIGMAS: "SIGMAS" },
      widgets: { scheduler: "karras", steps: 30 },
    },
  ],
  split: [
    "SplitSigmas",
    { inputs: { sigmas: "SIGMAS" }, outputs: { high: "SIGMAS", low: "SIGMAS" }, widgets: { step: 15 } },
  ],
  guider: [
    "CFGGuider",
    { inputs: { model: "MODEL", positive: "CONDITIONING" }, outputs: { GUIDER: "GUIDER" }, widgets: { cfg: 6 } },
  ],
  chooser: ["KSamplerSelect", { outputs: { SAMPLER: "SAMPLER" }, widgets: { sampler_name: "dpmpp_2m" } }],
  custom: [
    "SamplerCustomAdvanced",
    { inputs: { guider: "GUIDER", sampler: "SAMPLER", sigmas: "SIGMAS" }, outputs: { LATENT: "LATENT" } },
  ],
  swap: [
    "KoalaUNetSwap",
    {
      inputs: { model: "MODEL" },
      outputs: { MODEL: "MODEL", report: "STRING" },
      widgets: { unet_name: "", weight_dtype: "default" },
    },
  ],
  koala: ["KoalaCheckpointLoader", { outputs: { MODEL: "MODEL" } }],
  adapter: ["KoalaControlNet", { inputs: { control_net: "CONTROL_NET" }, outputs: { CONTROL_NET: "CONTROL_NET" } }],
  controlnet: ["ControlNetLoader", { outputs: { CONTROL_NET: "CONTROL_NET" } }],
  prompt: ["CLIPTextEncode", { outputs: { CONDITIONING: "CONDITIONING" } }],
  control: [
    "ControlNetApply",
    { inputs: { positive: "CONDITIONING", control_net: "CONTROL_NET" }, outputs: { positive: "CONDITIONING" } },
  ],
  reroute: ["Reroute", { inputs: { "": "*" }, outputs: { "": "*" } }],
  number: ["PrimitiveInt", { outputs: { INT: "INT" }, widgets: { value: 30 } }],
};

/** A fake node of one of these kinds, not yet in a graph. */
export function made(kind, options = {}) {
  const [comfyClass, described] = KINDS[kind];
  const node = new Node(comfyClass, {
    ...described,
    ...options,
    widgets: { ...described.widgets, ...options.widgets },
  });
  node.title = options.title ?? kind;
  return node;
}

/** Nodes of a graph, one of each kind: {name: kind}, each with its name as title. */
export function add(graph, kinds) {
  const described = Object.entries(kinds).map(([name, kind]) =>
    Array.isArray(kind) ? [name, ...kind] : [name, kind, {}],
  );
  return Object.fromEntries(
    described.map(([name, kind, options]) => [name, graph.add(made(kind, { title: name, ...options }))]),
  );
}

/** Link MODELs from each node to the next. */
export function chain(...nodes) {
  for (const [at, node] of nodes.slice(1).entries()) nodes[at].connect(0, node, "model" in named(node) ? "model" : 0);
}

function named(node) {
  return Object.fromEntries(node.inputs.map(({ name }) => [name, true]));
}

/** The canvas's registry of nodes, with a swap that knows these files. */
export function register(published = FILES) {
  const nodeData = { input: { required: { unet_name: [[], { koala_published: published }] } } };
  const types = Object.fromEntries(Object.entries(KINDS).map(([kind, [comfyClass]]) => [comfyClass, kind]));
  globalThis.LiteGraph = {
    createNode(type) {
      if (!(type in types)) return null;
      const node = made(types[type], { title: type });
      Object.defineProperty(node, "constructor", { value: { nodeData } });
      return node;
    },
  };
}

/** A new graph. */
export function empty() {
  return new Graph();
}
