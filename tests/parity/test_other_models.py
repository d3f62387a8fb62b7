"""The nodes and folders that errors about files of other models name are there."""

from __future__ import annotations

import re

import folder_paths
from comfy_extras import nodes_video_model

import nodes as core
from koala_sdxl.koala.files import other_models
from koala_sdxl.nodes import NODES
from koala_sdxl.nodes.load import UNET_AND_PARTS

OF_OTHER_PACKS = {"ipadapter", "animatediff_models"}
"""Folder keys that packs for IP-Adapters and motion modules bring."""


def remedies() -> list[str]:
    """Every sentence on what to do with a file."""
    tables = (other_models._MODEL_SIGNATURES, other_models._COMPONENT_SIGNATURES)
    kinds = [kind for table in tables for kind, _ in table]
    loaders = (other_models.LOAD_CHECKPOINT, other_models.LOAD_UNET)
    swapped = [other_models.OtherModel("an SDXL", loader, other_models.SWAP) for loader in loaders]
    return [kind.remedy for kind in (*kinds, *swapped)]


def test_our_nodes_are_named_as_they_are_shown() -> None:
    shown = {node.GET_SCHEMA().display_name for node in NODES}
    named = {name for remedy in remedies() for name in re.findall(r"KOALA(?: [A-Z][\w-]+)+", remedy)}
    assert named == {
        "KOALA Attention Patches",
        "KOALA Checkpoint Loader",
        "KOALA ControlNet Loader",
        "KOALA LoRA Loader",
        "KOALA Prompt",
        "KOALA U-Net Swap",
    }
    assert named <= shown
    assert f'source "{UNET_AND_PARTS}"' in other_models.LOAD_PARTS


def test_stock_nodes_are_named_by_their_ids() -> None:
    stock = core.NODE_CLASS_MAPPINGS | nodes_video_model.NODE_CLASS_MAPPINGS
    named = {name for remedy in remedies() for name in re.findall(r"\b\w+(?:Loader|LoaderSimple)\b(?=\))", remedy)}
    assert {"CheckpointLoaderSimple", "ControlNetLoader", "LoraLoader", "UNETLoader", "CLIPLoader"} <= named
    assert named <= stock.keys()


def test_every_kind_has_a_folder_that_comfyui_knows() -> None:
    folders = {re.search(r"models/(\w+)", remedy)[1] for remedy in remedies()}  # type: ignore[index]
    assert folders > OF_OTHER_PACKS
    assert folders - OF_OTHER_PACKS < folder_paths.folder_names_and_paths.keys()
