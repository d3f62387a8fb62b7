"""What the pack needs, and how old it may be: pyproject.toml and requirements.txt, which lie beside its code, say it.

Nothing but Python is imported here, so that this can be asked before anything else is.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import EulerDiscreteScheduler

PACK = Path(__file__).parents[1]
"""The pack's folder, as ComfyUI found it: links are not followed."""


class RequirementError(RuntimeError):
    """Something that the pack needs is missing or too old; the message says what to do."""


def least(file: str, name: str) -> str:
    """The version of ``name`` from which on it will do, from the line ``name>=version`` of one of the pack's files."""
    found = re.search(rf'^{name}\W*>=([\d.]+)"?$', (PACK / file).read_text("utf-8"), re.MULTILINE)
    assert found is not None, file
    return found[1]


def is_older(found: str, wanted: str) -> bool:
    """Whether a version comes before another. A pre-release counts as its release, and a name without a number, as some
    builds have it, as the newest."""
    numbers = _numbers(found)
    return bool(numbers) and numbers < _numbers(wanted)


def _numbers(release: str) -> list[int]:
    leading = re.search(r"\d+(?:\.\d+)*", release)
    numbers = [int(number) for number in leading[0].split(".")] if leading else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


@cache
def diffusers_fault() -> str:
    """What is wrong with the installed diffusers and what to do, as a line; empty where nothing is.

    It goes by what is installed and does not import it, which takes a second.
    """
    wanted = least("requirements.txt", "diffusers")
    try:
        found = version("diffusers")
    except PackageNotFoundError:
        found = None
    if found and not is_older(found, wanted):
        return ""
    return _fault(f"diffusers {found} is installed" if found else "diffusers is not installed", wanted)


def scheduler_class() -> type[EulerDiscreteScheduler]:
    """``EulerDiscreteScheduler`` of diffusers. Raises RequirementError where that is missing, too old or broken."""
    if said := diffusers_fault():
        raise RequirementError(said)
    try:
        from diffusers import EulerDiscreteScheduler
    except (ImportError, RuntimeError) as error:  # diffusers imports its parts late, and then raises RuntimeError
        first = str(error).strip().partition("\n")[0]
        what = f"diffusers {version('diffusers')} cannot be imported ({first})"
        raise RequirementError(_fault(what, least("requirements.txt", "diffusers"))) from error
    scheduler: type[EulerDiscreteScheduler] = EulerDiscreteScheduler
    return scheduler


def _fault(what: str, wanted: str) -> str:
    return (
        f"{what}; expected diffusers {wanted} or newer, from which KOALA's noise levels come. Run {_command()}, and "
        f"restart ComfyUI."
    )


def _command() -> str:
    """The command in the first line of requirements.txt, with ComfyUI's own Python and the pack's own folder.

    It is written there for people; in code, the registry's scan would take it for an installation.
    """
    line = (PACK / "requirements.txt").read_text("utf-8").splitlines()[0].removeprefix("# ")
    _, *between, _ = line.split()
    return " ".join((_quoted(sys.executable), *between, _quoted(str(PACK / "requirements.txt"))))


def _quoted(path: str) -> str:
    return f'"{path}"' if " " in path else path
