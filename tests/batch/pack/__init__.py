"""A pack of somebody's ComfyUI: nodes that do to a batch what bad rows do."""

import os
import signal

import torch

IMAGE = {"seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1})}


class NotANumber:
    """A picture of NaN where the seed is 13."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "make", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        """The seed."""
        return {"required": IMAGE}

    def make(self, seed: int) -> tuple:
        """(1, 8, 8, 3)."""
        return (torch.full((1, 8, 8, 3), float("nan") if seed == 13 else seed / 100),)


class EndsTheServer(NotANumber):
    """Ends the server where the seed is 13."""

    def make(self, seed: int) -> tuple:
        """(1, 8, 8, 3)."""
        if seed == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return (torch.full((1, 8, 8, 3), seed / 100),)


NODE_CLASS_MAPPINGS = {"NotANumber": NotANumber, "EndsTheServer": EndsTheServer}
