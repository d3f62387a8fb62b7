"""KOALA LoRA from SDXL in ComfyUI, on koala-tiny and an SDXL that it might have been cut out of."""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy_extras.nodes_train import LoraModelLoader, SaveLoRA
from diffusers import DDPMScheduler

from koala_sdxl.distill.carry.samples import Samples as CarrySamples
from koala_sdxl.distill.carry.samples import Texts
from koala_sdxl.distill.carry.settings import Settings
from koala_sdxl.distill.carry.student import Learner, Student
from koala_sdxl.host.learning import learn as learning
from koala_sdxl.host.learning.network import Network, weights
from koala_sdxl.host.learning.samples import Samples, encoded, predictions
from koala_sdxl.host.learning.weights import Weights, differences
from koala_sdxl.host.transfer.lora import apply_lora
from koala_sdxl.koala.architecture.keys import renaming, tensors
from koala_sdxl.koala.architecture.layout import KOALA_TINY, SDXL
from koala_sdxl.koala.architecture.lineage import lineage
from koala_sdxl.koala.lora.adjustable import Adjustable, adjustable
from koala_sdxl.koala.lora.factors import factors, lora_tensors
from koala_sdxl.koala.lora.fit import fit_changes
from koala_sdxl.koala.releases import SCHEDULER_CONFIG
from koala_sdxl.nodes.learn import KoalaLoraFromSdxl
from tests.daily import daily
from tools.measure import parity, reference, transfer
from tools.synthetic import adapters
from tools.tiny import SHIPPED
from tools.tiny.grow import SDXL_TINY, grown

LINE = lineage(KOALA_TINY)
NAMES = renaming(KOALA_TINY, "diffusers", "comfy")
LITTLE = 0.1
"""What the layers that koala-tiny lacks add, as a share of what they would with PyTorch's initial weights."""
PROMPTS = [f"a star on a {colour} background" for colour in ("red", "green", "blue", "yellow")]
PROMPTS.insert(1, "a koala, " * 40)  # longer than 77 tokens
PRESET = {"preset": "custom", "steps": 10, "cfg": 5.0, "spacing": "leading"}
FEW: dict[str, Any] = {"prompts": "\n".join(PROMPTS), "preset": PRESET, "rank": 4, "samples": 20, "size": 64, "seed": 3}


class Given(NamedTuple):
    """The models of a run."""

    sdxl: Any
    sdxl_changed: Any
    koala: Any
    clip: Any
    clip_changed: Any


class Ran(NamedTuple):
    """A LoRA, the report, and what the SDXLs were asked for: the MODEL and its texts."""

    lora: dict[str, torch.Tensor]
    report: str
    asked: list[tuple[Any, ...]]


def change() -> adapters.State:
    """A LoRA whose effect is not mostly that of layers which koala-tiny lacks."""
    kept = {adapters.NAMINGS["kohya, LDM blocks"].module(whole) for _, whole in LINE.tensors}
    texts = adapters.text_lora(2, 32, 128, "lora_te1") | adapters.text_lora(2, 64, 256, "lora_te2")
    made = adapters.lora(SDXL_TINY, "LoRA", "kohya, LDM blocks", only=adapters.in_attention) | texts

    def strength(name: str) -> float:
        weak = name.startswith("lora_te") or name.partition(".")[0] in kept
        return 1.0 if "lora_up" not in name else 0.3 if weak else 1.5

    return {name: value * strength(name) for name, value in made.items()}


@pytest.fixture(scope="module")
def given(own_models: None, tmp_path_factory: pytest.TempPathFactory) -> Given:
    koala, clip, _ = parity.tiny_models()
    names = renaming(SDXL_TINY, "diffusers", "comfy")
    state = grown(reference.pipeline(SHIPPED).unet.state_dict(), LITTLE)
    unet = {names[name]: weight.contiguous() for name, weight in state.items()}
    sdxl = transfer.model(SDXL_TINY, unet, tmp_path_factory.mktemp("sdxl"))
    model, text = comfy.sd.load_lora_for_models(sdxl, clip, change(), 1.0, 1.0)
    return Given(sdxl, model, koala, clip, text)


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


class unchanged:  # noqa: N801
    """Nothing of the models is another one behind this than before: weights, patches, options; nor PyTorch's modes."""

    def __init__(self, given: Given) -> None:
        self.given = given

    def __enter__(self) -> None:
        comfy.model_management.unload_all_models()
        self.before = self._state()

    def __exit__(self, *_: object) -> None:
        comfy.model_management.unload_all_models()
        now = self._state()
        for old, new in zip(self.before, now, strict=True):
            assert old.keys() == new.keys()
            assert [name for name in old if not _equal(old[name], new[name])] == []

    def _state(self) -> list[dict[str, Any]]:
        modes = {
            "inference": torch.is_inference_mode_enabled(),
            "grad": torch.is_grad_enabled(),
            "tf32": torch.backends.cudnn.allow_tf32,
        }
        return [modes, *map(_of_model, self.given[:3])]


def _of_model(model: Any) -> dict[str, Any]:
    weights = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    network = model.model.diffusion_model
    return {
        **weights,
        "patches": {name: len(patches) for name, patches in model.patches.items()},
        "uuid": model.patches_uuid,
        "options": repr(model.model_options),
        "wrappers": repr(model.wrappers),
        "grad": any(weight.requires_grad for weight in network.parameters()),
        "hooks": sum(len(module._forward_hooks) for module in network.modules()),
    }


def _equal(old: Any, new: Any) -> bool:
    return torch.equal(old, new) if isinstance(old, torch.Tensor) else bool(old == new)


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
        KoalaLoraFromSdxl.execute(**given._asdict(), **FEW, keep="\n".join(kept))
    seen = asked[0].pick(torch.arange(len(wanted[0])))
    assert set(asked[0].text[-4:].tolist()) <= {4, 9, 10}  # held out: the last of either, and the empty prompt
    clean = predictions(given.koala, encoded(given.clip, [*PROMPTS, *kept]), seen, lambda images: None)
    change = wanted[0] - (seen.noisy - clean) / seen.sigma.view(-1, 1, 1, 1) * weights(seen.sigma)
    is_kept = (seen.text >= 5) & (seen.text < 10)
    assert 4 <= is_kept.sum() <= 12
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


@pytest.mark.parametrize("kind", ["LoCon", "LoHa", "norms", "whole differences"])
def test_the_start_is_what_koala_lora_loader_adds(given: Given, kind: str) -> None:
    state = adapters.lora(SDXL_TINY, kind, "kohya, LDM blocks")
    stock, _ = comfy.sd.load_lora_for_models(given.sdxl, None, state, 0.5, 0.0)
    found = dict(differences(Weights(given.sdxl), Weights(stock), LINE))
    with transfer.on_disk(state) as path:
        koala = apply_lora(given.koala, given.clip, path, 0.5, 0.0, trained_on="SDXL").model
    before, after = transfer.baked(given.koala), transfer.baked(koala)
    assert len(found) > 100
    for name, weight in before.items():
        change = after[name].float() - weight.float()
        torch.testing.assert_close(found.get(own(name), torch.zeros(1)).expand_as(change), change, atol=2e-5, rtol=0)


def own(name: str) -> str:
    return renaming(KOALA_TINY, "comfy", "diffusers")[name]


def test_the_network_that_is_fitted_is_the_koala_that_is_sampled(given: Given) -> None:
    """With a patch on it; and prompts of two lengths together."""
    with transfer.on_disk(change()) as path:
        koala = apply_lora(given.koala, given.clip, path, 1.0, 0.0, trained_on="SDXL").model
    texts = encoded(given.clip, PROMPTS)
    seen = samples(texts)
    with torch.no_grad():
        clean = predictions(koala, texts, seen, lambda images: None)
    wanted = (seen.noisy - clean) / seen.sigma.view(-1, 1, 1, 1) * weights(seen.sigma)
    with torch.inference_mode(False), torch.no_grad():
        network = Network(koala)
        found = network.output(seen, network.conditions(texts, seen))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def samples(texts: list[Any]) -> Samples:
    generator = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.3, 1.0, 3.0, 10.0])
    noisy = torch.randn(4, 4, 8, 8, generator=generator) * (1 + sigma.square()).sqrt().view(-1, 1, 1, 1)
    return Samples(noisy, sigma, torch.tensor([0, 1, len(texts) - 1, 2]))


def test_the_fit_is_that_of_dev_py_carry(given: Given) -> None:
    """Same KOALA, samples and wanted change: ComfyUI's network and diffusers' give the same LoRA."""
    texts = encoded(given.clip, PROMPTS[2:])
    start = factors(differences(Weights(given.sdxl), Weights(given.sdxl_changed), LINE), 4)
    model_sampling = given.koala.get_model_object("model_sampling")
    with torch.inference_mode(False):
        seen = samples(texts)
        time = model_sampling.timestep(seen.sigma).long()
        seen = seen._replace(sigma=model_sampling.sigma(time).clone())
        asked = 0.3 * torch.randn(seen.noisy.shape, generator=torch.Generator().manual_seed(2))
        network = Network(given.koala)
        conditions = network.conditions(texts, seen)
        ours = fitted(adjustable(network.unet, start, NAMES), lambda: network.output(seen, conditions), start, asked)

        unet = reference.pipeline(SHIPPED).unet.float()
        context = torch.cat([text[0][0] for text in texts]).clone()
        pooled = torch.cat([text[0][1]["pooled_output"] for text in texts]).clone()
        places = Path()
        settings = Settings(places, places, places, places, places, size=64)
        noise = DDPMScheduler.from_config(dict(SCHEDULER_CONFIG))
        learner = Learner(start, adjustable(unet, start))
        student = Student(unet, learner, Texts((context, pooled), (context, pooled)), noise, settings)
        scaled = model_sampling.calculate_input(seen.sigma, seen.noisy).clone()
        carried = CarrySamples(scaled, time, seen.text, torch.zeros(4, dtype=torch.bool), torch.zeros(4).long())
        scale = float((student.weights[time] / weights(seen.sigma).flatten()).mean())
        theirs = fitted(learner.places, lambda: student._weighted(carried) / scale, start, asked)
    for name, number in ours.items():
        moved = float((theirs[name] - start[name]).norm())
        assert float((number - theirs[name]).norm()) < 0.01 * moved + 1e-6, name


def fitted(places: Adjustable, output: Callable[[], torch.Tensor], start: Any, change: torch.Tensor) -> Any:
    """The numbers after one round; ``change``: what is asked for beyond the output at the start."""
    every = (torch.arange(len(change)),)

    def outputs(at: Any) -> torch.Tensor:
        return places.outputs(dict(at), lambda _: output(), every)

    def slopes(at: Any, error: torch.Tensor) -> Any:
        return places.slopes(at, lambda _: output(), lambda _, part: error[part], every)

    wanted = outputs(start) + change
    return fit_changes(outputs, start, wanted, 2, slopes).changes


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
        (lambda given: {"sdxl_changed": strong(given, math.inf)}, "difference of sdxl_changed and sdxl is not finite"),
        (lambda given: {"sdxl_changed": strong(given, 1e20)}, "outputs of sdxl and sdxl_changed are not finite"),
        (lambda given: {"koala": strong_koala(given)}, "not finite"),
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


def test_a_fine_tune_is_a_change_like_any_other(given: Given) -> None:
    """Of norms and biases, too; what is equal is left out, and layers that KOALA lacks."""
    tuned, kept = given.sdxl.clone(), [whole for _, whole in LINE.tensors]
    chosen = [*kept[:6], *kept[-6:]]
    lacking = next(tensor for tensor in tensors(SDXL_TINY) if tensor not in kept)
    other = {f"diffusion_model.{one.comfy}": (0.01 * torch.ones(one.shape),) for one in (*chosen, lacking)}
    tuned.add_patches(other)
    own = {part.diffusers: part.shape for part, whole in LINE.tensors if whole in chosen}
    found = {name: tuple(change.shape) for name, change in differences(Weights(given.sdxl), Weights(tuned), LINE)}
    assert found == own
    assert {len(shape) for shape in found.values()} >= {1, 4}
