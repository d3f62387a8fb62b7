"""A KOALA model to disk: KOALA Checkpoint Save."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io

from ..host import saver as koala_saver
from ..host.model import WEIGHT_DTYPES
from ..host.protocols import Clip, Model, Vae
from ..host.transfer.weights import require_own_weights
from ..koala.files.atomic_write import SHOWN, SaveError
from ..koala.words import message
from .base import CATEGORY, shown

CHECKPOINT = "checkpoint"
FOLDER = "diffusers folder"
PREFIXES = {CHECKPOINT: "checkpoints/KOALA", FOLDER: "diffusers/KOALA"}
"""Format -> default of its ``filename_prefix``."""


def _prefix_input(default: str, tooltip: str) -> io.String.Input:
    return io.String.Input("filename_prefix", default=default, tooltip=tooltip)


class KoalaCheckpointSave(io.ComfyNode):
    """Writes a KOALA model to disk, its patches baked in."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KoalaCheckpointSave",
            display_name="KOALA Checkpoint Save",
            category=CATEGORY,
            description="Saves a KOALA model, LoRAs and merges baked in, as one .safetensors file or as a diffusers "
            "folder, together with its variant and schedule. Never overwrites a file.",
            search_aliases=["save koala", "export koala", "save model", "save checkpoint", "bake lora", "diffusers"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A KOALA model; LoRAs and merges become part of the saved weights."),
                io.DynamicCombo.Input(
                    "format",
                    tooltip="checkpoint: one file in ComfyUI's numbering. diffusers folder: as on Hugging Face.",
                    options=[
                        io.DynamicCombo.Option(
                            CHECKPOINT,
                            [
                                _prefix_input(
                                    PREFIXES[CHECKPOINT],
                                    "Path below the output folder; a number is added. Loaders also look in "
                                    "output/checkpoints. For a U-Net alone use diffusion_models/KOALA.",
                                )
                            ],
                        ),
                        io.DynamicCombo.Option(
                            FOLDER,
                            [
                                _prefix_input(
                                    PREFIXES[FOLDER], "Name of the folder below the output folder; a number is added."
                                )
                            ],
                        ),
                    ],
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="Data type of the saved weights. default: as ComfyUI keeps them in memory. fp8_e4m3fn "
                    "applies to the U-Net's matrices; the rest of it and the text encoders are then fp16. The VAE "
                    "always keeps its own type.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Text encoders. Without CLIP and VAE a checkpoint is the U-Net alone; a folder needs both.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Autoencoder; connect it together with CLIP."),
            ],
            outputs=[
                io.String.Output(display_name="name", tooltip="Path of what was written, below the output folder.")
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls, model: Model, format: dict[str, str], weight_dtype: str, clip: Clip | None = None, vae: Vae | None = None
    ) -> io.NodeOutput:
        require_own_weights(model)
        folder, stem, counter, subfolder = _place(format["filename_prefix"], PREFIXES[format["format"]])
        as_folder = format["format"] == FOLDER
        target = Path(folder, f"{stem}_{counter:05}_" + ("" if as_folder else ".safetensors"))
        save = koala_saver.save_folder if as_folder else koala_saver.save_checkpoint
        save(target, model, clip, vae, weight_dtype, _graph(cls))
        written = Path(subfolder, target.name).as_posix()
        return shown(message("saved as {path}", path=written), written)


def _place(prefix: str, default: str) -> tuple[str, str, int, str]:
    """Folder, name, number of the next file and folder below the output folder, as core's saving nodes choose them.

    Nothing at all is the default; a folder alone, such as "checkpoints/", gets the default's name in it. Raises
    SaveError where there can be no such folder.
    """
    if not prefix.strip():
        prefix = default
    elif os.path.basename(prefix).strip() in ("", ".", ".."):
        prefix = os.path.join(prefix, os.path.basename(default))
    try:
        if "\0" in prefix:
            raise OSError(errno.EINVAL, "it holds a zero byte")
        folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(
            os.path.normpath(prefix), folder_paths.get_output_directory()
        )
    except OSError as error:
        raise SaveError(
            f"filename_prefix {prefix[:SHOWN]}: no such folder can be made ({error.strerror}). Choose another one."
        ) from error
    return folder, stem, counter, subfolder


def _graph(node: type[io.ComfyNode]) -> dict[str, str]:
    """The workflow as metadata, as core's CheckpointSave writes it; empty where the server was told to write none."""
    if args.disable_metadata or not node.hidden:
        return {}
    graph = {"prompt": node.hidden.prompt, **(node.hidden.extra_pnginfo or {})}
    return {key: json.dumps(content) for key, content in graph.items() if content is not None}
