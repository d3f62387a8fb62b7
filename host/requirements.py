"""Whether the pack can run in this ComfyUI: asked before anything is imported that an older one lacks."""

from __future__ import annotations

import logging

from ..koala.requirements import RequirementError, diffusers_fault, is_older, least


def require_host() -> None:
    """Check ComfyUI's version, and log a line where diffusers is missing or too old, without which most nodes work.

    Raises RequirementError for a ComfyUI that is older than the pack is for; ComfyUI shows its message in the log.
    """
    found, wanted = _version(), least("pyproject.toml", "requires-comfyui")
    if found is None or is_older(found, wanted):
        what = f"is {found}" if found else "has no version (no comfyui_version.py)"
        raise RequirementError(
            f"this ComfyUI {what}; KOALA for ComfyUI needs {wanted} or newer. Update ComfyUI, install its "
            f"requirements.txt again, and restart it."
        )
    if fault := diffusers_fault():
        logging.warning("KOALA Sampler, KOALA Scheduler and KOALA Accelerate will not run: %s", fault)


def _version() -> str | None:
    try:
        from comfyui_version import __version__
    except ImportError:
        return None
    return str(__version__)
