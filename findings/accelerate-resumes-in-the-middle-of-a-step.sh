#!/usr/bin/env bash
# accelerate 1.15.0 resumes in the middle of an optimizer step, if gradient_accumulation_steps is another number than
# before: what one has to change to keep the batch on another number of GPUs. Nothing is logged.
#
# Guess before running: a checkpoint that is saved right after an optimizer step is the beginning of the next one; after
#   load_state the optimizer steps after every gradient_accumulation_steps passes.
# Found: a run of 3 steps with 1 pass each (as on 4 GPUs), saved, and resumed with 4 passes each (as on one): the
#   optimizer steps after the first pass, and then after every fourth. Every step of the rest of the run mixes batches of
#   two steps, and the first one has the gradient of a quarter of its batch, divided by 4:
#     passes until the optimizer steps     1, 4, 4       expected 4, 4, 4
#     weight after the first step          moved by 1/4 of what its batch asks for
# Why: Accelerator.accumulate counts passes in Accelerator.step and steps where that is a multiple of the number of
#   passes; save_state writes the count beside the random states, load_state puts it back.
# What to do: set accelerator.step = 0 after load_state, if checkpoints are saved between steps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --quiet --disable-pip-version-check)
"${pip[@]}" install "accelerate==1.15.0" "torch==2.14.1" "numpy==2.4.6" 2>"$folder/pip.log" ||
    { cat "$folder/pip.log"; exit 2; }
cat >"$folder/check.py" <<'PYTHON'
import sys

import accelerate
import torch
from accelerate import Accelerator

print(f"accelerate {accelerate.__version__}, torch {torch.__version__}")
place = sys.argv[1]


def begun(passes):
    """A weight of zero, whose gradient is -1 for each image, and what trains it."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=passes)
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    return accelerator, *accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=1.0))


def steps(accelerator, layer, optimizer, count):
    """For each of some steps: its passes, and how far it moved the weight."""
    made, passes, before = [], 0, layer.weight.item()
    while len(made) < count:
        with accelerator.accumulate(layer):
            accelerator.backward(-layer(torch.ones(1, 1)).sum())
            optimizer.step()
            optimizer.zero_grad()
        passes += 1
        if layer.weight.item() != before:
            made.append((passes, layer.weight.item() - before))
            passes, before = 0, layer.weight.item()
    return made


accelerator, *run = begun(1)
print("before, passes and move of each step:", steps(accelerator, *run, 3))
accelerator.save_state(place)
accelerator.free_memory()
accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
accelerate.state.GradientState._reset_state()

for remedy in (False, True):
    accelerator, *run = begun(4)
    accelerator.load_state(place)
    if remedy:
        accelerator.step = 0
    found = steps(accelerator, *run, 3)
    print("resumed", "with the remedy:" if remedy else "as it is:", found)
    assert found == ([(4, 1.0)] * 3 if remedy else [(1, 0.25), (4, 1.0), (4, 1.0)]), found
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
PYTHON
"$folder/venv/bin/python" "$folder/check.py" "$folder/checkpoint"
