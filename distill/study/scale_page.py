"""The figures of ``scale``, as a section of docs/distillation.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tools.measure import markdown

from ...koala.architecture.keys import parameters
from ...koala.architecture.layout import KOALA_700M, SDXL, Layout, name
from ..footprint import fsdp_units
from .scale import (
    BATCH,
    CARDS,
    GB,
    GPUS,
    ITERATIONS,
    LATENT,
    PEAK,
    SIDE,
    STUDENTS,
    TABLE,
    TOKENS,
    USABLE,
    UTILISATIONS,
    activations,
    cache_bytes,
    encoders,
    gpu_hours,
    images_per_second,
    largest_batch,
    memory,
    step_flops,
    traffic,
    unet_macs,
)


def section() -> str:
    """The whole section as Markdown."""
    parts = (_head, _arithmetic, _memory, _fits, _batches, _time, _caching, _sharding, _limits)
    return "\n".join(line for part in parts for line in part()).rstrip() + "\n"


def _head() -> Iterator[str]:
    yield from (
        "## Full size, calculated",
        "",
        f"KOALA from SDXL at {SIDE} px: latents of {LATENT} x {LATENT}, {TOKENS} text tokens. Nothing here was run "
        "on a GPU. Multiplications, weights and saved activations are counted on the real graphs; all other figures "
        "are calculated from these. GB is 10^9 bytes.",
        "",
    )


def _arithmetic() -> Iterator[str]:
    yield from ("### Arithmetic", "", "10^12, for one image. A multiplication and its addition are two FLOPs.", "")
    yield from _table(
        ("U-Net", "weights, M", "multiplications, forward", "FLOPs per training step", "with gradient checkpointing"),
        (
            (
                "SDXL" if layout == SDXL else name(layout),
                f"{parameters(layout) / 1e6:,.0f}",
                f"{unet_macs(layout) / 1e12:.2f}",
                *(
                    f"{step_flops(layout, checkpointing) / 1e12:.1f}" if layout in STUDENTS else ""
                    for checkpointing in (False, True)
                ),
            )
            for layout in (SDXL, *STUDENTS)
        ),
    )
    shares = ", ".join(f"{_percent(2 * unet_macs(SDXL) / step_flops(one, False))} of {name(one)}'s" for one in STUDENTS)
    yield from (
        "A step costs one forward pass of the teacher and three of the student: one forward, and the backward pass, "
        f"which costs two; with gradient checkpointing, four. The frozen teacher takes {shares} step.",
        "",
    )


def _memory() -> Iterator[str]:
    rows: tuple[tuple[str, Callable[[Layout], int]], ...] = (
        ("teacher, bf16", lambda one: memory(one, False).teacher),
        ("student's weights, fp32", lambda one: memory(one, False).weights),
        ("their bf16 copies (autocast)", lambda one: memory(one, False).copies),
        ("gradients, fp32", lambda one: memory(one, False).gradients),
        ("AdamW's two moments, fp32", lambda one: memory(one, False).moments),
        ("averaged weights, fp32", lambda one: memory(one, False).average),
        ("**sum for any batch**", lambda one: memory(one, False).fixed),
        ("activations", lambda one: activations(one).plain),
        ("or, with gradient checkpointing: stored", lambda one: activations(one).kept),
        ("and the largest block, recomputed", lambda one: activations(one).recomputed),
        ("features of the student, bf16", lambda one: activations(one).student_features),
        ("features of the teacher, bf16", lambda one: activations(one).teacher_features),
        ("their differences in the loss, fp32", lambda one: activations(one).loss),
        ("**sum per image**", lambda one: activations(one).per_image(False)),
        ("**sum per image, with gradient checkpointing**", lambda one: activations(one).per_image(True)),
    )
    yield from ("### Memory of one GPU", "", "GB; the lower half is per image of the batch.", "")
    yield from _table(
        ("part", *map(name, STUDENTS)),
        ((part, *(f"{size(one) / GB:.2f}" for one in STUDENTS)) for part, size in rows),
    )
    yield from (
        "Activations: what autograd saves in a forward pass, each storage once and without weights, for a bf16 U-Net "
        "of fake tensors under CUDA's autocast, which computes norms in fp32, with flash attention. Blocks are those "
        "of diffusers: residual layers and transformer blocks. Features: the output of every self-attention (default).",
        "",
    )


_SPREAD: tuple[tuple[str, int, int], ...] = (
    ("nothing sharded", 1, 1),
    (f"student over {GPUS}", GPUS, 1),
    (f"student and teacher over {GPUS}", GPUS, GPUS),
)
"""What FSDP shards; the number of GPUs over which the student is sharded, and the teacher."""


def _batches() -> Iterator[str]:
    columns = [(card, *spread) for card in ("24 GB", "80 GB") for spread in _SPREAD]
    yield from (
        f"### Largest batch per GPU, of {GPUS}",
        "",
        f"Images, with {_percent(USABLE)} of the card's memory available to tensors. 0: it does not fit.",
        "",
    )
    yield from _table(
        ("student", "gradient checkpointing", *(f"{card}, {what}" for card, what, _, _ in columns)),
        (
            (
                name(student),
                "yes" if checkpointing else "no",
                *(largest_batch(memory(student, checkpointing, a, b), CARDS[card]) for card, _, a, b in columns),
            )
            for student in STUDENTS
            for checkpointing in (False, True)
        ),
    )
    yield from (
        f"The recipe's {BATCH} images on {GPUS} GPUs are {BATCH // GPUS} per GPU: set `accumulate` where they do not "
        "fit at once.",
        "",
    )


_SAVINGS: tuple[tuple[str, bool, dict[str, Any], str], ...] = (
    ("default", False, {}, "bf16"),
    ("gradient_checkpointing", True, {}, "bf16"),
    ('and optimiser = "adamw-8bit"', True, {"optimiser": "adamw-8bit"}, "bf16"),
    ("and ema_on_cpu", True, {"optimiser": "adamw-8bit", "ema_on_cpu": True}, "bf16"),
    ('and teacher.dtype = "fp8"', True, {"optimiser": "adamw-8bit", "ema_on_cpu": True}, "fp8"),
)
"""Settings, each with those above: whether blocks are checkpointed, keys of the table training, the teacher's type."""


def _fits() -> Iterator[str]:
    yield from (
        "### What fits on one GPU",
        "",
        f"GB for any batch and per image, and the largest batch by the card's memory, of which {_percent(USABLE)} are "
        "available to tensors. 0: it does not fit. `--check` calculates the fixed part with the same code for any "
        "configuration, and measures the rest.",
        "",
    )
    yield from _table(
        ("student", "settings", "any batch", "per image", *CARDS),
        (
            (
                name(student),
                what,
                f"{found.fixed / GB:.2f}",
                f"{found.per_image / GB:.2f}",
                *(largest_batch(found, card) for card in CARDS.values()),
            )
            for student in STUDENTS
            for what, checkpointing, keys, dtype in _SAVINGS
            for found in (memory(student, checkpointing, table=TABLE.model_copy(update=keys), teacher_dtype=dtype),)
        ),
    )


def _time() -> Iterator[str]:
    yield from (
        "### Time",
        "",
        f"The published recipe: {ITERATIONS:,} iterations of {BATCH} images, {ITERATIONS * BATCH / 1e6:.0f} M in "
        f"total, on {GPUS} A100 of 80 GB. **Assumed**: these GPUs reach {_listed(UTILISATIONS)} of their bf16 peak of "
        f"{PEAK / 1e12:.0f} TFLOP/s over a whole step, recomputation by checkpointing included.",
        "",
    )
    yield from _table(
        (
            "student",
            "gradient checkpointing",
            "utilisation",
            "images/s per GPU",
            f"images/s on {GPUS}",
            "GPU-hours",
            f"days on {GPUS}",
        ),
        (
            (
                name(student),
                "yes" if checkpointing else "no",
                _percent(utilisation),
                f"{images_per_second(student, checkpointing, utilisation):.1f}",
                f"{GPUS * images_per_second(student, checkpointing, utilisation):.1f}",
                f"{gpu_hours(student, checkpointing, utilisation):,.0f}",
                f"{gpu_hours(student, checkpointing, utilisation) / GPUS / 24:.0f}",
            )
            for student in STUDENTS
            for checkpointing in (False, True)
            for utilisation in UTILISATIONS
        ),
    )
    images = GPUS * images_per_second(KOALA_700M, False, max(UTILISATIONS))
    rate = images * sum(cache_bytes(1).values())
    yield from (f"The cache has to be read at up to {rate / 1e6:.0f} MB/s, for {images:.0f} images/s.", "")


def _caching() -> Iterator[str]:
    found, million = encoders(), cache_bytes(10**6)
    macs = found.vae + found.text
    shares = ", ".join(f"{_percent(2 * macs / step_flops(one, False))} of {name(one)}'s" for one in STUDENTS)
    yield from (
        "### What the cache saves",
        "",
        f"Encoding an image takes {found.vae / 1e12:.2f} T multiplications (VAE), and its caption "
        f"{found.text / 1e12:.3f} T (both text encoders): {shares} step without gradient checkpointing. The cache "
        f"saves this each time an image is used, and {2 * found.weights / GB:.2f} GB of weights in bf16 on each GPU.",
        "",
    )
    yield from _table(
        ("cache of a million images, fp16", "GB"),
        ((part, f"{size / GB:.1f}") for part, size in (*million.items(), ("**sum**", sum(million.values())))),
    )


def _sharding() -> Iterator[str]:
    yield from (
        f"### FSDP over {GPUS} GPUs",
        "",
        "GB per GPU for any batch, and GB that each GPU sends per step; the memory per image is the same as without.",
        "",
    )
    yield from _table(
        ("student", "sharded", "teacher", "student's states", "bf16 copies or gathered units", "sum", "sent per step"),
        (
            (
                name(student),
                what,
                *(
                    f"{size / GB:.2f}"
                    for size in (
                        found.teacher,
                        found.fixed - found.teacher - found.copies,
                        found.copies,
                        found.fixed,
                        traffic(student, a, b),
                    )
                ),
            )
            for student in STUDENTS
            for what, a, b in _SPREAD
            for found in (memory(student, False, a, b),)
        ),
    )
    roots = ", ".join(
        f"{'SDXL' if one == SDXL else name(one)} R = {root / 1e6:.0f} M and U = {max(units.values()) / 1e6:.0f} M"
        for one in (SDXL, *STUDENTS)
        for root, units in (fsdp_units(one),)
    )
    yield from (
        "With P weights, N GPUs, R weights in no unit and U in the largest (a unit: a residual layer or a transformer "
        f"block; {roots}):",
        "",
        "- student, nothing sharded: (4 + 4 + 8 + 4) P for weights, gradients, moments and average, and 2 P for bf16 "
        "copies.",
        "- student, sharded: 20 P / N, and 2 x 2 (R + 2 U): the root, the current unit and the next, in bf16, and as "
        "much for their gradients. The average is assumed to be sharded as well.",
        "- teacher: 2 P; sharded: 2 P / N + 2 (R + 2 U).",
        "- sent per step, x (N - 1) / N: 8 P by DDP, which reduces fp32 gradients; 6 P for a sharded student (gathered "
        "forward and backward, and gradients scattered, bf16); 2 P more for a sharded teacher, which is gathered once.",
        "",
    )


def _limits() -> Iterator[str]:
    buckets = ", ".join(f"{4 * parameters(one) / GB:.1f} GB for {name(one)}" for one in STUDENTS)
    yield from (
        "### Not included",
        "",
        "- Utilisation is an assumption: it differs between U-Nets and language models, and depends on data loading.",
        "- Memory is a sum of parts that do not peak at the same time: gradients grow while activations are freed. "
        "This overestimates.",
        "- Other things are underestimated: gradients of activations, cuDNN's workspaces, and the teacher's "
        "activations (it runs first, and only its features are kept) have to fit into the memory not counted above.",
        f"- DDP's buckets are a second copy of the gradients ({buckets}), unless gradients are views of the buckets.",
        "- AdamW's step may briefly need one or two more copies of the weights; activations have been freed by then.",
        "- Everything is calculated for squares: other aspect buckets have about the same area.",
        "- Multiplications exclude norms, activation functions, losses and the optimiser, which are limited by memory "
        "bandwidth.",
        "- The VAE's encoder is counted in multiplications only: SDXL's own needs fp32 and takes longer than that.",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _listed(shares: Iterable[float]) -> str:
    *most, last = map(_percent, shares)
    return f"{', '.join(most)} or {last}"


def _table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    yield from (*markdown.table(head, rows), "")
