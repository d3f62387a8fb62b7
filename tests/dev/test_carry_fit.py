"""Changes of weights by least squares, on networks whose best change is known."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from koala_sdxl.distill.carry.plan import OUTPUTS
from koala_sdxl.koala.lora.fit import Changes, fit_changes, fit_rounds, low_rank, reached


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


INPUTS = random(64, 6, seed=0)


def share(missing: float, wanted: Tensor, plain: Tensor) -> float:
    """What is missing, as a share of the wanted change of the plain output."""
    return missing / float((wanted - plain).square().sum())


def test_the_change_of_a_linear_layer_is_found_exactly() -> None:
    weight, right = random(5, 6, seed=1), random(5, 6, seed=2)
    wanted, plain = INPUTS @ (weight + right).T, INPUTS @ weight.T
    fitted = fit_changes(
        lambda changes: INPUTS @ (weight + changes["layer"]).T,
        {"layer": 0.1 * random(5, 6, seed=3)},
        wanted,
        iterations=30,
    )
    torch.testing.assert_close(fitted.changes["layer"], right, atol=1e-3, rtol=0)
    assert share(fitted.after, wanted, plain) < 1e-6 < share(fitted.before, wanted, plain)


def test_kept_layers_take_over_what_a_removed_one_did() -> None:
    """The teacher has a layer between the student's two, and its LoRA changes that layer alone."""
    first, between, last = 0.5 * random(8, 6, seed=1), torch.eye(8), 0.5 * random(4, 8, seed=2)
    lora = 0.3 * random(8, 8, seed=4)
    hidden = torch.tanh(INPUTS @ first.T)
    wanted = hidden @ (between + lora).T @ last.T

    def student(changes: Mapping[str, Tensor]) -> Tensor:
        return torch.tanh(INPUTS @ (first + changes["first"]).T) @ (last + changes["last"]).T

    start = {"first": 1e-3 * random(8, 6, seed=5), "last": 1e-3 * random(4, 8, seed=6)}
    few, many = (fit_changes(student, start, wanted, iterations) for iterations in (2, 12))
    assert few.before == many.before
    plain = torch.tanh(INPUTS @ first.T) @ last.T
    assert share(few.before, wanted, plain) == pytest.approx(1, abs=0.05)
    assert many.after < few.after < few.before
    assert share(many.after, wanted, plain) < 0.05


def test_the_network_computes_no_more_than_the_plan_counts() -> None:
    """One output before and one after, and for each iteration one output and the slopes."""
    calls = {"outputs": 0, "slopes": 0}

    def output(changes: Mapping[str, Tensor]) -> Tensor:
        calls["outputs"] += 1
        return INPUTS @ changes["layer"].T

    def adjoint(at: Changes, error: Tensor) -> Changes:
        calls["slopes"] += 1
        return {"layer": error.T @ INPUTS}

    fit_changes(output, {"layer": random(5, 6, seed=1)}, random(64, 5, seed=2), 4, adjoint)
    assert calls == {"outputs": OUTPUTS + 4, "slopes": 4}


def test_what_the_inputs_do_not_show_stays_as_it_was() -> None:
    seen = torch.tensor([1.0, 1, 1, 0, 0, 0])
    start = {"layer": random(5, 6, seed=1)}
    fitted = fit_changes(lambda changes: (INPUTS * seen) @ changes["layer"].T, start, random(64, 5, seed=2), 20)
    change = (fitted.changes["layer"] - start["layer"]).abs()
    assert change[:, 3:].max() < 1e-4 < change[:, :3].min()


def test_a_way_that_is_too_long_is_gone_in_part() -> None:
    start, wanted = {"layer": torch.tensor([2.0])}, torch.tensor([0.1])
    fitted = fit_changes(lambda changes: torch.tanh(changes["layer"]), start, wanted, 1)
    assert 0 < fitted.after < fitted.before
    assert -1 < fitted.changes["layer"] < 0  # the whole way leads to -10


def test_a_large_matrix_has_a_randomised_svd_that_is_as_good() -> None:
    change = random(70, 3, seed=1) @ random(3, 60, seed=2)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    up, down = low_rank(change, 4)
    torch.testing.assert_close(up @ down, change, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(*both) for both in zip(low_rank(change, 4), (up, down), strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_low_rank_is_exact_where_the_rank_suffices() -> None:
    change = random(7, 2, seed=1) @ random(2, 5, seed=2)
    up, down = low_rank(change, 2)
    assert (up.shape, down.shape) == ((7, 2), (2, 5))
    torch.testing.assert_close(up @ down, change)


@pytest.mark.parametrize(("scale", "output", "says"), [(0.0, 1.0, "zero"), (1.0, float("nan"), "not finite")])
def test_nothing_is_fitted_to_nonsense(scale: float, output: float, says: str) -> None:
    start = {"layer": scale * torch.ones(5, 6)}
    with pytest.raises(ValueError, match=says):
        fit_changes(lambda changes: output * (INPUTS @ changes["layer"].T), start, torch.ones(64, 5), 3)


@pytest.mark.parametrize(
    ("shares", "rounds", "best"), [((1, 3, 5, 4, 9), 4, 2), ((1, 3, 5, 4, 9), 1, 1), ((3, 2), 4, 0)]
)
def test_rounds_end_where_the_next_one_reaches_no_more(shares: tuple[int, ...], rounds: int, best: int) -> None:
    """The start and each round reach so much; which one is found?"""
    every = [{"layer": torch.tensor(float(number))} for number in range(len(shares))]
    tried: list[int] = []

    def fit(start: Changes) -> Changes:
        turn = len(tried)
        tried.append(turn)
        assert start is every[turn]
        return every[turn + 1]

    found, before, after = fit_rounds(every[0], fit, lambda changes: shares[int(changes["layer"])], rounds)
    assert found is every[best]
    assert (before, after) == (shares[0], shares[best])
    assert tried == list(range(min(rounds, best + 1)))


def test_reached_is_the_share_of_a_change() -> None:
    plain, wanted = torch.zeros(2, 3), torch.ones(2, 3)
    assert reached(wanted, wanted, wanted - plain) == 1
    assert reached(wanted, plain, wanted - plain) == 0
    assert reached(wanted, wanted / 2, wanted - plain) == 0.75
    assert reached(wanted, -wanted, wanted - plain) == -3
