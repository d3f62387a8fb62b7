"""The host's VAE on a machine without a GPU, where a picture may be too large to be decoded at once."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import comfy.sd
import torch

TILES = (64, 32, 16)
"""Sides, in latents, of the tiles in which an image is decoded that is too large to be decoded at once."""


class Vae(comfy.sd.VAE):  # type: ignore[misc]  # ComfyUI's classes are untyped
    """The host's VAE, which also decodes in tiles on a CPU, where no error tells that memory is short."""

    def decode(self, samples_in: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """Decode latents.

        In tiles where the host's estimate of the memory that the full size takes is more than the machine has free.

        Args:
            samples_in: (N, 4, h, w).

        Returns: an image (N, 8h, 8w, 3) in 0..1.
        """
        tile = None
        if comfy.model_management.is_device_cpu(self.device):
            height, width = samples_in.shape[-2:]
            need = self.memory_used_decode(samples_in.shape, self.vae_dtype)
            free = comfy.model_management.get_free_memory(self.device)
            tile = decode_tile(height, width, need, free)
        if tile is None:
            image: torch.Tensor = super().decode(samples_in, *arguments, **options)
            return image
        logging.info(
            f"KOALA: decoding {8 * width}x{8 * height} pixels in tiles of {8 * tile}: the full size may take "
            f"{need / 2**30:.1f} GiB, free are {free / 2**30:.1f} GiB."
        )
        image = self.decode_tiled(samples_in, tile_x=tile, tile_y=tile, overlap=tile // 4)
        return image


def decode_tile(height: int, width: int, need: float, free: float) -> int | None:
    """Side, in latents, of the tiles in which to decode a latent; None to decode it at once.

    The largest tile that fits is taken, or else the smallest. A tile takes as much of ``need`` as it has of the area.

    Args:
        height, width: of the latent.
        need: bytes that decoding it at once takes.
        free: bytes of free memory.
    """
    if need <= free:
        return None
    fitting = (side for side in TILES if side * side < height * width and need * side * side <= free * height * width)
    return next(fitting, TILES[-1])
