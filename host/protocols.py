"""ComfyUI's objects as the pack uses them: the attributes and methods that it relies on, and no others.

ComfyUI's own classes are wider, differ between releases and carry few types. Anything with these members will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch

Conditioning = list[list[Any]]
"""CONDITIONING: a list of [text [1, tokens, width], options such as pooled_output and control]."""
Latent = dict[str, Any]
"""LATENT: ``samples`` [N, 4, h, w], and what else a node has put beside them."""
Residuals = dict[str, list[Any]]
"""What a ControlNet adds: ``input``, ``middle`` and ``output``, each a list of [N, C, h, w] or None."""


@runtime_checkable
class BaseModel(Protocol):
    """``comfy.model_base.BaseModel``: the module around a U-Net, shared by all clones of a MODEL."""

    diffusion_model: torch.nn.Module
    current_patcher: Model | None
    """While it is sampled, the MODEL that is."""
    model_config: Any
    """How its U-Net was built: ``unet_config``."""

    def extra_conds(self, **conditioning: Any) -> dict[str, Any]: ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def state_dict_for_saving(
        self, unet: Mapping[str, torch.Tensor], clip: Mapping[str, torch.Tensor], vae: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]: ...


@runtime_checkable
class Patcher(Protocol):
    """``comfy.model_patcher.ModelPatcher``, around any module."""

    model: Any
    patches: dict[str, list[Any]]
    backup: Mapping[str, Any]
    load_device: torch.device


@runtime_checkable
class Model(Protocol):
    """MODEL: a ``comfy.model_patcher.ModelPatcher`` around a ``BaseModel``."""

    model: BaseModel
    model_options: dict[str, Any]
    load_device: torch.device
    offload_device: torch.device
    patches: dict[str, list[Any]]
    backup: Mapping[str, Any]
    """What was in the place of each weight that has its patches in it now, by name."""
    patches_uuid: Any
    object_patches: dict[str, Any]
    weight_wrapper_patches: dict[str, list[Any]]
    force_cast_weights: bool
    callbacks: dict[str, dict[Any, list[Any]]]
    wrappers: dict[str, dict[Any, list[Any]]]
    additional_models: dict[str, list[Model]]
    attachments: dict[str, Any]
    injections: dict[str, list[Any]]
    forced_hooks: Any
    current_hooks: Any
    cached_patcher_init: Any
    """How its loader loads it once more; None: not at all."""
    parent: Model | None
    """The MODEL that it is a clone of; ComfyUI goes on with it when this one is gone."""

    def clone(self, disable_dynamic: bool = False, model_override: Any = None) -> Model: ...

    def get_clone_model_override(self) -> Any: ...

    def is_dynamic(self) -> bool: ...

    def model_dtype(self) -> torch.dtype: ...

    def model_size(self) -> int: ...

    def memory_required(self, input_shape: list[int]) -> float: ...

    def get_model_object(self, name: str) -> Any: ...

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list[Any]]: ...

    def add_patches(
        self, patches: Mapping[str, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[str]: ...

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable[..., Any]) -> None: ...

    def add_callback_with_key(self, call_type: str, key: str, callback: Callable[..., Any]) -> None: ...

    def set_model_compute_dtype(self, dtype: torch.dtype) -> None: ...

    def get_additional_models_with_key(self, key: str) -> list[Model]: ...

    def get_attachment(self, key: str) -> Any: ...

    def set_attachments(self, key: str, attachment: Any) -> None: ...


@runtime_checkable
class Tokenizer(Protocol):
    """SDXL's two tokenizers; inside each, as ``tokenizer``, is that of transformers."""

    clip_l: Any
    clip_g: Any


@runtime_checkable
class Clip(Protocol):
    """CLIP: a ``comfy.sd.CLIP``."""

    patcher: Patcher
    cond_stage_model: torch.nn.Module
    tokenizer: Tokenizer

    def clone(self) -> Clip: ...

    def load_model(self) -> Patcher: ...

    def add_patches(
        self, patches: Mapping[str, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[str]: ...

    def tokenize(self, text: str, **options: Any) -> dict[str, list[list[tuple[Any, ...]]]]: ...

    def encode_from_tokens_scheduled(self, tokens: Mapping[str, Any]) -> Conditioning: ...


@runtime_checkable
class Vae(Protocol):
    """VAE: a ``comfy.sd.VAE``."""

    device: torch.device
    first_stage_model: torch.nn.Module
    vae_dtype: torch.dtype
    decode: Callable[..., torch.Tensor]
    decode_tiled: Callable[..., torch.Tensor]
    encode: Callable[..., torch.Tensor]
    encode_tiled: Callable[..., torch.Tensor]

    def get_sd(self) -> dict[str, torch.Tensor]: ...


@runtime_checkable
class ControlNet(Protocol):
    """CONTROL_NET: a ``comfy.controlnet.ControlBase``."""

    previous_controlnet: ControlNet | None

    def copy(self) -> ControlNet: ...

    def pre_run(self, model: BaseModel, percent_to_timestep_function: Callable[[float], float]) -> None: ...

    def get_control(self, *arguments: Any, **further: Any) -> Residuals | None: ...


@runtime_checkable
class Hooks(Protocol):
    """HOOKS: a ``comfy.hooks.HookGroup``."""

    def clone_and_combine(self, other: Hooks) -> Hooks: ...


class Executor(Protocol):
    """What a wrapper around a part of sampling is called with: a ``comfy.patcher_extension.WrapperExecutor``."""

    class_obj: Any
    """The object whose method is wrapped: a guider, or a U-Net."""
    wrappers: list[Callable[..., Any]]
    idx: int

    def __call__(self, *arguments: Any, **further: Any) -> torch.Tensor: ...


@runtime_checkable
class Guider(Protocol):
    """What samples a MODEL: a ``comfy.samplers.CFGGuider``, while it does."""

    model_patcher: Model
    model_options: dict[str, Any]
    conds: dict[str, list[dict[str, Any]]]
    """Name of a prompt (positive, negative, ...) -> its entries, the text as one more of their options."""
    cfg: float
