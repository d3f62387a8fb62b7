"""How a KOALA's LoRA is learned from what an SDXL does, by `dev.py carry` or on the canvas: common numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

ROUNDS, ITERATIONS = 3, 5
"""Of the least squares: how often the output is linearised, and iterations each time. Few, as each makes the changes
larger, and the output is less linear the larger they are."""
PER_DRAWING = 5
"""Samples of either network for each time that it samples a prompt, where there are as many steps; neighbouring ones of
many are much alike."""
KEPT = 2
"""With prompts to keep, every so manieth prompt that is sampled is one of them."""
WITHOUT_PROMPT = 0.2
"""Share of the samples that see the empty prompt, as one of two forward passes of each step does with guidance; without
guidance none does."""


def parted(rows: Sequence[int], every: int) -> tuple[Sequence[int], Sequence[int]]:
    """The rows to learn from, and every so manieth, which is held out to measure."""
    return [row for at, row in enumerate(rows, 1) if at % every], rows[every - 1 :: every]


def rows_to_draw(
    prompts: int, keep: int, every: int, learned: int, held_out: int, each: int
) -> tuple[list[int], list[int]]:
    """The rows of the prompts that a network samples to learn from, and those held out.

    Args:
        prompts: how many use the change.
        keep: how many there are to keep, behind them.
        every: of so many of either one is held out.
        learned, held_out: how many samples are taken.
        each: how many of them there are for an image.
    """
    used, used_out = parted(range(prompts), every)
    kept, kept_out = parted(range(prompts, prompts + keep), every)
    return in_turns(used, kept, -(-learned // each)), in_turns(used_out, kept_out, -(-held_out // each))


def in_turns(used: Sequence[int], kept: Sequence[int], count: int) -> list[int]:
    """``count`` rows to sample: prompts that use the change and, where there are some, those to keep; in turns."""
    turns = [bool(kept) and at % KEPT == 1 for at in range(count)]
    others, keep = (spread(rows, turns.count(kind)) for rows, kind in ((used, False), (kept, True)))
    return [next(keep) if is_kept else next(others) for is_kept in turns]


def spread(rows: Sequence[int], count: int) -> Iterator[int]:
    """``count`` of the rows: all in turn, or of too many as far apart as can be."""
    return (rows[at * len(rows) // count if len(rows) > count else at % len(rows)] for at in range(count))
