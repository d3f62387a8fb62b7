"""What LoRA files call the modules of a U-Net and of the two text encoders."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache

from ..architecture import keys
from ..architecture.component_keys import PROJECTION, text_tensors
from ..architecture.components import CLIP_G, CLIP_L
from ..architecture.keys import Shape, tensors
from ..architecture.layout import Layout
from .kinds import split

TEXT = re.compile(r"^(?:lora_te\d?_|lora_prior_te_|(?:base_model\.model\.)?text_encoders?(?:_\d)?\.|conditioner\.)")

_DOTTED = re.compile(r"^(?:(?:base_model\.model|model|unet|diffusion_model)\.)+")
"""What stands before a module's name where its parts are divided by dots: SGM and ComfyUI, diffusers, PEFT."""
_FLAT = re.compile(r"^(?:lora_unet_|lycoris_)")
"""The same where they are divided by underscores: kohya, OneTrainer; LyCORIS as SimpleTuner writes it."""
_FLAT_ALL = re.compile(r"^(?:lora_unet_|lycoris_|lora_te\d?_)")

TEXT_ENCODERS = {"clip_l": ("lora_te1_", "lora_te_", "text_encoder."), "clip_g": ("lora_te2_", "text_encoder_2.")}
"""ComfyUI's name of each text encoder -> what the names of its modules begin with in LoRA files."""

Groups = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Module's name in the file -> suffix -> the tensors with it, by their full names; one, unless the file is damaged."""


@cache
def _modules(layout: Layout) -> dict[str, keys.Tensor]:
    """A layout's modules under every name that is found for them, without prefixes, dotted and flat -> the weight."""
    found: dict[str, keys.Tensor] = {}
    for tensor in tensors(layout):
        if tensor.diffusers.endswith(".weight"):
            diffusers, comfy = (known.removesuffix(".weight") for known in (tensor.diffusers, tensor.comfy))
            processor = diffusers.replace(".to_", ".processor.to_").removesuffix(".0" if "to_out" in diffusers else "")
            outer = diffusers.removesuffix(".0") if "to_out" in diffusers else diffusers
            for name in (diffusers, processor, outer, comfy):
                found[name] = found[name.replace(".", "_")] = tensor
    return found


def find(layout: Layout, module: str) -> keys.Tensor | None:
    """The weight that a module of a LoRA file stands for in a layout; None where it has no such module."""
    known = _modules(layout)
    if flat := _FLAT.match(module):
        return known.get(module[flat.end() :].replace(".", "_"))
    return known.get(_DOTTED.sub("", module))


def bare(module: str) -> str:
    """A module's name without what tools put before it: as PEFT knows it within its model."""
    for prefixes in TEXT_ENCODERS.values():
        for prefix in prefixes:
            if module.startswith(prefix):
                return module.removeprefix(prefix).removeprefix("base_model.model.")
    return _DOTTED.sub("", module)


def text_shapes() -> dict[str, Shape | None]:
    """The tensors of SDXL's text encoders under ComfyUI's names, where no encoders are at hand to tell their shapes."""
    return {
        f"{encoder}.transformer.{name}": None
        for encoder, size in (("clip_l", CLIP_L), ("clip_g", CLIP_G))
        for name in (*text_tensors(size, "transformers"), PROJECTION)  # ComfyUI gives CLIP-L a projection, too
    }


def text_aliases(weights: Iterable[str]) -> dict[str, str]:
    """What LoRA files call each module of the text encoders -> ComfyUI's name of it.

    ``weights``: ComfyUI's names of the encoders' tensors. Files come from kohya and OneTrainer, diffusers before and
    since PEFT, and PEFT; names from transformers 4 (with ``text_model.``) and 5 (without).
    """
    found: dict[str, str] = {}
    for weight in weights:
        encoder, _, rest = weight.partition(".transformer.")
        if encoder not in TEXT_ENCODERS or not rest.endswith(".weight"):
            continue
        module = f"{encoder}.transformer.{rest.removesuffix('.weight')}"
        name = rest.removesuffix(".weight")
        processor = re.sub(r"self_attn\.([qkv]|out)_proj$", r"self_attn.to_\1", name)
        found[f"text_encoders.{module}"] = module
        for form in {name, name.removeprefix("text_model."), processor}:
            for prefix in TEXT_ENCODERS[encoder]:
                if prefix.endswith("_"):
                    found[prefix + form.replace(".", "_")] = module
                else:
                    for outer in ("", "base_model.model."):
                        found[f"{outer}{prefix}{form}"] = found[f"{prefix}{outer}{form}"] = module
    return found


def group(names: Iterable[str], is_module: Callable[[str], bool]) -> dict[str, dict[str, tuple[str, ...]]]:
    """The tensors of a LoRA file by module and suffix.

    A tensor with an unknown suffix belongs to the module that its name begins with, as far as ``is_module`` knows one,
    and is a module of its own otherwise, with an empty suffix.
    """
    found: dict[str, dict[str, tuple[str, ...]]] = defaultdict(dict)
    for name in names:
        module, suffix = split(name)
        if not suffix:
            outer = name
            while outer := outer.rpartition(".")[0]:
                if is_module(outer):
                    module, suffix = outer, name[len(outer) :]
                    break
        if _FLAT_ALL.match(module):
            module = module.replace(".", "_")  # diffusers' conversion to kohya's names leaves some dots of a DoRA
        found[module][suffix] = (*found[module].get(suffix, ()), name)
    return found
