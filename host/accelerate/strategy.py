"""How a MODEL's passes run on this machine: compiled, captured, both or neither; chosen before it is sampled.

Captured passes need weights that stay where they are. ComfyUI's dynamic VRAM streams them, so a MODEL that is captured
is a clone without it, as core's own TorchCompileModel takes one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import comfy.model_management as management
import torch

from ...koala.words import message
from ..protocols import Model
from .captured import Recorder
from .cuda_graphs import CudaGraphs

GIB = 2**30
GUIDED_PASS = (2, 4, 128, 128)
"""Latents of a guided pass at 1024 x 1024 pixels, for which there must be room."""
NO_NVIDIA = message("faster execution needs an NVIDIA GPU")
TRITON_CAPABILITY = (7, 0)
"""The oldest NVIDIA GPUs that Triton compiles for."""


@dataclass(frozen=True)
class Strategy:
    """``compiled``: whether blocks are. ``recorder`` makes what captures passes; None: they are not captured.
    ``device_type``: of the device for which it was chosen."""

    compiled: bool = False
    recorder: Callable[[], Recorder] | None = None
    device_type: str = "cpu"

    @property
    def is_eager(self) -> bool:
        """Whether passes run as ComfyUI runs them."""
        return not self.compiled and self.recorder is None


EAGER = Strategy()


class Choice(NamedTuple):
    """A clone of a MODEL and how it runs; that in words, or why it is eager, but for a CPU."""

    model: Model
    strategy: Strategy
    words: str = ""
    why_eager: str = ""


def choose(model: Model) -> Choice:
    """The fastest way that this machine offers for a MODEL, which stays as it is."""
    device = model.load_device
    if device.type == "cpu":
        return Choice(model.clone(), EAGER)
    if why := _why_eager(model):
        return Choice(model.clone(), EAGER, why_eager=why)
    why = why_not_compiled(device)
    words = message("CUDA graphs ({why})", why=why) if why else message("compiled blocks and CUDA graphs")
    return Choice(without_dynamic_vram(model), Strategy(not why, CudaGraphs, device.type), words)


def why_not_compiled(device: torch.device) -> str:
    """Why code cannot be compiled for a device; empty where it can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return NO_NVIDIA
    if management.torch_version_numeric < (2, 6):
        return message("PyTorch older than 2.6")
    if importlib.util.find_spec("triton") is None:
        return message("triton not found")
    if torch.cuda.get_device_capability(device) < TRITON_CAPABILITY:
        return message("this GPU is older than Triton supports")
    return ""


def shares_work(model: Model) -> bool:
    """Whether further GPUs have clones of a MODEL, which compute a part of its passes."""
    return bool(model.get_additional_models_with_key("multigpu"))


def room_is_missing(model: Model) -> float:
    """Bytes of VRAM that are missing to hold a MODEL and capture its passes; 0 or less where none is.

    What ComfyUI keeps of other models counts as free: it unloads them when the room is needed.
    """
    device = model.load_device
    loaded = (one for one in management.loaded_models() if one is not None and one.load_device == device)
    others = sum(one.loaded_size() for one in loaded)
    need = model.model_size() + pass_memory(model, GUIDED_PASS) + management.minimum_inference_memory()
    return float(need - management.get_free_memory(device) - others)


def pass_memory(model: Model, shape: tuple[int, ...]) -> float:
    """The host's estimate, in bytes, of what a pass takes beside the weights. ``shape``: of the latents, the batch
    first."""
    return model.memory_required(list(shape))


def without_dynamic_vram(model: Model) -> Model:
    """A clone whose weights are loaded at once and stay; with dynamic VRAM they are read from the file once more.

    By itself ``clone`` would read them for every clone, at every change of a LoRA; here they are kept as long as the
    MODEL's own. The clone's parent, which ComfyUI goes on with when the clone is gone, has them, too.
    """
    if not model.is_dynamic():
        return model.clone()
    resident = _resident.get(model.model)
    if resident is None:
        load, arguments, *part = model.cached_patcher_init
        loaded = load(*arguments, disable_dynamic=True)
        resident = _resident[model.model] = loaded[part[0]] if part else loaded
        resident.load_device, resident.offload_device = model.load_device, model.offload_device
    clone = model.clone(disable_dynamic=True, model_override=resident.get_clone_model_override())
    clone.parent = resident
    return clone


_resident: WeakKeyDictionary[Any, Model] = WeakKeyDictionary()
"""A model with dynamic VRAM -> the MODEL of its second self without, which knows nothing of the first."""


def _why_eager(model: Model) -> str:
    if model.load_device.type != "cuda" or torch.version.cuda is None:
        return NO_NVIDIA
    if shares_work(model):
        return message("several GPUs share the work")
    if management.vram_state is management.VRAMState.NO_VRAM:
        return message("ComfyUI streams all weights (--novram)")
    if model.is_dynamic() and model.cached_patcher_init is None:
        return message("the node that loaded this MODEL cannot load it without dynamic VRAM")
    missing = room_is_missing(model)
    size = f"{missing / GIB:.1f}"
    return message("{size} GiB of VRAM missing for CUDA graphs", size=size) if missing > 0 else ""
