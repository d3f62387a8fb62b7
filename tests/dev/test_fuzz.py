"""A sample of the mutation campaign, and whether its oracle sees what it must see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from koala_sdxl.koala.files.header import CheckpointError
from tools.fuzz import campaign, cases, oracle
from tools.fuzz.bases import Base, bases, contents, write
from tools.fuzz.oracle import FAULTS

SEED, SAMPLE = 7, 200


@pytest.fixture(scope="module", autouse=True)
def prepared() -> Iterator[None]:
    with campaign.prepared():
        yield


@pytest.fixture(scope="module")
def results() -> list[campaign.Result]:
    return list(campaign.run(SEED, range(SAMPLE)))


def test_damaged_files_are_refused_by_name_or_loaded_as_they_are(results: list[campaign.Result]) -> None:
    assert [result.line for result in results if result.verdict.outcome in FAULTS] == []


def test_the_sample_has_every_kind_and_both_outcomes(results: list[campaign.Result]) -> None:
    outcomes = Counter((result.base.kind, result.verdict.outcome) for result in results)
    assert {kind for kind, _ in outcomes} == set(cases.SHARES)
    for kind in cases.SHARES:
        assert outcomes[kind, "refused"] > outcomes[kind, "loaded"] / 20
        assert outcomes[kind, "loaded"] > 0


def test_a_case_is_the_same_whatever_ran_before() -> None:
    every = list(bases())
    first = [cases.case(every, SEED, number) for number in range(20)]
    again = [cases.case(every, SEED, number) for number in reversed(range(20))]
    assert [(case.did, case.contents) for case in first] == [(case.did, case.contents) for case in reversed(again)]
    assert [case.did for case in first] != [cases.case(every, SEED + 1, number).did for number in range(20)]


def _base(name: str) -> Base:
    return next(base for base in bases() if base.name == name)


def _judged(base: Base, tmp_path: Path, load: Any) -> oracle.Verdict:
    """What the oracle says of an undamaged file that a faulty pack loads."""
    path = write(base, contents(base), tmp_path, "case")
    clean = oracle.learn(base, path)
    return oracle.judge(replace(base, load=load), clean, path)


def test_the_oracle_sees_one_number_that_is_another(tmp_path: Path) -> None:
    base = _base("checkpoint, comfy")

    def load(path: Path) -> Any:
        loaded = base.load(path)
        loaded[2].first_stage_model.decoder.conv_out.weight[0, 0, 0, 0] += 1e-3
        return loaded

    verdict = _judged(base, tmp_path, load)
    assert verdict.outcome == "silent difference"
    assert "decoder.conv_out.weight" in verdict.text


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (CheckpointError("case.safetensors is damaged"), "refused"),
        (CheckpointError("a file is damaged"), "foreign traceback"),
        (FileNotFoundError("case.safetensors is not there"), "refused"),
        (KeyError("case.safetensors"), "foreign traceback"),
        (RecursionError("case.safetensors"), "foreign traceback"),
    ],
    ids=str,
)
def test_the_oracle_knows_our_errors(error: Exception, outcome: str, tmp_path: Path) -> None:
    def load(path: Path) -> Any:
        raise error

    assert _judged(_base("bare U-Net"), tmp_path, load).outcome == outcome


def test_the_oracle_sees_a_lora_that_changes_nothing(tmp_path: Path) -> None:
    base = _base("LoRA file, LoRA, kohya, LDM blocks")
    apply = base.load

    def load(path: Path) -> Any:
        applied = apply(path)
        patches = applied.model.patches
        key = next(iter(patches))
        patches[key] = [("diff", (torch.zeros_like(applied.model.model.state_dict()[key]),))]
        return applied

    assert _judged(base, tmp_path, load).outcome == "silent difference"
