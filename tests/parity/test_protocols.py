"""ComfyUI's objects have every member that the pack's Protocols name."""

from __future__ import annotations

from typing import Any

import comfy.hooks
import pytest
from comfy.patcher_extension import WrappersMP

from koala_sdxl.host import protocols
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from tools.measure import parity, transfer

OBJECTS = {
    protocols.Model: lambda: parity.tiny_models()[0],
    protocols.BaseModel: lambda: parity.tiny_models()[0].model,
    protocols.Clip: lambda: parity.tiny_models()[1],
    protocols.Patcher: lambda: parity.tiny_models()[1].patcher,
    protocols.Tokenizer: lambda: parity.tiny_models()[1].tokenizer,
    protocols.Vae: lambda: parity.tiny_models()[2],
    protocols.ControlNet: transfer.controlnet,
    protocols.Hooks: comfy.hooks.HookGroup,
}


@pytest.mark.parametrize("protocol", OBJECTS, ids=lambda protocol: protocol.__name__)
def test_comfyuis_objects_have_what_the_pack_uses(protocol: Any) -> None:
    assert isinstance(OBJECTS[protocol](), protocol)


def test_a_guider_has_what_the_pack_uses_while_it_samples() -> None:
    model, guiders = parity.tiny_models()[0].clone(), []

    def wrapper(executor: Any, *arguments: Any, **further: Any) -> Any:
        guiders.append(isinstance(executor.class_obj, protocols.Guider))
        return executor(*arguments, **further)

    model.add_wrapper(WrappersMP.OUTER_SAMPLE, wrapper)
    transfer.sample(model, transfer.conditioning(KOALA_TINY))
    assert guiders == [True]
