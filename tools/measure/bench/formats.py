"""How the report shows figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tools.measure import markdown
from tools.measure.bench.stats import IDENTICAL, Spread, spread


def times(values: Sequence[float], digits: int = 2) -> str:
    """Repeated times: the median, and in brackets least..most."""
    median, least, most = (f"{value:.{digits}f}" for value in spread(values))
    return f"{median} ({least}..{most})"


def ratio(ratios: Spread) -> str:
    """A ratio, likewise."""
    return "{:.2f} x ({:.2f}..{:.2f})".format(*ratios)


def with_spread(figure: float | Spread, unit: str) -> str:
    """A figure with three digits, and in brackets its spread if it has one."""
    if not isinstance(figure, Spread):
        return f"{figure:.3g} {unit}"
    return f"{figure.median:.3g} {unit} ({figure.least:.3g}..{figure.most:.3g})"


def decibels(psnr: float) -> str:
    """A PSNR; that of two images that are the same to a hundred-thousandth is no figure."""
    return "identical" if psnr >= IDENTICAL else f"{psnr:.1f}"


def percent(share: float) -> str:
    """A share of 1."""
    return f"{100 * share:.1f} %"


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> list[str]:
    """A table's lines, and an empty one after it."""
    return [*markdown.table(head, rows), ""]
