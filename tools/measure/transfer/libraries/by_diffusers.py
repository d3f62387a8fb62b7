"""LoRAs that diffusers' training scripts write for an SDXL pipeline, with and without metadata, and as kohya's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import peft
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tools.measure.transfer.libraries.sdxl import ATTENTION, CONVOLUTIONS, PARTS, Kind, Sdxl, randomize

_TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
"""What the training scripts change of a text encoder."""


def write(sdxl: Sdxl, folder: Path, options: dict[str, Any], text: bool, metadata: bool, kohya: bool) -> Path:
    """``Kind.write``. ``text``: also LoRAs of both text encoders; ``kohya``: the file that the scripts'
    ``--output_kohya_format`` writes beside their own."""
    trained = {part: getattr(sdxl, part) for part in (PARTS if text else PARTS[:1])}
    for seed, (part, module) in enumerate(trained.items()):
        own = options if part == "unet" else {**options, "target_modules": _TEXT}
        module.add_adapter(peft.LoraConfig(**{"r": 4, "target_modules": ATTENTION, **own}))
        randomize((parameter for parameter in module.parameters() if parameter.requires_grad), seed)
    StableDiffusionXLPipeline.save_lora_weights(
        str(folder),
        **{
            f"{part}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
            for part, module in trained.items()
        },
        **(_collate_lora_metadata(trained) if metadata else {}),
    )
    path = folder / "pytorch_lora_weights.safetensors"
    if kohya:
        state = convert_all_state_dict_to_peft(load_file(path))
        path = folder / "pytorch_lora_weights_kohya.safetensors"
        save_file(convert_state_dict_to_kohya(state), path)
    for module in trained.values():
        _merge(module)
    return path


def write_unet_alone(sdxl: Sdxl, folder: Path) -> Path:
    """``Kind.write`` by the U-Net's own ``save_lora_adapter``: no prefix, neither before names nor in the metadata."""
    sdxl.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION))
    randomize(parameter for parameter in sdxl.unet.parameters() if parameter.requires_grad)
    sdxl.unet.save_lora_adapter(str(folder))
    _merge(sdxl.unet)
    return folder / "pytorch_lora_weights.safetensors"


def _merge(module: Any) -> None:
    """Merge what ``add_adapter`` added, by peft, and take its layers out again.

    Not by loading the file into a pipeline: diffusers 0.42.1 leaves out a text encoder's DoRA magnitudes, and the
    attention half of a file that also has convolutions.
    """
    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, layer.get_base_layer())


def _kind(name: str, text: bool = False, metadata: bool = True, kohya: bool = False, **options: Any) -> Kind:
    left_out, refused = options.pop("left_out", ""), options.pop("refused", "")
    written = partial(write, options=options, text=text, metadata=metadata, kohya=kohya)
    return Kind("diffusers", name, written, refused=refused, left_out=left_out)


KINDS: tuple[Kind, ...] = (
    _kind("LoRA with text encoders", text=True, lora_alpha=8),
    _kind("LoRA with text encoders, no metadata", text=True, lora_alpha=4, metadata=False),
    _kind("rsLoRA with text encoders", text=True, lora_alpha=8, use_rslora=True),
    _kind("LoRA, rank and alpha patterns", lora_alpha=4, rank_pattern={"attn1.to_q": 8},
          alpha_pattern={"attn2.to_k": 1, r"down_blocks\..*\.to_out.0": 12}),
    _kind("LoRA, lora_bias", lora_alpha=8, lora_bias=True, target_modules=r".*to_out\.0"),
    _kind("LoRA of attention and convolutions", lora_alpha=8, target_modules=f"{ATTENTION}|{CONVOLUTIONS}"),
    _kind("DoRA with text encoders", text=True, lora_alpha=8, use_dora=True),
    Kind("diffusers", "LoRA by the U-Net's own function", write_unet_alone),
    _kind("LoRA, kohya's format", lora_alpha=4, kohya=True),
    _kind("LoRA with text encoders, kohya's format", text=True, lora_alpha=4, kohya=True),
    _kind("DoRA, kohya's format", lora_alpha=4, use_dora=True, kohya=True),
)  # fmt: skip
