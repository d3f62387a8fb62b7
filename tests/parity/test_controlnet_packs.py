"""KOALA ControlNet with ControlNets of other packs: functions set on the instance, conversions, classes of their own.

The stand-ins have the patterns of published packs, in our own words.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.model_management
import pytest
import torch
from safetensors.torch import save_file

from koala_sdxl.koala.architecture.layout import KOALA_1B, KOALA_700M, KOALA_TINY, Layout, compact, name
from koala_sdxl.nodes.adapt import KoalaControlNet
from koala_sdxl.nodes.sample import KoalaSampler
from tests.daily import daily
from tools.measure import parity, transfer
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL

SKIPS = (0, 2, 3, 5, 6, 8)
KEYFRAMES = ((0.0, 0.5), (0.4, 2.0))
"""Percent of the schedule -> strength from there on."""
SIGMAS = (14.0, 5.0, 0.5)


@pytest.fixture(autouse=True)
def no_stand_ins_left() -> Iterator[None]:
    """A stand-in's own patcher goes before the network that it shares, as the pack's does; the host would warn of it in
    a later test."""
    yield
    comfy.model_management.unload_all_models()
    gc.collect()
    loaded = comfy.model_management.current_loaded_models
    loaded[:] = [each for each in loaded if not each.is_dead()]


def adapted(control: Any) -> Any:
    return KoalaControlNet.execute(control).result[0]


# --- Advanced-ControlNet's pattern --------------------------------------------------------------------------------


class Keyframed:
    """Mixed into core's classes. Sets its functions on the instance, where they go before any class's."""

    previous_controlnet: Any

    def begin(self, base: Any) -> None:
        self.base = base
        self.keyframes: tuple[tuple[float, float], ...] = ()
        self.mask: torch.Tensor | None = None
        self.get_control = self.get_control_by_keyframes
        self.control_merge = self.control_merge_by_layer
        self.pre_run = self.pre_run_with_keyframes

    def pre_run_with_keyframes(self, model: Any, percent_to_sigma: Any) -> None:
        self.base.pre_run(model, percent_to_sigma)
        self.strengths = [(percent_to_sigma(start), strength) for start, strength in self.keyframes]

    def get_control_by_keyframes(self, x: Any, t: Any, cond: Any, batched: int, options: Any) -> Any:
        started = [strength for sigma, strength in self.strengths if float(t[0]) <= sigma]
        self.now = started[-1] if started else 1.0
        if self.now == 0.0:
            before = self.previous_controlnet
            return None if before is None else before.get_control(x, t, cond, batched, options)
        return self.base.get_control(x, t, cond, batched, options)

    def control_merge_by_layer(self, control: Any, before: Any, output_dtype: Any) -> Any:
        """A strength for each of SDXL's layers, and a mask."""
        merged = comfy.controlnet.ControlBase.control_merge(self, control, None, output_dtype)
        for listed in merged.values():
            for layer, residual in enumerate(listed):
                if residual is not None:
                    weighted = residual * self.now * 0.8 ** (len(listed) - layer)
                    if self.mask is not None:
                        weighted = weighted * torch.nn.functional.interpolate(self.mask, weighted.shape[-2:])
                    listed[layer] = weighted
        return merged if before is None else comfy.controlnet.ControlBase().control_merge(merged, before, output_dtype)

    def copy_keyframes(self, made: Any) -> Any:
        made.keyframes, made.mask = self.keyframes, self.mask
        return made


class KeyframedControlNet(comfy.controlnet.ControlNet, Keyframed):
    def __init__(self, network: Any, **options: Any) -> None:
        super().__init__(network, **options)
        self.begin(super(type(self), self))

    @classmethod
    def of(cls, plain: Any) -> Any:
        made = cls(plain.control_model, load_device=plain.load_device, manual_cast_dtype=plain.manual_cast_dtype)
        plain.copy_to(made)
        made.control_model_wrapped = plain.control_model_wrapped.clone()
        return made

    def copy(self) -> Any:
        return self.copy_keyframes(KeyframedControlNet.of(self))


class KeyframedT2IAdapter(comfy.controlnet.T2IAdapter, Keyframed):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.begin(super(type(self), self))

    @classmethod
    def of(cls, plain: Any) -> Any:
        made = cls(plain.t2i_model, plain.channels_in, plain.compression_ratio, plain.upscale_algorithm)
        plain.copy_to(made)
        return made

    def copy(self) -> Any:
        return self.copy_keyframes(KeyframedT2IAdapter.of(self))


def converted(control: Any) -> Any:
    """A loader's or an apply node's conversion: of exactly core's class, everything else is left as it is."""
    if hasattr(control, "keyframes"):
        return control
    if type(control) is comfy.controlnet.ControlNet:
        return KeyframedControlNet.of(control)
    if isinstance(control, comfy.controlnet.T2IAdapter):
        return KeyframedT2IAdapter.of(control)
    return control


def applied(control: Any, keyframes: Any = KEYFRAMES, side: int = 128) -> Any:
    """The pack's apply node: it copies, converts, and gives keyframes and a mask."""
    made = converted(control.copy())
    hint = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(4))
    made.set_cond_hint(hint, 0.9, (0.0, 1.0))
    if hasattr(made, "keyframes"):
        made.keyframes = keyframes
        made.mask = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(8))
    return made


ORDERS = {
    "behind the pack's loader": lambda control: applied(adapted(converted(control))),
    "before the pack's apply node": lambda control: applied(adapted(control)),
    "behind the loader, copied often": lambda control: applied(adapted(converted(control)).copy().copy()),
}
orders = pytest.mark.parametrize("order", ORDERS)
koalas = pytest.mark.parametrize("koala", daily([KOALA_700M, KOALA_1B], [KOALA_700M]), ids=name)
"""By day test_transfer.py has core's ControlNets on all of them."""


def asked(control: Any, model: Any) -> list[dict[str, list[Any]]]:
    """A ControlNet's residuals at several noise levels, asked for as the sampler asks."""
    control.pre_run(model.model, model.model.model_sampling.percent_to_sigma)
    generator = torch.Generator().manual_seed(6)
    cond = {
        "c_crossattn": torch.randn(1, 77, SMALL_SDXL.context, generator=generator),
        "y": torch.randn(1, SMALL_SDXL.added, generator=generator),
    }
    noisy = torch.randn(1, 4, 16, 16, generator=generator)
    return [control.get_control(noisy, torch.tensor([sigma]), cond, 1, {}) for sigma in SIGMAS]


def equal(found: list[Any], wanted: list[Any]) -> bool:
    return len(found) == len(wanted) and all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(found, wanted, strict=True)
    )


@koalas
@orders
def test_keyframes_masks_and_weights_by_layer_are_kept(koala: Layout, order: str) -> None:
    whole, part = transfer.pair(koala)
    wanted = asked(applied(transfer.controlnet()), whole)
    found = asked(ORDERS[order](transfer.controlnet()), part)
    for own, sdxl in zip(found, wanted, strict=True):
        assert len(sdxl["output"]) == 9
        assert equal(own["output"], [sdxl["output"][skip] for skip in SKIPS])
        assert equal(own["middle"], sdxl["middle"] if koala == KOALA_1B else [])
    strengths = [own["output"][0].abs().mean() / found[0]["output"][0].abs().mean() for own in found]
    assert strengths[0] == 1
    assert strengths[2] > 2  # the second keyframe's


@orders
def test_students_with_layouts_in_no_table_too(order: str, tmp_path: Path) -> None:
    layout = transfer.small(PRUNED[7])
    model = transfer.model(layout, adapters.unet(layout), tmp_path)
    wanted = asked(applied(transfer.controlnet()), transfer.pair(KOALA_700M)[0])
    for own, sdxl in zip(asked(ORDERS[order](transfer.controlnet()), model), wanted, strict=True):
        assert equal(own["output"], [sdxl["output"][skip] for skip in (0, 2, 3, 5, 6, 7, 8)])
        assert equal(own["middle"], sdxl["middle"])


@orders
def test_on_sdxl_nothing_changes(order: str) -> None:
    whole, _ = transfer.pair(KOALA_700M)
    for own, sdxl in zip(
        asked(ORDERS[order](transfer.controlnet()), whole), asked(applied(transfer.controlnet()), whole), strict=True
    ):
        assert equal(own["output"], sdxl["output"])
        assert equal(own["middle"], sdxl["middle"])


@koalas
@orders
def test_t2i_adapters_too(koala: Layout, order: str, tmp_path: Path) -> None:
    from tests.parity.test_controlnet_node import t2i_adapter

    control, (whole, part) = t2i_adapter(tmp_path), transfer.pair(koala)
    wanted = asked(applied(control), whole)
    found = asked(ORDERS[order](control), part)
    for own, sdxl in zip(found, wanted, strict=True):
        by_block = list(reversed(sdxl["input"]))
        assert equal(list(reversed(own["input"])), [by_block[block] for block in SKIPS])


@orders
def test_a_chain_of_both_kinds_adds_up(order: str, tmp_path: Path) -> None:
    _, part = transfer.pair(KOALA_1B)
    save_file(adapters.controlnet(seed=9), tmp_path / "control.safetensors")
    other = adapted(comfy.controlnet.load_controlnet(str(tmp_path / "control.safetensors")))
    plain, keyframed = transfer.hinted(other), ORDERS[order](transfer.controlnet())
    apart = [asked(control, part) for control in (plain, keyframed)]
    for chain in (
        ORDERS[order](transfer.controlnet()).set_previous_controlnet(transfer.hinted(other)),
        transfer.hinted(other).set_previous_controlnet(ORDERS[order](transfer.controlnet())),
    ):
        for one, two, total in zip(*apart, asked(chain, part), strict=True):
            for key in ("output", "middle"):
                for a, b, added in zip(one[key], two[key], total[key], strict=True):
                    torch.testing.assert_close(a + b, added)


@orders
def test_a_keyframe_of_strength_zero_leaves_the_ones_before_it(order: str) -> None:
    _, part = transfer.pair(KOALA_1B)
    silent = ORDERS[order](transfer.controlnet())
    silent.keyframes = ((0.0, 0.0),)
    assert asked(silent, part) == [None] * len(SIGMAS)
    before = transfer.hinted(adapted(transfer.controlnet()))
    wanted = asked(before, part)
    for own, sdxl in zip(asked(silent.set_previous_controlnet(before), part), wanted, strict=True):
        assert equal(own["output"], sdxl["output"])


@orders
def test_the_given_controlnet_stays_as_it_is(order: str) -> None:
    plain, keyframed = transfer.controlnet(), converted(transfer.controlnet())
    assert adapted(plain) is not plain
    assert adapted(keyframed) is not keyframed
    assert "get_control" not in vars(plain)
    assert vars(keyframed)["get_control"] == keyframed.get_control_by_keyframes


def test_a_copy_for_another_device_is_adapted() -> None:
    whole, part = transfer.pair(KOALA_700M)
    control = transfer.hinted(adapted(transfer.controlnet()))
    made = control.deepclone_multigpu(torch.device("cpu"), autoregister=True)
    made.cond_hint_original = control.cond_hint_original
    wanted = asked(transfer.hinted(transfer.controlnet()), whole)[0]
    assert equal(asked(made, part)[0]["output"], [wanted["output"][skip] for skip in SKIPS])


# --- KOALA Sampler ------------------------------------------------------------------------------------------------


def run(control: Any) -> Any:
    model = parity.tiny_models()[0]
    positive = transfer.conditioning(KOALA_TINY, control)
    preset = {"preset": "custom", "steps": 1, "cfg": 1.0, "spacing": "leading"}
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    sampled = KoalaSampler.execute(model, positive, positive, latent, 0, preset, "euler", 1.0)
    return sampled.result[0]["samples"]


@orders
def test_koala_sampler_takes_them(order: str) -> None:
    with transfer.warnings_of_host() as said:
        found = run(ORDERS[order](transfer.controlnet()))
    assert said == []
    assert not torch.equal(found, run(None))


def test_koala_sampler_refuses_one_that_was_not_adapted() -> None:
    with pytest.raises(ValueError, match=r"^the conditioning has a ControlNet with SDXL's residuals"):
        run(applied(converted(transfer.controlnet())))


def test_koala_sampler_refuses_one_behind_another_in_the_chain() -> None:
    forgotten = applied(converted(transfer.controlnet()))
    with pytest.raises(ValueError, match=r"^the conditioning has a ControlNet with SDXL's residuals"):
        run(transfer.hinted(adapted(transfer.controlnet())).set_previous_controlnet(forgotten))


def own_controlnet(folder: Path, layout: Layout) -> Any:
    save_file(adapters.controlnet(layout), folder / "own.safetensors")
    return comfy.controlnet.load_controlnet(str(folder / "own.safetensors"))


def test_koala_sampler_takes_koalas_own_without_the_node(tmp_path: Path) -> None:
    """A ControlNet with as many residuals as the KOALA does the right thing, whichever node it comes from."""
    own = transfer.hinted(own_controlnet(tmp_path, transfer.small(KOALA_1B)))
    assert run(own).shape == (1, 4, 16, 16)


class Delegating(comfy.controlnet.ControlBase):
    """A pack's own class around a ControlNet that it keeps to itself."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def pre_run(self, model: Any, percent_to_sigma: Any) -> None:
        super().pre_run(model, percent_to_sigma)
        self.inner.pre_run(model, percent_to_sigma)

    def get_control(self, *arguments: Any) -> Any:
        return self.inner.get_control(*arguments)

    def get_models(self) -> Any:
        return self.inner.get_models()

    def copy(self) -> Any:
        return Delegating(self.inner)


def test_what_a_class_of_its_own_does_decides() -> None:
    """Nobody knows the class: its residuals are looked at as the U-Net gets them."""
    right = Delegating(transfer.hinted(adapted(transfer.controlnet())))
    torch.testing.assert_close(run(right), run(right.inner), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"^a ControlNet \(Delegating\) gives 9 residuals, and koala-tiny has 6 skip"):
        run(Delegating(transfer.hinted(transfer.controlnet())))


def test_a_function_over_ours_is_taken_too() -> None:
    control = transfer.hinted(adapted(transfer.controlnet()))
    ours = control.get_control
    control.get_control = lambda *arguments: ours(*arguments)
    assert run(control).shape == (1, 4, 16, 16)


# --- other numbers of residuals -----------------------------------------------------------------------------------

PRUNED = {
    7: Layout(down=((0,), (2,), (4, 4)), middle=4, up=((4, 4, 4), (2, 2), (0, 0))),
    8: Layout(down=((0,), (2, 2), (4, 4)), middle=4, up=((4, 4, 4), (2, 2, 2), (0, 0))),
}


@pytest.mark.parametrize("count", PRUNED)
@koalas
def test_seven_or_eight_residuals_are_refused_in_words(count: int, koala: Layout, tmp_path: Path) -> None:
    control = adapted(own_controlnet(tmp_path, transfer.small(PRUNED[count])))
    _, part = transfer.pair(koala)
    with pytest.raises(ValueError, match=rf"^this ControlNet has {count} residuals; expected SDXL's 9, or the 6 of "):
        asked(transfer.hinted(control), part)


def test_a_students_own_seven_are_left_alone(tmp_path: Path) -> None:
    layout = transfer.small(PRUNED[7])
    model = transfer.model(layout, adapters.unet(layout), tmp_path)
    control = own_controlnet(tmp_path, layout)
    plain, through = (asked(transfer.hinted(each), model) for each in (control, adapted(control)))
    assert len(plain[0]["output"]) == 7
    assert equal(plain[0]["output"], through[0]["output"])


def test_another_koalas_own_is_refused_on_a_student(tmp_path: Path) -> None:
    layout = transfer.small(PRUNED[7])
    model = transfer.model(layout, adapters.unet(layout), tmp_path)
    control = adapted(own_controlnet(tmp_path, transfer.small(compact(5, middle=True))))
    with pytest.raises(ValueError, match=r"^this ControlNet has 6 residuals; expected SDXL's 9, or the 7 of custom"):
        asked(transfer.hinted(control), model)
