"""Nothing is sent that was not asked for, and nothing is written outside of outputs and named caches.

Each command runs where every request by HTTP goes to a proxy of this test, whatever library makes it; where Python's
sockets note whom they speak to, in children too; and where the home folder is empty.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import TWIN

from micl_zoo.telemetry import OFF, no_telemetry

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="watches the home folder as POSIX has it")

# A child's sitecustomize: sockets to other places than this machine are noted.
WATCH = """
import os, sys
LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0", os.uname().nodename if hasattr(os, "uname") else "127.")
def watch(event, words):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        place = words[0] if event == "socket.getaddrinfo" else words[1]
        host = place[0] if isinstance(place, tuple) else place
        if not isinstance(place, (str, bytes)) or event == "socket.getaddrinfo":  # else the path of a local socket
            if host and not str(host).startswith(LOOPBACK):
                with open(os.environ["WATCH_LOG"], "a") as log:
                    log.write(f"{event} {place}\\n")
sys.addaudithook(watch)
"""
CACHES = {  # of packages, below the home folder
    ".cache/matplotlib",
    ".cache/fontconfig",
    ".config/matplotlib",
    ".cache/huggingface",
    ".triton",
    ".nv",
}
LOADS = """
import sys, time
import micl_zoo
from PIL import Image
for backend in sys.argv[1].split(","):
    micl_zoo.load(backend=backend, device="cpu").embed([Image.new("RGB", (64, 64))])
time.sleep(float(sys.argv[2]))  # ONNX Runtime sends what it has every few seconds, and at the end
"""
COMMANDS = """
import shlex, sys
from micl_zoo.cli import main
for line in sys.argv[1:]:
    assert not main.main(shlex.split(line), standalone_mode=False), line
"""


class Watched:
    """A folder where commands run and are watched."""

    def __init__(self, folder: Path, proxy: socket.socket) -> None:
        self.folder, self.home, self.log, self.requests = folder, folder / "home", folder / "log", list[bytes]()
        for made in (self.home, folder / "work", folder / "tmp", folder / "site"):
            made.mkdir()
        (folder / "site" / "sitecustomize.py").write_text(WATCH)
        url, path = f"http://127.0.0.1:{proxy.getsockname()[1]}", os.environ.get("PYTHONPATH")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "HF_", "MPL"))}
        self.environment = {name: value for name, value in kept.items() if name not in {"CI", "TF_BUILD", *OFF}}
        self.environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), url)
        self.environment |= {"HOME": str(self.home), "TMPDIR": str(folder / "tmp"), "WATCH_LOG": str(self.log)}
        self.environment |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder / "site"), path]))}
        threading.Thread(target=self._answer, args=[proxy], daemon=True).start()

    def _answer(self, proxy: socket.socket) -> None:
        while True:
            try:
                with proxy.accept()[0] as asked:
                    self.requests.append(asked.recv(200))
            except OSError:  # the test is over
                return

    def run(self, *words: str) -> None:
        """Run Python with these words, and look what it left."""
        done = subprocess.run(
            [sys.executable, *words],
            env=self.environment,
            cwd=self.folder / "work",
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert not self.requests
        assert not self.log.exists(), self.log.read_text()
        written = {path.relative_to(self.home).as_posix() for path in self.home.rglob("*") if path.is_file()}
        strange = {path for path in written if not path.startswith(tuple(f"{name}/" for name in CACHES))}
        assert not strange

    def commands(self, *lines: str) -> None:
        """Run commands of micl-zoo, in one process, as to import torch takes seconds."""
        self.run("-c", COMMANDS, *lines)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        yield Watched(tmp_path, proxy)


def test_the_watch_sees_requests_of_this_process_and_of_its_children(watched: Watched) -> None:
    ask = "import urllib.request as r; r.urlopen('http://192.0.2.1/x')"
    with pytest.raises(AssertionError, match=r"RemoteDisconnected|reset"):
        watched.run("-c", ask)
    assert watched.requests[0].startswith(b"GET http://192.0.2.1/x")
    child = "import socket, subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    watched.requests.clear()
    with pytest.raises(AssertionError, match=r"socket.sendto \('192\.0\.2\.1', 9\)"):
        watched.run("-c", child, "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 9))")
    watched.log.unlink()
    with pytest.raises(AssertionError, match="intel/id"):
        watched.run("-c", "import pathlib; p = pathlib.Path.home() / 'intel'; p.mkdir(); (p / 'id').touch()")


def test_loading_sends_nothing(watched: Watched) -> None:
    modules = {"torch": "torch", "onnx": "onnxruntime", "openvino": "openvino"}
    watched.run("-c", LOADS, ",".join(name for name, module in modules.items() if find_spec(module)), "0")


@pytest.mark.slow
def test_onnx_runtime_sends_nothing_later_either(watched: Watched) -> None:
    pytest.importorskip("onnxruntime")
    watched.run("-c", LOADS, "onnx", "15")


def test_extract_search_and_doctor_send_nothing(watched: Watched, image_folder: Callable[..., Path]) -> None:
    images = image_folder(4)
    extract = f"extract {images} -o out --devices cpu --workers 1"
    watched.commands(extract, f"search out {images}/000.jpg --device cpu", "doctor --offline")
    assert [path.name for path in (watched.folder / "work").iterdir()] == ["out"]


@pytest.mark.slow
def test_train_and_export_send_nothing(watched: Watched, image_folder: Callable[..., Path]) -> None:
    images, changes = image_folder(16), " ".join(f"--set {change}" for change in TWIN)
    lines = [f"train vit_ti16.tin200 --data {images} --out run --device cpu --max-steps 3 {changes}", "report run"]
    if all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        lines += ["export run -o onnx", f"extract {images} -o out --weights onnx/model.onnx"]
    watched.commands(*lines)
    assert {path.name for path in (watched.folder / "work").iterdir()} <= {"run", "onnx", "out"}


def test_what_a_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OFF:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    no_telemetry()
    assert {name: os.environ[name] for name in OFF} == {**OFF, "RAY_USAGE_STATS_ENABLED": "1"}
