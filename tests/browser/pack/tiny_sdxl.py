"""Nodes for the tests of the canvas, as another pack's: a small SDXL, and nodes that nobody knows.

The server loads this file beside the pack that is tested. ``sdxl.safetensors`` lies next to it: a U-Net with SDXL's
layers at koala-tiny's widths, so that koala-tiny can take its place.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils

UNET = Path(__file__).parent / "sdxl.safetensors"
CATEGORY = "tests"


def tested(name: str) -> Any:
    """A module of the tested pack, for what a small SDXL has in common with koala-tiny."""
    return next(module for path, module in sys.modules.items() if path.endswith(f"koala-sdxl.{name}"))


class TinySDXL:
    """MODEL, CLIP and VAE as Load Checkpoint gives them."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES: ClassVar = ("MODEL", "CLIP", "VAE")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {}}

    def load(self) -> tuple[Any, Any, Any]:
        loader = tested("koala_loader")
        layout = tested("koala.files.inspect").inspect_model(UNET).unet.layout
        config = comfy.supported_models.SDXL(loader.unet_config(layout))
        model = config.get_model({}, "")
        model.diffusion_model.load_state_dict(comfy.utils.load_torch_file(str(UNET)))
        management = comfy.model_management
        patcher = comfy.model_patcher.ModelPatcher(
            model, management.get_torch_device(), management.unet_offload_device()
        )
        return patcher, *loader.load_checkpoint_parts(loader.BUILT_IN)


class UnknownPatch:
    """Another pack's change of a MODEL: it halves the guidance."""

    CATEGORY, FUNCTION = CATEGORY, "patch"
    RETURN_TYPES: ClassVar = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model: Any) -> tuple[Any]:
        patched = model.clone()
        patched.set_model_sampler_cfg_function(
            lambda args: args["uncond"] + 0.5 * args["cond_scale"] * (args["cond"] - args["uncond"])
        )
        return (patched,)


class UnknownUser:
    """Another pack's use of a MODEL."""

    CATEGORY, FUNCTION = CATEGORY, "use"
    RETURN_TYPES: ClassVar = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"model": ("MODEL",)}}

    def use(self, model: Any) -> tuple[str]:
        return (type(model.model).__name__,)


NODE_CLASS_MAPPINGS = {"TinySDXL": TinySDXL, "UnknownPatch": UnknownPatch, "UnknownUser": UnknownUser}
