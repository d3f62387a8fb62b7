"""Talk to a ComfyUI server: HTTP for what is asked once, a WebSocket for what happens while a graph runs."""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import requests
import websocket

Prompt = dict[str, dict[str, Any]]  # node id -> {"class_type", "inputs", ...}: what POST /prompt takes
Event = Callable[[str, dict[str, Any]], None]
PREVIEW_IMAGE, TEXT = 1, 3  # types of binary WebSocket messages, big endian in their first four bytes


class GraphError(Exception):
    """The server refused a graph or a node failed. ``errors`` is what the server said, node by node."""

    def __init__(self, message: str, errors: dict[str, Any]):
        super().__init__(message)
        self.errors = errors


class Interrupted(Exception):
    """The run was cancelled."""


@dataclass(frozen=True)
class Image:
    """An image that a graph left on the server."""

    filename: str
    subfolder: str
    type: str  # "output", "temp" or "input"


@dataclass(frozen=True)
class Result:
    """A finished run: the id of its prompt and, node by node, the ``ui`` output as /history has it."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]

    def images(self, node: str | None = None) -> list[Image]:
        """Images of one output node, or of all of them in the order of the node ids."""
        nodes = [node] if node else sorted(self.outputs)
        found = [image for name in nodes for image in self.outputs[name].get("images", [])]
        return [Image(image["filename"], image["subfolder"], image["type"]) for image in found]

    def text(self, node: str) -> str:
        """The text that a node showed (the ``text`` of its ui output), as one string."""
        return "\n".join(self.outputs[node]["text"])


class Client:
    """A connection to the server at ``url``. Raises ConnectionError where the server is not there any more."""

    def __init__(self, url: str, timeout: float = 600.0):
        """``timeout``: seconds without a word from the server after which a run is given up."""
        self.url = url
        self.timeout = timeout
        self.id = uuid.uuid4().hex
        self.session = requests.Session()

    def get(self, path: str, **parameters: str) -> Any:
        """GET a JSON document, such as "/system_stats"."""
        return self._call("GET", path, params=parameters).json()

    def object_info(self) -> dict[str, Any]:
        """Every node's schema, by class name."""
        info: dict[str, Any] = self.get("/object_info")
        return info

    def history(self, prompt_id: str) -> dict[str, Any]:
        """The record of a finished run: ``prompt``, ``outputs``, ``status``."""
        record: dict[str, Any] = self.get(f"/history/{prompt_id}")[prompt_id]
        return record

    def view(self, image: Image) -> bytes:
        """An image's file as it is on the server, metadata included."""
        return self._call("GET", "/view", params=image.__dict__).content

    def upload(self, name: str, content: bytes) -> str:
        """Put an image into the input folder; returns the name for a LoadImage node."""
        answer = self._call("POST", "/upload/image", files={"image": (name, content)}).json()
        return f"{answer['subfolder']}/{answer['name']}" if answer["subfolder"] else str(answer["name"])

    def interrupt(self) -> None:
        """Cancel what is running."""
        self._call("POST", "/interrupt")

    def free(self) -> None:
        """Let go of every model and of what was computed, as soon as nothing runs."""
        self._call("POST", "/free", json={"unload_models": True, "free_memory": True})

    def run(self, prompt: Prompt, workflow: dict[str, Any] | None = None, on_event: Event | None = None) -> Result:
        """Run a graph to its end.

        ``workflow`` (the canvas form) goes into the PNGs' metadata. ``on_event`` is told every event of this run, as
        (type, data) in the server's own terms: "execution_start", "executing", "progress", "executed" ..., and
        ("preview", {"image": bytes}) for a live preview, ("progress_text", {"node": id, "text": text}) for a text that
        is shown on a node while it runs. Raises GraphError, Interrupted, ConnectionError.
        """
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.id}"
        try:
            socket = websocket.create_connection(address, timeout=self.timeout)
            try:
                prompt_id = self.submit(prompt, workflow)
                self._follow(socket, prompt_id, on_event or (lambda *_: None))
            finally:
                socket.close()
        except websocket.WebSocketException as error:
            raise ConnectionError(f"{self.url}: the connection broke while a graph ran ({error})") from error
        return Result(prompt_id, self.history(prompt_id)["outputs"])

    def submit(self, prompt: Prompt, workflow: dict[str, Any] | None = None) -> str:
        """Queue a graph; returns its id. Raises GraphError if the server finds fault with any node of it."""
        extra = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        body = {"prompt": prompt, "client_id": self.id, "extra_data": extra}
        answer = self._call("POST", "/prompt", json=body, check=False)
        if answer.status_code not in (200, 400):
            raise GraphError(f"The server refused the graph: HTTP {answer.status_code}", {})
        said = answer.json()
        # A graph with two outputs, one of them faulty, is accepted without that one: not what was asked for.
        if said.get("error") or said.get("node_errors"):
            raise GraphError(refusal(said), said.get("node_errors") or {})
        return str(said["prompt_id"])

    def _follow(self, socket: websocket.WebSocket, prompt_id: str, on_event: Event) -> None:
        """Hand on this run's events until its end."""
        while True:
            message = socket.recv()
            if isinstance(message, bytes):
                kind, number = struct.unpack(">II", message[:8])
                if kind == PREVIEW_IMAGE:  # the number is the image's format
                    on_event("preview", {"image": message[8:]})
                elif kind == TEXT:  # the number is the length of the node's id
                    node, text = message[8 : 8 + number], message[8 + number :]
                    on_event("progress_text", {"node": node.decode(), "text": text.decode()})
                continue
            if not message:
                raise ConnectionError(f"{self.url}: the server closed the connection while a graph ran")
            event = json.loads(message)
            kind, data = event["type"], event.get("data") or {}
            if data.get("prompt_id") != prompt_id:
                continue
            on_event(kind, data)
            # The end as far as /history goes; "execution_success" comes before the record is there.
            if kind == "executing" and data["node"] is None:
                return
            if kind == "execution_interrupted":
                raise Interrupted(f"Cancelled in node {data.get('node_id')} ({data.get('node_type')})")
            if kind == "execution_error":
                place = f"node {data.get('node_id')} ({data.get('node_type')})"
                said = f"{data.get('exception_type')}: {str(data.get('exception_message')).strip()}"
                raise GraphError(f"{said}\n  in {place}", {str(data.get("node_id")): data})

    def _call(self, method: str, path: str, check: bool = True, **arguments: Any) -> requests.Response:
        try:
            answer = self.session.request(method, self.url + path, timeout=self.timeout, **arguments)
        except requests.RequestException as error:
            raise ConnectionError(f"{self.url}{path}: {error}") from error
        if check:
            answer.raise_for_status()
        return answer


def refusal(said: dict[str, Any]) -> str:
    """The server's 400 answer in words: its main error, then each node's."""
    main = said.get("error") or {}
    lines = [f"The server refused the graph: {main.get('message', 'some nodes are faulty')}"]
    if main.get("details"):
        lines[0] += f" ({main['details']})"
    for node, found in (said.get("node_errors") or {}).items():
        place = f"node {node} ({found['class_type']})"
        lines += [f"  {place}: {error['message']}: {error['details']}" for error in found["errors"]]
    return "\n".join(lines)
