"""ComfyUI's own nodes that take and give a MODEL, and something to put into each of their inputs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import folder_paths
import torch

from koala_sdxl.host.transfer.lora import apply_lora
from koala_sdxl.koala.architecture.layout import HEAD_WIDTH
from tools.harness.assets import SHIPPED

MODEL = "MODEL"
LORA = SHIPPED.with_name("koala-tiny-cyan.safetensors")
HYPERNETWORK = "tiny.pt"
LEFT_OUT: dict[str, str] = {
    "TorchCompileModel": "compiles for minutes; tests/parity/test_loader.py and tests/speed/test_accelerate.py run "
    "torch.compile without a compiler",
    "LTXVReferenceAudio": "needs a video model's audio VAE and a sound",
}
"""Node -> why it is not run. For those with an input of ``OTHER_MODELS`` that reason is given."""
OTHER_MODELS: dict[str, str] = {
    "MODEL_PATCH": "needs a patch file of another model (MODEL_PATCH), which ComfyUI loads only if it is one it knows",
}
"""Type of an input that nothing for KOALA can give -> why."""


@cache
def host_nodes() -> dict[str, Any]:
    """Class of each of ComfyUI's own nodes with a MODEL among its inputs and its outputs, by its name, sorted."""
    nodes: Any = import_module("nodes")  # ComfyUI's: the checkout has a folder of that name, too
    logging.disable(logging.WARNING)  # nodes_replacements.py asks for a server; it brings no node
    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    logging.disable(logging.NOTSET)
    return {
        name: node
        for name, node in sorted(nodes.NODE_CLASS_MAPPINGS.items())
        if MODEL in node.RETURN_TYPES and MODEL in [spec[0] for spec in inputs_of(node).values()]
    }


def inputs_of(node: Any, optional: bool = True) -> dict[str, Any]:
    """Inputs of a node: name -> (type, options)."""
    found = node.INPUT_TYPES()
    return {**found.get("required", {}), **(found.get("optional", {}) if optional else {})}


NOT_NEUTRAL: dict[str, float] = {"ModelMerge": 0.5, "UNet": 1.2}
"""Beginning of a node's name -> value for its widgets whose default value is 1, at which these nodes change nothing."""

FOR_SMALL_IMAGES: dict[tuple[str, str], int] = {("FreSca", "freq_cutoff"): 4, ("HyperTile", "tile_size"): 64}
"""Node and widget -> value in the place of a default value that is beyond koala-tiny's images."""


def reason_left_out(name: str) -> str:
    """Why a node is not run; empty for one that is."""
    types = [spec[0] for spec in inputs_of(host_nodes()[name], optional=False).values()]
    blocked = next((OTHER_MODELS[kind] for kind in types if isinstance(kind, str) and kind in OTHER_MODELS), "")
    return LEFT_OUT.get(name, blocked)


def call(node: Any, inputs: Mapping[str, Any]) -> Any:
    """What a node gives first, called as ComfyUI calls it."""
    if hasattr(node, "define_schema"):
        return node.EXECUTE_NORMALIZED(**inputs).result[0]
    return getattr(node(), node.FUNCTION)(**inputs)[0]


def filled(name: str, model: Any, made: Mapping[str, Any]) -> dict[str, Any]:
    """A node's inputs: this MODEL, the widgets' default values, and ``made`` for what must be connected.

    Raises LookupError for an input of a type that ``made`` lacks.
    """
    inputs: dict[str, Any] = {}
    for key, spec in inputs_of(host_nodes()[name], optional=False).items():
        kind, options = spec[0], (spec[1] if len(spec) > 1 else {})
        if kind == MODEL:
            inputs[key] = model if MODEL not in map(type_of, inputs.values()) else made["second MODEL"]
        elif key in made:
            inputs[key] = made[key]
        elif isinstance(kind, list) or kind == "COMBO":
            choices = kind if isinstance(kind, list) else options["options"]
            inputs[key] = options.get("default", choices[0])
        elif (name, key) in FOR_SMALL_IMAGES:
            inputs[key] = FOR_SMALL_IMAGES[name, key]
        elif "default" in options:
            inputs[key] = _default(name, options["default"])
        elif kind in made:
            inputs[key] = made[kind]
        else:
            raise LookupError(f"{name}: nothing to put into {key}, of type {kind}")
    return inputs


def _default(name: str, value: Any) -> Any:
    other = next((number for start, number in NOT_NEUTRAL.items() if name.startswith(start)), value)
    return other if isinstance(value, float) and value == 1 else value


def type_of(value: Any) -> str:
    """``MODEL`` for one, or the name of a Python type."""
    return MODEL if hasattr(value, "model_sampling") or hasattr(value, "model_options") else type(value).__name__


def fixtures(model: Any, clip: Any, vae: Any, conditioning: Any, folder: Path) -> dict[str, Any]:
    """What is put into inputs that have no default value, by the input's type or name.

    Args:
        model, clip, vae: a KOALA's.
        conditioning: of an empty prompt.
        folder: for a hypernetwork's file.
    """
    folder_paths.add_model_folder_path("loras", str(LORA.parent))
    folder_paths.add_model_folder_path("hypernetworks", str(folder))
    _write_hypernetwork(folder / HYPERNETWORK)
    nodes: Any = import_module("nodes")
    return {
        "second MODEL": apply_lora(model, clip, LORA, 1.0, 1.0).model,
        "CLIP": clip,
        "VAE": vae,
        "CONDITIONING": conditioning,
        "IMAGE": torch.full((1, 128, 128, 3), 0.5),
        "LATENT": {"samples": torch.zeros(1, 4, 16, 16)},
        "LATENT_OPERATION": call(nodes.NODE_CLASS_MAPPINGS["LatentOperationSharpen"], _sharpen()),
        "LORA_MODEL": import_module("comfy.utils").load_torch_file(str(LORA)),
        "lora_name": LORA.name,
        "hypernetwork_name": HYPERNETWORK,
    }


def _sharpen() -> dict[str, Any]:
    return {"sharpen_radius": 9, "sigma": 1.0, "alpha": 0.1}


def _write_hypernetwork(path: Path) -> None:
    """A hypernetwork that adds a little to keys and values of the text's width."""
    generator = torch.Generator().manual_seed(0)

    def layer(width: int) -> dict[str, torch.Tensor]:
        weight = 0.02 * torch.randn(width, width, generator=generator)
        return {"linear.0.weight": weight, "linear.0.bias": torch.zeros(width)}

    torch.save({width: (layer(width), layer(width)) for width in (HEAD_WIDTH, 96, 128)}, path)
