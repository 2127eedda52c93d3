"""The doctor: what is broken is recognised, with the commands that mend it, and nothing that is broken stops it."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import micl_zoo
from micl_zoo import doctor
from micl_zoo.cli import main
from micl_zoo.doctor import CUDA, ONNX_MODEL, Finding, examine, pip_command

GPU = "NVIDIA Test, 8 GB, 580"
LACKS = "Failed to load library libonnxruntime_providers_cuda.so with error: libcudnn.so.9: cannot open"
MODULE = """
import sys
__version__ = "{version}"
def get_available_providers():
    return {providers}
class InferenceSession:
    def __init__(self, model, providers):
        print("\x1b[1;31m[E:onnxruntime] {said}\x1b[m", file=sys.stderr)
    def get_providers(self):
        return {used}
"""


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver shows none, on a system for which there are wheels for one."""
    monkeypatch.setattr(doctor, "driver_gpus", lambda: ())
    monkeypatch.setattr(doctor, "_has_gpu_wheel", lambda: True)


@pytest.fixture
def gpu(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver shows one."""
    monkeypatch.setattr(doctor, "driver_gpus", lambda: (GPU,))


def install(site: Path, name: str, *providers: str, used: tuple[str, ...] = (), version: str = "1.20.0") -> list[Path]:
    """What pip does: write the files over those that are there, and a RECORD. Returns the module's files."""
    code = MODULE.format(version=version, providers=list(providers), used=list(used or providers), said=LACKS)
    contents = {
        "onnxruntime/__init__.py": code.encode(),
        "onnxruntime/capi/state.so": name.encode(),  # other bytes in each, of other sizes
        "onnxruntime/LICENSE": b"the same in both",
    }
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    lines = [f"{info}/RECORD,,"]
    for path, data in contents.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(data)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(data)}")
    (site / info).mkdir()
    (site / info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (site / info / "RECORD").write_text("\n".join(lines) + "\n")
    return [site / path for path in contents]


def only(site: Path) -> Finding:
    findings = list(doctor.onnxruntime(site))
    assert len(findings) == 1
    return findings[0]


def test_one_sound_distribution(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime", "CPUExecutionProvider")
    found = only(tmp_path)
    assert (found.state, found.commands) == ("ok", ())
    assert f"onnxruntime 1.20.0, imported from {tmp_path / 'onnxruntime' / '__init__.py'}, version 1.20.0" in found.text
    assert "CPUExecutionProvider" in found.text


def test_none(tmp_path: Path) -> None:
    assert only(tmp_path).state == "ok"
    assert "not installed" in only(tmp_path).text


@pytest.mark.parametrize("first", ["onnxruntime", "onnxruntime-gpu"])
def test_two_distributions_and_whose_files_they_are(tmp_path: Path, first: str) -> None:
    last = {"onnxruntime": "onnxruntime-gpu", "onnxruntime-gpu": "onnxruntime"}[first]
    install(tmp_path, first, "First", version="1.20.0")
    install(tmp_path, last, "Last", version="1.20.1")
    found = only(tmp_path)
    assert found.state == "problem"
    assert f"The files are those of {last} 1.20.1; {first} 1.20.0: 2 of its 3 files are not its own" in found.text
    assert "providers Last" in found.text
    assert found.commands == (
        pip_command("uninstall", "-y", "onnxruntime", "onnxruntime-gpu"),
        pip_command("install", "onnxruntime-gpu"),
    )


def test_two_distributions_of_which_none_is_whole(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime", "CPUExecutionProvider")
    install(tmp_path, "onnxruntime-gpu", CUDA)[1].write_bytes(b"of neither")
    assert "The files are mixed; onnxruntime 1.20.0: 2 of its 3" in only(tmp_path).text


def test_where_there_is_no_wheel_for_gpus_the_other_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_has_gpu_wheel", lambda: False)
    install(tmp_path, "onnxruntime-gpu", CUDA)
    install(tmp_path, "onnxruntime", "CPUExecutionProvider")
    assert only(tmp_path).commands[1] == pip_command("install", "onnxruntime")


def test_a_special_package_is_kept(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime", "CPUExecutionProvider")
    install(tmp_path, "onnxruntime-directml", "DmlExecutionProvider")
    assert only(tmp_path).commands[1] == pip_command("install", "onnxruntime-directml")


@pytest.mark.parametrize("left", ["nothing", "a folder", "a file"])
def test_files_that_went_with_the_other_distribution(tmp_path: Path, left: str) -> None:
    files = install(tmp_path, "onnxruntime-gpu", CUDA)
    for file in files[:2] if left == "a file" else files:
        file.unlink()
    if left == "nothing":
        (tmp_path / "onnxruntime" / "capi").rmdir()
        (tmp_path / "onnxruntime").rmdir()
    found = only(tmp_path)
    assert found.state == "problem"
    assert f"{2 if left == 'a file' else 3} of its 3 files are missing (onnxruntime/__init__.py …)" in found.text
    assert "Error: " in found.text  # of the import
    assert found.commands == (pip_command("install", "--force-reinstall", "--no-deps", "onnxruntime-gpu==1.20.0"),)


def test_a_folder_that_no_distribution_owns(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    assert only(tmp_path).state == "problem"
    assert "has no attribute" in only(tmp_path).text
    assert only(tmp_path).commands == (pip_command("install", "onnxruntime-gpu"),)


def test_an_import_that_fails_or_takes_its_process_along(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime", "CPUExecutionProvider")
    for code, text in (
        (b"raise ImportError('libxyz.so is missing')", "ImportError: libxyz.so is missing"),
        (b"import os, sys; print('no such instruction', file=sys.stderr, flush=True); os._exit(7)", "code 7: no such"),
    ):
        _rewrite(tmp_path, "onnxruntime/__init__.py", code)
        found = only(tmp_path)
        assert found.state == "problem"
        assert text in found.text
        assert found.commands == (pip_command("install", "onnxruntime==1.20.0"),)


def _rewrite(site: Path, path: str, data: bytes) -> None:
    """Other bytes, with their line in the RECORD."""
    (site / path).write_bytes(data)
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    record = next(site.glob("*.dist-info/RECORD"))
    lines = [line for line in record.read_text().splitlines() if not line.startswith(path)]
    record.write_text("\n".join([*lines, f"{path},sha256={digest},{len(data)}"]))


def test_the_gpu_package_without_its_provider(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime-gpu", "CPUExecutionProvider")
    found = only(tmp_path)
    assert found.state == "problem"
    assert f"onnxruntime-gpu 1.20.0 has no {CUDA}" in found.text
    assert "--force-reinstall" in found.commands[0]


@pytest.mark.usefixtures("gpu")
def test_a_gpu_and_the_package_for_the_cpu(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime", "CPUExecutionProvider")
    found = only(tmp_path)
    assert found.state == "note"
    assert GPU in found.text
    assert found.commands == (
        pip_command("uninstall", "-y", "onnxruntime"),
        pip_command("install", "onnxruntime-gpu"),
    )


@pytest.mark.usefixtures("gpu")
def test_a_gpu_whose_provider_does_not_load(tmp_path: Path) -> None:
    install(tmp_path / "sound", "onnxruntime-gpu", CUDA, "CPUExecutionProvider")
    assert only(tmp_path / "sound").state == "ok"
    install(tmp_path / "lacks", "onnxruntime-gpu", CUDA, "CPUExecutionProvider", used=("CPUExecutionProvider",))
    found = only(tmp_path / "lacks")
    assert found.state == "problem"
    assert found.text.endswith(LACKS)
    assert found.commands == (pip_command("install", "onnxruntime-gpu[cuda,cudnn]==1.20.0"),)


def test_a_package_that_another_folder_hides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = [tmp_path / "a", tmp_path / "b"]
    install(sites[0], "onnxruntime", "CPUExecutionProvider")
    install(sites[1], "onnxruntime-gpu", CUDA)
    monkeypatch.setattr(sys, "path", [*map(str, sites), *sys.path])
    findings = list(doctor.onnxruntime())
    assert findings[0].state == "ok"
    assert f"onnxruntime-gpu 1.20.0 in {sites[1].resolve()} is hidden by onnxruntime 1.20.0" in findings[1].text


def test_the_model_of_one_operator() -> None:
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load_model_from_string(ONNX_MODEL), full_check=True)
    session = pytest.importorskip("onnxruntime").InferenceSession(ONNX_MODEL, providers=["CPUExecutionProvider"])
    x = torch.tensor([7.0]).numpy()
    assert session.run(None, {"x": x})[0] == x


def test_torch_and_torchvision_of_different_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.6.0+cu126" if name == "torch" else "1.0")
    monkeypatch.setattr("importlib.import_module", fails)
    found = {finding.name: finding for finding in doctor.versions()}
    assert found["torchvision"].state == "problem"
    assert "RuntimeError: operator torchvision::nms does not exist" in found["torchvision"].text
    assert found["torchvision"].commands == doctor.torch_again()
    assert [one for one in found.values() if one.state == "problem"] == [found["torchvision"]]


def test_what_the_package_requires_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["click>=8.1", "absent-one<3,>=2"]
    extras = ['absent-two>=1; extra == "ray"', 'pytest>=8; extra == "dev"', 'micl-zoo[onnx]; extra == "all"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: [*needed, *extras])
    found = {finding.name: finding for finding in doctor.versions()}
    assert found["click"].state == found["torchvision"].state == "ok"
    assert found["absent-one"] == Finding(
        "absent-one", "problem", "not installed", (pip_command("install", "absent-one"),)
    )
    assert not {"absent-two", "pytest", "micl-zoo[onnx]"} & set(found)


def test_without_torch_its_followers_are_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "torch":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imported {name}"))
    assert [one.name for one in doctor.versions() if one.state == "problem"] == ["torch"]


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_torch_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    found = {finding.name: finding for finding in doctor.devices()}
    assert found["cpu"].state == "ok"
    assert found["gpu"].state == "problem"
    assert f"the driver shows {GPU}, but torch was built without CUDA" in found["gpu"].text
    assert found["gpu"].commands[1] == pip_command("install", "torch", "torchvision")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert "built for CUDA 13.0" in next(one.text for one in doctor.devices() if one.name == "gpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert next(one.state for one in doctor.devices() if one.name == "gpu") == "note"


def test_a_hub_that_cannot_be_reached_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked, cache = doctor.hub()
    assert asked.state == "note"
    assert "http://127.0.0.1:1 cannot be reached; only published weights that are not in the cache" in asked.text
    assert (cache.state, "not made yet" in cache.text) == ("ok", True)
    assert "not asked" in next(iter(doctor.hub(offline=True))).text
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in next(iter(doctor.hub())).text


def test_a_disk_that_is_nearly_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOW_DISK", 10**18)
    assert [one.state for one in doctor.disks()] == ["problem", "problem"]


def test_embedded_weights_that_were_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [one.state for one in doctor.embedded_weights()] == ["ok", "ok"]
    monkeypatch.setattr("micl_zoo.zoo.hub.file_sha256", lambda file: "0" * 64)
    weights, onnx = doctor.embedded_weights()
    assert [weights.state, onnx.state] == ["problem", "problem"]
    assert "are not the published ones" in weights.text
    assert "sha256 0000" in onnx.text
    assert len(weights.commands) == len(onnx.commands) == 1


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *words])


def test_the_command_line() -> None:
    result = run("--offline", "--json")
    said: dict[str, Any] = json.loads(result.output)
    states = {finding["name"]: finding["state"] for finding in said["findings"]}
    assert {"micl-zoo", "python", "torch", "timm", "cpu", "onnxruntime", "hub", "cache", "working folder"} <= set(
        states
    )
    assert states["weights of vit_ti16.tin200"] == states["embeddings of vit_ti16.tin200"] == "ok"
    assert said["problems"] == sum(state == "problem" for state in states.values())
    assert result.exit_code == (1 if said["problems"] else 0)


def test_a_section_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Iterator[Finding]:
        yield Finding("cpu", "ok", "2 cores")
        raise ValueError("what is\nthis")

    for section in ("versions", "onnxruntime", "hub", "embedded_weights", "golden_embeddings", "public_embeddings"):
        monkeypatch.setattr(doctor, section, lambda **options: [])
    monkeypatch.setattr(doctor, "devices", fails)
    found = examine(offline=True)
    assert [one.name for one in found.findings] == ["cpu", "devices", "working folder", "cache folder"]
    assert found.findings[1] == Finding("devices", "problem", "could not be examined: ValueError: what is this")
    result = run()
    assert result.exit_code == 1
    assert "devices         problem  could not be examined: ValueError: what is this" in result.output
    assert result.output.endswith("1 problem found.\n")
    monkeypatch.setattr(doctor, "devices", lambda: [Finding("cpu", "note", "slow", ("buy another",))])
    assert (run().exit_code, run().output.splitlines()[1].strip()) == (0, "buy another")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform not in ("linux", "win32"), reason="no wheel of onnxruntime-gpu")
def test_a_real_pair_is_recognised_and_mended(tmp_path: Path) -> None:
    """Needs the package index: 350 MB."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    for name in ("onnxruntime", "onnxruntime-gpu"):
        subprocess.run([python, "-m", "pip", "install", "--no-deps", name], check=True)
    code = (
        "import dataclasses, json, sys\n"
        f"sys.path.append({str(Path(micl_zoo.__file__).parent.parent)!r})\n"
        "from micl_zoo import doctor\n"
        "doctor.driver_gpus = lambda: ()\n"
        "print(json.dumps([dataclasses.asdict(finding) for finding in doctor.onnxruntime()]))"
    )

    def look() -> dict[str, Any]:
        said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
        print(said)
        return dict(json.loads(said)[0])

    found = look()
    assert found["state"] == "problem"
    assert "The files are those of onnxruntime-gpu" in found["text"]
    for command in found["commands"]:
        print(command)
        subprocess.run(command, shell=True, check=True)
    found = look()
    assert (found["state"], found["commands"]) == ("ok", [])
    assert "CPUExecutionProvider" in found["text"]


def test_no_module_of_the_current_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "runpy", "onnxruntime", "base64", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    doctor.imported_onnxruntime()
    assert not (tmp_path / "ran").exists()
