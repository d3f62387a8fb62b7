#!/usr/bin/env bash
# lycoris-lora 4.1.3: merge_to() makes a LoHa or LoKr weaker than it was trained: it multiplies by alpha / rank twice.
# The usual alpha of 1 at rank 8 leaves an eighth of the adapter in the merged model, without a word.
#
# Guess before running: merging an adapter into a layer gives the layer that the forward pass computed in training.
# Found: change of a linear layer as merged, divided by its change in the forward pass:
#     rank, alpha    LoCon    LoHa     LoKr
#     8, 8           1        1        1
#     8, 4           1        0.5      0.5
#     8, 1           1        0.125    0.125
# Why: LohaModule.get_weight() and LokrModule.get_weight() scale already; get_diff_weight(), which the merge calls and
#   the forward pass does not, scales once more (lycoris/modules/loha.py, lokr.py). Where alpha is the rank, nothing
#   shows.
# What to do: merge with merge_to(rank / alpha), or load the file into ComfyUI, which scales it once.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.14.1" "lycoris-lora==4.1.3" "numpy==2.4.6" 2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 2; }
cat >"$folder/check.py" <<'PYTHON'
from importlib.metadata import version

import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

print(", ".join(f"{name} {version(name)}" for name in ("torch", "lycoris-lora")))
torch.manual_seed(0)
WIDTH, RANK = 640, 8


@torch.no_grad()
def ratio(kind, alpha):
    """A trained adapter's change of a linear layer as merged, divided by its change in the forward pass."""
    layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    adapter = kind("layer", layer, 1.0, RANK, alpha).eval()
    for parameter in adapter.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    before = layer.weight.clone()
    forward = adapter(torch.eye(WIDTH)).T - before
    adapter.merge_to(1.0)
    merged = layer.weight - before
    factor = float((merged * forward).sum() / forward.square().sum())
    assert torch.allclose(merged, factor * forward, atol=1e-5), kind
    return round(factor, 4)


for alpha in (8, 4, 1):
    found = {kind.__name__: ratio(kind, alpha) for kind in (LoConModule, LohaModule, LokrModule)}
    print(f"rank {RANK}, alpha {alpha}: merged / forward {found}")
    assert found == {"LoConModule": 1, "LohaModule": alpha / RANK, "LokrModule": alpha / RANK}
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/check.py"
