"""The pack as people install it: the registry's zip in a bare ComfyUI, and in the hands of ComfyUI-Manager."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.host.test_hosts import about_us
from tools.harness import pack
from tools.harness.client import Client
from tools.harness.server import Server, running
from tools.harness.testhost import ROOT, Host, requirement_lines

ID = "koala-sdxl"
MANAGER = Path(str(importlib.util.find_spec("comfyui_manager").origin)).parent  # type: ignore[union-attr]
DONE_WITHIN = 60.0  # seconds for a task of Manager's that moves a folder


def test_the_zip_boots_without_a_word_about_it(server: Server, client: Client) -> None:
    installed = server.base / "custom_nodes" / ID
    shipped = {path.name for path in installed.iterdir()}
    assert not shipped & {"tests", "tools", "docs", "dev.py", ".github", ".ci"}
    log = server.log.read_text("utf-8", "replace")
    start = log[: log.index("To see the GUI go to")]
    assert f"custom_nodes/{ID}" in start
    assert about_us(start) == []
    assert sum(name.startswith("Koala") for name in client.object_info()) > 10


def test_manager_is_the_one_that_the_host_names(host: Host) -> None:
    (wanted,) = requirement_lines((host.folder / "manager_requirements.txt").read_text("utf-8"))
    assert wanted.replace("_", "-") == f"comfyui-manager=={version('comfyui-manager')}"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base folder with the pack in it as Manager leaves it, Manager itself offline.

    The registry's list of packs, which Manager otherwise fetches, is in its cache: this pack, as it will be in there.
    """
    installed = pack.install(tmp_path / "custom_nodes")
    files = [path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()]
    (installed / ".tracking").write_text("\n".join(files), "utf-8")
    for name in ("models", "input", "output"):
        (tmp_path / name).mkdir()
    own = tmp_path / "user" / "__manager"
    (own / "cache").mkdir(parents=True)
    (own / "config.ini").write_text("[default]\nnetwork_mode = offline\n", "utf-8")
    listed = {
        "id": ID,
        "name": "KOALA SDXL",
        "repository": "https://github.com/OWNER/koala-sdxl",
        "latest_version": {"version": project_version()},
    }
    (own / "cache" / registry_cache_name()).write_text(json.dumps({"nodes": [listed]}), "utf-8")
    return tmp_path


def project_version() -> str:
    (found,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    return str(found)


def registry_cache_name() -> str:
    """The name under which Manager keeps the registry's list: a hash of its address, which is in Manager's source."""
    (address,) = re.findall(r'^base_url = "(.+)"$', (MANAGER / "common" / "cnr_utils.py").read_text("utf-8"), re.M)
    number = 0
    for letter in f"{address}/nodes":
        number = (number * 31 + ord(letter)) % 2**32
    return f"{number}_nodes.json"


def with_manager(host: Host, base: Path) -> Any:
    return running(host, arguments=["--enable-manager", "--base-directory", str(base)])


def post(server: Server, path: str, body: dict[str, Any] | None = None) -> Any:
    answer = requests.post(server.url + path, json=body, timeout=60)
    answer.raise_for_status()
    return answer.json() if answer.content else None


def listed(server: Server) -> dict[str, Any]:
    """The pack in Manager's list of what is installed."""
    (entry,) = [one for one in Client(server.url).get("/v2/customnode/installed").values() if one["cnr_id"] == ID]
    return dict(entry)


def do(server: Server, kind: str, **parameters: Any) -> None:
    """One task through Manager's queue, to its end."""
    client = Client(server.url)
    # so that Manager has read its cache: it does when the canvas asks which packs failed to import
    assert post(server, "/v2/customnode/import_fail_info_bulk", {"cnr_ids": [ID]}) == {ID: None}
    post(server, "/v2/manager/queue/task", {"ui_id": kind, "client_id": "test", "kind": kind, "params": parameters})
    post(server, "/v2/manager/queue/start")
    deadline = time.monotonic() + DONE_WITHIN
    while not (done := client.get("/v2/manager/queue/history").get("history", {}).get(kind)):
        assert time.monotonic() < deadline, server.last_lines()
        time.sleep(0.1)
    assert done["result"] == "success"


def nodes_of_ours(server: Server) -> set[str]:
    return {name for name in Client(server.url).object_info() if name.startswith("Koala")}


@pytest.mark.slow
@pytest.mark.nightly
def test_manager_lists_disables_and_enables_it(host: Host, base: Path) -> None:
    folder = base / "custom_nodes" / ID
    content = sorted(path.relative_to(folder) for path in folder.rglob("*") if "__pycache__" not in path.parts)
    entry = {"ver": project_version(), "cnr_id": ID, "aux_id": None}
    with with_manager(host, base) as server:
        ours = nodes_of_ours(server)
        assert ours
        assert listed(server) == entry | {"enabled": True}
        elsewhere = Client(server.url).get("/v2/customnode/getmappings", mode="local")
        assert [key for key, (nodes, _) in elsewhere.items() if ours & set(nodes)] == []
        do(server, "disable", node_name=ID, is_unknown=False)
        assert listed(server) == entry | {"enabled": False}
        assert about_us(server.log.read_text("utf-8", "replace").replace(str(base), "")) == []
    assert not folder.exists()
    with with_manager(host, base) as server:
        assert nodes_of_ours(server) == set()
        do(server, "enable", cnr_id=ID)
        assert listed(server) == entry | {"enabled": True}
    with with_manager(host, base) as server:
        assert nodes_of_ours(server) == ours
        assert listed(server) == entry | {"enabled": True}
    assert content == sorted(path.relative_to(folder) for path in folder.rglob("*") if "__pycache__" not in path.parts)
