"""What reaches which layer when SDXL's adapters are put on a KOALA: by stock nodes and by ours, measured side by side.

The tests assert these figures; ``python3 dev.py transfer`` writes them to docs/transfer.md. No real weights are needed:
adapters of random or telling numbers show where a change lands. Runs in a process that has ComfyUI in it.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tools.harness import inprocess, testhost

inprocess.activate()

import comfy.controlnet
import comfy.lora
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import torch
from safetensors.torch import save_file

from koala_sdxl import koala_loader
from koala_sdxl.host.model import ATTACHMENT
from koala_sdxl.host.transfer.lora import apply_lora
from koala_sdxl.koala.architecture.keys import tensors
from koala_sdxl.koala.architecture.layout import (
    KOALA_1_7B,
    KOALA_1B,
    KOALA_700M,
    KOALA_TINY,
    SDXL,
    Layout,
    blocks,
    name,
)
from koala_sdxl.koala.architecture.lineage import Lineage, at_widths_of, lineage
from koala_sdxl.koala.files.inspect import inspect_model
from koala_sdxl.koala.model_info import assumed_facts
from koala_sdxl.nodes.adapt import KoalaAttentionPatches, KoalaControlNet
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL, State

REPORT = testhost.ROOT / "docs" / "transfer.md"
KOALAS = (KOALA_700M, KOALA_1B, KOALA_1_7B)
SQUARE_BOUND = 1e-6
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
        whole = model(SMALL_SDXL, sdxl_weights(), Path(folder))
    with tempfile.TemporaryDirectory(prefix="koala-transfer-") as folder:
        part = small(koala)
        return whole, model(part, lineage(part).cut(sdxl_weights(), "comfy"), Path(folder))


@cache
def clip() -> Any:
    """koala-tiny's text encoders, for nodes that take a CLIP, too."""
    return koala_loader.load_checkpoint_parts(koala_loader.BUILT_IN)[0]


def baked(patched: Any) -> State:
    """A MODEL's U-Net weights with its patches in, ComfyUI's names; the MODEL stays as it is."""
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


# --- LoRA ---------------------------------------------------------------------------------------------------------


class Square(NamedTuple):
    """Applied to SDXL and then cut, against cut and then applied: the largest difference of a weight, and how large the
    change itself is."""

    difference: float
    change: float


def square(koala: Layout, kind: str = "LoRA", naming: str = "kohya, LDM blocks", strength: float = 0.8) -> Square:
    """Both ways round for a random LoRA; the stock loader applies it to SDXL, ours to KOALA."""
    whole, part = pair(koala)
    state = adapters.lora(SMALL_SDXL, kind, naming)
    stock_state = adapters.lora(SMALL_SDXL, kind)  # the stock loader does not know all names, so one that it knows
    patched, _ = comfy.sd.load_lora_for_models(whole, None, dict(stock_state), strength, 0.0)
    with on_disk(state) as path:
        ours = apply_lora(part, clip(), path, strength, 0.0).model
    cut = lineage(small(koala)).cut(baked(patched), "comfy")
    original = lineage(small(koala)).cut(sdxl_weights(), "comfy")
    return Square(difference(cut, baked(ours)), difference(cut, original))


class Reach(NamedTuple):
    """How many of a KOALA's modules got their own layer's change, another layer's, or none; and what the loader did
    with the LoRA's modules."""

    right: int
    wrong: int
    untouched: int
    applied: int
    mismatch: int
    absent: int


@cache
def hollow(layout: Layout) -> Any:
    """A full-size MODEL without weights: names and shapes, on the meta device."""
    config = comfy.supported_models.SDXL(koala_loader.unet_config(layout))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(config.get_model({}, "", device="meta"), cpu, cpu)


def telling_lora(naming: str) -> State:
    """An SDXL LoRA of rank 1 that adds its module's own number to every weight: what lands where can be read off."""
    style = adapters.NAMINGS[naming]
    state = {}
    for number, tensor in enumerate(filter(adapters.in_attention, tensors(SDXL)), 1):
        for suffix, value in (
            (".lora_up.weight", torch.full((tensor.shape[0], 1), float(number))),
            (".lora_down.weight", torch.ones(1, tensor.shape[1])),
        ):
            state[style.module(tensor) + style.suffixes.get(suffix, suffix)] = value
    return state


def reach(koala: Layout, naming: str, ours: bool) -> Reach:
    """Where the modules of an SDXL LoRA (all 722 matrices of its attention modules) land on a full-size KOALA."""
    numbers = {tensor.diffusers: n for n, tensor in enumerate(filter(adapters.in_attention, tensors(SDXL)), 1)}
    state, target = telling_lora(naming), hollow(koala)
    if ours:
        target.set_attachments(ATTACHMENT, assumed_facts(koala, "fp32", 0))
        with on_disk(state) as path:
            patches = apply_lora(target, clip(), path, 1.0, 0.0).model.patches
    else:
        patches = comfy.sd.load_lora_for_models(target, None, state, 1.0, 0.0)[0].patches
    right = wrong = mismatch = 0
    for part, whole in lineage(koala).tensors:
        if not adapters.in_attention(part):
            continue
        if listed := patches.get(NETWORK + part.comfy):
            landed = comfy.lora.calculate_weight(listed, torch.zeros(part.shape), part.comfy)
            number = float(landed.flatten()[0])
            mismatch += number == 0  # the host could not apply it
            right += number == numbers[whole.diffusers]
            wrong += number not in (0, numbers[whole.diffusers])
    total = sum(map(adapters.in_attention, tensors(koala)))
    return Reach(right, wrong, total - right - wrong, right + wrong, mismatch, len(numbers) - right - wrong - mismatch)


# --- ControlNet ---------------------------------------------------------------------------------------------------


class Residuals(NamedTuple):
    """What a KOALA's U-Net took of an SDXL ControlNet in one pass: how many residuals were added, how many of those to
    the skip connection (or middle block) they belong to, and the warnings of the host."""

    added: int
    right: int
    warnings: int


@cache
def controlnet() -> Any:
    """A small random SDXL ControlNet through core's loader."""
    with on_disk(adapters.controlnet(), "controlnet.safetensors") as path:
        return comfy.controlnet.load_controlnet(str(path))


def conditioning(layout: Layout, control: Any = None, seed: int = 3) -> list[Any]:
    """Random text conditioning for a layout, with a ControlNet or without."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, layout.pooled, generator=generator)
    extra = {} if control is None else {"control": control, "control_apply_to_uncond": True}
    return [[torch.randn(1, 77, layout.context, generator=generator), {"pooled_output": pooled, **extra}]]


def hinted(control: Any, side: int = 128, strength: float = 1.0) -> Any:
    """A ControlNet with a random hint, as Apply ControlNet leaves it on the conditioning."""
    hint = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(4))
    return control.copy().set_cond_hint(hint, strength, (0.0, 1.0))


def sample(patched: Any, positive: list[Any], side: int = 16, steps: int = 1) -> torch.Tensor:
    """A latent after a few Euler steps from fixed noise, (1, 4, side, side)."""
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(5))
    sigmas = torch.linspace(8.0, 0.0, steps + 1)
    sampler = comfy.samplers.sampler_object("euler")
    empty = torch.zeros_like(noise)
    return comfy.sample.sample_custom(patched, noise, 1.0, sampler, sigmas, positive, positive, empty)


@contextmanager
def residuals_seen(control: Any) -> Iterator[list[dict[str, list[Any]]]]:
    """What a ControlNet hands to the U-Net in each pass, before the U-Net takes it."""
    seen: list[dict[str, list[Any]]] = []
    inner = control.get_control

    def recorded(*arguments: Any, **further: Any) -> Any:
        given = inner(*arguments, **further)
        seen.append({key: list(held) for key, held in given.items()})
        return given

    control.get_control = recorded
    try:
        yield seen
    finally:
        del control.get_control


def residuals(koala: Layout, ours: bool) -> Residuals:
    """One pass of a small KOALA with an SDXL ControlNet, by the stock nodes or with KOALA ControlNet between them."""
    _, part = pair(koala)
    line = lineage(small(koala))
    control = controlnet()
    if ours:
        control = KoalaControlNet.execute(control).result[0]
    control = hinted(control)
    with residuals_seen(control) as seen, warnings_of_host() as said:
        sample(part, conditioning(line.student, control))
    given = seen[0]
    shapes = skip_shapes(line.student)
    # the U-Net takes residuals from each list's end, the deepest first
    taken = list(zip(reversed(shapes), reversed(given["output"]), strict=False))
    fitting = [residual for shape, residual in taken if tuple(residual.shape[1:]) == shape]
    wanted = sdxl_residuals()
    right = sum(
        torch.equal(residual, wanted["output"][skip])
        for skip, (_, residual) in zip(reversed(line.skips), taken, strict=False)
    )
    middle = len(given["middle"])
    right += middle if line.student.middle is not None else 0
    return Residuals(len(fitting) + middle, right, len(said))


@cache
def sdxl_residuals() -> dict[str, list[Any]]:
    """The residuals that SDXL itself gets from the same ControlNet."""
    control = hinted(controlnet())
    with residuals_seen(control) as seen:
        sample(pair(KOALA_700M)[0], conditioning(SMALL_SDXL, control))
    return seen[0]


def skip_shapes(layout: Layout, side: int = 16) -> list[tuple[int, int, int]]:
    """Channels, height and width of each skip connection for a latent of ``side``."""
    found = [(layout.channels[0], side, side)]
    for block in blocks(layout):
        if block.part == "down":
            side //= 2 if block.kind == "downsample" else 1
            found.append((block.c_out, side, side))
    return found


# --- IP-Adapter ---------------------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """Cross-attention layers of a KOALA by what an SDXL IP-Adapter's patches did in them: the patch of the layer that
    they came from, of another layer of the same width, of a layer of another width, or none."""

    right: int
    other: int
    width: int
    untouched: int


def ip_adapter(patched: Any, patch: Callable[[tuple[Any, ...]], Any]) -> Any:
    """A clone with a patch on each of SDXL's cross-attention layers, by SDXL's numbers, as IP-Adapter packs set them.

    ``patch`` makes the function for a place: (block name, block number, transformer block).
    """
    clone = patched.clone()
    for place in sdxl_places(SDXL):
        clone.set_model_attn2_replace(patch(place), *place)
    return clone


def sdxl_places(layout: Layout) -> dict[tuple[Any, ...], int]:
    """A U-Net's cross-attention layers as ComfyUI names their places -> their width."""
    sides = {"down": "input", "middle": "middle", "up": "output"}
    return {
        (sides[block.part], block.n, index): block.c_out for block in blocks(layout) for index in range(block.depth)
    }


def bound(koala: Layout, ours: bool) -> Bound:
    """One pass of a small KOALA with an SDXL IP-Adapter's patches on it: which of them ran in which layer."""
    _, part = pair(koala)
    line = lineage(small(koala))
    ran: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def patch(place: tuple[Any, ...]) -> Any:
        def replacement(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
            ran[_running()] = place
            return q

        return replacement

    running: list[tuple[Any, ...]] = []

    def _running() -> tuple[Any, ...]:
        return running[-1]

    patched = ip_adapter(part, patch)
    if ours:
        patched = KoalaAttentionPatches.execute(patched).result[0]

    # where the U-Net is, told by a patch that runs just before, with KOALA's own numbers
    def here(n: Any, context: Any, value: Any, options: dict[str, Any]) -> Any:
        running.append((*options["block"], options["block_index"]))
        return n, context, value

    patched.set_model_attn2_patch(here)
    sample(patched, conditioning(line.student))
    widths, whole_widths = sdxl_places(line.student), sdxl_places(SMALL_SDXL)
    found = Counter(_judged(line, place, ran.get(place), widths, whole_widths) for place in widths)
    return Bound(found["right"], found["other"], found["width"], found["untouched"])


def _judged(
    line: Lineage,
    place: tuple[Any, ...],
    ran: tuple[Any, ...] | None,
    widths: Mapping[tuple[Any, ...], int],
    whole_widths: Mapping[tuple[Any, ...], int],
) -> str:
    if ran is None:
        return "untouched"
    block, index = place[:2], place[2]
    if ran == (*line.blocks[block], line.attention[block][index]):
        return "right"
    return "other" if whole_widths[ran] == widths[place] else "width"


# --- the report ---------------------------------------------------------------------------------------------------


def text() -> str:
    """docs/transfer.md: the figures, measured now."""
    lines = [
        "# What reaches which layer",
        "",
        "SDXL's adapters on KOALA, by ComfyUI's stock nodes and by this pack's. Written by `python3 dev.py transfer`; "
        "the tests assert the same figures. No trained weights are needed: the adapters' numbers are random or name "
        "the layer they are for, so that it can be read off where they land.",
        "",
        "## LoRA",
        "",
        "An SDXL LoRA on all 722 matrices of the attention modules. *Right*: a KOALA module got the change of the SDXL "
        "module that it came from.",
        "",
        *_table(
            ("model", "names", "nodes", "right", "wrong layer", "untouched"),
            (
                (name(koala), naming, "this pack" if ours else "stock", *reach(koala, naming, ours)[:3])
                for koala in KOALAS
                for naming in ("kohya, LDM blocks", "kohya, diffusers blocks")
                for ours in (False, True)
            ),
        ),
        "",
        "The commuting square: a random LoRA is applied to a random SDXL by the stock loader, and KOALA cut out of the "
        "result; or KOALA is cut out first, and the LoRA applied by KOALA LoRA Loader. Largest change that the LoRA "
        f"makes to a weight, and largest difference between the two ways (fp32; bound {SQUARE_BOUND:g}):",
        "",
        *_table(
            ("kind", "change", *(f"difference, {name(koala)}" for koala in KOALAS)),
            (
                (kind, f"{found[0].change:.1g}", *(f"{way.difference:.1g}" for way in found))
                for kind in adapters.KINDS
                for found in [[square(koala, kind) for koala in KOALAS]]
            ),
        ),
        "",
        "## ControlNet",
        "",
        "An SDXL ControlNet (random weights, core's loader and sampler) gives nine residuals for skip connections and "
        "one for the middle block; KOALA has six skip connections, and a middle block from 1B on.",
        "",
        *_table(
            ("model", "nodes", "residuals added", "of these in their place", "warnings of the host"),
            (
                (name(koala), "this pack" if ours else "stock", *residuals(koala, ours))
                for koala in KOALAS
                for ours in (False, True)
            ),
        ),
        "",
        "## IP-Adapter",
        "",
        "Patches on SDXL's 70 cross-attention layers, by SDXL's block numbers, as IP-Adapter packs set them; with this "
        "pack: KOALA Attention Patches behind them.",
        "",
        *_table(
            ("model", "nodes", "right", "wrong layer, same width", "wrong width", "untouched"),
            (
                (name(koala), "this pack" if ours else "stock", *bound(koala, ours))
                for koala in KOALAS
                for ours in (False, True)
            ),
        ),
        "",
        "## What this does not show",
        "",
        "Where a change lands, not what it does to pictures: KOALA was trained on after the cut, so that a layer is no "
        "longer SDXL's, and that KOALA-700M and 1B kept the first five and six of ten transformer layers is an "
        "assumption (`python3 dev.py lineage` measures it on real weights).",
        "",
    ]
    return "\n".join(lines)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    listed = [tuple(head), *(tuple(map(str, row)) for row in rows)]
    lines = ["| " + " | ".join(row) + " |" for row in listed]
    return [lines[0], "|" + "---|" * len(listed[0]), *lines[1:]]


if __name__ == "__main__":
    REPORT.write_text(text(), "utf-8")
    print(REPORT)
