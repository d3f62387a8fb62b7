"""locales/ and the help pages: complete, in step with the live schemas, and served by the real server."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tools.generate.generator import text_faults
from tools.generate.locales import (
    COMMANDS,
    ENGLISH,
    FOLDER,
    MESSAGES,
    PACK,
    TRANSLATIONS,
    Key,
    differences,
    english,
    files,
    leaves,
    lookup,
    own_nodes,
    read,
    update,
)
from tools.harness.client import Client
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT

DOCS = ROOT / "web" / "docs"
NODES = sorted(path.stem for path in DOCS.glob("*.md"))
SCRIPTS = {"ko": "[가-힣]", "zh": "[一-龥]", "ja": "[ぁ-ゖァ-ヺ]"}
SENTENCES = ("description", "tooltip")
FACT = re.compile(r"[\w./-]*(?:[\d_/]|[A-Z][\w-]*[A-Z])[\w./-]*")
"""A number, a file name, a path, or a word such as VAE, LoRA and ComfyUI: the same in every language."""


def facts(text: str) -> set[str]:
    return {found.strip(".-").removesuffix("s") for found in FACT.findall(text)}


def sentences(language: str) -> dict[Key, str]:
    """The descriptions and tooltips of the nodes, by key."""
    return {key: text for key, text in leaves(read(language)).items() if key[-1] in SENTENCES}


def test_english_is_what_the_schemas_say(object_info: dict[str, Any]) -> None:
    """If this fails: `python3 dev.py generate locales`."""
    assert text_faults(files(object_info), (FOLDER / ENGLISH).iterdir()) == []


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_a_translation_has_every_key_and_no_other(language: str, object_info: dict[str, Any]) -> None:
    assert differences(english(object_info), read(language)) == []


def test_every_input_and_output_has_a_name_and_a_tooltip(object_info: dict[str, Any]) -> None:
    """Counted in the schemas by another way than the generator's: by the text of the whole answer."""
    texts = english(object_info)["nodeDefs"]
    assert texts.keys() == own_nodes(object_info).keys() == set(NODES)
    for name, node in own_nodes(object_info).items():
        shown = [entry["tooltip"] for part in ("inputs", "outputs") for entry in texts[name][part].values()]
        known = {line.split(": ", 1)[-1] for text in shown for line in text.split("\n")} | set(shown)
        tooltips = re.findall(r"'tooltip': (?:'([^']*)'|\"([^\"]*)\")", str(node["input"]))
        assert {one or other for one, other in tooltips} | set(node["output_tooltips"]) <= known
        assert all(entry["name"] for entry in texts[name]["inputs"].values())
        assert len(texts[name]["outputs"]) == len(node["output"])


def test_inputs_inside_a_dynamic_combo_have_the_keys_that_the_canvas_looks_up(object_info: dict[str, Any]) -> None:
    inputs = english(object_info)["nodeDefs"]["KoalaCheckpointLoader"]["inputs"]
    assert inputs["source_vae_name"] == {"name": "vae_name", "tooltip": "SDXL's VAE, from models/vae."}
    lines = inputs["source_ckpt_name"]["tooltip"].split("\n")  # two options have it, each with a text of its own
    assert [line.split(":")[0] for line in lines] == ["checkpoint", "U-Net + SDXL checkpoint"]


@pytest.mark.parametrize("language", [ENGLISH, *TRANSLATIONS])
def test_the_host_serves_all_of_it(language: str, client: Client) -> None:
    texts = read(language)
    expected = {**texts.pop("main"), **texts}  # the host puts the parts of main.json beside the other files' names
    assert leaves(expected).items() <= leaves(client.get("/i18n")[language]).items()


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_sentences_are_in_their_language_and_hold_the_facts_of_the_english(language: str) -> None:
    originals, own = sentences(ENGLISH), sentences(language)
    assert own
    for key, text in own.items():
        assert re.search(SCRIPTS[language], text), key
        assert {fact for fact in facts(originals[key]) if fact not in text} == set(), key
        assert text.count("\n") == originals[key].count("\n"), key


@pytest.mark.parametrize("language", [ENGLISH, *TRANSLATIONS])
def test_no_text_holds_what_the_canvas_takes_for_a_placeholder(language: str) -> None:
    """The canvas compiles all but tooltips: {name}, @:link and one | other would be replaced."""
    found = [
        key
        for key, text in leaves(read(language)).items()
        if key[-1] != "tooltip" and MESSAGES not in key and set(text) & set("{}@|")
    ]
    assert found == []


def messages(language: str) -> dict[str, str]:
    """English template -> the same in a language."""
    found: dict[str, str] = read(language)["main"][MESSAGES]
    return found


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_messages_are_in_their_language_and_hold_the_values_and_facts_of_the_english(language: str) -> None:
    placeholder = re.compile(r"\{\w+\}")
    own = messages(language)
    assert own
    for template, text in own.items():
        assert sorted(placeholder.findall(text)) == sorted(placeholder.findall(template)), template
        words = placeholder.sub("", template)
        assert {fact for fact in facts(words) if fact not in text} == set(), template
        if re.search("[a-z]{3}", FACT.sub("", words)):
            assert re.search(SCRIPTS[language].replace("ぁ", "一-龥ぁ"), text), template  # a word may be kanji alone


def test_the_canvas_looks_messages_up_where_they_are() -> None:
    assert f'ENTRY = "{MESSAGES}"' in (ROOT / "web" / "lib" / "words.mjs").read_text("utf-8")


def test_commands_are_those_of_the_canvas_extension() -> None:
    source = (ROOT / "web" / "koala.js").read_text("utf-8")
    assert set(re.findall(r'"(KOALA\.\w+)"', source)) == COMMANDS.keys()
    assert all(f'"{label}"' in source for label in COMMANDS.values())


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_a_command_has_one_label_wherever_it_is_shown(language: str) -> None:
    texts = read(language)
    by_id = {label: texts["commands"][lookup(command)]["label"] for command, label in COMMANDS.items()}
    assert texts["main"]["menuLabels"] == by_id
    assert texts["main"]["contextMenu"].items() <= by_id.items()
    assert not by_id.keys() & set(by_id.values())


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_labels_of_one_node_differ(language: str) -> None:
    for name, node in read(language)["nodeDefs"].items():
        labels = [entry["name"] for entry in node["inputs"].values()]
        assert len(set(labels)) == len(labels), name
        assert node["display_name"].startswith("KOALA ")


def test_the_tool_writes_english_and_says_what_the_others_lack(tmp_path: Path, object_info: dict[str, Any]) -> None:
    assert all("missing" in line for line in update(object_info, tmp_path))  # as there is no translation yet
    for language in TRANSLATIONS:
        shutil.copytree(tmp_path / ENGLISH, tmp_path / language)
    assert update(object_info, tmp_path) == []
    swap(tmp_path / "en" / "commands.json", "Swap U-Net for KOALA", "Swap")
    swap(tmp_path / "ko" / "commands.json", "KOALA_SwapUNet", "KOALA_Swap")
    before = {path: path.read_bytes() for language in TRANSLATIONS for path in (tmp_path / language).iterdir()}
    assert update(object_info, tmp_path) == [
        "en: changed, so look at its translations: commands > KOALA_SwapUNet > label",
        "ko: missing: commands > KOALA_SwapUNet > label",
        "ko: superfluous: commands > KOALA_Swap > label",
    ]
    assert read(ENGLISH, tmp_path) == english(object_info)
    assert {path: path.read_bytes() for path in before} == before


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "ko").mkdir()
    (tmp_path / "ko" / "main.json").write_text('{"nodeCategories": ')
    with pytest.raises(UserError, match=r"main\.json is not JSON"):
        read("ko", tmp_path)


def swap(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


def help_page(node: str, language: str = "") -> Path:
    """Where the canvas looks for a node's page: first in its language, then the English one."""
    return DOCS / node / f"{language}.md" if language else DOCS / f"{node}.md"


def shape(page: str) -> list[str]:
    """Headings, list items and table rows with their columns, in order, without their words."""
    lines = re.findall(r"^(?:#+ | *- |\|.*\|$)", page, re.MULTILINE)
    return [re.sub(r"[^|]", "", line) or line for line in lines]


@pytest.mark.parametrize("language", ["", "ko"])
@pytest.mark.parametrize("node", NODES)
def test_a_help_page_is_served(node: str, language: str, client: Client) -> None:
    path = help_page(node, language)
    answer = client.session.get(f"{client.url}/extensions/{PACK}/docs/{path.relative_to(DOCS).as_posix()}", timeout=60)
    assert answer.status_code == 200
    assert answer.content == path.read_bytes()
    assert "text/html" not in answer.headers["Content-Type"]  # the canvas takes that for a missing page
    title = read(language or ENGLISH)["nodeDefs"][node]["display_name"]
    assert answer.content.decode().startswith(f"# {title}\n")


@pytest.mark.parametrize("node", NODES)
def test_a_korean_help_page_says_what_the_english_one_says(node: str) -> None:
    original, page = help_page(node).read_text("utf-8"), help_page(node, "ko").read_text("utf-8")
    assert shape(page) == shape(original)
    assert re.search(SCRIPTS["ko"], page)
    named = re.findall(r"\*+([^*\n]+)\*+|`([^`]+)`", original)  # inputs, values and other nodes
    kept = facts(original) | {one or other for one, other in named}
    assert {fact for fact in kept if fact not in page} == set()


@pytest.mark.parametrize("node", NODES)
def test_a_korean_help_page_calls_inputs_and_outputs_as_the_node_does(node: str) -> None:
    labels = re.findall(r"\*\*([^*]+)\*\* \(`(\w+)`", help_page(node, "ko").read_text("utf-8"))
    names = {key: text for key, text in leaves(read(ENGLISH)["nodeDefs"][node]).items() if key[-1] == "name"}
    own = leaves(read("ko")["nodeDefs"][node])
    assert labels
    assert set(labels) <= {(own[key], name) for key, name in names.items()}
