"""Adapters that peft writes onto SDXL's U-Net: ``save_pretrained``, and its own merge."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import peft.tuners.boft.layer

from tools.measure.transfer.libraries.sdxl import (
    ATTENTION,
    CONVOLUTIONS,
    Kind,
    Sdxl,
    interpolate,
    original,
    randomize,
)

CONFIG = "adapter_config.json"
peft.tuners.boft.layer._FBD_CUDA = False  # type: ignore[assignment]  # else its BOFT compiles a CUDA extension


def write(
    sdxl: Sdxl,
    folder: Path,
    make: Callable[..., Any],
    options: dict[str, Any],
    strength: float,
    with_config: bool,
    merge: bool,
) -> Path:
    """``Kind.write``. ``make``: the class of the adapter's configuration; ``with_config``: whether the configuration
    stays beside the weights; ``merge``: False for methods of which peft cannot merge all."""
    attached = peft.get_peft_model(sdxl.unet, make(**{"target_modules": ATTENTION, **options}))
    randomize(parameter for parameter in attached.parameters() if parameter.requires_grad)
    attached.eval().save_pretrained(str(folder))
    if not with_config:
        (folder / CONFIG).unlink()
    if merge:
        sdxl.unet = attached.merge_and_unload()
    if strength != 1:
        interpolate(sdxl.unet, original().unet.state_dict(), strength)
    return folder / "adapter_model.safetensors"


def _kind(name: str, make: Callable[..., Any], strength: float = 1.0, with_config: bool = True, **options: Any) -> Kind:
    refused, left_out = options.pop("refused", ""), options.pop("left_out", "")
    written = partial(write, make=make, options=options, strength=strength, with_config=with_config, merge=not refused)
    return Kind("peft", name, written, strength, refused, left_out)


_lora = partial(peft.LoraConfig, r=4)


def lora(name: str, **options: Any) -> Kind:
    """A LoRA of rank 4."""
    return _kind(f"LoRA {name}", _lora, **options)


KINDS: tuple[Kind, ...] = (
    _kind("LoRA", _lora, lora_alpha=8, strength=0.6),
    _kind("LoRA of convolutions", _lora, lora_alpha=2, target_modules=CONVOLUTIONS),
    _kind("LoRA without adapter_config.json", _lora, lora_alpha=4, with_config=False),
    _kind("rsLoRA", _lora, lora_alpha=4, use_rslora=True),
    _kind("LoRA, rank and alpha patterns", _lora, lora_alpha=4, rank_pattern={"attn1.to_q": 8},
          alpha_pattern={"attn2.to_k": 1, r"down_blocks\..*\.to_out.0": 12}),
    _kind("LoRA, lora_bias", _lora, lora_alpha=8, lora_bias=True, target_modules=r".*to_out\.0"),
    _kind("LoRA, bias='lora_only'", _lora, lora_alpha=8, bias="lora_only", left_out=r"base_layer\.bias"),
    _kind("LoRA, modules_to_save", _lora, lora_alpha=8, modules_to_save=["conv_out"], left_out="conv_out"),
    _kind("DoRA", _lora, lora_alpha=8, use_dora=True),
    _kind("DoRA at 0.6", _lora, lora_alpha=8, use_dora=True, strength=0.6),
    _kind("DoRA of convolutions", _lora, lora_alpha=8, use_dora=True, target_modules=CONVOLUTIONS),
    _kind("PiSSA", _lora, init_lora_weights="pissa", refused="PiSSA adapter"),
    _kind("OLoRA", _lora, init_lora_weights="olora", refused="OLoRA adapter"),
    _kind("LoHa", peft.LoHaConfig, r=4, alpha=8),
    _kind("LoHa of convolutions", peft.LoHaConfig, r=4, alpha=8, target_modules=CONVOLUTIONS,
          use_effective_conv2d=True),
    _kind("LoKr", peft.LoKrConfig, r=4, alpha=8),
    _kind("LoKr, two whole factors", peft.LoKrConfig, r=64, alpha=16),
    _kind("LoKr, both factors decomposed", peft.LoKrConfig, r=2, alpha=4, decompose_both=True, decompose_factor=8),
    _kind("LoKr of convolutions", peft.LoKrConfig, r=2, alpha=4, target_modules=CONVOLUTIONS,
          use_effective_conv2d=True),
)  # fmt: skip


_FEW = r".*attentions\.0\.transformer_blocks\.0\.attn1\.to_q"


def _other(name: str, make: Callable[..., Any], **options: Any) -> Kind:
    return _kind(name, make, refused=rf" {name}, which ComfyUI cannot apply", target_modules=_FEW, **options)


OTHERS: tuple[Kind, ...] = (
    _other("AdaLoRA", peft.AdaLoraConfig, total_step=10),
    _other("BEFT", peft.BeftConfig),
    _other("PEFT's BOFT", peft.BOFTConfig, boft_block_size=8),
    _other("C3A", peft.C3AConfig, block_size=32),
    _other("DEFT", peft.DeftConfig),
    _other("DeLoRA", peft.DeloraConfig),
    _other("FourierFT", peft.FourierFTConfig),
    _other("PEFT's GLoRA", peft.GloraConfig),
    _other("GraLoRA", peft.GraloraConfig),
    _other("HiRA", peft.HiraConfig),
    _other("HRA", peft.HRAConfig),
    _other("IA3", peft.IA3Config, feedforward_modules=[]),
    _other("Lily", peft.LilyConfig),
    _other("LN Tuning", peft.LNTuningConfig),
    _other("MiSS", peft.MissConfig),
    _other("PEFT's OFT", peft.OFTConfig),
    _other("OSF", peft.OSFConfig),
    _other("PEANuT", peft.PeanutConfig),
    _other("Poly", peft.PolyConfig),
    _other("PSOFT", peft.PsoftConfig),
    _other("PVeRA", peft.PveraConfig),
    _other("RandLora", peft.RandLoraConfig),
    _other("RoAd", peft.RoadConfig),
    _other("SHiRA", peft.ShiraConfig),
    _other("SuperTuning", peft.SupertuningConfig),
    _other("TinyLoRA", peft.TinyLoraConfig),
    _other("Uni-LoRA", peft.UniLoraConfig),
    _other("VB-LoRA", peft.VBLoRAConfig, vector_length=32, num_vectors=16, topk=2),
    _other("VeRA", peft.VeraConfig),
    _other("WaveFT", peft.WaveFTConfig),
)
"""PEFT's other methods that change a U-Net's matrices; AdaMSS needs another package, FRoD matrices of one size."""
