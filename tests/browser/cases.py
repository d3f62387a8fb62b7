"""SDXL graphs, what a swap in each of them does and says, and what it should draw then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.browser.graphs import (
    APPLY,
    BYPASSED,
    CONTROLNET,
    KOALA,
    PUBLISHED,
    SDXL,
    SEED,
    SETTINGS,
    UNET,
    Graph,
    advanced,
    graph,
    ksampler,
    lora,
)

IN_PLACE = f"{UNET} in place"
SET = "the sampler is set as KOALA was published"
BOTH = "2 of 2 samplers set as KOALA was published"
SWAP = "KOALA U-Net Swap"
TWICE = f"2 times {SWAP} in place, one for each MODEL that is sampled"
CUSTOM: dict[str, Any] = {
    "noise": ("RandomNoise", {"noise_seed": SEED}),
    "chosen": ("KSamplerSelect", {"sampler_name": SETTINGS["sampler_name"]}),
    "sigmas": ("BasicScheduler", {"scheduler": SETTINGS["scheduler"], "steps": SETTINGS["steps"], "denoise": 1.0}),
    "guider": ("CFGGuider", {"cfg": SETTINGS["cfg"]}),
    "custom": ("SamplerCustomAdvanced", {}),
}
CUSTOM_LINKS = (
    ("noise", 0, "custom", "noise"),
    ("guider", 0, "custom", "guider"),
    ("chosen", 0, "custom", "sampler"),
    ("sigmas", 0, "custom", "sigmas"),
)
CONTROL: dict[str, Any] = {"net": ("ControlNetLoader", {"control_net_name": CONTROLNET}), "apply": APPLY}
HINT = ("EmptyImage", {"width": 128, "height": 128, "batch_size": 1, "color": 0x40FF20})
CONTROL_LINKS = (
    ("hint", 0, "apply", "image"),
    ("apply", 0, "KSampler", "positive"),
    ("apply", 1, "KSampler", "negative"),
)


def ours(*parts: Any, **nodes: Any) -> Graph:
    """A graph for KOALA from the start, with the published settings."""
    return graph(*parts, **{"KSampler": ksampler(**PUBLISHED), **nodes, SDXL: KOALA})


PLAIN = ours(f"{SDXL} > KSampler")
WITH_LORA = ours(f"{SDXL} > LoRA > KSampler", (SDXL, 1, "LoRA", "clip"), clip="LoRA", LoRA=lora(kind="KoalaLoraLoader"))


@dataclass(frozen=True)
class Case:
    """A graph, what is clicked, the MODEL (and ControlNet) links afterwards, what is said, and what should be drawn."""

    graph: Graph
    links: str
    said: tuple[str, ...]
    drawn: Graph
    click: tuple[str, ...] = (SDXL,)
    inside: str = ""
    """The subgraph that is open."""
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Widgets afterwards, of nodes by their titles."""


CASES = {
    "LoRA chain": Case(
        graph(
            f"{SDXL} > LoRA > weak > scaled > KSampler",
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            LoRA=lora(),
            weak=lora(0.5, "LoraLoaderModelOnly"),
            scaled=("RescaleCFG", {"multiplier": 0.3}),
            KSampler=ksampler(),
        ),
        f"{SDXL} > LoRA > weak > scaled > {SWAP} > KSampler",
        (IN_PLACE, SET),
        ours(
            f"{SDXL} > LoRA > weak > scaled > KSampler",
            (SDXL, 1, "LoRA", "clip"),
            ("LoRA", 1, "weak", "clip"),
            clip="LoRA",
            LoRA=lora(kind="KoalaLoraLoader"),
            weak=lora(0.5, "KoalaLoraLoader"),
            scaled=("RescaleCFG", {"multiplier": 0.3}),
        ),
    ),
    "two samplers": Case(
        graph(
            f"{SDXL} > LoRA > KSampler",
            f"{SDXL} > plain",
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            LoRA=lora(),
            KSampler=ksampler(),
            plain=ksampler(),
        ),
        f"{SDXL} > LoRA > {SWAP} > KSampler, {SDXL} > {SWAP} > plain",
        (TWICE, BOTH),
        WITH_LORA,
    ),
    "custom sampler chain": Case(
        graph(f"{SDXL} > guider", f"{SDXL} > sigmas", *CUSTOM_LINKS, show="custom", **CUSTOM),
        f"{SDXL} > {SWAP} > guider, {SWAP} > sigmas",
        (IN_PLACE, SET),
        PLAIN,
    ),
    "subgraph, from outside": Case(
        graph(
            f"{SDXL} > LoRA > KSampler",
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            LoRA=lora(),
            KSampler=ksampler(),
            subgraphs={"inner": ("LoRA", "KSampler")},
            shown={"inner": ("KSampler", "steps")},
        ),
        f"{SDXL} > inner, in > LoRA > {SWAP} > KSampler",
        (IN_PLACE, SET),
        WITH_LORA,
        values={"inner": {"steps": PUBLISHED["steps"]}},
    ),
    "subgraph, from inside": Case(
        graph(
            f"{SDXL} > LoRA > KSampler",
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            LoRA=lora(),
            KSampler=ksampler(),
            subgraphs={"inner": (SDXL,)},
        ),
        f"{SDXL} > out, inner > LoRA > {SWAP} > KSampler",
        (IN_PLACE, SET),
        WITH_LORA,
        inside="inner",
    ),
    "subgraph with the swap alone": Case(
        graph(
            f"{SDXL} > swapped > LoRA > KSampler",
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            swapped=("KoalaUNetSwap", {"unet_name": UNET}),
            LoRA=lora(),
            KSampler=ksampler(**PUBLISHED),
            subgraphs={"inner": ("swapped",)},
        ),
        f"{SDXL} > inner > LoRA > {SWAP} > KSampler, Reroute > out",  # the link into it has no type
        (IN_PLACE,),
        WITH_LORA,
        click=("LoRA",),
    ),
    "bypassed nodes": Case(
        graph(
            f"{SDXL} > LoRA > off > compiled > KSampler",
            (SDXL, 1, "LoRA", "clip"),
            ("LoRA", 1, "off", "clip"),
            clip="off",
            LoRA=lora(),
            off=lora(2.0),
            compiled=("TorchCompileModel", {"backend": "inductor"}),
            KSampler=ksampler(),
            modes={"off": BYPASSED, "compiled": BYPASSED},
        ),
        f"{SDXL} > LoRA > off > {SWAP} > compiled > KSampler",
        (IN_PLACE, SET),
        WITH_LORA,
    ),
    "reroutes": Case(
        graph(
            (SDXL, 0, "one", ""),
            ("one", 0, "LoRA", "model"),
            ("LoRA", 0, "two", ""),
            ("two", 0, "KSampler", "model"),
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            one=("Reroute", {}),
            two=("Reroute", {}),
            LoRA=lora(),
            KSampler=ksampler(),
        ),
        f"{SDXL} > one > LoRA > {SWAP} > two > KSampler",
        (IN_PLACE, SET),
        WITH_LORA,
    ),
    "unknown types": Case(
        graph(
            f"{SDXL} > strange > KSampler",
            "strange > user",
            strange=("UnknownPatch", {}),
            user=("UnknownUser", {}),
            KSampler=ksampler(),
        ),
        f"{SDXL} > strange > {SWAP} > KSampler, {SWAP} > user",
        (
            IN_PLACE,
            SET,
            f'not known: "strange"; {SWAP} says after a run what it carried over',
            'not known: what "user" does with the MODEL',
        ),
        ours(f"{SDXL} > strange > KSampler", strange=("UnknownPatch", {})),
    ),
    "linked steps": Case(
        graph(
            f"{SDXL} > KSampler",
            f"{SDXL} > other",
            f"{SDXL} > third",
            ("steps", 0, "KSampler", "steps"),
            ("steps", 0, "sum", "values.a"),
            ("sum", 1, "other", "steps"),
            ("count", 0, "third", "steps"),
            steps=("PrimitiveInt", {"value": 30}),
            sum=("ComfyMathExpression", {"expression": "a"}),
            count=("PrimitiveInt", {"value": 30}),
            KSampler=ksampler(),
            other=ksampler(),
            third=ksampler(),
        ),
        f"{SDXL} > {SWAP} > KSampler, {SWAP} > other, {SWAP} > third",
        (
            IN_PLACE,
            "1 of 3 samplers set as KOALA was published",
            'not set: "KSampler": steps, because it comes from "steps", which feeds other nodes, too',
            'not set: "other": steps, because it comes from "sum", which computes it',
        ),
        ours(f"{SDXL} > KSampler", KSampler=ksampler(**{**PUBLISHED, "steps": SETTINGS["steps"]})),
        values={"count": {"value": 25}, "steps": {"value": 30}},
    ),
    "base and refiner": Case(
        graph(
            f"{SDXL} > base",
            f"{SDXL} > refiner",
            ("base", 0, "refiner", "latent_image"),
            base=advanced(0, 24, last=False),
            refiner=advanced(24, 10000, last=True),
            show="refiner",
        ),
        f"{SDXL} > {SWAP} > base, {SWAP} > refiner",
        (IN_PLACE, BOTH),
        ours(
            f"{SDXL} > base",
            f"{SDXL} > refiner",
            ("base", 0, "refiner", "latent_image"),
            base=advanced(0, 20, last=False, **PUBLISHED),
            refiner=advanced(20, 10000, last=True, **PUBLISHED),
            show="refiner",
        ),
    ),
    "a swap from before": Case(
        graph(
            f"{SDXL} > old > LoRA > KSampler",
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            LoRA=lora(),
            old=("KoalaUNetSwap", {"unet_name": UNET}),
            KSampler=ksampler(**PUBLISHED),
        ),
        f"{SDXL} > LoRA > old > KSampler",
        (f"{SWAP} moved behind what changes SDXL's MODEL",),
        WITH_LORA,
        click=("LoRA",),
    ),
    "several selected": Case(
        graph(
            f"{SDXL} > LoRA > KSampler",
            "second > plain",
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            second=("TinySDXL", {}),
            LoRA=lora(),
            KSampler=ksampler(),
            plain=ksampler(),
        ),
        f"{SDXL} > LoRA > {SWAP} > KSampler, second > {SWAP} > plain",
        (TWICE, BOTH),
        WITH_LORA,
        click=(SDXL, "LoRA", "second"),
    ),
    "ControlNet": Case(
        graph(
            f"{SDXL} > KSampler",
            *CONTROL_LINKS,
            ("net", 0, "apply", "control_net"),
            KSampler=ksampler(),
            hint=HINT,
            **CONTROL,
        ),
        f"{SDXL} > {SWAP} > KSampler, net > KOALA ControlNet > apply",
        (IN_PLACE, SET, 'KOALA ControlNet put behind "net"'),
        ours(
            f"{SDXL} > KSampler",
            *CONTROL_LINKS,
            ("net", 0, "adapted", "control_net"),
            ("adapted", 0, "apply", "control_net"),
            adapted=("KoalaControlNet", {}),
            hint=HINT,
            **CONTROL,
        ),
    ),
    "LoRA beside the weights": Case(
        graph(
            f"{SDXL} > LoRA > KSampler",
            (SDXL, 1, "LoRA", "clip"),
            clip="LoRA",
            LoRA=lora(kind="LoraLoaderBypass"),
            KSampler=ksampler(),
        ),
        f"{SDXL} > LoRA > {SWAP} > KSampler",
        (IN_PLACE, SET, 'merges its LoRA into the weights now, so that it is carried over: "LoRA"'),
        WITH_LORA,
    ),
}
