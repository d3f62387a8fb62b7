"""KOALA in SDXL's place in an existing graph: KOALA U-Net Swap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from .. import koala_loader
from ..host.model import model_facts
from ..host.protocols import Model
from ..host.transfer.swap import swap
from ..koala.files.conventions import label
from ..koala.files.inspect import inspect_model
from ..koala.model_report import badge
from ..koala.releases import STOCK_SCHEDULERS, identify
from .base import ADD_ONS, SHOWS, fingerprint, paths_of, shown, unet_input, weight_dtype_input

NO_FILE = ""
"""Stands for the U-Net where none is chosen yet: the canvas sets samplers as the base models were published."""


class KoalaUNetSwap(io.ComfyNode):
    """Replaces the U-Net of an SDXL MODEL with KOALA's, and carries over what was set on it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folder_paths.get_filename_list("diffusion_models")
        return io.Schema(
            node_id="KoalaUNetSwap",
            display_name="KOALA U-Net Swap",
            category=ADD_ONS,
            description="Replaces SDXL's U-Net with KOALA's in an existing graph. Connect it behind the SDXL loader, "
            "or behind its LoRAs and patches, which are carried over to the layers they belong to. CLIP, VAE and "
            "samplers stay as they are. ControlNets need KOALA ControlNet.",
            search_aliases=["swap sdxl", "replace unet", "sdxl to koala", "fast sdxl", "sdxl lite", "koala unet"],
            inputs=[
                io.Model.Input("model", tooltip="An SDXL model from any loader. LoRAs and patches are supported."),
                unet_input(extra_dict={"koala_published": {file: _published(file) for file in (NO_FILE, *files)}}),
                weight_dtype_input(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="The KOALA model with the SDXL model's LoRAs and patches."
                ),
                io.String.Output(
                    display_name="report", tooltip="What was carried over and what was not, with reasons."
                ),
            ],
            **SHOWS,
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name: str = "", **_: Any) -> str:
        """Changes when the file is replaced on disk under the same name."""
        return fingerprint(*paths_of("diffusion_models", unet_name))

    @classmethod
    def execute(cls, model: Model, unet_name: str, weight_dtype: str) -> io.NodeOutput:
        path = Path(folder_paths.get_full_path_or_raise("diffusion_models", unet_name))
        koala = koala_loader.load_unet(inspect_model(path), path.name, weight_dtype)
        swapped = swap(model, koala)
        return shown(swapped.report, swapped.model, swapped.report, badge=badge(model_facts(koala)))


def _published(file: str) -> dict[str, Any]:
    """KSampler's widgets as a U-Net of that file's name was published: what the canvas sets when it swaps one in."""
    path = Path(file)
    settings = identify({}, {}, "", label(path), reversed(path.parent.parts)).variant.settings
    scheduler = STOCK_SCHEDULERS[settings.spacing]
    return {"steps": settings.steps, "cfg": settings.cfg, "sampler_name": "euler", "scheduler": scheduler}
