"""Adapters that lycoris-lora writes onto SDXL's U-Net and text encoders, as kohya's scripts call it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lycoris import create_lycoris, kohya
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

from tools.measure.transfer.libraries.sdxl import (
    ATTENTION,
    CONVOLUTIONS,
    Kind,
    Sdxl,
    interpolate,
    original,
    randomize,
)

NORMS = r".*\.norm\d?$"
_PRESET = """
enable_conv = true
unet_target_module = []
unet_target_name = {names}
text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]
text_encoder_target_name = []
"""
"""Its own preset "full" names the time embedding's modules twice, and so fails on SDXL's U-Net in 4.1.3."""


def write(
    sdxl: Sdxl, folder: Path, options: dict[str, Any], strength: float, names: tuple[str, ...], reread: bool
) -> Path:
    """``Kind.write``. ``names``: patterns of the U-Net's modules; ``reread``: merge what the library reads from the
    file, not what it had in memory."""
    preset = folder / "preset.toml"
    preset.write_text(_PRESET.format(names=json.dumps(names)), "utf-8")
    encoders = [sdxl.text_encoder, sdxl.text_encoder_2]
    arguments = {"network_dim": 4, "network_alpha": 2, "preset": str(preset), "warn_on_unmatched": False} | options
    network = kohya.create_network(1.0, vae=None, text_encoder=encoders, unet=sdxl.unet, **arguments)
    network.apply_to(encoders, sdxl.unet, True, True)
    path = folder / "lycoris.safetensors"
    _save(network, path)
    if reread:
        network, _ = kohya.create_network_from_weights(1.0, str(path), None, encoders, sdxl.unet)
    decomposed = bool(arguments.get("dora_wd"))
    with torch.no_grad():
        for module in (*network.unet_loras, *network.text_encoder_loras):
            module.merge_to(1.0 if decomposed else strength / _scaled_twice(module))
    if decomposed and strength != 1:  # its own merge leaves the direction's whole change, whatever the strength
        for part, whole in vars(original()).items():
            interpolate(getattr(sdxl, part), whole.state_dict(), strength)
    return path


def write_wrapped(sdxl: Sdxl, folder: Path) -> Path:
    """``Kind.write`` for a LoKr by the library's general wrapper, as SimpleTuner calls it; names begin with lycoris."""
    preset = folder / "preset.toml"
    preset.write_text(f"target_module = []\ntarget_name = {json.dumps([ATTENTION, CONVOLUTIONS])}\n", "utf-8")
    network = create_lycoris(sdxl.unet, 1.0, 4, 2, algo="lokr", preset=str(preset))
    network.apply_to()
    path = folder / "pytorch_lora_weights.safetensors"
    _save(network, path)
    with torch.no_grad():
        for module in network.loras:
            module.merge_to(1 / _scaled_twice(module))
    return path


def _save(network: Any, path: Path) -> None:
    """Random numbers into an attached adapter, the adapter into a file, and the modules' own forward passes back."""
    randomize(parameter for parameter in network.parameters() if parameter.requires_grad)
    network.eval().save_weights(str(path), torch.float32, {})
    network.restore()


def _scaled_twice(module: Any) -> float:
    """By how much the library's merge is too weak: in 4.1.3 that of LoHa and LoKr scales by alpha / rank twice, the
    forward pass, in which they are trained, once."""
    return float(module.scale) if isinstance(module, LohaModule | LokrModule) else 1.0


def _kind(name: str, algo: str, strength: float = 1.0, **options: Any) -> Kind:
    refused = options.pop("refused", "")
    names, reread = options.pop("names", (ATTENTION, CONVOLUTIONS)), options.pop("reread", False)
    arguments = {"algo": algo, **options}
    written = partial(write, options=arguments, strength=strength, names=names, reread=reread)
    return Kind("lycoris-lora", name, written, strength, refused)


KINDS: tuple[Kind, ...] = (
    _kind("LoRA", "lora", names=(ATTENTION,), strength=0.6),
    _kind("LoCon", "locon", conv_dim=2, conv_alpha=1),
    _kind("LoCon, Tucker", "locon", use_tucker=True),
    _kind("LoCon, rs_lora", "locon", rs_lora=True),
    _kind("LoCon, use_scalar", "locon", use_scalar=True),
    _kind("LoHa", "loha", strength=0.6),
    _kind("LoHa, Tucker", "loha", use_tucker=True),
    _kind("LoKr", "lokr", strength=0.6),
    _kind("LoKr, full matrix", "lokr", full_matrix=True, factor=8),
    _kind("LoKr, both factors decomposed", "lokr", decompose_both=True, factor=8, network_dim=2),
    _kind("LoKr, Tucker", "lokr", use_tucker=True, network_dim=2),
    Kind("lycoris-lora", "LoKr by the general wrapper", write_wrapped),
    _kind("DyLoRA", "dylora", names=(ATTENTION,), block_size=2, reread=True),
    _kind("GLoRA", "glora", strength=0.6),
    _kind("DoRA", "locon", dora_wd=True),
    _kind("DoRA at 0.6", "locon", dora_wd=True, strength=0.6),
    _kind("DoRA of input channels", "locon", dora_wd=True, wd_on_output=False),
    _kind("DoRA on LoHa", "loha", dora_wd=True, network_alpha=4),
    _kind("DoRA on LoKr", "lokr", dora_wd=True, network_alpha=4),
    _kind("OFT", "diag-oft"),
    _kind("OFT at 0.6", "diag-oft", strength=0.6),
    _kind("OFT, constraint", "diag-oft", constraint=0.002),
    _kind("OFT, rescaled", "diag-oft", rescaled=True),
    _kind("BOFT", "boft"),
    _kind("BOFT at 0.6", "boft", strength=0.6),
    _kind("BOFT, constraint", "boft", constraint=0.002),
    _kind("BOFT, rescaled", "boft", rescaled=True),
    _kind("norms", "locon", names=(ATTENTION, NORMS), train_norm=True),
    _kind("full", "full", strength=0.6),
    _kind("LyCORIS's IA3", "ia3", refused="LyCORIS's IA3, which ComfyUI cannot apply"),
)
