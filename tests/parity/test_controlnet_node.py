"""KOALA ControlNet in ComfyUI: every kind that core loads, chained, scheduled, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import comfy.t2i_adapter.adapter
import pytest
import torch
from comfy_extras.nodes_controlnet import SetUnionControlNetType
from safetensors.torch import save_file

import nodes as core
from koala_sdxl import koala_loader
from koala_sdxl.koala.architecture.layout import KOALA_1B, KOALA_700M, KOALA_TINY, SDXL, Layout, name
from koala_sdxl.koala.architecture.lineage import lineage
from koala_sdxl.nodes.adapt import KoalaControlNet
from koala_sdxl.nodes.sample import KoalaSampler
from tools.measure import parity, transfer
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL

SKIPS = (0, 2, 3, 5, 6, 8)


def adapted(control: Any) -> Any:
    return KoalaControlNet.execute(control).result[0]


def loaded(state: dict[str, torch.Tensor], folder: Path) -> Any:
    """A ControlNet file through core's loader."""
    save_file(state, folder / "control.safetensors")
    return comfy.controlnet.load_controlnet(str(folder / "control.safetensors"))


def given(koala: Layout | None, control: Any, side: int = 128) -> dict[str, list[Any]]:
    """What the ControlNet hands to the U-Net of SDXL (None) or a KOALA in one pass, the host having nothing to warn."""
    whole, part = transfer.pair(koala or KOALA_700M)
    layout = transfer.small(koala) if koala else SMALL_SDXL
    model = transfer.unguarded(part if koala else whole)  # a stock loader's: nothing is refused before it is sampled
    with transfer.residuals_seen(control) as seen, transfer.warnings_of_host() as said:
        transfer.sample(model, transfer.conditioning(layout, control), side // 8)
    assert said == []
    return seen[0]


def equal(found: list[Any], wanted: list[Any]) -> bool:
    return len(found) == len(wanted) and all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("koala", [KOALA_700M, KOALA_1B], ids=name)
def test_every_residual_is_sdxls_own(koala: Layout) -> None:
    wanted = given(None, transfer.hinted(transfer.controlnet()))
    found = given(koala, transfer.hinted(adapted(transfer.controlnet())))
    assert equal(found["output"], [wanted["output"][skip] for skip in SKIPS])
    assert equal(found["middle"], wanted["middle"] if koala == KOALA_1B else [])
    assert len(wanted["output"]) == 9


def test_on_sdxl_nothing_changes() -> None:
    wanted = given(None, transfer.hinted(transfer.controlnet()))
    found = given(None, transfer.hinted(adapted(transfer.controlnet())))
    assert equal(found["output"], wanted["output"])
    assert equal(found["middle"], wanted["middle"])


def test_the_given_controlnet_stays_as_it_is() -> None:
    control = transfer.controlnet()
    made = adapted(control)
    assert type(control) is comfy.controlnet.ControlNet
    assert isinstance(made, comfy.controlnet.ControlNet)
    assert made.control_model is control.control_model
    assert adapted(made) is made


def test_strength_is_cores() -> None:
    full = given(KOALA_1B, transfer.hinted(adapted(transfer.controlnet())))
    half = given(KOALA_1B, transfer.hinted(adapted(transfer.controlnet()), strength=0.5))
    for key in ("output", "middle"):
        for one, other in zip(full[key], half[key], strict=True):
            torch.testing.assert_close(one * 0.5, other)


def chained(*controls: Any) -> Any:
    """ControlNets one behind the other, as several Apply ControlNet nodes chain them."""
    hint = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(4))
    conditioning = transfer.conditioning(transfer.small(KOALA_1B))
    for control, start, end in controls:
        conditioning = core.ControlNetApplyAdvanced().apply_controlnet(
            conditioning, conditioning, control, hint, 1.0, start, end
        )[0]
    return conditioning[0][1]["control"]


def test_a_chain_adds_up(tmp_path: Path) -> None:
    first, second = transfer.controlnet(), loaded(adapters.controlnet(seed=9), tmp_path)
    apart = [given(KOALA_1B, chained((adapted(control), 0.0, 1.0))) for control in (first, second)]
    both = given(KOALA_1B, chained((adapted(first), 0.0, 1.0), (adapted(second), 0.0, 1.0)))
    for key in ("output", "middle"):
        for one, other, total in zip(apart[0][key], apart[1][key], both[key], strict=True):
            torch.testing.assert_close(one + other, total)


def test_start_and_end_are_cores(tmp_path: Path) -> None:
    """The first step is inside the first one's time only."""
    first, second = transfer.controlnet(), loaded(adapters.controlnet(seed=9), tmp_path)
    alone = given(KOALA_1B, chained((adapted(first), 0.0, 1.0)))
    both = given(KOALA_1B, chained((adapted(first), 0.0, 1.0), (adapted(second), 0.9, 1.0)))
    assert equal(both["output"], alone["output"])
    late = chained((adapted(first), 0.9, 1.0))
    _, part = transfer.pair(KOALA_1B)
    layout = transfer.small(KOALA_1B)
    found = transfer.sample(part, transfer.conditioning(layout, late))
    assert torch.equal(found, transfer.sample(part, transfer.conditioning(layout)))


def test_a_chain_with_one_that_was_forgotten_is_an_error(tmp_path: Path) -> None:
    second = loaded(adapters.controlnet(seed=9), tmp_path)
    with pytest.raises(
        ValueError, match=r"^a ControlNet in this chain has SDXL's residuals, and .*Put KOALA ControlNet"
    ):
        given(KOALA_1B, chained((transfer.controlnet(), 0.0, 1.0), (adapted(second), 0.0, 1.0)))


def test_a_koalas_own_controlnet_is_left_alone(tmp_path: Path) -> None:
    own = loaded(adapters.controlnet(transfer.small(KOALA_1B)), tmp_path)
    plain, through = given(KOALA_1B, transfer.hinted(own)), given(KOALA_1B, transfer.hinted(adapted(own)))
    assert equal(through["output"], plain["output"])
    assert equal(through["middle"], plain["middle"])
    assert len(plain["output"]) == 6


def direct(control: Any, model: Any) -> dict[str, list[Any]]:
    """A ControlNet's residuals for a model, asked for as the sampler asks, without the model being run."""
    control = transfer.hinted(control)
    control.pre_run(model.model, model.model.model_sampling.percent_to_sigma)
    generator = torch.Generator().manual_seed(6)
    cond = {
        "c_crossattn": torch.randn(1, 77, SDXL.context, generator=generator),
        "y": torch.randn(1, SDXL.added, generator=generator),
    }
    return control.get_control(torch.randn(1, 4, 16, 16, generator=generator), torch.tensor([5.0]), cond, 1, {})


def test_union_controlnets_keep_their_type() -> None:
    config = koala_loader.unet_config(adapters.shallow(SDXL))  # core's union layers have SDXL's own widths
    config.pop("out_channels")
    torch.manual_seed(0)
    network = comfy.cldm.cldm.ControlNet(
        **config,
        num_head_channels=64,
        hint_channels=3,
        union_controlnet_num_control_type=6,
        operations=comfy.ops.disable_weight_init,
    )
    for weight in network.parameters():
        torch.nn.init.normal_(weight, 0, 0.02)
    union = SetUnionControlNetType.execute(comfy.controlnet.ControlNet(network), "canny/lineart/anime_lineart/mlsd")
    control = union.result[0]
    whole, part = transfer.pair(KOALA_1B)
    wanted = direct(control, whole)
    found = direct(adapted(control), part)
    assert equal(found["output"], [wanted["output"][skip] for skip in SKIPS])
    after = SetUnionControlNetType.execute(adapted(control), "depth").result[0]
    assert after.extra_args == {"control_type": [1]}
    other = direct(after, part)
    assert len(other["output"]) == len(SKIPS)
    assert not torch.equal(other["output"][0], found["output"][0])


def t2i_adapter(folder: Path, xl: bool = True) -> Any:
    torch.manual_seed(0)
    network = comfy.t2i_adapter.adapter.Adapter(
        channels=[32, 64, 128, 128], nums_rb=2, cin=768 if xl else 192, ksize=1, sk=True, use_conv=False, xl=xl
    )
    return loaded(network.state_dict(), folder)


@pytest.mark.parametrize("koala", [KOALA_700M, KOALA_1B], ids=name)
def test_t2i_adapters_reach_their_blocks(koala: Layout, tmp_path: Path) -> None:
    control = t2i_adapter(tmp_path)
    wanted = given(None, transfer.hinted(control))
    found = given(koala, transfer.hinted(adapted(control)))
    by_block = list(reversed(wanted["input"]))  # the U-Net takes them from the end
    assert [block for block, feature in enumerate(by_block) if feature is not None] == [3, 5, 8]
    assert equal(list(reversed(found["input"])), [by_block[block] for block in SKIPS])
    assert equal(found["middle"], wanted["middle"] if koala == KOALA_1B else [])


def test_koala_sampler_refuses_what_was_not_adapted() -> None:
    model = parity.tiny_models()[0]
    latent = {"samples": torch.zeros(1, 4, 16, 16)}

    def run(control: Any) -> Any:
        positive = transfer.conditioning(KOALA_TINY, transfer.hinted(control))
        preset = {"preset": "custom", "steps": 1, "cfg": 1.0, "spacing": "leading"}
        return KoalaSampler.execute(model, positive, positive, latent, 0, preset, "euler", 1.0)

    with pytest.raises(
        ValueError, match=r"^the conditioning has a ControlNet with SDXL's residuals; koala-tiny has other"
    ):
        run(transfer.controlnet())
    assert run(adapted(transfer.controlnet())).result[0]["samples"].shape == (1, 4, 16, 16)


def test_a_controlnet_for_stable_diffusion_1_is_refused(tmp_path: Path) -> None:
    old = Layout(
        channels=(64, 128, 256, 256), down=((1, 1), (1, 1), (1, 1), (0, 0)), middle=1, up=(), context=96, added=1600
    )
    state = {key: value for key, value in adapters.controlnet(old).items() if not key.startswith("label_emb.")}
    with pytest.raises(
        ValueError, match=r"^this ControlNet has 12 residuals, so it was made for Stable Diffusion 1\.x"
    ):
        adapted(loaded(state, tmp_path))
    with pytest.raises(ValueError, match=r"^this T2I-Adapter was made for another model, most likely Stable Diffu"):
        adapted(t2i_adapter(tmp_path, xl=False))


def test_a_control_lora_is_refused() -> None:
    control = comfy.controlnet.load_controlnet_state_dict(
        {"lora_controlnet": torch.zeros(1), "input_hint_block.0.weight": torch.zeros(16, 3, 3, 3)}
    )
    with pytest.raises(ValueError, match=r"^this ControlNet is a Control-LoRA, which needs the weights of SDXL's"):
        adapted(control)


def test_a_controlnet_of_another_family_is_refused() -> None:
    flux = comfy.controlnet.ControlNet(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"^this ControlNet was made for another family of models \(ControlNet\)"):
        adapted(flux)


def test_residuals_follow_the_lineage() -> None:
    assert lineage(KOALA_TINY).skips == SKIPS
