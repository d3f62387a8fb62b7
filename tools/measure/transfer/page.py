"""docs/transfer.md: every figure of this package, measured now."""

from __future__ import annotations

import sys

from koala_sdxl.koala.architecture.layout import KOALA_700M, name
from tools import commands
from tools.harness import testhost
from tools.measure.markdown import table
from tools.measure.transfer.attention_patches import patched_layers
from tools.measure.transfer.control_residuals import residuals
from tools.measure.transfer.libraries.compare import BOUND, Outcome, compare
from tools.measure.transfer.libraries.kinds import KINDS, versions
from tools.measure.transfer.lora import SQUARE_BOUND, reach, square
from tools.measure.transfer.models import KOALAS
from tools.synthetic import adapters

PAGE = testhost.ROOT / "docs" / "transfer.md"


def text() -> str:
    """docs/transfer.md: the figures, measured now."""
    lines = [
        "# Which layers SDXL's adapters reach",
        "",
        "SDXL's adapters on KOALA, by ComfyUI's stock nodes and by this pack's. Written by `python3 dev.py transfer`; "
        "the tests assert the same figures. No trained weights are needed: the adapters' numbers are random, or say "
        "which layer they are for.",
        "",
        "## LoRA",
        "",
        "An SDXL LoRA on all 722 matrices of the attention modules. *Right*: a KOALA module got the change of the SDXL "
        "module that it came from.",
        "",
        *table(
            ("model", "names", "nodes", "right", "wrong layer", "untouched"),
            (
                (name(koala), naming, "this pack" if ours else "stock", *reach(koala, naming, ours)[:3])
                for koala in KOALAS
                for naming in ("kohya, LDM blocks", "kohya, diffusers blocks")
                for ours in (False, True)
            ),
        ),
        "",
        "Both orders: a random LoRA is applied to a random SDXL by the stock loader, and KOALA cut out of the "
        "result; or KOALA is cut out first, and the LoRA applied by KOALA LoRA Loader. Largest change that the LoRA "
        f"makes to a weight, and largest difference between the two ways (fp32; bound {SQUARE_BOUND:g}):",
        "",
        *table(
            ("kind", "change", *(f"difference, {name(koala)}" for koala in KOALAS)),
            (
                (kind, f"{found[0].change:.1g}", *(f"{way.difference:.1g}" for way in found))
                for kind in adapters.KINDS
                for found in [[square(koala, kind) for koala in KOALAS]]
            ),
        ),
        "",
        *adapter_files(),
        "",
        "## ControlNet",
        "",
        "An SDXL ControlNet (random weights, core's loader and sampler) gives nine residuals for skip connections and "
        "one for the middle block; KOALA has six skip connections, and only 1B and larger have a middle block.",
        "",
        *table(
            ("model", "nodes", "residuals added", "on the right connection", "warnings of the host"),
            (
                (name(koala), "this pack" if ours else "stock", *residuals(koala, ours))
                for koala in KOALAS
                for ours in (False, True)
            ),
        ),
        "",
        "## IP-Adapter",
        "",
        "Patches on SDXL's 70 cross-attention layers, by SDXL's block numbers, as IP-Adapter packs set them. *This "
        "pack*: KOALA Attention Patches comes after them.",
        "",
        *table(
            ("model", "nodes", "right", "wrong layer, same width", "wrong width", "untouched"),
            (
                (name(koala), "this pack" if ours else "stock", *patched_layers(koala, ours))
                for koala in KOALAS
                for ours in (False, True)
            ),
        ),
        "",
        "## What this does not show",
        "",
        "Which layer a change reaches, not what it does to images. KOALA was trained further after the cut, so its "
        "layers differ from SDXL's. That KOALA-700M and 1B kept the first five and six of ten transformer layers is "
        "an assumption; `python3 dev.py lineage` measures it on real weights.",
        "",
    ]
    return "\n".join(lines)


def adapter_files() -> list[str]:
    """The section on files that the training libraries themselves write."""
    found = [(kind, compare(kind, KOALA_700M)[0]) for kind in KINDS]
    names = ", ".join(f"{library} {version}" for library, version in versions().items())
    refused = [kind.name for kind, compared in found if compared.refused]
    return [
        "### Files of the training libraries",
        "",
        f"{names}: each attaches an adapter with random numbers to a narrow SDXL and saves it. What the library itself "
        f"merges into SDXL is cut to KOALA-700M; KOALA LoRA Loader applies the file to a KOALA-700M that was cut out "
        f"before. *Right*: of the weights and biases that the library changed, how many are the same both ways. "
        f"*Difference*: the largest, as a share of the weight's own change (fp32; bound {BOUND:g}). The report names "
        f"every module that is not applied.",
        "",
        *table(
            ("library", "kind", "strength", "U-Net right", "difference", "text encoders right", "difference"),
            (
                (kind.library, kind.name, f"{kind.strength:g}", *_shares(compared.unet), *_shares(compared.text))
                for kind, compared in found
                if not compared.refused
            ),
        ),
        "",
        f"Refused by their own names, as ComfyUI cannot apply them, or as they belong to weights that their method "
        f"altered: {', '.join(refused)}.",
    ]


def _shares(part: Outcome) -> tuple[str, str]:
    changed = part.right + part.wrong + part.untouched
    return (f"{part.right} of {changed}", f"{part.difference:.1g}") if changed else ("", "")


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    commands.parser("transfer").parse_args(arguments)
    PAGE.write_text(text(), "utf-8")
    testhost.say(str(PAGE))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
