#!/usr/bin/env bash
# diffusers 0.42.1: a LoRA on attention and convolutions, saved as diffusers' training scripts save theirs, comes back
# with the convolutions alone. load_lora_weights() drops all of attention's modules, without a warning.
#
# Guess before running: what save_lora_weights() wrote, load_lora_weights() reads, whatever modules were trained.
# Found: modules of a small U-Net's LoRA in the file, and with a change after load_lora_weights() and fuse_lora():
#     target_modules              in the file    after loading
#     to_q, to_k                  16             16
#     conv1                       8              8
#     to_q, to_k, conv1           24             8
#   and no warning that names the U-Net.
# Why: convert_state_dict_to_diffusers() renames attention's tensors (lora.down.weight) and leaves those of convolutions
#   as PEFT has them (lora_A.weight). The loader looks at the file's first name alone to tell whether it has to convert
#   (diffusers/loaders/peft.py); where the first block has no attention, as SDXL's, that is a convolution's.
# What to do: save get_peft_model_state_dict(unet) as it is, without convert_state_dict_to_diffusers().
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.14.1" "diffusers==0.42.1" "peft==0.21.2" "transformers==5.23.0" "numpy==2.4.6" \
    2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 2; }
cat >"$folder/check.py" <<'PYTHON'
import logging
import tempfile

import diffusers
import peft
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

print(f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
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
said = []


class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


diffusers.utils.logging.disable_default_handler()
diffusers.utils.logging.get_logger("diffusers").addHandler(Listener())


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(**SIZES)


def round_trip(targets):
    """Modules of a LoRA in its file, and those with a change after diffusers has loaded it; U-Nets start equal."""
    trained, loaded, before = unet(), unet(), unet().state_dict()
    trained.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(trained))
    pipeline = StableDiffusionXLPipeline(unet=loaded, add_watermarker=False, **NO_PARTS)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_lora_weights(folder, unet_lora_layers=state)
        names = load_file(f"{folder}/pytorch_lora_weights.safetensors")
        pipeline.load_lora_weights(folder)
    pipeline.fuse_lora()
    written = sum(name.endswith((".lora_A.weight", ".lora.down.weight")) for name in names)
    layers = [(name, layer) for name, layer in loaded.named_modules() if hasattr(layer, "base_layer")]
    return written, sum(not torch.equal(layer.base_layer.weight, before[f"{name}.weight"]) for name, layer in layers)


for targets, expected in ((["to_q", "to_k"], (16, 16)), (["conv1"], (8, 8)), (["to_q", "to_k", "conv1"], (24, 8))):
    found = round_trip(targets)
    print(f"{', '.join(targets)}: {found[0]} modules in the file, {found[1]} after loading")
    assert found == expected
warnings = [message for message in said if "prefix='text_encoder" not in message]  # there is no text encoder here
print("warnings:", warnings)
assert not warnings
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/check.py"
