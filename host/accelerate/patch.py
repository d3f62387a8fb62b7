"""KOALA Accelerate on a MODEL: the wrappers around ComfyUI's sampling that skip what the image hardly needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from comfy.samplers import CFGGuider

from ..protocols import Executor, Guider, Model
from . import cpu_routines
from .branches import Branches, Call, Execute, Network, Passed
from .exchanged import run_options
from .execution import Execution, Prepared, on_detach
from .feature_cache import Key, Run
from .gates import gates
from .plan import FULL_RANGE, MAX_ERROR_PATCHED, Acceleration, Gates, Table, falls, full_steps
from .strategy import Choice, Strategy, choose

KEY = "koala_accelerate"
EXECUTION = "koala_execution"
SINGLE_STEP_SAMPLERS = frozenset(f"sample_{name}" for name in ("euler", "heun", "heunpp2", "exp_heun_2_x0", "dpm_2"))
"""ComfyUI's samplers that draw no noise and use one step's predictions; ddim is euler."""
MULTISTEP_SAMPLERS = frozenset(
    f"sample_{name}" for name in ("dpmpp_2m", "lms", "ipndm", "ipndm_v", "deis", "res_multistep")
)
"""Those that draw no noise and use several steps' predictions, as far as they tolerate cached steps: with uni_pc and
gradient_estimation, fewer steps are better."""


class Accelerated(NamedTuple):
    """An accelerated MODEL, and in words: the faster routines that it uses on a CPU, how it is executed elsewhere, and
    why it is executed as ComfyUI does it; empty where that is not so."""

    model: Model
    routines: str
    execution: str
    why_eager: str


def accelerate(
    model: Model,
    settings: Acceleration,
    report: Callable[[str], None],
    choose: Callable[[Model], Choice] = choose,
) -> Accelerated:
    """A clone of ``model`` that samples as ``settings`` say; after each run ``report`` gets a text on what was skipped,
    and on how the rest was executed. ``choose`` says how it is executed.

    Raises ValueError where another node on the MODEL skips steps already.
    """
    require_no_other_cache(model.model_options)
    if model.get_attachment(KEY) is not None:
        raise ValueError(
            "this MODEL is already accelerated by KOALA Accelerate; expected one that is not. Remove one of the two "
            "nodes."
        )
    accelerated, strategy, execution, why_eager = choose(model)
    accelerated.set_attachments(KEY, settings)
    routines = cpu_routines.install(accelerated, settings.routines)
    if _skips(settings) or not strategy.is_eager:
        wrappers = _Wrappers(settings, strategy, report)
        accelerated.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, wrappers.outer_sample)
        accelerated.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, wrappers.predict_noise)
        accelerated.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _uncompiled(wrappers.diffusion_model))
    if not strategy.is_eager:
        accelerated.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, on_detach)
    return Accelerated(accelerated, routines, execution, why_eager)


def table(settings: Acceleration, sampler: str) -> Table:
    """The table for a sampler, by the name of its function."""
    return settings.reuse.multistep if sampler in MULTISTEP_SAMPLERS else settings.reuse.single_step


def full_steps_of(settings: Acceleration, sigmas: torch.Tensor) -> frozenset[int]:
    """Which steps of a schedule run the full U-Net with euler, the published sampler, where no error is too large.
    ``sigmas``: [steps + 1]."""
    return full_steps(sigmas[:-1].tolist(), settings.reuse.single_step.levels)


def require_no_other_cache(options: Mapping[str, Any]) -> None:
    """Raise ValueError where a MODEL's options hold a node of the same kind, which would reuse what was reused."""
    other = options["transformer_options"].get("easycache")
    if other is not None:
        raise ValueError(
            f"this MODEL has {getattr(other, 'name', 'EasyCache')} as well as KOALA Accelerate; expected one of them, "
            f"as the two caches would compound each other's errors. Remove one of them."
        )


class _Wrappers:
    """The functions around ComfyUI's sampling. All that changes in a run is in its ``Run``, in that run's options."""

    def __init__(self, settings: Acceleration, strategy: Strategy, report: Callable[[str], None]) -> None:
        self.settings = settings
        self.strategy = strategy
        self.report = report
        self.branches: WeakKeyDictionary[torch.nn.Module, Branches] = WeakKeyDictionary()
        self.prepared: WeakKeyDictionary[torch.nn.Module, Prepared] = WeakKeyDictionary()

    def outer_sample(
        self,
        executor: Executor,
        noise: torch.Tensor,
        latent: torch.Tensor,
        sampler: object,
        sigmas: torch.Tensor,
        *rest: Any,
        **further: Any,
    ) -> torch.Tensor:
        guider: Guider = executor.class_obj
        before = guider.model_options
        require_no_other_cache(before)
        steps, found = sigmas[:-1].tolist(), _gates(guider)
        levels, max_error = table(self.settings, _name(sampler))
        if found.patched:
            max_error = min(max_error, MAX_ERROR_PATCHED)
        run = Run(steps, full_steps(steps, levels), max_error, guider.model_patcher, found)
        run.no_reuse = (
            _why_no_reuse(sampler, sigmas, before) or run.gates.unknown
            if self.settings.reuse.single_step.levels
            else "features are not reused"
        )
        execution = None if self.strategy.is_eager else Execution(self.strategy, guider)
        if execution is not None:  # what it has made stays for the next run, as long as this MODEL
            self.prepared[guider.model_patcher.model.diffusion_model] = execution.prepared
        try:
            with run_options(guider, **{KEY: run, EXECUTION: execution}):
                output = executor(noise, latent, sampler, sigmas, *rest, **further)
        finally:
            if execution is not None:
                execution.end()
        skipped = str(run) if _skips(self.settings) else ""
        self.report("\n".join(filter(None, (skipped, str(execution or "")))))
        return output

    def predict_noise(
        self,
        executor: Executor,
        x: torch.Tensor,
        timestep: torch.Tensor,
        options: dict[str, Any],
        seed: int | None = None,
    ) -> torch.Tensor:
        guider: Guider = executor.class_obj
        run: Run | None = options.get("transformer_options", {}).get(KEY)
        if run is None or not _skips(self.settings):  # then a GPU need not be waited for: the next line reads from it
            return executor(x, timestep, options, seed)
        sigma = float(timestep.flatten()[0])
        run.begin(sigma)
        if self._is_guided(guider.model_patcher, sigma) or not _can_skip_guidance(guider, options):
            run.guided += 1
            output = executor(x, timestep, options, seed)
            run.end(_scale(guider))
            return output
        scale = guider.cfg
        guider.cfg = 1.0  # the host then skips the negative prompt
        try:
            output = executor(x, timestep, options, seed)
        finally:
            guider.cfg = scale
        run.end(1.0)
        return output

    def diffusion_model(self, executor: Executor, *arguments: Any, **further: Any) -> torch.Tensor:
        call = Call(*arguments)
        run: Run | None = call.transformer_options.get(KEY)
        execution: Execution | None = call.transformer_options.get(EXECUTION)
        unet = executor.class_obj
        if execution is not None and not execution.is_of(unet):  # with two MODELs in a guider, or one for each GPU
            execution = None
        if run is None or (run.no_reuse and execution is None):
            return executor(*arguments, **further)
        execute: Execute = Network.run if execution is None else execution.run

        def all_of_it(*inner_arguments: Any, **inner_further: Any) -> torch.Tensor:
            return execute(Network("U-Net", unet), Call(*inner_arguments), inner_further, None)

        if run.no_reuse:
            return _inside(executor, all_of_it)(*arguments, **further)
        if unet not in self.branches:
            self.branches[unet] = Branches(unet)
        branches, keys = self.branches[unet], _keys(call, run)
        feature = torch.compiler.disable(run.extrapolated)(keys)
        to_check = torch.compiler.disable(run.to_check)(keys) if feature is None else None

        def compute(*inner_arguments: Any, **inner_further: Any) -> torch.Tensor:
            if feature is not None:
                return branches.shallow(Call(*inner_arguments), feature, inner_further, execute)
            passed = branches.full(Call(*inner_arguments), inner_further, execute, to_check)
            torch.compiler.disable(_keep)(run, call, keys, passed)
            return passed.output

        return _inside(executor, compute)(*arguments, **further)

    def _is_guided(self, model: Model, sigma: float) -> bool:
        sampling, (start, end) = model.get_model_object("model_sampling"), self.settings.guided
        return bool(sampling.percent_to_sigma(end) <= sigma <= sampling.percent_to_sigma(start))


def _skips(settings: Acceleration) -> bool:
    return bool(settings.reuse.single_step.levels) or settings.guided != FULL_RANGE


def _inside(executor: Executor, compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The wrappers that follow in an executor, around another function than the U-Net's own."""
    unet, following = executor.class_obj, executor.idx + 1
    inner = WrapperExecutor.new_class_executor(_uncompiled(compute), unet, executor.wrappers, following)
    execute: Callable[..., torch.Tensor] = inner.execute
    return execute


def _uncompiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What decides anew at every step is not compiled, where a node has the U-Net compiled; the blocks it calls are."""
    uncompiled: Callable[..., torch.Tensor] = torch.compiler.disable(function, recursive=False)
    return uncompiled


def _keep(run: Run, call: Call, keys: list[Key], passed: Passed) -> None:
    run.store(keys, passed.feature)
    if passed.from_other is not None:
        run.check(keys, call.transformer_options["cond_or_uncond"], passed.output, passed.from_other)


def _gates(guider: Guider) -> Gates:
    percent_to_sigma = guider.model_patcher.get_model_object("model_sampling").percent_to_sigma
    return gates(guider.model_options["transformer_options"], getattr(guider, "conds", {}), percent_to_sigma)


def _keys(call: Call, run: Run) -> list[Key]:
    """What a deep feature belongs to, for each part of a call: the prompt, the side of guidance (those of an area share
    a name), the size, the device (several GPUs may share the work), which residuals a ControlNet adds, between which
    gates of patches the noise level is, and the weights, as far as hooks (LoRAs scheduled over the steps) change them
    in the course of a run."""
    uuids = call.transformer_options["uuids"]
    size = (call.x.shape[0] // len(uuids), *call.x.shape[1:], call.x.device)
    control = {
        name for name, residuals in (call.control or {}).items() if any(residual is not None for residual in residuals)
    }
    current = run.patcher.current_hooks if run.patcher is not None else None
    weights = tuple((hook.hook_ref, hook.strength) for hook in (current.hooks if current is not None else ()))
    sides = call.transformer_options["cond_or_uncond"]
    return [(uuid, side, size, frozenset(control), weights, run.phase) for uuid, side in zip(uuids, sides, strict=True)]


def _why_no_reuse(sampler: object, sigmas: torch.Tensor, options: Mapping[str, Any]) -> str:
    """Why a run cannot reuse features; empty where it can."""
    if not falls(sigmas.tolist()):
        return "the noise levels do not fall from step to step, as in unsampling"
    name = _name(sampler)
    if name not in SINGLE_STEP_SAMPLERS | MULTISTEP_SAMPLERS:
        return f"{name.removeprefix('sample_')} draws noise between steps, or is not known to tolerate cached steps"
    if getattr(sampler, "extra_options", {}).get("s_churn"):
        return "the sampler draws noise between steps (s_churn)"
    for key, what in (
        ("model_function_wrapper", "runs the U-Net in its own way"),
        ("context_handler", "uses context windows"),
    ):
        if key in options:
            return f"another node on the MODEL {what} ({key})"
    return ""


def _name(sampler: object) -> str:
    """The name of the function that a ComfyUI SAMPLER samples with."""
    return str(getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__))


def _has_own_guidance(guider: Guider) -> bool:
    """Whether guidance is ComfyUI's own: one prompt away from another."""
    return isinstance(guider, CFGGuider) and type(guider).predict_noise is CFGGuider.predict_noise


def _scale(guider: Guider) -> float | None:
    """The scale of ComfyUI's own guidance; None for another's, or for one that is not a number."""
    scale: object = getattr(guider, "cfg", None)
    return float(scale) if _has_own_guidance(guider) and isinstance(scale, int | float) else None


def _can_skip_guidance(guider: Guider, options: Mapping[str, Any]) -> bool:
    """False where something needs the negative prompt's prediction, or there is none."""
    return (
        _has_own_guidance(guider)
        and not options.get("disable_cfg1_optimization", False)
        and "sampler_cfg_function" not in options
    )
