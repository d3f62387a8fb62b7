"""The passes of one run, each executed in the fastest way that is right for it, and counted.

A pass is captured where it depends on its tensors and on the weights only. What a node can add on top, patches,
ControlNets, scheduled LoRAs, makes it compiled without being captured, or runs it as ComfyUI does; the reason is shown.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import comfy.model_management as management
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ..protocols import Guider, Model
from .branches import Call, Network, again
from .captured import Captures, Inputs, Pass, Weights
from .compiled import ATTENTION, attention_is_exact, is_transformer, parts
from .exchanged import Part, running
from .gates import is_compiled_by_core
from .strategy import GIB, Strategy, pass_memory, shares_work

BETWEEN_BLOCKS = frozenset(
    ("input_block_patch", "input_block_patch_after_skip", "middle_block_after_patch", "output_block_patch", "emb_patch")
)
"""Patches that act between blocks; all others act within transformer blocks."""
FREE_BETWEEN_RUNS = 6 * GIB
"""Captured passes stay for the next run where at least this much VRAM is free beside them: decoding a 1024 x 1024 image
takes most of it, and ComfyUI does not see what they hold."""
REPLAYED, COMPILED, EAGERLY = "by CUDA graph", "compiled", "as in ComfyUI itself"
"""How a pass is executed, in words."""
FIRST = "the first of a size is not captured"


class Prepared:
    """What is made once for a U-Net: its compiled parts, and its captured passes."""

    def __init__(self, unet: UNetModel, strategy: Strategy) -> None:
        self.strategy = strategy
        self.weights = Weights(unet)
        self.parts = parts(unet) if strategy.compiled else []
        self.between_patches = [part for part in self.parts if not is_transformer(part)]
        self.captures = Captures(self.weights, strategy.recorder()) if strategy.recorder is not None else None
        self.has_run = self._capture_has_failed = False
        self.not_compiled = self.not_captured = self.failed = ""
        """Why nothing is compiled any more, why nothing is captured, and why neither: PyTorch could not."""

    def fail(self, how: str, error: str) -> str:
        """PyTorch could not execute a pass in this way: without a C compiler, say, it can capture and not compile. Code
        that has to be compiled anew cannot be captured, so capturing is tried twice. Returns what is told of it."""
        if how == REPLAYED:
            told = f"not captured, as {error}"
            self.not_captured = told if self._capture_has_failed else ""
            self._capture_has_failed = True
        elif self.parts:
            self.parts, self.between_patches, self.not_compiled = [], [], (told := f"not compiled, as {error}")
            self.not_captured = ""  # which may have been the same code's fault
        else:
            self.failed = told = error
        return told

    def release(self) -> None:
        """Give back the memory of the captured passes."""
        if self.captures is not None:
            self.captures.clear()


_prepared: WeakKeyDictionary[torch.nn.Module, ReferenceType[Prepared]] = WeakKeyDictionary()
"""By U-Net, which all clones of a MODEL share: they share its captured passes, too, as long as one of them lives."""


def prepared(unet: UNetModel, strategy: Strategy) -> Prepared:
    """What is made for a U-Net and a strategy; what was made for another one is given back. Whoever goes on using it
    keeps it: it is gone with its last user."""
    known = _find(unet)
    if known is None or known.strategy != strategy:
        release(unet)
        known = Prepared(unet, strategy)
        _prepared[unet] = ref(known)
    return known


def release(unet: torch.nn.Module) -> None:
    """Give back the memory of a U-Net's captured passes."""
    known = _find(unet)
    if known is not None:
        known.release()


def _find(unet: torch.nn.Module) -> Prepared | None:
    reference = _prepared.get(unet)
    return reference() if reference is not None else None


def on_detach(patcher: Model, unpatch_all: bool) -> None:
    """The host takes a MODEL off the GPU: a callback for it. Else a clone of it only goes, at any time and in any
    thread."""
    if unpatch_all:
        release(patcher.model.diffusion_model)


class _Way(NamedTuple):
    """How a pass is executed; why it is not captured, or not compiled, empty where it is both; the parts that are
    exchanged meanwhile; and what executes it."""

    how: str
    why: str
    parts: list[Part]
    execute: Callable[[], torch.Tensor]


class Execution:
    """Made when sampling begins. ``run`` executes a pass; the text is how passes were executed so far."""

    def __init__(self, strategy: Strategy, guider: Guider) -> None:
        self._patcher = guider.model_patcher
        self.prepared = prepared(self._patcher.model.diffusion_model, strategy)
        self._why_eager = _why_eager(guider, strategy)
        self._why_not_captured = _why_not_captured(guider)
        self._ways: Counter[tuple[str, str]] = Counter()
        self._what = "pass"

    def __str__(self) -> str:
        return "; ".join(
            f"{count} {self._what}{'' if count == 1 else 'es'} {how}{why and f': {why}'}"
            for (how, why), count in self._ways.most_common()
        )

    def is_of(self, unet: torch.nn.Module) -> bool:
        """Whether a U-Net is that of the MODEL that is sampled."""
        return unet is self._patcher.model.diffusion_model

    def run(
        self, network: Network, call: Call, further: Mapping[str, Any], feature: torch.Tensor | None
    ) -> torch.Tensor:
        """A pass through a U-Net or a branch of it, with the arguments of ``Network.run``.

        Raises what that raises, and InterruptProcessingException where the person has cancelled.
        """
        management.throw_exception_if_processing_interrupted()  # a captured pass does not ask
        unet, made = self._patcher.model.diffusion_model, self.prepared
        if not self.is_of(network.unet):
            self._what = "branch pass"  # a full step has two, or three where it is checked
        made.weights.update()
        why = self._why_eager or made.failed or _why_pass_is_eager(unet, made.weights, call, further)
        if why:
            return self._eager(why, network, call, further, feature)
        way = self._way(made, network, call, feature)
        try:
            return self._faster(made, way)
        except management.InterruptProcessingException:
            raise
        except Exception as error:  # what PyTorch raises of compiling and capturing has no other base in common
            first_line = str(error).strip().partition("\n")[0]
            failed = "" if management.is_oom(error) else f"PyTorch failed ({type(error).__name__}: {first_line})"
        # here, not above: as long as an error is handled, it holds the memory of what failed
        made.release()
        management.soft_empty_cache()
        output = network.run(call, further, feature)  # or it raises the same, and the pass is wrong
        if failed:
            why = made.fail(way.how, failed)
        else:
            why = self._why_not_captured = "too little VRAM for more"
        self._ways[EAGERLY, why] += 1
        return output

    def end(self) -> None:
        """After a run, also one that failed: give memory back where little is left."""
        device = self._patcher.load_device
        if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < FREE_BETWEEN_RUNS:
            self.prepared.release()

    def _way(self, made: Prepared, network: Network, call: Call, feature: torch.Tensor | None) -> _Way:
        why, within_blocks = _patches(call)
        parts = made.between_patches if within_blocks or not attention_is_exact() else made.parts
        uncaptured, captures = COMPILED if parts else EAGERLY, made.captures
        why = why or self._why_not_captured or made.not_captured
        one = Pass(network.name, partial(_plain, network), _inputs(call, feature))
        if captures is not None and not why:
            if not captures.is_prepared(one):
                return _Way(uncaptured, FIRST, parts, partial(captures.prepare, one))
            why = "" if captures.has(one) else _missing_room(self._patcher, call.x)
            if not why:
                return _Way(REPLAYED, made.not_compiled, parts, partial(captures.run, one))
        return _Way(uncaptured, why or made.not_compiled, parts, partial(network.run, again(call), {}, feature))

    def _faster(self, made: Prepared, way: _Way) -> torch.Tensor:
        if way.parts and not made.has_run:
            logging.info("KOALA Accelerate: compiling, which takes a while; PyTorch keeps the code on disk")
        made.has_run = True
        with running(way.parts), _on(self._patcher.load_device):
            output = way.execute()
        self._ways[way.how, way.why] += 1
        return output

    def _eager(
        self, why: str, network: Network, call: Call, further: Mapping[str, Any], feature: torch.Tensor | None
    ) -> torch.Tensor:
        output = network.run(call, further, feature)
        self._ways[EAGERLY, why] += 1
        return output


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Streams and graphs are the current GPU's, which need not be the one that a node has put a MODEL on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _why_eager(guider: Guider, strategy: Strategy) -> str:
    """Why all passes of a run are eager; empty where they need not be."""
    patcher, options = guider.model_patcher, guider.model_options
    if patcher.load_device.type != strategy.device_type:
        return "another node has put the MODEL on another kind of device"
    if torch.is_grad_enabled():
        return "gradients are computed"
    if is_compiled_by_core(options["transformer_options"]):
        return "another node has the U-Net compiled"
    if any(name.startswith("diffusion_model") for name in patcher.object_patches) or patcher.injections:
        return "another node has exchanged parts of the U-Net"
    if shares_work(patcher):
        return "several GPUs share the work"
    return ""


def _why_not_captured(guider: Guider) -> str:
    hooked = any("hooks" in cond for side in getattr(guider, "conds", {}).values() for cond in side)
    return "LoRAs that are scheduled or masked change the weights in the course of a run" if hooked else ""


def _why_pass_is_eager(unet: torch.nn.Module, weights: Weights, call: Call, further: Mapping[str, Any]) -> str:
    if type(unet) is not UNetModel or call.context is None or any(value is not None for value in further.values()):
        return "this U-Net or its inputs are not SDXL's"
    if not weights.are_on(call.x.device):
        return "ComfyUI streams the weights, or changes them whenever they are used"
    return ""


def _patches(call: Call) -> tuple[str, bool]:
    """What was added to a U-Net's pass, empty for nothing; and whether it acts within transformer blocks."""
    options = call.transformer_options
    patches = {name for name, held in options.get("patches", {}).items() if held}
    if ATTENTION in options:
        return "another node has chosen how attention is computed", True
    if any(options.get("patches_replace", {}).values()) or patches - BETWEEN_BLOCKS:
        return "patches on the MODEL act within its blocks", True
    if patches:
        return "patches on the MODEL act between its blocks", False
    if any(residual is not None for residuals in (call.control or {}).values() for residual in residuals):
        return "a ControlNet adds to its layers", False
    return "", False


def _missing_room(patcher: Model, x: torch.Tensor) -> str:
    missing = pass_memory(patcher, tuple(x.shape)) + management.extra_reserved_memory()
    missing -= management.get_free_memory(x.device)
    return f"{missing / GIB:.1f} GiB of VRAM missing for a CUDA graph" if missing > 0 else ""


def _inputs(call: Call, feature: torch.Tensor | None) -> Inputs:
    named = {"x": call.x, "timesteps": call.timesteps, "context": call.context, "y": call.y, "feature": feature}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _plain(network: Network, inputs: Inputs) -> torch.Tensor:
    """A pass that depends on tensors only."""
    call = Call(inputs["x"], inputs["timesteps"], inputs["context"], inputs.get("y"), None, {})
    return network.run(call, {}, inputs.get("feature"))
