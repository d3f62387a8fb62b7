"""The start of a graph: KOALA Checkpoint Loader and KOALA Model Info."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from .. import koala_loader
from ..host.model import model_facts
from ..host.protocols import Clip, Model, Vae
from ..host.transfer.compatibility import incompatible_patches
from ..koala.architecture.layout import Layout
from ..koala.files.dtypes import dtype_name
from ..koala.files.inspect import inspect_model, inspect_text_encoders, inspect_vae
from ..koala.files.unfinished import PATTERN
from ..koala.model_report import badge, report
from ..koala.words import lines
from .base import CATEGORY, SHOWS, fingerprint, shown, unet_input, weight_dtype_input

BUILT_IN = "built-in koala-tiny"
FOLDER = "diffusers folder"
CHECKPOINT = "checkpoint"
UNET_AND_CHECKPOINT = "U-Net + SDXL checkpoint"
UNET_AND_PARTS = "U-Net + text encoders + VAE"


class KoalaCheckpointLoader(io.ComfyNode):
    """Loads a KOALA model from any published form of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        unet = unet_input()
        return io.Schema(
            node_id="KoalaCheckpointLoader",
            display_name="KOALA Checkpoint Loader",
            category=CATEGORY,
            description="Loads a KOALA model in one step: a Hugging Face folder, a single file, or a U-Net together "
            "with SDXL's text encoders and VAE. Explains exactly what is wrong with a file that is not a KOALA model.",
            search_aliases=["koala", "load koala", "sdxl lite", "fast sdxl", "compact sdxl", "koala 700m", "koala 1b"],
            inputs=[
                io.DynamicCombo.Input(
                    "source",
                    tooltip="Where the weights come from. koala-tiny is part of the pack and needs no download.",
                    options=[
                        io.DynamicCombo.Option(BUILT_IN, []),
                        io.DynamicCombo.Option(
                            FOLDER,
                            [
                                io.Combo.Input(
                                    "folder",
                                    options=list(diffusers_folders()),
                                    tooltip="A folder as published on Hugging Face, from models/diffusers.",
                                )
                            ],
                        ),
                        io.DynamicCombo.Option(
                            CHECKPOINT,
                            [
                                io.Combo.Input(
                                    "ckpt_name",
                                    options=folder_paths.get_filename_list("checkpoints"),
                                    tooltip="A KOALA model with text encoders and VAE, from models/checkpoints.",
                                )
                            ],
                        ),
                        io.DynamicCombo.Option(
                            UNET_AND_CHECKPOINT,
                            [
                                unet,
                                io.Combo.Input(
                                    "ckpt_name",
                                    options=folder_paths.get_filename_list("checkpoints"),
                                    tooltip="Any SDXL checkpoint: only its text encoders and VAE are used.",
                                ),
                            ],
                        ),
                        io.DynamicCombo.Option(
                            UNET_AND_PARTS,
                            [
                                unet,
                                io.Combo.Input(
                                    "clip_name1",
                                    options=folder_paths.get_filename_list("text_encoders"),
                                    tooltip="One of SDXL's text encoders, CLIP-L or CLIP-G: the order does not matter.",
                                ),
                                io.Combo.Input(
                                    "clip_name2",
                                    options=folder_paths.get_filename_list("text_encoders"),
                                    tooltip="SDXL's other text encoder.",
                                ),
                                io.Combo.Input(
                                    "vae_name",
                                    options=folder_paths.get_filename_list("vae"),
                                    tooltip="SDXL's VAE, from models/vae.",
                                ),
                            ],
                        ),
                    ],
                ),
                weight_dtype_input(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="The U-Net, with its variant and published settings attached."
                ),
                io.Clip.Output(display_name="CLIP", tooltip="Both text encoders."),
                io.Vae.Output(display_name="VAE", tooltip="The autoencoder between latents and images."),
            ],
            **SHOWS,
        )

    @classmethod
    def fingerprint_inputs(cls, source: dict[str, str] | None = None, **_: Any) -> str:
        """Changes when a chosen file is replaced on disk under the same name."""
        return fingerprint(*_chosen(source or {}))

    @classmethod
    def execute(cls, source: dict[str, str], weight_dtype: str) -> io.NodeOutput:
        model, clip, vae = _load(source, weight_dtype)
        return shown(None, model, clip, vae, badge=badge(model_facts(model)))


def _load(source: dict[str, str], weight_dtype: str) -> koala_loader.Loaded:
    """MODEL, CLIP and VAE from where the node's source says."""
    first, *others = _chosen(source)
    kind = source["source"]
    if kind == FOLDER:
        return koala_loader.load_folder(first, weight_dtype)
    if kind in (BUILT_IN, CHECKPOINT):
        return koala_loader.load_checkpoint(first, weight_dtype)
    # the small files are judged before the large one is read
    inspected = inspect_model(first)
    if kind == UNET_AND_CHECKPOINT:
        clip, vae = koala_loader.load_checkpoint_parts(others[0], inspected.unet.layout)
    else:
        clip, vae = load_parts(inspected.unet.layout, *others)
    return koala_loader.load_unet(inspected, first.name, weight_dtype), clip, vae


class KoalaModelInfo(io.ComfyNode):
    """Shows what is known about a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KoalaModelInfo",
            display_name="KOALA Model Info",
            category=CATEGORY,
            description="Shows a KOALA model's layout, size relative to SDXL, weight type, variant and how it was "
            "detected, and its published settings. Lists patches on it that have no effect or target the wrong layers.",
            search_aliases=["koala info", "model details", "koala parameters", "which koala"],
            is_output_node=True,
            inputs=[io.Model.Input("model", tooltip="A KOALA model, from this pack's loader or a stock one.")],
            outputs=[io.String.Output(display_name="info", tooltip="Model details, one per line.")],
            **SHOWS,
        )

    @classmethod
    def execute(cls, model: Model) -> io.NodeOutput:
        facts, dtype = model_facts(model), dtype_name(model.model_dtype())
        text = lines(report(facts, dtype, model.model_size()), *incompatible_patches(model))
        return shown(text, text, badge=badge(facts))


def diffusers_folders() -> dict[str, Path]:
    """Name -> path of every Hugging Face folder (one with a model_index.json) below models/diffusers, and of those that
    KOALA Checkpoint Save wrote below output/diffusers, as the host lists output/checkpoints with its checkpoints."""
    folders: dict[str, Path] = {}
    saved = Path(folder_paths.get_output_directory(), "diffusers")
    for root in (*map(Path, folder_paths.get_folder_paths("diffusers")), saved):
        for folder, inner, files in os.walk(root, followlinks=True):
            if "model_index.json" in files:
                folders.setdefault(Path(folder).relative_to(root).as_posix(), Path(folder))
                inner.clear()  # its subfolders are not models of their own
            inner[:] = [name for name in inner if not fnmatch(name, PATTERN)]
    return folders


_FILE_FOLDERS = {
    "unet_name": "diffusion_models",
    "ckpt_name": "checkpoints",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
    "vae_name": "vae",
}


def _chosen(source: dict[str, str]) -> list[Path]:
    """Paths of the files or the folder that the source's inputs name, in the order of the inputs.

    Raises FileNotFoundError, naming the folder key, where one is not there.
    """
    if source.get("source") == BUILT_IN:
        return [koala_loader.BUILT_IN]
    if folder := source.get("folder"):
        folders = diffusers_folders()
        if folder not in folders:
            raise FileNotFoundError(
                f"{folder}: no such folder with a model_index.json below models/diffusers; found "
                f"{', '.join(folders) or 'none'}. Put the complete Hugging Face folder there."
            )
        return [folders[folder]]
    return [
        Path(folder_paths.get_full_path_or_raise(key, source[name]))
        for name, key in _FILE_FOLDERS.items()
        if name in source
    ]


def load_parts(layout: Layout, first: Path, second: Path, vae: Path) -> tuple[Clip, Vae]:
    """CLIP and VAE for a U-Net from single files; the text encoders in any order.

    Raises CheckpointError where they are not one CLIP-L and one CLIP-G, or do not fit the U-Net.
    """
    encoders, autoencoder = inspect_text_encoders(first, second, layout), inspect_vae(vae)
    return koala_loader.load_clip(*encoders), koala_loader.load_vae(autoencoder)
