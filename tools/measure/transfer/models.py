"""Small random models, an SDXL and the KOALA that is cut out of it, and what is done with them: patching, sampling."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save_file

from koala_sdxl import koala_loader
from koala_sdxl.host.transfer import guard
from koala_sdxl.koala.architecture.layout import KOALA_1_7B, KOALA_1B, KOALA_700M, KOALA_TINY, Layout, name
from koala_sdxl.koala.architecture.lineage import at_widths_of, lineage
from koala_sdxl.koala.files.inspect import inspect_model
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL, State

KOALAS = (KOALA_700M, KOALA_1B, KOALA_1_7B)
NETWORK = "diffusion_model."


def small(layout: Layout) -> Layout:
    """The layout's layers at koala-tiny's widths."""
    return at_widths_of(KOALA_TINY, layout)


def model(layout: Layout, weights: State, folder: Path) -> Any:
    """A MODEL of any layout with the given weights (ComfyUI's names), through a file, as users load it."""
    path = folder / "unet.safetensors"
    save_file(dict(weights), path)
    return koala_loader.load_unet(inspect_model(path), name(layout))


@cache
def sdxl_weights() -> State:
    return adapters.unet(SMALL_SDXL)


@cache
def pair(koala: Layout) -> tuple[Any, Any]:
    """A small random SDXL and the KOALA that is cut out of it, both as MODELs."""
    with tempfile.TemporaryDirectory(prefix="koala-transfer-") as folder:
        sdxl = model(SMALL_SDXL, sdxl_weights(), Path(folder))
    with tempfile.TemporaryDirectory(prefix="koala-transfer-") as folder:
        layout = small(koala)
        return sdxl, model(layout, lineage(layout).cut(sdxl_weights(), "comfy"), Path(folder))


def unguarded(koala: Any) -> Any:
    """A clone of a KOALA MODEL as a stock loader gives it: it is sampled whatever is set on it."""
    clone = koala.clone()
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, guard.KEY)
    return clone


@cache
def clip() -> Any:
    """koala-tiny's text encoders, for nodes that take a CLIP, too."""
    return koala_loader.load_checkpoint_parts(koala_loader.BUILT_IN)[0]


def baked(patched: Any) -> State:
    """A MODEL's U-Net weights with its patches merged, ComfyUI's names; the MODEL is not changed."""
    own = patched.model_state_dict(NETWORK)
    return {
        key.removeprefix(NETWORK): comfy.lora.calculate_weight(patched.patches.get(key, []), weight.clone(), key)
        for key, weight in own.items()
    }


def difference(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    """The largest difference between two sets of the same weights."""
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


@contextmanager
def on_disk(state: State, file: str = "lora.safetensors", metadata: dict[str, str] | None = None) -> Iterator[Path]:
    """A state as a file, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="koala-transfer-") as folder:
        path = Path(folder) / file
        save_file({key: value.contiguous() for key, value in state.items()}, path, metadata)
        yield path


@contextmanager
def warnings_of_host() -> Iterator[list[str]]:
    """The host's warnings and errors while this is open."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logging.getLogger().addHandler(listener)
    try:
        yield said
    finally:
        logging.getLogger().removeHandler(listener)


@cache
def hollow(layout: Layout) -> Any:
    """A full-size MODEL without weights: names and shapes, on the meta device."""
    config = comfy.supported_models.SDXL(koala_loader.unet_config(layout))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(config.get_model({}, "", device="meta"), cpu, cpu)


def conditioning(layout: Layout, control: Any = None, seed: int = 3) -> list[Any]:
    """Random text conditioning for a layout, with a ControlNet or without."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, layout.pooled, generator=generator)
    extra = {} if control is None else {"control": control, "control_apply_to_uncond": True}
    return [[torch.randn(1, 77, layout.context, generator=generator), {"pooled_output": pooled, **extra}]]


def sample(patched: Any, positive: list[Any], side: int = 16, steps: int = 1) -> torch.Tensor:
    """A latent after a few Euler steps from fixed noise, (1, 4, side, side)."""
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(5))
    sigmas = torch.linspace(8.0, 0.0, steps + 1)
    sampler = comfy.samplers.sampler_object("euler")
    empty = torch.zeros_like(noise)
    return comfy.sample.sample_custom(patched, noise, 1.0, sampler, sigmas, positive, positive, empty)
