"""SDXL's two text encoders: captions as tokens, tokens as embeddings, and those of a batch made while training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .cache import TOKENS

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class TextEncoders:
    """CLIP-L and CLIP-G with their tokenizers, on one device."""

    tokenizers: tuple[Any, Any]
    encoders: tuple[nn.Module, nn.Module]

    @classmethod
    def of(cls, pipeline: Any, device: torch.device) -> TextEncoders:
        """Those of a diffusers pipeline, moved to a device."""
        encoders = pipeline.text_encoder.to(device), pipeline.text_encoder_2.to(device)
        return cls((pipeline.tokenizer, pipeline.tokenizer_2), encoders)

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """int64 [n, encoder, 77] on the CPU: each caption's first 77, or fewer and padding, start and end included."""
        found = [
            tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
            for tokenizer in self.tokenizers
        ]
        return torch.stack(found, 1)

    def lengths(self, captions: list[str]) -> list[int]:
        """The tokens of each caption, start and end included, however many they are."""
        return lengths(self.tokenizers[0], captions)

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [n, encoder, 77] -> context [n, 77, c], pooled [n, p], as diffusers' SDXL pipeline computes them:
        both encoders' last hidden state but one, side by side, and the second's projection."""
        device = next(self.encoders[0].parameters()).device
        first, second = (
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip(self.encoders, tokens.to(device).unbind(1), strict=True)
        )
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds

    def embedded(self, batch: Batch) -> Batch:
        """A batch of the cache with context and pooled in place of its tokens."""
        context, pooled = self.embed(batch["tokens"])
        return {name: value for name, value in batch.items() if name != "tokens"} | {
            "context": context,
            "pooled": pooled,
        }


def lengths(tokenizer: Any, captions: list[str]) -> list[int]:
    """The tokens of each caption, start and end included, however many they are."""
    ids = tokenizer(captions, truncation=False, padding=False, verbose=False).input_ids
    return [len(one) for one in ids]


def unchanged(batch: Batch) -> Batch:
    """A batch of a cache that holds embeddings."""
    return batch
