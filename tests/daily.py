"""What of many like tests runs by day; `dev.py test --all` runs all of them, every night."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def daily(everything: Iterable[Any], chosen: Container[Any]) -> list[Any]:
    """Values for ``pytest.mark.parametrize``: those that are not chosen run at night only."""
    return [pytest.param(one, marks=[] if one in chosen else pytest.mark.nightly) for one in everything]
