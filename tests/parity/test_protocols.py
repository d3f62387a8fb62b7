"""ComfyUI's objects have every member that the pack's Protocols name."""

from __future__ import annotations

from typing import Any

import comfy.hooks
import comfy.samplers
import pytest

from koala_sdxl.host import protocols
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


def test_a_guider_has_what_the_pack_uses() -> None:
    guider = comfy.samplers.CFGGuider(parity.tiny_models()[0])
    guider.set_cfg(1.0)
    assert isinstance(guider, protocols.Guider)
