"""What the tests of a file share is theirs alone, and a test that writes into it is found out."""

from __future__ import annotations

import pytest
import torch

from tests.shared_models import of_this_file
from tools.measure import parity

WEIGHT = "diffusion_model.out.2.bias"


def test_a_file_that_writes_into_shared_weights_fails_and_the_next_has_its_own() -> None:
    watched = of_this_file()
    next(watched)
    held = parity.tiny_models()  # as a test that has failed, or a model that ComfyUI has loaded, would
    shared = held[0].model_state_dict()[WEIGHT]
    before = shared.clone()
    shared.add_(1)
    with pytest.raises(AssertionError, match=f"wrote into the weights that it shares .*model.{WEIGHT}$"):
        next(watched)
    assert torch.equal(parity.tiny_models()[0].model_state_dict()[WEIGHT], before)


def test_a_file_that_only_patches_them_does_not() -> None:
    watched = of_this_file()
    next(watched)
    model = parity.tiny_models()[0].clone()
    before = model.model_state_dict()[WEIGHT].clone()
    model.add_patches({WEIGHT: ("diff", (torch.ones(4),))})
    model.patch_model()
    assert not torch.equal(model.model_state_dict()[WEIGHT], before)
    model.unpatch_model()
    with pytest.raises(StopIteration):
        next(watched)
