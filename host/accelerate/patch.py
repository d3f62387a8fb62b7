"""A MODEL whose sampling leaves out what the picture hardly needs: KOALA Accelerate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.samplers import CFGGuider

from . import cpu_routines as kernels
from .branches import Call, Halves
from .feature_cache import Key, Run
from .plan import WHOLE, Acceleration, full_steps

KEY = "koala_accelerate"
ONE_STEP = frozenset(f"sample_{name}" for name in ("euler", "heun", "heunpp2", "exp_heun_2_x0", "dpm_2"))
"""ComfyUI's samplers that draw no noise, and take each step by itself; ddim is euler."""
MULTISTEP = frozenset(f"sample_{name}" for name in ("dpmpp_2m", "lms", "ipndm", "ipndm_v", "deis", "res_multistep"))
"""Those that draw no noise and go by several steps' predictions, as far as they bear foretold ones: with uni_pc and
gradient_estimation fewer steps are better."""


class Accelerated(NamedTuple):
    """An accelerated MODEL, and by which faster routines it runs, in words."""

    model: Any
    routines: str


def accelerate(model: Any, settings: Acceleration, report: Callable[[str], None]) -> Accelerated:
    """A clone of ``model`` that samples as ``settings`` say; after each run ``report`` is told what was left out.

    Raises ValueError where the MODEL leaves out steps already.
    """
    require_alone(model.model_options)
    if model.get_attachment(KEY) is not None:
        raise ValueError("this MODEL comes from a KOALA Accelerate; expected one that does not. Remove one of the two.")
    accelerated = model.clone()
    accelerated.set_attachments(KEY, settings)
    routines = kernels.install(accelerated, settings.routines)
    if settings.reuse.one_step or settings.guided != WHOLE:
        wrappers = _Wrappers(settings, report)
        accelerated.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, wrappers.outer_sample)
        accelerated.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, wrappers.predict_noise)
        accelerated.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _untraced(wrappers.diffusion_model))
    return Accelerated(accelerated, routines)


def steps_in_full(settings: Acceleration, sigmas: torch.Tensor, sampler: str = "sample_euler") -> frozenset[int]:
    """Which steps of a schedule are computed in full. ``sigmas``: falling, one more than steps."""
    table = settings.reuse.multistep if sampler in MULTISTEP else settings.reuse.one_step
    return full_steps(sigmas[:-1].tolist(), table)


def require_alone(options: Mapping[str, Any]) -> None:
    """Raise ValueError where a MODEL's options hold a node of the same kind, which would be fed guesses for facts."""
    other = options["transformer_options"].get("easycache")
    if other is not None:
        raise ValueError(
            f"this MODEL has {getattr(other, 'name', 'EasyCache')} as well as KOALA Accelerate; both leave out steps, "
            f"and each would go by the other's guesses. Remove one of them."
        )


class _Wrappers:
    """The functions around ComfyUI's sampling. All that changes in a run is in its ``Run``, in that run's options."""

    def __init__(self, settings: Acceleration, report: Callable[[str], None]) -> None:
        self.settings = settings
        self.report = report
        self.halves: WeakKeyDictionary[torch.nn.Module, Halves] = WeakKeyDictionary()

    def outer_sample(
        self, executor: WrapperExecutor, noise: Any, latent: Any, sampler: Any, sigmas: Any, *rest: Any, **further: Any
    ) -> Any:
        guider = executor.class_obj
        before = guider.model_options
        require_alone(before)
        full = steps_in_full(self.settings, sigmas, _name(sampler))
        run = Run(sigmas[:-1].tolist(), full, guider.model_patcher)
        run.in_full = _why_in_full(sampler, before) if self.settings.reuse.one_step else "features are not reused"
        guider.model_options = create_model_options_clone(before)
        guider.model_options["transformer_options"][KEY] = run
        try:
            output = executor(noise, latent, sampler, sigmas, *rest, **further)
        finally:
            guider.model_options = before
        self.report(str(run))
        return output

    def predict_noise(
        self,
        executor: WrapperExecutor,
        x: torch.Tensor,
        timestep: torch.Tensor,
        options: dict[str, Any],
        seed: Any = None,
    ) -> torch.Tensor:
        guider, run = executor.class_obj, options.get("transformer_options", {}).get(KEY)
        if run is None:
            return executor(x, timestep, options, seed)
        sigma = float(timestep.flatten()[0])
        run.begin(sigma)
        if self._is_guided(guider.model_patcher, sigma) or not _can_go_unguided(guider, options):
            run.guided += 1
            return executor(x, timestep, options, seed)
        scale = guider.cfg
        guider.cfg = 1.0  # the host then leaves out the negative prompt
        try:
            return executor(x, timestep, options, seed)
        finally:
            guider.cfg = scale

    def diffusion_model(self, executor: WrapperExecutor, *arguments: Any, **further: Any) -> torch.Tensor:
        call = Call(*arguments)
        run: Run | None = call.transformer_options.get(KEY)
        if run is None or run.in_full:
            return executor(*arguments, **further)
        unet = executor.class_obj
        if unet not in self.halves:
            self.halves[unet] = Halves(unet)
        halves, keys = self.halves[unet], _keys(call, run.patcher)
        foretold, keep = torch.compiler.disable(run.foretold), torch.compiler.disable(run.keep)
        feature = foretold(keys)

        def compute(*given: Any, **given_further: Any) -> torch.Tensor:
            if feature is not None:
                return halves.head(Call(*given), feature, given_further)
            made, output = halves.whole(Call(*given), given_further)
            keep(keys, made)
            return output

        inner = WrapperExecutor.new_class_executor(_untraced(compute), unet, executor.wrappers, executor.idx + 1)
        return inner.execute(*arguments, **further)

    def _is_guided(self, model: Any, sigma: float) -> bool:
        sampling, (start, end) = model.get_model_object("model_sampling"), self.settings.guided
        return sampling.percent_to_sigma(end) <= sigma <= sampling.percent_to_sigma(start)


def _untraced(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What decides anew at every step is not compiled, where a node has the U-Net compiled; the blocks it calls are."""
    return torch.compiler.disable(function, recursive=False)


def _keys(call: Call, patcher: Any) -> list[Key]:
    """What a deep feature belongs to, for each part of a call: the prompt, the size, which residuals a ControlNet adds,
    and the weights, as far as hooks (LoRAs scheduled over the steps) change them in the course of a run."""
    uuids = call.transformer_options["uuids"]
    size = (call.x.shape[0] // len(uuids), *call.x.shape[1:])
    control = {name for name, held in (call.control or {}).items() if any(part is not None for part in held)}
    hooks = patcher.current_hooks.hooks if patcher.current_hooks is not None else ()
    weights = tuple((hook.hook_ref, hook.strength) for hook in hooks)
    return [(uuid, size, frozenset(control), weights) for uuid in uuids]


def _why_in_full(sampler: Any, options: Mapping[str, Any]) -> str:
    """Why a run cannot reuse features, or nothing."""
    name = _name(sampler)
    if name not in ONE_STEP | MULTISTEP:
        return f"{name.removeprefix('sample_')} draws noise between steps, or is not known to bear foretold ones"
    if getattr(sampler, "extra_options", {}).get("s_churn"):
        return "the sampler draws noise between steps (s_churn)"
    for key, what in (("model_function_wrapper", "runs the U-Net in its own way"), ("context_handler", "runs windows")):
        if key in options:
            return f"another node on the MODEL {what} ({key})"
    return ""


def _name(sampler: Any) -> str:
    """The name of the function that a ComfyUI SAMPLER samples with."""
    return getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__)


def _can_go_unguided(guider: Any, options: Mapping[str, Any]) -> bool:
    """False where something needs the negative prompt's prediction, or there is none."""
    return (
        isinstance(guider, CFGGuider)
        and type(guider).predict_noise is CFGGuider.predict_noise
        and not options.get("disable_cfg1_optimization", False)
        and "sampler_cfg_function" not in options
    )
