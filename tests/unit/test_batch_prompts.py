"""Where the columns prompt and negative go: the text that reaches the samplers, or one line that says why not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.batch_graphs import (
    at,
    complaint,
    controlled,
    guided,
    image_controlled,
    node,
    primitive_text,
    refined,
    saved,
    sdxl,
    sdxl_encoders,
)


def test_both_texts_of_sdxl_are_set() -> None:
    graph = sdxl_encoders()
    assert at(graph, "prompt") == ["6.text_g", "6.text_l"]
    assert at(graph, "negative") == ["7.text_g", "7.text_l"]
    assert at(graph, "6.text_l") == ["6.text_l"]


def test_a_guider_with_one_conditioning() -> None:
    graph = guided()
    graph["11"] = node("BasicGuider", model=["4", 0], conditioning=["14", 0])
    graph["14"] = node("FluxGuidance", guidance=3.5, conditioning=["6", 0])
    assert at(graph, "prompt") == ["6.text"]
    line = complaint(graph, "negative")
    assert "no text of the workflow reaches a sampler as negative; name its input: '7.text'" in line


def test_a_zeroed_conditioning_has_no_text() -> None:
    """One encoder for both, as with models that have no negative prompt."""
    graph = sdxl()
    graph["7"] = node("ConditioningZeroOut", conditioning=["6", 0])
    assert at(graph, "prompt") == ["6.text"]
    assert complaint(graph, "negative").endswith("reaches a sampler as negative; leave it out")


def test_base_and_refiner() -> None:
    graph = refined()
    assert at(graph, "prompt") == ["6.text", "15.text"]
    assert at(graph, "negative") == ["7.text", "16.text"]
    assert at(graph, "width") == ["5.width"]
    assert complaint(graph, "seed").endswith("more than one place: take 'Base.noise_seed' or 'Refine.noise_seed'")
    assert at(graph, "Base.noise_seed") == ["3.noise_seed"]


def test_base_and_refiner_with_different_texts_are_not_clear() -> None:
    graph = refined(same=False)
    line = complaint(graph, "prompt")
    assert line == "t.csv: column 'prompt' fits more than one text: take '6.text' or 'Refiner.text'"
    assert at(graph, "Refiner.text") == ["15.text"]
    assert at(graph, "negative") == ["7.text", "16.text"]


def test_a_controlnet_between_encoders_and_sampler() -> None:
    graph = image_controlled()
    assert at(graph, "prompt") == ["6.text"]
    assert at(graph, "negative") == ["7.text"]


def test_the_sampler_behind_a_controlnets_image_has_a_prompt_of_its_own() -> None:
    """Both samplers draw; neither is taken for the other."""
    assert "'6.text' or 'KOALA Prompt.positive'" in complaint(controlled(), "prompt")
    graph = controlled()
    graph["6"]["inputs"]["text"] = "a star"
    assert at(graph, "prompt") == ["6.text", "20.positive"]


def test_a_text_behind_an_image_is_not_the_prompt() -> None:
    graph = sdxl()
    graph["22"] = node("PrintedText", text="a sign")
    graph["23"] = node("ControlNetLoader", control_net_name="c.safetensors")
    links: dict[str, Any] = {"conditioning": ["6", 0], "control_net": ["23", 0], "image": ["22", 0]}
    graph["24"] = node("ControlNetApply", strength=1, **links)
    graph["3"]["inputs"]["positive"] = ["24", 0]
    assert at(graph, "prompt") == ["6.text"]


def test_an_output_that_no_sampler_has_does_not_count() -> None:
    """The ControlNet passes both on; the sampler takes only one of them."""
    graph = image_controlled()
    graph["24"]["inputs"]["negative"] = ["6", 0]
    graph["3"]["inputs"]["negative"] = ["7", 0]
    assert (at(graph, "prompt"), at(graph, "negative")) == (["6.text"], ["7.text"])
    graph["25"] = node("FluxGuidance", guidance=3.5, conditioning=["24", 0])
    graph["3"]["inputs"]["positive"] = ["25", 0]
    assert (at(graph, "prompt"), at(graph, "negative")) == (["6.text"], ["7.text"])


def test_encoders_of_other_models() -> None:
    graph = primitive_text()
    graph["6"] = node("CLIPTextEncodeFlux", clip_l="a koala", t5xxl="a koala", guidance=3.5, clip=["4", 1])
    assert at(graph, "prompt") == ["6.clip_l", "6.t5xxl"]
    graph["6"] = node("CLIPTextEncodeSD3", clip_l=["30", 0], clip_g=["30", 0], empty_padding="none", clip=["4", 1])
    assert at(graph, "prompt") == ["30.value"]


@pytest.mark.parametrize(
    ("class_type", "inputs"),
    [
        ("ConditioningCombine", ("conditioning_1", "conditioning_2")),
        ("ConditioningConcat", ("conditioning_to", "conditioning_from")),
        ("ConditioningAverage", ("conditioning_to", "conditioning_from")),
        ("SwitchOfAnotherPack", ("a", "b")),
    ],
)
def test_two_encoders_that_are_joined(class_type: str, inputs: tuple[str, str]) -> None:
    graph = sdxl()
    graph["10"] = node("CLIPTextEncode", "Background", text="a forest", clip=["4", 1])
    links: dict[str, Any] = {inputs[0]: ["6", 0], inputs[1]: ["10", 0]}
    graph["11"] = node(class_type, **links)
    graph["3"]["inputs"]["positive"] = ["11", 0]
    assert complaint(graph, "prompt").endswith("more than one text: take '6.text' or 'Background.text'")


def test_one_text_for_both_roles_is_not_clear() -> None:
    graph = sdxl()
    graph["3"]["inputs"]["negative"] = ["6", 0]
    for column in ("prompt", "negative"):
        line = complaint(graph, column)
        assert line == (
            f"t.csv: column {column!r} is not clear: CLIP Text Encode (Prompt) · text (node 6) is prompt and negative "
            "prompt in one; name the column '6.text' to set it"
        )


def test_text_from_a_primitive() -> None:
    graph = primitive_text("6")
    assert at(graph, "prompt") == ["30.value"]
    assert at(graph, "6.text") == ["30.value"]
    assert at(graph, "My prompt.value") == ["30.value"]
    assert at(graph, "negative") == ["7.text"]
    assert complaint(graph, "text").endswith("more than one place: take 'My prompt.value' or '7.text'")


def test_one_primitive_for_two_encoders_is_one_place() -> None:
    graph = refined()
    graph["30"] = node("PrimitiveString", "My prompt", value="a koala")
    for name in ("6", "15"):
        graph[name]["inputs"]["text"] = ["30", 0]
    assert at(graph, "prompt") == ["30.value"]


def test_pieces_of_text_that_are_joined_are_not_clear() -> None:
    graph = sdxl()
    graph["30"] = node("StringConcatenate", "Join", string_a="", string_b="", delimiter=", ")
    graph["6"]["inputs"]["text"] = ["30", 0]
    assert complaint(graph, "prompt").endswith("more than one text: take 'Join.string_a' or 'Join.string_b'")
    graph["31"] = node("PrimitiveString", "Subject", value="a koala")
    graph["30"]["inputs"]["string_a"] = ["31", 0]
    assert complaint(graph, "prompt").endswith("more than one text: take 'Join.string_b' or 'Subject.value'")


def test_a_circle_of_links_ends() -> None:
    graph = sdxl()
    graph["10"] = node("ConditioningCombine", conditioning_1=["11", 0], conditioning_2=["6", 0])
    graph["11"] = node("ConditioningCombine", conditioning_1=["10", 0], conditioning_2=["10", 0])
    graph["3"]["inputs"]["positive"] = ["11", 0]
    assert at(graph, "prompt") == ["6.text"]


def test_koala_prompt_by_its_outputs() -> None:
    graph = sdxl()
    graph["20"] = node("KoalaPrompt", "KOALA Prompt", positive="a", negative="b", style="no style", clip=["4", 1])
    graph["3"]["inputs"] |= {"positive": ["20", 0], "negative": ["20", 1]}
    assert (at(graph, "prompt"), at(graph, "negative")) == (["20.positive"], ["20.negative"])
    graph["21"] = node("KoalaPrompt", "Second", positive="c", negative="d", style="no style", clip=["4", 1])
    graph["3"]["inputs"]["negative"] = ["21", 0]  # encoded as a positive prompt, used as a negative one
    assert (at(graph, "prompt"), at(graph, "negative")) == (["20.positive"], ["21.positive"])


def test_other_nodes_with_both_texts() -> None:
    graph = sdxl()
    graph["20"] = node("TextEncodeMageFlowEdit", prompt="a", negative_prompt="b", clip=["4", 1])
    graph["3"]["inputs"] |= {"positive": ["20", 0], "negative": ["20", 1]}
    assert (at(graph, "prompt"), at(graph, "negative")) == (["20.prompt"], ["20.negative_prompt"])
    graph["20"] = node("Efficient Loader", positive="a", negative="b", ckpt_name="c")
    graph["3"]["inputs"] |= {"positive": ["20", 1], "negative": ["20", 2]}
    assert (at(graph, "prompt"), at(graph, "negative")) == (["20.positive"], ["20.negative"])


def test_an_input_of_the_name_that_no_sampler_sees_is_no_place() -> None:
    graph = sdxl()
    graph["20"] = node("KoalaPrompt", "KOALA Prompt", positive="a", negative="b", clip=["4", 1])
    graph["21"] = node("ConditioningZeroOut", conditioning=["20", 0])
    graph["3"]["inputs"] |= {"positive": ["20", 0], "negative": ["21", 0]}
    assert at(graph, "prompt") == ["20.positive"]
    line = complaint(graph, "negative")
    assert line.endswith(
        "reaches a sampler as negative; name its input: '6.text' or '7.text' or 'KOALA Prompt.negative'"
    )
    assert at(graph, "KOALA Prompt.negative") == ["20.negative"]


def test_without_a_sampler_an_input_of_the_name_will_do() -> None:
    graph = {"1": node("PainterOfAnotherPack", "Painter", prompt="a", negative="b", seed=1)}
    assert (at(graph, "prompt"), at(graph, "negative")) == (["1.prompt"], ["1.negative"])


def test_a_workflow_with_two_prompts() -> None:
    graph = saved("KOALA-tiny with a ControlNet")
    assert complaint(graph, "prompt").endswith("more than one text: take '5.positive' or '6.positive'")
    assert at(graph, "6.positive") == ["6.positive"]
