"""OpenVINO's engine: diffusers' U-Net through OpenVINO's own converter, in fp32, on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openvino
import torch

from tools.measure.bench.diffusers_engine import Diffusers


class OpenVino(Diffusers):
    """The U-Net alone: diffusers' denoising loop around a compiled model for each size."""

    def load_unet(self, folder: Path) -> None:
        super().load_unet(folder)
        layout = self.unet.config
        width, pooled = layout.cross_attention_dim, layout.projection_class_embeddings_input_dim
        example = (
            torch.zeros(2, layout.in_channels, 32, 32),
            torch.tensor(1.0),
            torch.zeros(2, 77, width),
            torch.zeros(2, pooled - 6 * layout.addition_time_embed_dim),
            torch.zeros(2, 6),
        )
        self._converted = openvino.convert_model(_Named(self.unet), example_input=example)
        self._core = openvino.Core()
        self._compiled: dict[tuple[tuple[int, ...], ...], Any] = {}
        self.parts, self.unet = [], self._run

    def weights(self) -> int:
        """Bytes of the converted model's constants."""
        return sum(one.data.nbytes for one in self._converted.get_ops() if one.get_type_name() == "Constant")

    def types(self) -> dict[str, str]:
        return {"unet": "float32"}

    def _run(
        self,
        sample: torch.Tensor,
        time: torch.Tensor,
        context: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor],
    ) -> Any:
        """As diffusers' U-Net is called."""
        given = (sample, time.float(), context, added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"])
        shapes = tuple(tuple(one.shape) for one in given)
        if shapes not in self._compiled:
            self._converted.reshape({place: list(shape) for place, shape in enumerate(shapes)})
            hint = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            self._compiled = {shapes: self._core.compile_model(self._converted, "CPU", hint)}  # one is large enough
        made = self._compiled[shapes]([one.numpy() for one in given])[0]
        return SimpleNamespace(sample=torch.from_numpy(made))


class _Named(torch.nn.Module):
    """The U-Net with tensors alone as its arguments, in this order."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        text_embeds: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        made: torch.Tensor = self.unet(sample, timestep, context, added_cond_kwargs=added, return_dict=False)[0]
        return made
