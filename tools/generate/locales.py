"""The texts of locales/: English as the nodes' schemas and the sources have it, and what the translations lack.

`python3 dev.py generate locales` asks a server for the schemas, collects the texts that are shown after a run (see
tools/generate/messages.py), writes locales/en, and says what to do about the
translations: which keys are missing, which superfluous, and which English texts changed. It never writes a translation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.generate.generator import Generator, text_faults, write_texts
from tools.generate.messages import templates
from tools.harness import testhost
from tools.harness.client import Client
from tools.harness.errors import UserError
from tools.harness.pack import project_name
from tools.harness.server import running

FOLDER = testhost.ROOT / "locales"
ENGLISH = "en"
TRANSLATIONS = ("ko", "zh", "ja")
PACK = project_name(testhost.ROOT)

SWAP = "Swap U-Net for KOALA"
COMMANDS = {"KOALA.SwapUNet": SWAP, "KOALA.InsertTextToImage": "Insert KOALA text to image"}
"""Id -> English label of what the canvas extension, web/koala.js, adds."""
MESSAGES = "koalaMessages"
"""Key in main.json of what web/lib/words.mjs looks up by its English template."""

Tree = dict[str, Any]
Key = tuple[str, ...]


def own_nodes(info: Mapping[str, Tree]) -> dict[str, Tree]:
    """This pack's part of GET /object_info."""
    return {name: node for name, node in info.items() if node["python_module"] == f"custom_nodes.{PACK}"}


def english(info: Mapping[str, Tree]) -> Tree:
    """Stem of a file in locales/en -> its contents, out of GET /object_info.

    The canvas looks up a command by its id in the toolbox and in the settings, but in its menus by its English label.
    """
    nodes = own_nodes(info)
    return {
        "main": {
            "nodeCategories": {part: part for node in nodes.values() for part in node["category"].split("/")},
            "menuLabels": {lookup(label): label for label in COMMANDS.values()},
            "contextMenu": {SWAP: SWAP},  # of a node
            MESSAGES: {template: template for template in templates()},
        },
        "nodeDefs": {name: node_texts(node) for name, node in nodes.items()},
        "commands": {lookup(command): {"label": label} for command, label in COMMANDS.items()},
    }


def node_texts(node: Tree) -> Tree:
    """What the canvas shows of a node, under the keys that it looks them up by.

    As in ComfyUI's own files, an output that is named after its type has no name here: the canvas takes the type's.
    """
    outputs = zip(node["output_name"], node["output"], node["output_tooltips"], strict=True)
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": inputs(node["input"]),
        "outputs": {
            str(index): {**({"name": name} if name != kind else {}), **tooltip(text)}
            for index, (name, kind, text) in enumerate(outputs)
        },
    }


def inputs(groups: Mapping[str, Any]) -> Tree:
    """Key -> texts of every input, those inside dynamic combos too.

    Two options' inputs of one id have one key, so only one text for both: where theirs differ, it has a line for each.
    """
    texts: dict[Key, dict[str, list[str]]] = {}
    for path, option, text in each_input(groups):
        texts.setdefault(path, {}).setdefault(text, []).append(option)
    return {lookup(".".join(path)): {"name": path[-1], **tooltip(merged(by))} for path, by in texts.items()}


def each_input(groups: Mapping[str, Any], path: Key = (), option: str = "") -> Iterator[tuple[Key, str, str]]:
    """(id and those of the combos around it, the option that it belongs to, tooltip) of each input."""
    for group in ("required", "optional"):
        for name, (_, settings) in groups.get(group, {}).items():
            inner = (*path, name)
            yield inner, option, settings.get("tooltip", "")
            for choice in settings.get("options", []):
                if isinstance(choice, dict):  # of a dynamic combo; a plain one's are its values
                    yield from each_input(choice["inputs"], inner, choice["key"])


def merged(texts: Mapping[str, list[str]]) -> str:
    """One tooltip for the inputs that share a key: tooltip -> the options it belongs to."""
    if len(texts) == 1:
        return next(iter(texts))
    return "\n".join(f"{', '.join(options)}: {text}" for text, options in texts.items())


def tooltip(text: str | None) -> dict[str, str]:
    return {"tooltip": text} if text else {}


def lookup(name: str) -> str:
    """The key for an id; the canvas replaces what would divide it."""
    return name.replace(".", "_")


def leaves(tree: Tree, path: Key = ()) -> dict[Key, str]:
    """Key -> text of every text in the tree."""
    found: dict[Key, str] = {}
    for key, value in tree.items():
        found |= leaves(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return found


def read(language: str, folder: Path = FOLDER) -> Tree:
    """Stem -> contents of every file of a language. Raises UserError where one is not JSON."""
    found: Tree = {}
    for path in sorted((folder / language).glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise UserError(
                f"{path} is not JSON: {error}. The host would leave the whole file out; correct it."
            ) from error
    return found


def as_text(contents: Tree) -> str:
    """A tree as its file holds it."""
    return json.dumps(contents, indent=2, ensure_ascii=False) + "\n"


def differences(texts: Tree, translated: Tree) -> list[str]:
    """A line for each key that the translation lacks or that English does not have."""
    wanted, found = leaves(texts).keys(), leaves(translated).keys()
    missing = [f"missing: {' > '.join(key)}" for key in sorted(wanted - found)]
    return missing + [f"superfluous: {' > '.join(key)}" for key in sorted(found - wanted)]


def update(info: Mapping[str, Tree], folder: Path = FOLDER) -> list[str]:
    """Write the English files; returns what is to be done about the translations, a line for each key."""
    before, texts = leaves(read(ENGLISH, folder)), english(info)
    write_texts(files(info, folder))
    changed = [key for key, text in leaves(texts).items() if before.get(key, text) != text]
    lines = [f"{ENGLISH}: changed, so look at its translations: {' > '.join(key)}" for key in changed]
    return lines + untranslated(info, folder)


def files(info: Mapping[str, Tree], folder: Path = FOLDER) -> dict[Path, str]:
    """The text of each English file."""
    return {folder / ENGLISH / f"{stem}.json": as_text(contents) for stem, contents in english(info).items()}


def untranslated(info: Mapping[str, Tree], folder: Path = FOLDER) -> list[str]:
    """A line for each key that a translation lacks, or has in excess."""
    texts = english(info)
    return [f"{language}: {line}" for language in TRANSLATIONS for line in differences(texts, read(language, folder))]


def schemas() -> dict[str, Tree]:
    """GET /object_info of a server with the pack."""
    with running(testhost.test_host()) as server:
        return Client(server.url).object_info()


def write(_: bool) -> None:
    """Bring locales/en up to date."""
    for line in update(schemas()):
        testhost.say(line)


def check() -> list[str]:
    """A line for each English file that is out of date, and for each text that is still to be translated."""
    info = schemas()
    lines = [f"locales/{line}; to be translated by hand" for line in untranslated(info)]
    return text_faults(files(info), (FOLDER / ENGLISH).glob("*.json")) + lines


GENERATOR = Generator(write, check, needs_server=True)
