"""Processes that this package starts run its modules, and none that lies where the user happens to be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from traps import set_traps

from micl_zoo.doctor import imported_onnxruntime
from micl_zoo.extraction.processes import child_environment, python

COMMAND = "from micl_zoo.cli import main; main()"


def paths(folder: Path, environment: dict[str, str] | None = None) -> list[str]:
    code = "import sys; print(*sys.path, sep=chr(10))"
    said = subprocess.run(python(code), cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return said.stdout.splitlines()


def test_code_in_the_current_folder_does_not_run(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    images, traps = image_folder(4), tmp_path / "traps"
    sprung = set_traps(traps)
    for number, processes in enumerate(("1", "2")):
        words = ["extract", str(images), "-o", f"out-{number}", "--workers", "2", "--processes", processes]
        words += ["--devices", "cpu", "--shard-rows", "2", "--json"]
        subprocess.run(python(COMMAND, *words), cwd=traps, capture_output=True, check=True, timeout=300)
    assert not sprung.exists(), sprung.read_text()


def test_the_look_at_onnxruntime_runs_no_code_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sprung = set_traps(tmp_path / "traps")
    monkeypatch.chdir(tmp_path / "traps")
    imported_onnxruntime()
    assert not sprung.exists(), sprung.read_text()


def test_a_plain_process_would_have_run_it(tmp_path: Path) -> None:
    sprung = set_traps(tmp_path)
    subprocess.run([sys.executable, "-c", "import mmap"], cwd=tmp_path, check=True, env=child_environment())
    assert "mmap\n" in sprung.read_text()


@pytest.mark.parametrize("given", ["", ".", "src", "{0}/lib", ":{0}/lib", "{0}/lib::.:src"])
def test_of_pythonpath_what_is_absolute_stays(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "src").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", given.format(tmp_path).replace(":", os.pathsep))
    found = paths(tmp_path / "here", child_environment())
    assert not any(Path(one).is_relative_to(tmp_path / "here") or not one for one in found)
    assert (str(tmp_path / "lib") in found) == ("lib" in given)


def test_they_have_the_flags_of_this_interpreter(tmp_path: Path) -> None:
    code = "from micl_zoo.extraction.processes import python; print(python('', flags=['-u']))"
    said = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(flag in said for flag in ("'-E'", "'-s'", "'-u'"))
    assert "'-E'" not in str(python(""))
    assert paths(tmp_path)[0] != ""
