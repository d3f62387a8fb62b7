"""KOALA Accelerate in the real server: what it computes, what it says on which node, and what it refuses."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from PIL import Image

from tests.host.test_nodes import Events, graph, picture, seen
from tools.harness.client import Client, GraphError, Prompt

BALANCED = {"preset": "balanced"}
AS_BALANCED = {
    "preset": "custom",
    "preset.reuse": "balanced",
    "preset.guidance_start": 0.0,
    "preset.guidance_end": 1.0,
    "preset.cpu_routines": "bf16",
}
NO_VAE = "KOALA Accelerate: the VAE output is used but no VAE is connected"
LEFT_OUT = re.compile("1[2-5] of 25 passes ran the full U-Net, 25 with guidance")
"""In *balanced*: the table's twelve, and some more where the features change too fast."""


def accelerated(preset: dict[str, Any] | None = None, vae: bool = True, **sampler: Any) -> Prompt:
    """Text to image with koala-tiny, its model and its VAE accelerated; without ``vae``, only the model."""
    prompt = graph(**sampler)
    inputs = {"model": ["1", 0], **(preset or BALANCED), **({"vae": ["1", 2]} if vae else {})}
    prompt["10"] = {"class_type": "KoalaAccelerate", "inputs": inputs}
    prompt["4"]["inputs"]["model"] = ["10", 0]
    if vae:
        prompt["5"]["inputs"]["vae"] = ["10", 1]
    return prompt


def told(client: Client, prompt: Prompt) -> dict[str, str]:
    """Node -> the last text that was shown on it while the graph ran."""
    events = Events()
    client.run(prompt, on_event=events)
    return {data["node"]: data["text"] for data in events.of("progress_text")}


def again(prompt: Prompt) -> Prompt:
    """The same picture by a graph of which the server has the accelerated model in its cache, but no latent."""
    prompt["30"] = {"class_type": "RepeatLatentBatch", "inputs": {"samples": ["3", 0], "amount": 1}}
    prompt["4"]["inputs"]["latent_image"] = ["30", 0]
    return prompt


def test_the_prompt_is_answered_and_the_sampler_is_told_what_was_left_out(client: Client) -> None:
    events = Events()
    result = client.run(accelerated(seed=91), on_event=events)
    assert result.text("10").startswith("at least 12 of 25 steps run the full U-Net")
    (said,) = events.of("progress_text")
    assert said["node"] == "4"
    assert LEFT_OUT.match(said["text"])
    sampled = [data["value"] for data in events.of("progress") if data["node"] == "4"]
    assert sampled[-1] == 25
    assert events.of("preview")
    assert seen(picture(client, accelerated())) == ("red", "circle", "blue")


def test_stock_samplers_take_it_and_are_told(client: Client) -> None:
    prompt = accelerated()
    names = ("model", "positive", "negative", "latent_image", "seed")
    inputs = {name: prompt["4"]["inputs"][name] for name in names}
    inputs |= {"steps": 25, "cfg": 7.5, "sampler_name": "euler", "scheduler": "ddim_uniform", "denoise": 1.0}
    prompt["4"] = {"class_type": "KSampler", "inputs": inputs}
    (text,) = told(client, prompt).values()
    assert LEFT_OUT.match(text)


@pytest.mark.parametrize(
    ("sampler", "why"),
    [
        ({"sampler_name": "euler_ancestral"}, ": euler_ancestral draws noise between steps"),
        ({"sampler_name": "lcm"}, ": lcm draws noise between steps"),
    ],
)
def test_what_cannot_reuse_features_runs_full_steps_and_says_why(
    sampler: dict[str, Any], why: str, client: Client
) -> None:
    (text,) = told(client, accelerated(**sampler, seed=92)).values()
    assert text.startswith("25 of 25 passes ran the full U-Net")
    assert why in text


def test_exact_tells_nothing_and_draws_the_same(client: Client) -> None:
    prompt = accelerated({"preset": "exact"})
    assert told(client, prompt) == {}
    assert seen(picture(client, prompt)) == ("red", "circle", "blue")


def test_custom_settings_arrive(client: Client) -> None:
    by_preset, by_hand = (picture(client, accelerated(preset)) for preset in (BALANCED, AS_BALANCED))
    assert by_hand.tobytes() == by_preset.tobytes()
    half = AS_BALANCED | {"preset.guidance_start": 0.2, "preset.guidance_end": 0.6}
    result = client.run(accelerated(half))
    assert "guidance from 0.2 to 0.6" in result.text("10")
    with pytest.raises(GraphError, match=r"guidance_start is 0\.5 and guidance_end 0\.5; expected an end after"):
        client.run(accelerated(AS_BALANCED | {"preset.guidance_start": 0.5, "preset.guidance_end": 0.5}))


def test_a_picture_is_the_same_after_another_from_the_same_model(client: Client) -> None:
    alone = picture(client, accelerated())
    client.submit(again(accelerated(seed=93)))
    events = Events()
    second = again(accelerated())
    (image,) = client.run(second, on_event=events).images("6")
    cached = {node for data in events.of("execution_cached") for node in data["nodes"]}
    assert "10" in cached
    assert "4" not in cached
    assert Image.open(io.BytesIO(client.view(image))).tobytes() == alone.tobytes()


def test_a_model_that_was_not_accelerated_stays_as_it_was(client: Client) -> None:
    plain = picture(client, graph(seed=94))
    client.run(accelerated(seed=94))
    assert picture(client, again(graph(seed=94))).tobytes() == plain.tobytes()


def test_without_a_vae_only_the_vae_output_is_closed(client: Client) -> None:
    assert seen(picture(client, accelerated(vae=False))) == ("red", "circle", "blue")
    prompt = accelerated(vae=False)
    prompt["5"]["inputs"]["vae"] = ["10", 1]
    with pytest.raises(GraphError, match=NO_VAE) as caught:
        client.run(prompt)
    assert str(caught.value).splitlines()[-1].strip() == "in node 5 (VAEDecode)"


def test_a_second_one_and_easycache_are_refused(client: Client) -> None:
    twice = accelerated()
    twice["11"] = {"class_type": "KoalaAccelerate", "inputs": {"model": ["10", 0], **BALANCED}}
    twice["4"]["inputs"]["model"] = ["11", 0]
    with pytest.raises(GraphError, match="this MODEL is already accelerated by KOALA Accelerate"):
        client.run(twice)
    settings = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    for kind in ("EasyCache", "LazyCache"):
        for first, second in (("10", "11"), ("11", "10")):  # the cache behind KOALA Accelerate, and in front of it
            both = accelerated()
            both["11"] = {"class_type": kind, "inputs": settings}
            both[first]["inputs"] = both[first]["inputs"] | {"model": ["1", 0]}
            both[second]["inputs"] = both[second]["inputs"] | {"model": [first, 0]}
            both["4"]["inputs"]["model"] = [second, 0]
            with pytest.raises(GraphError, match=f"this MODEL has {kind} as well as KOALA Accelerate"):
                client.run(both)
