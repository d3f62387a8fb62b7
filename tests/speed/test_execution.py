"""How passes are executed on a GPU, shown on the CPU: captured by a stand-in for CUDA graphs, and compiled."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.ops
import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from koala_sdxl.host.accelerate import compiled, execution, gpu_vae
from koala_sdxl.host.accelerate.captured import MAX_PASSES, Captures, Pass, Weights
from koala_sdxl.host.accelerate.exchanged import Part, with_methods
from koala_sdxl.host.accelerate.strategy import Strategy, choose, without_dynamic_vram
from tests.daily import daily
from tests.speed import execution_cases as cases
from tests.speed.execution_cases import Case
from tests.speed.recorders import Counting, Numbers, Operations, Reruns
from tests.speed.sampling import run
from tools.harness.testhost import ROOT
from tools.measure import parity

CAPTURED = Strategy(recorder=Operations)
BOTH = Strategy(True, Reruns)
NEAR = 75.0  # decibels; rounding in fp32


def anew() -> Strategy:
    """As ``BOTH``, and nothing was captured with it before."""

    class Own(Reruns):
        pass

    return Strategy(True, Own)


loras = pytest.fixture(cases.put_lora)


@pytest.mark.parametrize(
    "case",
    # by day compiled as well
    daily(cases.ALL, [case for case in cases.ALL if case is not cases.nothing_is_compiled_anew]),
    ids=lambda case: case.__name__,
)
def test_captured(case: Callable[[Case], None], loras: None) -> None:
    cases.check(case, CAPTURED, NEAR)


COMPILED_BY_DAY = (
    cases.exact_equals_eager,
    cases.branches_equal_eager,
    cases.nothing_is_compiled_anew,
    cases.add_ons_fall_back,
)
"""Where compiled parts act otherwise than parts that are captured alone, which all cases try by day."""


@pytest.mark.parametrize(
    "case",
    # for one more type everything would be compiled once more
    [
        pytest.param(case, marks=[] if case in COMPILED_BY_DAY else pytest.mark.nightly)
        for case in cases.ALL
        if case is not cases.weights_of_another_type
    ],
    ids=lambda case: case.__name__,
)
def test_compiled_and_captured(case: Callable[[Case], None], loras: None) -> None:
    cases.check(case, BOTH, NEAR)


def test_the_vae() -> None:
    cases.the_vae_draws_the_same(Case(BOTH, NEAR))


def test_a_vae_that_cannot_be_compiled_runs_uncompiled(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler.")

    vae = parity.tiny_models()[2]
    failing = [Part(vae.first_stage_model.decoder.norm_out, fail)]
    decode = with_methods(vae, gpu_vae._by(failing)).decode
    latent = torch.zeros(1, 4, 8, 8)
    for _ in range(2):
        assert torch.equal(decode(latent), vae.decode(latent))
    assert failing == []
    assert [record.getMessage() for record in caplog.records] == [
        "KOALA Accelerate: the VAE runs uncompiled from now on, as PyTorch failed: Failed to find C compiler."
    ]


class Failing(Counting):
    """Fails as PyTorch may."""

    error: Exception

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        run()
        raise self.error


def test_where_pytorch_fails_the_image_is_right_and_the_reason_is_told() -> None:
    class Broken(Failing):
        error = RuntimeError("operation not permitted when stream is capturing\nfurther lines")

    case = Case(Strategy(recorder=Broken), NEAR)
    case.same()
    why = "not captured, as PyTorch failed (RuntimeError: operation not permitted when stream is capturing)"
    first = f"2 passes as in ComfyUI itself: {execution.FIRST}"
    assert case.said[-1] == f"{first}; 1 pass as in ComfyUI itself: {why}"
    case.same()
    assert case.said[-1] == f"3 passes as in ComfyUI itself: {why}"


@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to find C compiler."), FailOnRecompileLimitHit("recompile_limit reached")], ids=repr
)
def test_what_cannot_be_compiled_is_captured(error: Exception) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise error

    case = Case(anew(), NEAR)
    model = case.faster()
    (made,) = case.kept
    made.parts = made.between_patches = [Part(model.model.diffusion_model.out[0], fail)]
    wanted, found = (run(one, preset=cases.SHORT) for one in (parity.tiny_models()[0], model))
    assert torch.equal(found, wanted)
    why = f"not compiled, as PyTorch failed ({type(error).__name__}: {error})"
    assert set(case.said[-1].split("; ")) == {
        f"1 pass as in ComfyUI itself: {why}",
        f"1 pass as in ComfyUI itself: {execution.FIRST}",
        f"1 pass by CUDA graph: {why}",
    }


def test_code_that_fails_while_a_pass_is_captured_is_given_up_and_not_the_capturing() -> None:
    case = Case(anew(), NEAR)
    model = case.faster()
    (made,) = case.kept
    run(model, preset=cases.SHORT | {"steps": 1})

    def fail(*_: object) -> torch.Tensor:
        raise FailOnRecompileLimitHit("recompile_limit reached")

    made.parts = made.between_patches = [Part(model.model.diffusion_model.out[0], fail)]
    run(model, preset=cases.BASE | {"steps": 5})
    why = "PyTorch failed (FailOnRecompileLimitHit: recompile_limit reached)"
    assert set(case.said[-1].split("; ")) == {
        f"1 pass as in ComfyUI itself: not captured, as {why}",
        f"1 pass as in ComfyUI itself: not compiled, as {why}",
        f"1 pass as in ComfyUI itself: {execution.FIRST}",
        f"2 passes by CUDA graph: not compiled, as {why}",
    }


def test_code_that_has_to_be_compiled_anew_is_compiled_before_the_next_capture() -> None:
    class Once(Reruns):
        """PyTorch compiles nothing while a pass is captured."""

        def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
            if self.prepared == 1:
                raise RuntimeError("cannot compile during capture")
            return super().capture(run)

    case = Case(Strategy(recorder=Once), NEAR)
    case.same(preset=cases.BASE | {"steps": 6})
    why = "not captured, as PyTorch failed (RuntimeError: cannot compile during capture)"
    assert set(case.said[-1].split("; ")) == {
        f"1 pass as in ComfyUI itself: {why}",
        f"2 passes as in ComfyUI itself: {execution.FIRST}",
        "3 passes by CUDA graph",
    }


def test_what_cannot_be_captured_is_compiled() -> None:
    class Broken(Failing):
        error = RuntimeError("operation not permitted when stream is capturing")

    case = Case(Strategy(True, Broken), NEAR)
    for _ in range(3):
        case.same()
    why = f"not captured, as PyTorch failed (RuntimeError: {Broken.error})"
    assert case.said[-1] == f"3 passes compiled: {why}"


def test_a_step_of_exact_reads_no_number() -> None:
    model = Case(CAPTURED, NEAR).faster()
    counts = []
    for steps in (3, 13):
        with Numbers() as numbers:
            run(model, preset=cases.BASE | {"steps": steps})
        counts.append(numbers.count)
    assert counts[0] == counts[1]


def test_where_vram_runs_out_a_pass_runs_as_comfyui_runs_it() -> None:
    class Full(Failing):
        error = torch.cuda.OutOfMemoryError("CUDA out of memory")

    case = Case(Strategy(recorder=Full), NEAR)
    case.same()
    first = f"1 pass as in ComfyUI itself: {execution.FIRST}"
    assert case.said[-1] == f"2 passes as in ComfyUI itself: too little VRAM for more; {first}"


def test_the_last_used_passes_are_kept() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 4))
    weights, recorder = Weights(network), Operations()
    captures = Captures(weights, recorder)

    def run_with(rows: int) -> None:
        x = torch.randn(rows, 4)
        assert torch.equal(captures.run(Pass("some", lambda own: network(own["x"]), {"x": x})), network(x))

    for rows in (*range(1, MAX_PASSES + 1), 1, MAX_PASSES + 1, 1, 3):
        run_with(rows)
    assert (len(captures), captures.count) == (MAX_PASSES, MAX_PASSES + 1)  # the second is gone
    run_with(2)
    assert captures.count == MAX_PASSES + 2
    network[0].weight.data = torch.randn(4, 4)
    weights.update()
    run_with(3)
    assert (len(captures), recorder.released) == (1, 1)


def test_weights_of_other_kinds_are_not_captured() -> None:
    class Quantised(torch.nn.Parameter):
        """As quantised files have them."""

    linear = torch.nn.Linear(4, 4)
    weights = Weights(torch.nn.Sequential(linear))
    weights.update()
    assert weights.are_on(torch.device("cpu"))
    linear.weight = Quantised(linear.weight.data, requires_grad=False)
    weights.update()
    assert weights.version == 2
    assert not weights.are_on(torch.device("cpu"))


def test_what_was_captured_goes_with_the_last_accelerated_clone() -> None:
    model = Case(CAPTURED, NEAR).faster()
    run(model, preset=cases.SHORT)
    unet = model.model.diffusion_model
    further = model.clone()
    made = weakref.ref(execution.prepared(unet, CAPTURED))
    del model
    gc.collect()
    assert made() is not None
    del further
    gc.collect()
    assert made() is None


def test_without_dynamic_vram_weights_are_read_once() -> None:
    given = parity.tiny_models()[0]
    load, arguments = given.cached_patcher_init
    loaded = []

    def counted(*inputs: Any, **options: Any) -> Any:
        loaded.append(load(*inputs, **options))
        return loaded[-1]

    streamed = cases.Streamed(given.model, given.load_device, given.offload_device)
    streamed.cached_patcher_init = (counted, arguments)
    streamed.attachments = given.attachments
    name = "diffusion_model.out.2.bias"
    patched = streamed.clone()
    patched.add_patches({name: ("diff", (torch.ones(4),))})
    first, second = without_dynamic_vram(streamed), without_dynamic_vram(patched)
    assert len(loaded) == 1
    assert first.model is second.model is not given.model
    assert first.parent is second.parent is loaded[0]
    assert not first.is_dynamic()
    assert (list(first.patches), list(second.patches)) == ([], [name])
    assert torch.equal(run(first, preset=cases.SHORT), run(given, preset=cases.SHORT))


def test_a_cpu_runs_as_comfyui_runs_it() -> None:
    model = parity.tiny_models()[0]
    choice = choose(model)
    assert choice.strategy.is_eager
    assert (choice.words, choice.why_eager) == ("", "")
    assert choice.model is not model
    assert gpu_vae.install(parity.tiny_models()[2]) == (parity.tiny_models()[2], "")


def test_compiled_blocks_ask_pytorch_for_attention_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, ComfyUI orders PyTorch's routines around it: code with that is not kept on disk."""
    asked = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        asked.append(k.shape[2])
        return scaled_dot_product_attention(q, k, v)

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError

    unet = parity.tiny_models()[0].model.diffusion_model
    block: Any = next(part.module for part in compiled.parts(unet) if compiled.is_transformer(part))
    x, text = torch.randn(2, 16, block.attn1.to_q.in_features), torch.randn(2, 77, block.attn2.to_k.in_features)
    with torch.inference_mode():
        wanted = type(block).forward(block, x, text)
        monkeypatch.setattr(compiled, "scaled_dot_product_attention", attention)
        monkeypatch.setattr(comfy.ops, "scaled_dot_product_attention", fail)
        torch.testing.assert_close(compiled._transformer(block, x, text), wanted, rtol=1e-5, atol=1e-5)
    assert asked == [16, 77]  # the image's own pixels, and the text


@pytest.mark.parametrize("norm", [compiled._activated_norm, compiled._plain_norm])
def test_a_norm_of_a_vae_is_in_channels_last_on_a_gpu(norm: Callable[..., torch.Tensor]) -> None:
    """As PyTorch's compiler sees it, for which a norm on a GPU is operations that make contiguous tensors."""
    with FakeTensorMode():
        x = torch.empty(2, 64, 8, 12, device="cuda", memory_format=torch.channels_last)
        weight = torch.empty(64, device="cuda")
        given = (x, torch.channels_last, 32, weight, weight, 1e-6)
        traced = make_fx(lambda *tensors: norm(*given), decomposition_table=select_decomp_table())()
        (node,) = (node for node in traced.graph.nodes if node.op == "output")
        assert node.args[0].meta["val"].is_contiguous(memory_format=torch.channels_last)


def test_compiled_code_is_found_again_on_disk() -> None:
    """When PyTorch has forgotten it."""

    def compiled_once() -> tuple[int, ...]:
        torch._dynamo.reset()
        before = found()
        part, *_ = compiled._norm_and_activation(comfy.ops.disable_weight_init.GroupNorm(32, 64))
        with torch.inference_mode():
            part.forward(torch.randn(2, 64, 8, 12))
        return tuple(now - then for now, then in zip(found(), before, strict=True))

    def found() -> tuple[int, ...]:
        return tuple(counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss"))

    assert sum(compiled_once()) == 1
    assert compiled_once() == (1, 0)


ONE_NORM = """
from tools.harness import inprocess
inprocess.activate()
import comfy.ops
import torch
from torch._dynamo.utils import counters
from koala_sdxl.host.accelerate import compiled
(part,) = compiled._norm_and_activation(comfy.ops.disable_weight_init.GroupNorm(32, 64))
with torch.inference_mode():
    part.forward(torch.randn(2, 64, 8, 12))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.nightly
@pytest.mark.slow
def test_compiled_code_is_kept_on_disk(tmp_path: Path) -> None:
    """Another process finds what a first one compiled."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", ONE_NORM]
    first, second = (
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    )
    assert (first[-2:], second[-2:]) == (["0", "1"], ["1", "0"])
