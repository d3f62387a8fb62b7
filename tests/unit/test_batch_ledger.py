"""How often a row is begun, and when a job is over."""

from __future__ import annotations

import pytest

from batch import ledger
from batch.ledger import MOST_STARTS, Ended, Ledger, Verdict


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(ledger.time, "monotonic", lambda: now[0])
    return now


def test_a_row_that_never_ends_is_set_aside_with_its_last_reason(clock: list[float]) -> None:
    book = Ledger(2)
    answers = [book.begin("w", "row", f"reason {number}" if number else "") for number in range(MOST_STARTS + 1)]
    assert [answer.verdict for answer in answers] == [*[Verdict.DRAW] * MOST_STARTS, Verdict.SET_ASIDE]
    assert [answer.tried for answer in answers] == [False, True, True, True]
    assert answers[-1].why == f"reason {MOST_STARTS}"


def test_a_row_that_has_ended_was_tried_and_counts_once(clock: list[float]) -> None:
    book = Ledger(1)
    for error in (True, False):
        book.begin("w", "row")
        book.end("w", Ended("row", error))
    assert book.begin("w", "row").tried
    assert (book.progress().done, book.progress().errors) == (1, 0)


def test_a_worker_tells_of_its_row_with_the_next_one(clock: list[float]) -> None:
    book = Ledger(1)
    book.begin("w", "first")
    book.begin("w", "second", ended=Ended("first", False))
    assert (book.progress().done, book.progress().errors) == (1, 0)
    book.stop("enough")
    assert book.begin("w", "third", ended=Ended("second", True)).verdict is Verdict.LEAVE
    assert (book.progress().done, book.progress().errors) == (1, 1)


def test_a_stop_leaves_the_rows_and_keeps_its_first_reason(clock: list[float]) -> None:
    book = Ledger(1)
    book.stop("first")
    book.stop("second")
    assert book.begin("w", "row").verdict is Verdict.LEAVE
    assert book.progress().stopped == "first"
    assert book.is_over()


def test_the_last_worker_that_retires_ends_the_job(clock: list[float]) -> None:
    book = Ledger(2)
    book.retire("no GPU")
    assert book.progress().stopped is None
    book.retire("no disk")
    assert book.progress().stopped == "no disk"
    assert book.progress().retired == ("no GPU", "no disk")


def test_a_job_is_over_when_no_worker_has_had_a_row_for_a_while(clock: list[float]) -> None:
    book = Ledger(2)
    clock[0] = 1000.0
    assert not book.is_over()  # the others are still starting
    book.begin("a", "row")
    clock[0] = 1010.0
    book.beat("a")
    assert not book.is_over()
    book.end("a", Ended("row", False))
    clock[0] += ledger.LOST_AFTER / 2
    assert not book.is_over()
    clock[0] += ledger.LOST_AFTER
    assert book.is_over()


def test_a_worker_that_is_not_heard_of_has_no_row(clock: list[float]) -> None:
    book = Ledger(2)
    book.begin("a", "row")
    clock[0] = ledger.LOST_AFTER + 1
    assert book.progress().workers == 0
    assert book.is_over()
