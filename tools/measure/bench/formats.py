"""How the report shows figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tools.measure import markdown
from tools.measure.bench.stats import Spread, spread


def times(values: Sequence[float], digits: int = 2) -> str:
    """Repeated times: the median, and in brackets least..most."""
    median, least, most = (f"{value:.{digits}f}" for value in spread(values))
    return f"{median} ({least}..{most})"


def ratio(ratios: Spread) -> str:
    """A ratio, likewise."""
    return "{:.2f} x ({:.2f}..{:.2f})".format(*ratios)


def percent(share: float) -> str:
    """A share of 1."""
    return f"{100 * share:.1f} %"


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> list[str]:
    """A table's lines, and an empty one after it."""
    return [*markdown.table(head, rows), ""]
