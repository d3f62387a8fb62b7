"""What ``scale`` counts, as a part of docs/distillation.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ...koala.architecture.keys import parameters
from ...koala.architecture.layout import KOALA_700M, SDXL, Layout, name
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
    TOKENS,
    USABLE,
    UTILISATIONS,
    activations,
    cache_bytes,
    encoders,
    fsdp_units,
    gpu_hours,
    largest_batch,
    memory,
    pictures_per_second,
    step_flops,
    traffic,
    unet_macs,
)


def section() -> str:
    """All of it as Markdown."""
    parts = (_head, _arithmetic, _memory, _batches, _time, _caching, _sharding, _limits)
    return "\n".join(line for part in parts for line in part()).rstrip() + "\n"


def _head() -> Iterator[str]:
    yield from (
        "## At real scale, on paper",
        "",
        f"KOALA out of SDXL at {SIDE} px: latents of {LATENT} x {LATENT}, {TOKENS} text tokens. Nothing here was run "
        "on a GPU. Multiplications, weights and saved activations are counted on the real graphs; the rest is "
        "arithmetic on them. GB is 10^9 bytes.",
        "",
    )


def _arithmetic() -> Iterator[str]:
    yield from ("### Arithmetic", "", "T of one picture. A multiplication and its addition are two FLOPs.", "")
    yield from _table(
        ("U-Net", "weights, M", "multiplications, forward", "FLOPs of a training step", "with gradient checkpointing"),
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
        "A step is the teacher forward and the student three times its forward pass: once forward, and backward twice "
        f"as much; with gradient checkpointing, four times. The frozen teacher is {shares} step.",
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
        ("**sum, whatever the batch**", lambda one: memory(one, False).fixed),
        ("activations", lambda one: activations(one).plain),
        ("or, with gradient checkpointing: kept", lambda one: activations(one).kept),
        ("and the largest block, recomputed", lambda one: activations(one).recomputed),
        ("features of the student, bf16", lambda one: activations(one).student_features),
        ("features of the teacher, bf16", lambda one: activations(one).teacher_features),
        ("their differences in the loss, fp32", lambda one: activations(one).loss),
        ("**sum a picture**", lambda one: activations(one).a_picture(False)),
        ("**sum a picture, with gradient checkpointing**", lambda one: activations(one).a_picture(True)),
    )
    yield from ("### Memory of one GPU", "", "GB; the lower half for each picture of the batch.", "")
    yield from _table(
        ("part", *map(name, STUDENTS)),
        ((part, *(f"{size(one) / GB:.2f}" for one in STUDENTS)) for part, size in rows),
    )
    yield from (
        "Activations: what autograd saves, each storage once and weights left out, in a forward pass of a bf16 U-Net "
        "without contents under CUDA's autocast, which has norms in fp32, with flash attention. Blocks are diffusers' "
        "own: a residual layer, or a transformer block. Features: the output of every self-attention, the default.",
        "",
    )


_SPREAD: tuple[tuple[str, int, int], ...] = (
    ("nothing sharded", 1, 1),
    (f"student over {GPUS}", GPUS, 1),
    (f"student and teacher over {GPUS}", GPUS, GPUS),
)
"""What FSDP shards, over how many GPUs the student, and the teacher."""


def _batches() -> Iterator[str]:
    columns = [(card, *spread) for card in CARDS for spread in _SPREAD]
    yield from (
        "### Largest batch a GPU",
        "",
        f"Pictures, with {_percent(USABLE)} of the card's memory for tensors. 0: it does not fit.",
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
        f"The recipe's {BATCH} pictures on {GPUS} GPUs are {BATCH // GPUS} a GPU: `accumulate` makes up for what does "
        "not fit at once.",
        "",
    )


def _time() -> Iterator[str]:
    yield from (
        "### Time",
        "",
        f"The published recipe: {ITERATIONS:,} iterations of {BATCH} pictures, {ITERATIONS * BATCH / 1e6:.0f} M in "
        f"all, on {GPUS} A100 of 80 GB. **Assumed**: these GPUs do {_listed(UTILISATIONS)} of their bf16 peak of "
        f"{PEAK / 1e12:.0f} TFLOP/s, over all of a step, what checkpointing computes again counted as work.",
        "",
    )
    yield from _table(
        (
            "student",
            "gradient checkpointing",
            "utilisation",
            "pictures/s a GPU",
            f"pictures/s of {GPUS}",
            "GPU-hours",
            f"days on {GPUS}",
        ),
        (
            (
                name(student),
                "yes" if checkpointing else "no",
                _percent(utilisation),
                f"{pictures_per_second(student, checkpointing, utilisation):.1f}",
                f"{GPUS * pictures_per_second(student, checkpointing, utilisation):.1f}",
                f"{gpu_hours(student, checkpointing, utilisation):,.0f}",
                f"{gpu_hours(student, checkpointing, utilisation) / GPUS / 24:.0f}",
            )
            for student in STUDENTS
            for checkpointing in (False, True)
            for utilisation in UTILISATIONS
        ),
    )
    pictures = GPUS * pictures_per_second(KOALA_700M, False, max(UTILISATIONS))
    rate = pictures * sum(cache_bytes(1).values())
    yield from (f"The cache has to be read at {rate / 1e6:.0f} MB/s at the most, for {pictures:.0f} pictures/s.", "")


def _caching() -> Iterator[str]:
    found, million = encoders(), cache_bytes(10**6)
    macs = found.vae + found.text
    shares = ", ".join(f"{_percent(2 * macs / step_flops(one, False))} of {name(one)}'s" for one in STUDENTS)
    yield from (
        "### What the cache saves",
        "",
        f"Encoding a picture takes {found.vae / 1e12:.2f} T multiplications (VAE) and its caption "
        f"{found.text / 1e12:.3f} T (both text encoders): {shares} step without gradient checkpointing, which the "
        f"cache saves each time a picture comes round; and {2 * found.weights / GB:.2f} GB of weights in bf16 on each "
        "GPU.",
        "",
    )
    yield from _table(
        ("cache of a million pictures, fp16", "GB"),
        ((part, f"{size / GB:.1f}") for part, size in (*million.items(), ("**sum**", sum(million.values())))),
    )


def _sharding() -> Iterator[str]:
    yield from (
        f"### FSDP over {GPUS} GPUs",
        "",
        "GB a GPU whatever the batch, and GB that each GPU sends a step; pictures take as much as without it.",
        "",
    )
    yield from _table(
        ("student", "sharded", "teacher", "student's states", "bf16 copies or gathered units", "sum", "sent a step"),
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
        "- student, sharded: 20 P / N, and 2 x 2 (R + 2 U): the root, the unit at work and the next, in bf16, and as "
        "much for their gradients. The average is supposed to live in shards, too.",
        "- teacher: 2 P; sharded: 2 P / N + 2 (R + 2 U).",
        "- sent a step, x (N - 1) / N: 8 P by DDP, which reduces fp32 gradients; 6 P for a sharded student (gathered "
        "forward and backward, and gradients scattered, bf16); 2 P more for a sharded teacher, which is gathered once.",
        "",
    )


def _limits() -> Iterator[str]:
    buckets = ", ".join(f"{4 * parameters(one) / GB:.1f} GB for {name(one)}" for one in STUDENTS)
    yield from (
        "### What this leaves out",
        "",
        "- Utilisation is an assumption: it differs between U-Net and language model, and with the loader.",
        "- Memory is the sum of parts that are not all at their largest at once: gradients grow while activations go. "
        "It errs upwards there.",
        "- It errs downwards elsewhere: gradients of activations, cuDNN's workspaces, and what the teacher needs on "
        "the way (it goes first and keeps only features) are covered by the card's unused share, if at all.",
        f"- DDP's buckets are a second copy of the gradients ({buckets}), unless these are views into them.",
        "- AdamW's step may need as much as one or two copies of the weights for a moment; activations are gone then.",
        "- All is counted for squares: other aspect buckets have about their area.",
        "- Multiplications leave out norms, activation functions, losses and the optimiser, which are bound by memory.",
        "- The VAE's encoder is counted in multiplications only: SDXL's own needs fp32 and takes more than its share.",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _listed(shares: Iterable[float]) -> str:
    *most, last = map(_percent, shares)
    return f"{', '.join(most)} or {last}"


def _table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    listed = [[str(cell) for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in listed]
    yield from (lines[0], "|" + "---|" * len(listed[0]), *lines[1:], "")
