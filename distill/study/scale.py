"""What distilling KOALA-700M and KOALA-1B from SDXL costs at 1024 px, calculated: arithmetic, memory, time and disk.

No tensor is computed and no GPU is needed. Multiplications are counted by torch's ``FlopCounterMode`` on diffusers'
U-Nets of meta tensors; ``tools.measure.bench.macs`` counts ComfyUI's with the same counter, with equal results.
Activations are what autograd saves in a forward pass of fake CUDA tensors, in bf16 under CUDA's autocast rules, with
flash attention.

Sources: the recipe is that of the model cards (etri-vilab/koala-lightning-700m: "500K with a batch size of 128",
"4 x NVIDIA A100 (80GB)"); 312 TFLOP/s is NVIDIA's figure for the A100, bf16, dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tools.synthetic import random_weights

from ...koala.architecture.keys import parameters
from ...koala.architecture.layout import KOALA_1B, KOALA_700M, SDXL, Layout
from ...koala.files.export import unet_config
from .. import footprint
from ..config import LossTable, TrainingTable
from ..features import FeatureRecorder, pairs
from ..footprint import Memory, Saved
from ..losses import feature_error
from ..student import cut_out

STUDENTS = (KOALA_700M, KOALA_1B)
SIDE = 1024  # px
LATENT = SIDE // 8
TOKENS = 77

ITERATIONS = 500_000
BATCH = 128  # images per iteration, over all GPUs
GPUS = 4
PEAK = 312e12  # FLOP/s of an A100
UTILISATIONS = (0.3, 0.4, 0.5)

CARDS = {"16 GB": 16 * 2**30, "24 GB": 24 * 2**30, "40 GB": 40 * 2**30, "80 GB": 80 * 2**30}  # bytes
TABLE = TrainingTable(steps=ITERATIONS)
"""The default settings: bf16 autocast, AdamW and the average in fp32 on the GPU."""
USABLE = 0.9
"""Share of a card's memory available to tensors; the rest is for CUDA itself, workspaces and fragmentation."""

GB = 10**9


# --- arithmetic --------------------------------------------------------------------------------------------------


@cache
def unet_macs(layout: Layout) -> int:
    """Multiplications of one forward pass of one image."""
    unet = _unet(layout, "meta")
    with torch.no_grad(), _flash():
        return _macs(lambda: _forward(unet, layout, "meta"))


def step_flops(student: Layout, checkpointing: bool) -> int:
    """FLOPs of training on one image: the teacher forward, the student forward, and backward at twice the cost; with
    gradient checkpointing, the student forward once more."""
    return 2 * (unet_macs(SDXL) + (4 if checkpointing else 3) * unet_macs(student))


def images_per_second(student: Layout, checkpointing: bool, utilisation: float) -> float:
    """Of one A100 that reaches ``utilisation`` of its peak."""
    return PEAK * utilisation / step_flops(student, checkpointing)


def gpu_hours(student: Layout, checkpointing: bool, utilisation: float) -> float:
    """Of the published recipe, on A100s."""
    return ITERATIONS * BATCH / images_per_second(student, checkpointing, utilisation) / 3600


@dataclass(frozen=True)
class Encoders:
    """The models that are not needed while training, thanks to the cache of latents and text embeddings."""

    vae: int
    """Multiplications of encoding one image."""
    text: int
    """Multiplications of both text encoders on one caption."""
    weights: int
    """Number of weights of the VAE's encoder and both text encoders."""


@cache
def encoders() -> Encoders:
    """SDXL's."""
    with torch.device("meta"):
        vae = AutoencoderKL(**random_weights.VAE)
        first, second = (
            kind(CLIPTextConfig(**size, projection_dim=width, attn_implementation="eager"))
            for kind, size, width in (
                (CLIPTextModel, random_weights.CLIP_L, 768),
                (CLIPTextModelWithProjection, random_weights.CLIP_G, 1280),
            )
        )
        image = torch.empty(1, 3, SIDE, SIDE)
        caption = torch.zeros(1, TOKENS, dtype=torch.int64)
    used = (vae.encoder, vae.quant_conv, first, second)
    with torch.no_grad():
        return Encoders(
            _macs(lambda: vae.encode(image)),
            _macs(lambda: (first(caption), second(caption))),
            sum(weight.numel() for model in used for weight in model.parameters()),
        )


def cache_bytes(images: int) -> dict[str, int]:
    """Bytes on disk of the cache, fp16, by part."""
    shapes = {
        "latents": (SDXL.in_channels, LATENT, LATENT),
        "context": (TOKENS, SDXL.context),
        "pooled": (SDXL.pooled,),
    }
    return {part: 2 * images * prod(shape) for part, shape in shapes.items()}


def _macs(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


# --- activations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """What a student's forward pass of one image stores for its backward pass, in bytes."""

    plain: int
    kept: int
    """With gradient checkpointing: the inputs of blocks, and everything outside of blocks."""
    recomputed: int
    """With gradient checkpointing: the most that one block needs beyond that."""
    student_features: int
    teacher_features: int
    loss: int
    """Of the feature loss itself: the differences, fp32."""

    @property
    def features(self) -> int:
        return self.student_features + self.teacher_features + self.loss

    def per_image(self, checkpointing: bool) -> int:
        """The peak, features included."""
        return self.features + (self.kept + self.recomputed if checkpointing else self.plain)


@cache
def activations(layout: Layout) -> Activations:
    """Measured on one pass of fake tensors, with diffusers' own division into checkpointed blocks."""
    table = LossTable()
    chosen = pairs(cut_out(layout, "first"), table)
    weights, inside, outside, ends, loss, ours, theirs = (Saved() for _ in range(7))
    blocks: list[Saved] = []

    def checkpointed(block: Callable[..., Any], *given: Any) -> Any:
        blocks.append(Saved())
        for tensor in given:
            if isinstance(tensor, torch.Tensor):
                ends.add(tensor)
        with blocks[-1].hooks():
            return block(*given)

    with FakeTensorMode(), _flash(), _autocast():
        unet = _unet(layout, "cuda")
        for weight in unet.parameters():
            weights.add(weight)
        unet.enable_gradient_checkpointing(checkpointed)
        with FeatureRecorder(unet, (pair.student for pair in chosen)).recording() as taken, outside.hooks():
            _forward(unet, layout, "cuda")
        wanted = {pair.teacher: torch.empty_like(taken[pair.student]) for pair in chosen}
        with loss.hooks():
            feature_error(table, chosen, taken, wanted)
        for saved, features in ((ours, taken), (theirs, wanted)):
            for feature in features.values():
                saved.add(feature)
    for block in blocks:
        inside.bytes.update(block.bytes)
    return Activations(
        plain=outside.beyond(weights) + inside.beyond(weights, outside),
        kept=outside.beyond(weights) + ends.beyond(weights, outside),
        recomputed=max(block.beyond(weights, outside, ends) for block in blocks),
        student_features=ours.beyond(outside, inside, ends),
        teacher_features=theirs.beyond(),
        loss=loss.beyond(weights, ours, theirs),
    )


def _unet(layout: Layout, device: str) -> UNet2DConditionModel:
    """Without weights in memory, in bf16."""
    arguments = {key: value for key, value in unet_config(layout, SIDE).items() if not key.startswith("_")}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # Module.to cannot change fake CUDA tensors
    try:
        with torch.device(device):
            return UNet2DConditionModel(**arguments)
    finally:
        torch.set_default_dtype(before)


def _forward(unet: UNet2DConditionModel, layout: Layout, device: str) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(1, *shape, device=device, dtype=torch.bfloat16)

    unet(
        empty(layout.in_channels, LATENT, LATENT),
        torch.empty(1, device=device, dtype=torch.int64),
        empty(TOKENS, layout.context),
        added_cond_kwargs={"text_embeds": empty(layout.pooled), "time_ids": empty(6)},
    )


def _flash() -> Any:
    """Flash attention for every attention call: torch would not choose it for fake tensors."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    return patch.object(F, "scaled_dot_product_attention", attention)


@contextmanager
def _autocast() -> Iterator[None]:
    """CUDA's autocast to bf16; ``torch.autocast`` disables itself where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


# --- memory ------------------------------------------------------------------------------------------------------


def memory(
    student: Layout,
    checkpointing: bool,
    gpus: int = 1,
    teacher_gpus: int = 1,
    table: TrainingTable = TABLE,
    teacher_dtype: str = "bf16",
) -> Memory:
    """``footprint.memory`` on each GPU, SDXL being the teacher."""
    per_image = activations(student).per_image(checkpointing)
    return footprint.memory(table, student, SDXL, teacher_dtype, per_image, gpus, teacher_gpus)


def largest_batch(found: Memory, card: int) -> int:
    """Images on a card with that many bytes; 0 where not one fits."""
    return max(0, (int(USABLE * card) - found.fixed) // found.per_image)


def traffic(student: Layout, gpus: int = 1, teacher_gpus: int = 1) -> int:
    """Bytes that each GPU sends per step, in rings of ``GPUS``: without sharding, DDP's all-reduce of fp32 gradients;
    with it, two all-gathers of the student and a reduce-scatter, all bf16; and an all-gather of a sharded teacher."""
    weights = parameters(student) * (3 * 2 if gpus > 1 else 2 * 4)
    return (GPUS - 1) * (weights + (2 * parameters(SDXL) if teacher_gpus > 1 else 0)) // GPUS
