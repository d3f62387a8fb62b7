"""Where columns go by their names, in real workflows and the usual graphs, and each refusal in one line."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from batch.columns import describe, places
from tests.unit.batch_graphs import (
    KOALA,
    at,
    complaint,
    guided,
    node,
    refined,
    saved,
    sdxl,
    sdxl_encoders,
)
from tools.harness.errors import UserError

# --- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("prompt", ["6.text"]),
        ("positive", ["6.text"]),
        ("positive_prompt", ["6.text"]),
        ("Prompt", ["6.text"]),
        ("negative", ["7.text"]),
        ("negative_prompt", ["7.text"]),
        ("seed", ["3.seed"]),
        ("Seed", ["3.seed"]),
        ("steps", ["3.steps"]),
        ("width", ["5.width"]),
        ("batch_size", ["5.batch_size"]),
        ("ckpt_name", ["4.ckpt_name"]),
        ("filename_prefix", ["9.filename_prefix"]),
        ("3.cfg", ["3.cfg"]),
        ("7.text", ["7.text"]),
        ("KSampler.cfg", ["3.cfg"]),
        ("ksampler.CFG", ["3.cfg"]),
        ("Empty Latent Image.width", ["5.width"]),
    ],
)
def test_the_usual_graph(column: str, expected: list[str]) -> None:
    assert at(sdxl(), column) == expected


def test_node_ids_of_subgraphs_and_titles_with_dots() -> None:
    graph = {
        "75:3": node("KSampler", "v1.5 sampler", seed=1),
        "75:12:3": node("KSampler", "v1.5", **{"preset.steps": 9}),
    }
    assert at(graph, "75:3.seed") == ["75:3.seed"]
    assert at(graph, "v1.5 sampler.seed") == ["75:3.seed"]
    for column in ("75:12:3.preset.steps", "75:12:3.steps", "v1.5.preset.steps", "v1.5.steps", "steps", "preset.steps"):
        assert at(graph, column) == ["75:12:3.preset.steps"]


def test_an_id_counts_before_a_title_and_case_before_no_case() -> None:
    graph = {"6": node("A", "seven", x=1), "7": node("A", "6", x=2), "8": node("A", "Seven", x=3)}
    assert at(graph, "6.x") == ["6.x"]
    assert at(graph, "seven.x") == ["6.x"]
    assert at(graph, "Seven.x") == ["8.x"]
    assert "'6.x' or '8.x'" in complaint(graph, "SEVEN.x")


def test_the_size_is_that_of_the_latent_that_is_sampled() -> None:
    graph = sdxl_encoders()
    assert at(graph, "width") == ["5.width"]
    ((_, words),) = describe(graph, places(graph, ["height"], "t.csv"))
    assert words == (
        "Empty Latent Image · height (node 5): the latent that is sampled, "
        "not CLIPTextEncodeSDXL · height (node 6), CLIPTextEncodeSDXL · height (node 7)"
    )
    graph["40"] = node("EmptyLatentImage", "Second", width=64, height=64, batch_size=1)
    assert at(graph, "width") == ["5.width"]
    graph["41"] = node("KSampler", "Second sampler", latent_image=["40", 0])
    assert "'Empty Latent Image.width' or" in complaint(graph, "width")


def test_a_size_without_a_sampler_is_not_guessed() -> None:
    graph = {"1": node("EmptyImage", width=8), "2": node("EmptyImage", width=16)}
    assert complaint(graph, "width") == "t.csv: column 'width' fits more than one place: take '1.width' or '2.width'"


def test_a_sampler_with_a_guider() -> None:
    graph = guided()
    assert at(graph, "prompt") == ["6.text"]
    assert at(graph, "negative") == ["7.text"]
    assert at(graph, "seed") == ["10.noise_seed"]
    assert at(graph, "noise_seed") == ["10.noise_seed"]
    assert at(graph, "cfg") == ["11.cfg"]
    assert at(graph, "steps") == ["13.steps"]
    assert at(graph, "width") == ["5.width"]


def test_numbers_from_primitives() -> None:
    graph = sdxl_encoders()
    graph["31"] = node("PrimitiveInt", "Width", value=1024)
    for name in ("5", "6", "7"):
        graph[name]["inputs"]["width"] = ["31", 0]
    graph["32"] = node("PrimitiveInt", "Any seed", value=4)
    graph["3"]["inputs"]["seed"] = ["32", 0]
    assert at(graph, "width") == ["31.value"]
    assert at(graph, "seed") == ["32.value"]


def test_an_inputs_own_name_counts_before_that_of_a_dynamic_combo_of_its_node() -> None:
    graph = {"1": node("A", "Node", steps=1, **{"preset.steps": 2})}
    assert at(graph, "1.steps") == at(graph, "node.STEPS") == ["1.steps"]
    assert at(graph, "preset.steps") == at(graph, "Node.preset.steps") == ["1.preset.steps"]
    assert complaint(graph, "steps").endswith("more than one place: take 'Node.steps' or 'Node.preset.steps'")


@pytest.mark.parametrize("name", KOALA)
def test_our_workflows(name: str) -> None:
    found = places(saved(name), ["prompt", "negative", "seed", "width"], "t.csv")
    assert tuple(f"{place.node}.{place.input}" for (place,) in found.values()) == KOALA[name]


def test_settings_of_a_preset() -> None:
    assert at(saved("every node"), "cfg") == ["16.preset.cfg"]
    line = complaint(saved("every node"), "steps")
    assert line.endswith("more than one place: take 'KOALA Sampler.preset.steps' or 'KOALA Scheduler.steps'")
    assert at(saved("every node"), "KOALA Sampler.steps") == ["16.preset.steps"]
    assert at(saved("every node"), "KOALA Sampler.preset.steps") == ["16.preset.steps"]
    assert "fits nothing: no node has such an input" in complaint(saved("KOALA-tiny text to image"), "cfg")


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("sed", "fits nothing: no node has such an input; did you mean 'seed'?"),
        ("Widht", "fits nothing: no node has such an input; did you mean 'width'?"),
        ("KSampler.sede", "did you mean 'KSampler.seed'"),
        ("Ksampler.step", "did you mean 'KSampler.steps'"),
        ("3.guidance", "fits nothing: no node has such an input"),
        ("lora", "no node has such an input; there are batch_size, cfg, ckpt_name, denoise,"),
        ("lora", "steps, text, width"),
        ("text", "fits more than one place: take '6.text' or '7.text'"),
        ("CLIP Text Encode (Prompt).text", "fits more than one node: take '6.text' or '7.text'"),
        ("vae", "is a link, not a value: it comes from Load Checkpoint (node 4)"),
        ("8.vae", "is a link, not a value: it comes from Load Checkpoint (node 4)"),
        ("KSampler.model", "is a link, not a value: it comes from Load Checkpoint (node 4)"),
        ("12.text", "fits nothing"),
        ("", "fits nothing"),
        (".", "fits nothing"),
    ],
)
def test_a_column_without_its_one_place_is_refused_in_one_line(column: str, expected: str) -> None:
    line = complaint(sdxl(), column)
    assert line.startswith(f"t.csv: column {column!r} ")
    assert expected in line
    assert len(line) < 300


def test_what_an_error_suggests_is_taken() -> None:
    """Every name between quotation marks is a column with one place."""
    for graph, column in ((sdxl(), "text"), (refined(), "seed"), (refined(same=False), "prompt"), (sdxl(), "sed")):
        names = complaint(graph, column).split("'")[3::2]
        assert names
        assert all(len(at(graph, name)) == 1 for name in names)


def test_columns_on_the_same_place_are_refused_in_one_line() -> None:
    line = complaint(sdxl(), "prompt", "seed", "6.text")
    assert line == (
        "t.csv: columns 'prompt' and '6.text' both set CLIP Text Encode (Prompt) · text (node 6); leave out one of them"
    )
    assert "'prompt' and '6.text_l' both set" in complaint(sdxl_encoders(), "prompt", "6.text_l")
    assert "columns 'prompt' and 'positive' both set" in complaint(sdxl_encoders(), "prompt", "positive")


def test_every_fault_has_its_line() -> None:
    with pytest.raises(UserError) as caught:
        places(sdxl(), ["sed", "prompt", "text", "vae", "Seed", "3.seed"], "t.csv")
    lines = str(caught.value).splitlines()
    assert [line.split("'")[1] for line in lines] == ["sed", "text", "vae", "Seed"]
    assert all(line.startswith("t.csv: column") for line in lines)


def test_values_that_are_no_text_no_number_and_no_truth_value_are_no_places() -> None:
    graph = {"1": node("A", points=[1, 2, 3], files={"__value__": ["a", 0]}, nothing=None, on=False)}
    for column in ("points", "files", "nothing"):
        assert "fits nothing" in complaint(graph, column)
    assert at(graph, "on") == ["1.on"]


def test_the_plan_in_words() -> None:
    graph = sdxl_encoders()
    assert describe(graph, places(graph, ["prompt", "KSampler.seed", "5.width"], "t.csv")) == [
        ("prompt", "CLIPTextEncodeSDXL · text_g (node 6), CLIPTextEncodeSDXL · text_l (node 6)"),
        ("KSampler.seed", "KSampler · seed (node 3)"),
        ("5.width", "Empty Latent Image · width (node 5)"),
    ]


def test_the_same_columns_give_the_same_places() -> None:
    columns: Sequence[str] = ("prompt", "negative", "seed", "width", "cfg")
    assert places(sdxl(), columns, "a") == places(dict(reversed(sdxl().items())), columns, "b")
