"""KOALA LoRA from SDXL in ComfyUI, on koala-tiny and an SDXL that it might have been cut out of."""

from __future__ import annotations

import copy
import gc
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import comfy.lora
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy_extras.nodes_train import LoraModelLoader, SaveLoRA

from koala_sdxl.host.learning import learn as learning
from koala_sdxl.host.learning.network import weights
from koala_sdxl.host.learning.samples import Samples, encoded, predictions
from koala_sdxl.host.learning.weights import Weights, differences
from koala_sdxl.host.transfer.lora import apply_lora
from koala_sdxl.koala.architecture.layout import KOALA_TINY, SDXL
from koala_sdxl.koala.lora.factors import factors, lora_tensors
from koala_sdxl.koala.lora.fit import fit_changes
from koala_sdxl.nodes.learn import KoalaLoraFromSdxl
from tests.daily import daily
from tests.parity.learning import FEW, LINE, PROMPTS, Given, change, models, unchanged
from tools.measure import transfer


class Ran(NamedTuple):
    """A LoRA, the report, and what the SDXLs were asked for: the MODEL and its texts."""

    lora: dict[str, torch.Tensor]
    report: str
    asked: list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def given(own_models: None, tmp_path_factory: pytest.TempPathFactory) -> Given:
    return models(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def short() -> Iterator[None]:
    """Few rounds of few iterations: seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "ROUNDS", 2)
        patch.setattr(learning, "ITERATIONS", 3)
        yield


@pytest.fixture(scope="module")
def ran(given: Given, short: None) -> Ran:
    asked: list[tuple[Any, ...]] = []

    def asking(*arguments: Any) -> torch.Tensor:
        asked.append(arguments)
        return predictions(*arguments)

    with pytest.MonkeyPatch.context() as patch, unchanged(given):
        patch.setattr(learning, "predictions", asking)
        lora, report = KoalaLoraFromSdxl.execute(**given._asdict(), **FEW).result
    return Ran(lora, str(report), asked)


def percents(report: str) -> list[int]:
    return [int(found) for found in re.findall(r"(-?\d+) %", report)]


def test_more_of_the_change_is_reached_than_by_lineage(ran: Ran) -> None:
    reached, by_lineage = percents(ran.report)
    assert reached >= by_lineage + 5
    assert "4 held-out samples" in ran.report
    assert "222 layers" in ran.report


def test_of_prompts_to_keep_the_koalas_own_output_is_asked(given: Given, short: None) -> None:
    kept = [f"a {colour} circle" for colour in ("red", "green", "blue", "yellow", "white")]
    asked: list[Samples] = []
    wanted: list[torch.Tensor] = []

    def asking(model: Any, texts: Any, seen: Samples, tick: Any) -> torch.Tensor:
        asked.append(seen)
        return predictions(model, texts, seen, tick)

    def fitting(outputs: Any, start: Any, asked_for: torch.Tensor, *others: Any) -> Any:
        wanted.append(asked_for)
        return fit_changes(outputs, start, asked_for, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "predictions", asking)
        patch.setattr(learning, "fit_changes", fitting)
        KoalaLoraFromSdxl.execute(**given._asdict(), **FEW | {"samples": 60}, keep="\n".join(kept))
    seen = asked[0].pick(torch.arange(len(wanted[0])))
    assert set(asked[0].text[-12:].tolist()) == {4, 9, 10}  # held out: the last of either, and the empty prompt
    assert not set(seen.text.tolist()) & {4, 9}
    clean = predictions(given.koala, encoded(given.clip, [*PROMPTS, *kept]), seen, lambda images: None)
    change = wanted[0] - (seen.noisy - clean) / seen.sigma.view(-1, 1, 1, 1) * weights(seen.sigma)
    is_kept = (seen.text >= 5) & (seen.text < 10)
    assert 12 <= is_kept.sum() <= 28
    assert (seen.text == 10).any()
    assert change[is_kept].abs().max() < 1e-4
    assert change[~is_kept].abs().flatten(1).amax(1).min() > 1e-2


def test_it_does_not_begin_anew_each_time() -> None:
    """The canvas gives each input of the name seed a new value after a run, unless it is told not to."""
    (seed,) = [one for one in KoalaLoraFromSdxl.define_schema().inputs if one.id == "seed"]
    assert seed.as_dict()["control_after_generate"] is False


def test_each_sdxl_is_asked_with_its_own_text_encoders(given: Given, ran: Ran) -> None:
    (first, with_change, seen, _), (second, plain, same, _) = ran.asked
    assert (first, second) == (given.sdxl_changed, given.sdxl)
    assert seen is same
    for texts, clip in ((with_change, given.clip_changed), (plain, given.clip)):
        wanted = encoded(clip, PROMPTS)
        assert all(torch.equal(text[0][0], own[0][0]) for text, own in zip(texts, wanted, strict=True))
    assert not torch.equal(with_change[0][0][0], plain[0][0][0])
    assert seen.text.unique().numel() > 3
    assert set(seen.text[-4:].tolist()) <= {4, 5}  # the fifth prompt, and the empty one, which is behind them


def test_cores_nodes_apply_and_save_it(given: Given, ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (applied,) = LoraModelLoader.execute(given.koala, ran.lora, 1.0).result
    wanted = transfer.baked(applied)
    assert transfer.difference(wanted, transfer.baked(given.koala)) > 1e-3
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    SaveLoRA.execute(ran.lora, "loras/mine")
    (file,) = (tmp_path / "loras").iterdir()
    by_core, _ = comfy.sd.load_lora_for_models(given.koala, None, comfy.utils.load_torch_file(str(file)), 1.0, 0.0)
    ours = apply_lora(given.koala, given.clip, file, 1.0, 1.0)
    assert ours.plan.count("applied") == len(ours.plan.modules) == 222
    assert ours.plan.origin is not None
    assert ours.plan.origin.layout == KOALA_TINY
    for model in (by_core, ours.model):
        assert transfer.difference(transfer.baked(model), wanted) < 1e-6
    latent = transfer.sample(ours.model, encoded(given.clip, PROMPTS[:1])[0], side=8)
    assert torch.equal(latent, transfer.sample(applied, encoded(given.clip, PROMPTS[:1])[0], side=8))


@pytest.mark.parametrize(
    "share", daily([0.05, 0.15, 0.6], [0.6]), ids=["while it draws", "while SDXL is asked", "in the fit"]
)
def test_a_cancelled_run_ends_at_once_and_leaves_nothing(given: Given, short: None, share: float) -> None:
    moved: list[int] = []

    def cancel(now: int, total: int, *_: Any, **__: Any) -> None:
        moved.append(now)
        if now >= share * total:
            comfy.model_management.interrupt_current_processing(True)

    before = networks()
    assert id(given.koala.model.diffusion_model) in before
    with unchanged(given), hooked(cancel), pytest.raises(comfy.model_management.InterruptProcessingException):
        KoalaLoraFromSdxl.execute(**given._asdict(), **FEW)
    assert all(now < moved[-1] for now in moved[:-1])  # none behind the one that cancels
    assert networks() == before


def networks() -> set[int]:
    """The U-Nets that are in memory, those of other tests in this process among them."""
    gc.collect()
    return {id(found) for found in gc.get_objects() if isinstance(found, UNetModel)}


@contextmanager
def hooked(hook: Callable[..., None]) -> Iterator[None]:
    """What ComfyUI calls where a progress bar moves, as a server does."""
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        yield
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
        comfy.model_management.interrupt_current_processing(False)


def strong(given: Given, strength: float) -> Any:
    model, _ = comfy.sd.load_lora_for_models(given.sdxl, None, change(), strength, 0.0)
    return model


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda given: {"sdxl": given.koala}, "sdxl is already a KOALA model"),
        (lambda given: {"sdxl_changed": given.koala}, "sdxl_changed is already a KOALA model"),
        (lambda given: {"sdxl": transfer.hollow(SDXL)}, "sdxl is an SDXL of other sizes"),
        (lambda given: {"koala": transfer.hollow(SDXL)}, "not a KOALA model"),
        (lambda given: {"sdxl_changed": given.sdxl}, "the weights of sdxl in every layer"),
        (lambda given: {"prompts": "one\n\n  \ntwo\n"}, "prompts has 2 lines with text; expected at least 5"),
        (lambda given: {"keep": "one\n"}, "keep has 1 line with text; expected at least 5"),
        (lambda given: {"keep": FEW["prompts"], "samples": 59}, "samples is 59; expected at least 60 with prompts in"),
        (lambda given: {"sdxl_changed": strong(given, math.inf)}, "difference of sdxl_changed and sdxl is not finite"),
        (lambda given: {"sdxl_changed": strong(given, 1e20)}, "outputs of sdxl and sdxl_changed are not finite"),
        (lambda given: {"koala": strong_koala(given)}, "not finite"),
        (
            lambda given: {"koala": quantised(given.koala)},
            r"^koala has quantised weights \(with time_embed.0.weight_sc",
        ),
        (lambda given: {"sdxl_changed": quantised(given.sdxl)}, "^sdxl_changed has quantised weights"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    given: Given, short: None, wrong: Callable[[Given], dict[str, Any]], says: str
) -> None:
    inputs = given._asdict() | FEW | wrong(given)
    with unchanged(given), pytest.raises(ValueError, match=says):
        KoalaLoraFromSdxl.execute(**inputs)


def strong_koala(given: Given) -> Any:
    model = given.koala.clone()
    model.add_patches({"diffusion_model.out.2.bias": (torch.full((4,), math.inf),)})
    return model


def quantised(model: Any) -> Any:
    """A MODEL with a layer as ComfyUI loads it from a file of scaled fp8."""
    base, unet = copy.copy(model.model), copy.deepcopy(model.model.diffusion_model)
    plain = unet.time_embed[0]
    unet.time_embed[0] = layer = comfy.ops.mixed_precision_ops().Linear(plain.in_features, plain.out_features)
    kind = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    weight = plain.weight.to(torch.float8_e4m3fn)
    layer.load_state_dict({"weight": weight, "weight_scale": torch.ones(()), "bias": plain.bias, "comfy_quant": kind})
    base._modules = {**model.model._modules, "diffusion_model": unet}
    made = model.clone()
    made.model = base
    return made


def test_where_least_squares_are_no_better_the_result_is_the_start(
    given: Given, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held out is asked to change the other way."""

    def turned(model: Any, texts: Any, seen: Samples, tick: Any) -> torch.Tensor:
        found = predictions(model, texts, seen, tick)
        if model is given.sdxl_changed:
            plain = predictions(given.sdxl, encoded(given.clip, PROMPTS), seen, tick)
            found[:-4] = 2 * plain[:-4] - found[:-4]
        return found

    monkeypatch.setattr(learning, "predictions", turned)
    lora, report = KoalaLoraFromSdxl.execute(**given._asdict(), **FEW).result
    reached, by_lineage = percents(report)
    assert reached == by_lineage
    assert "no better" in report
    start = factors(differences(Weights(given.sdxl), Weights(given.sdxl_changed), LINE), FEW["rank"])
    assert all(torch.equal(lora[name], tensor) for name, tensor in lora_tensors(start, KOALA_TINY).items())
