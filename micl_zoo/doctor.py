"""What is installed here, and whether it works: every problem comes with the commands that mend it.

A section that cannot be examined is reported, and the others go on. This file imports nothing but the standard library
when it is loaded, as a process of its own loads it by its path, see `imported_onnxruntime`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath, distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from .encoders.zoo import Record

State = Literal["ok", "note", "problem"]

NEEDED = ("torch", "torchvision", "timm", "numpy", "pyarrow", "pillow", "huggingface-hub", "safetensors", "fsspec")
OPTIONAL = (
    *("onnx", "onnxscript", "openvino", "ray", "faiss-cpu", "faiss-gpu", "lancedb", "pandas", "duckdb", "pillow-heif"),
    *("s3fs", "gcsfs", "aiohttp", "matplotlib", "tensorboard"),
)
IMPORTED = ("torch", "torchvision", "timm")  # in this order: each needs those before it
MODULE, GPU_PACKAGE, CUDA = "onnxruntime", "onnxruntime-gpu", "CUDAExecutionProvider"
HASHED_BYTES = 64 << 20  # larger files of ONNX Runtime, its CUDA library of 300 MB, are compared by size alone
LOW_DISK = 10**9  # bytes: less is a problem
CACHE_FILES = 20_000  # of which the size is added up: a second or so
# y = Identity(x) of one float: onnx.ModelProto of IR version 8, opset 13. A test has the onnx package read it.
ONNX_MODEL = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01g'  # IR version; the graph: its node and its name
    b"Z\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"  # its input x, float32 (1,)
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"  # its output y
    b"B\x04\n\x00\x10\r"  # the opset
)


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes:
        name: what was examined.
        state: "ok"; "note", worth knowing; "problem", something here does not work.
        text: what was found.
        commands: that mend it, one after the other, ready for a shell.
    """

    name: str
    state: State
    text: str
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `examine` found."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def problems(self) -> int:
        """How many findings are problems."""
        return sum(finding.state == "problem" for finding in self.findings)

    def table(self, width: int = 120) -> str:
        """For a person: name, state, text, and below it the commands; a last line sums up.

        Args:
            width: characters a line. Commands and paths are not broken.
        """
        names = max((len(finding.name) for finding in self.findings), default=0)
        lines = []
        for finding in self.findings:
            start = f"{finding.name:<{names}}  {finding.state:<7}  "
            lines += textwrap.wrap(
                finding.text,
                max(width, len(start) + 40),
                initial_indent=start,
                subsequent_indent=" " * len(start),
                break_long_words=False,
                break_on_hyphens=False,
            )
            lines += [" " * len(start) + "  " + command for command in finding.commands]
        count = self.problems
        verdict = "No problem found." if not count else f"{count} problem{'s' if count > 1 else ''} found."
        return "\n".join([*lines, "", verdict])


def examine(*, offline: bool = False) -> Report:
    """Look at this installation and this machine. Takes some seconds, most of them to import torch and timm.

    Args:
        offline: do not ask whether the hub can be reached.

    Returns:
        All findings, in order. Nothing that is wrong here raises.
    """
    sections: dict[str, Callable[[], Iterable[Finding]]] = {
        "versions": versions,
        "devices": devices,
        MODULE: onnxruntime,
        "hub": lambda: hub(offline=offline),
        "disk": disks,
        "weights": embedded_weights,
        "embeddings": golden_embeddings,
    }
    findings: list[Finding] = []
    for name, section in sections.items():
        try:
            for finding in section():  # one by one: what comes before an error is kept
                findings.append(finding)  # noqa: PERF402
        except Exception as error:
            findings.append(Finding(name, "problem", f"could not be examined: {_said(error)}"))
    return Report(findings)


def pip_command(*words: str) -> str:
    """A call of this interpreter's own pip, quoted for the shell of this system."""
    return _command(sys.executable, "-m", "pip", *words)


def _command(*words: str) -> str:
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {_short(str(error))}"


def _short(text: str, most: int = 500) -> str:
    text = " ".join(re.sub(r"\x1b\[[\d;]*m", "", text).split())  # without colours
    return text if len(text) <= most else text[:most] + " …"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"


# versions


def versions() -> Iterator[Finding]:
    """Of this package, Python, the system and the packages that matter; those that most often do not import are."""
    from ._version import __version__

    yield Finding("micl-zoo", "ok", f"{__version__}, in {Path(__file__).parent}")
    yield Finding("python", "ok", f"{platform.python_version()}, {sys.executable}")
    yield Finding("platform", "ok", platform.platform())
    broken = _broken_import()
    for name in (*NEEDED, *OPTIONAL):
        try:
            version = importlib.metadata.version(name)
        except PackageNotFoundError:
            if name in NEEDED:
                yield Finding(name, "problem", "not installed", (pip_command("install", name),))
            continue
        yield broken if broken and broken.name == name else Finding(name, "ok", version)


def _broken_import() -> Finding | None:
    """The first of IMPORTED that is installed and cannot be imported."""
    for name in IMPORTED:
        try:
            version = importlib.metadata.version(name)
            importlib.import_module(name)
        except PackageNotFoundError:
            return None
        except Exception as error:
            text = f"{version}, but its import fails: {_said(error)}"
            if name == "timm":
                return Finding(name, "problem", text, (pip_command("install", "--upgrade", name),))
            text += ". torch and torchvision must be of the same release and the same build"
            return Finding(name, "problem", text, torch_again())
    return None


def torch_again() -> tuple[str, ...]:
    """The commands that put a matching torch and torchvision in the place of those that are here."""
    return (
        pip_command("uninstall", "-y", "torch", "torchvision"),
        pip_command("install", "torch", "torchvision"),
    )


# devices


@functools.cache
def driver_gpus() -> tuple[str, ...]:
    """NVIDIA's GPUs as the driver shows them: name, memory, driver, each as one text; none without `nvidia-smi`."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(line.strip() for line in found.stdout.splitlines() if line.strip()) if found.returncode == 0 else ()


def devices() -> Iterator[Finding]:
    """The devices of torch, and a GPU that it does not use."""
    import torch

    from .encoders.device import usable_cores

    cores = f"{usable_cores()} usable cores, torch computes in {torch.get_num_threads()} threads"
    yield Finding("cpu", "ok", f"{cores}; {_bf16(torch.device('cpu'))}")
    shown = driver_gpus()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cuda = torch.cuda.is_available()
    if cuda:
        yield from (_gpu(number) for number in range(torch.cuda.device_count()))
    elif shown:
        yield _unused_gpu(shown, torch.version.cuda, _short(" ".join(str(one.message) for one in said)))
    if torch.backends.mps.is_available():
        yield Finding("mps", "ok", f"Apple's GPU; {_bf16(torch.device('mps'))}")
    elif not cuda and not shown:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no GPU of NVIDIA's"
        yield Finding("gpu", "ok", f"none found, so the CPU is used (torch is built for {built})")


def _bf16(device: torch.device) -> str:
    try:
        from .encoders.device import bf16_is_fast

        return "bf16 is fast" if bf16_is_fast(device) else "bf16 is not fast, fp32 is taken"
    except Exception as error:
        return f"whether bf16 is fast cannot be said ({_said(error)})"


def _gpu(number: int) -> Finding:
    import torch

    device = torch.device("cuda", number)
    name = str(device)
    try:
        found = torch.cuda.get_device_properties(device)
        text = f"{found.name}, {_gigabytes(found.total_memory)}; {_bf16(device)}"
        assert (torch.ones(2, device=device) + 1).sum().item() == 4
    except Exception as error:
        return Finding(name, "problem", f"does not compute: {_said(error)}", torch_again())
    return Finding(name, "ok", text)


def _unused_gpu(shown: Sequence[str], built_for: str | None, said: str) -> Finding:
    """A GPU that the driver shows and torch does not."""
    gpus = f"the driver shows {'; '.join(shown)}, but torch "
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("gpu", "note", f"{gpus}may not use it, as CUDA_VISIBLE_DEVICES hides it")
    if built_for:
        text = f"{gpus}finds none. It was built for CUDA {built_for}: a driver that is older needs an update. {said}"
        return Finding("gpu", "problem", text.rstrip(), ("nvidia-smi",))
    text = f"{gpus}was built without CUDA. Where this brings the same again: https://pytorch.org/get-started/locally/"
    return Finding("gpu", "problem", text, torch_again())


# ONNX Runtime


@dataclass(frozen=True)
class Installed:
    """A distribution that brings the module `onnxruntime`, and what became of its files of it.

    Attributes:
        name, version: of the distribution.
        folder: it is installed in.
        files: of the module, as its RECORD says.
        lost: those that are not there.
        changed: those that have other bytes.
    """

    name: str
    version: str
    folder: Path
    files: int
    lost: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    @property
    def intact(self) -> bool:
        """All of its files are there, and are its own."""
        return not self.lost and not self.changed

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def damage(self) -> str:
        """What became of the files, for a person."""
        counts = ((self.lost, "missing"), (self.changed, "not its own"))
        said = [f"{len(some)} of its {self.files} files are {what} ({some[0]} …)" for some, what in counts if some]
        return " and ".join(said) or f"all of its {self.files} files are its own"


@dataclass(frozen=True)
class Imported:
    """The module `onnxruntime` as a process of its own imported it.

    Attributes:
        file: of the module; None where it is only a folder without code.
        version, providers: as the module says.
        error: why it cannot be used.
        cuda_error: why the CUDA provider cannot be used, where that was tried.
    """

    file: str | None = None
    version: str | None = None
    providers: tuple[str, ...] = ()
    error: str | None = None
    cuda_error: str | None = None

    def __str__(self) -> str:
        return f"imported from {self.file}, version {self.version}, providers {', '.join(self.providers)}"


def onnxruntime(site: Path | None = None) -> Iterator[Finding]:
    """Whether ONNX Runtime is installed once, whole, and with the GPU that is here.

    Args:
        site: a site-packages folder, to look at this one alone and not at the interpreter's.
    """
    every, gpus = installed_onnxruntime(site), driver_gpus()
    here = [one for one in every if one.folder == every[0].folder]
    yield judge(here, imported_onnxruntime(site, cuda=bool(gpus)), gpus)
    for one in every[len(here) :]:
        yield Finding(MODULE, "note", f"{one} in {one.folder} is hidden by {here[0]} in {here[0].folder}")


def installed_onnxruntime(site: Path | None = None) -> list[Installed]:
    """All distributions of the module `onnxruntime`, in the order in which their folders are searched.

    Args:
        site: see `onnxruntime`.
    """
    found: dict[tuple[Path, str], Installed] = {}
    for one in distributions(path=[str(site)]) if site else distributions():
        name = re.sub(r"[-_.]+", "-", one.metadata["Name"] or "").lower()
        if name.startswith((MODULE, "ort-nightly")):
            folder = Path(str(one.locate_file(""))).resolve()
            files = [file for file in one.files or () if file.parts[0] == MODULE and file.hash]
            if files and (folder, name) not in found:  # onnxruntime-genai and others have modules of their own
                found[folder, name] = _compared(one, name, folder, files)
    folders = list(dict.fromkeys(folder for folder, _ in found))
    return sorted(found.values(), key=lambda one: (folders.index(one.folder), one.name))


def _compared(one: Distribution, name: str, folder: Path, files: Sequence[PackagePath]) -> Installed:
    lost = tuple(str(file) for file in files if not (folder / file).is_file())
    changed = tuple(str(file) for file in files if str(file) not in lost and _differs(folder / file, file))
    return Installed(name, one.version, folder, len(files), lost, changed)


def _differs(path: Path, recorded: PackagePath) -> bool:
    """A file has not the size, or not the hash, that its RECORD says."""
    size = path.stat().st_size
    if recorded.size is not None and size != recorded.size:
        return True
    if size > HASHED_BYTES or recorded.hash is None:
        return False
    digest = hashlib.new(recorded.hash.mode, path.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != recorded.hash.value


def imported_onnxruntime(site: Path | None = None, *, cuda: bool = False) -> Imported:
    """Import ONNX Runtime in a process of its own, which it may take along.

    Args:
        site: see `onnxruntime`.
        cuda: also run a model of one operator with the CUDA provider.
    """
    paths = [str(site)] if site else sys.path
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['try_onnxruntime'](*sys.argv[2:])"
    alone = ["-S"] if site else []  # without site-packages
    words = [
        sys.executable,
        *alone,
        "-c",
        code,
        __file__,
        json.dumps(list(filter(None, paths))),
        "cuda" if cuda else "",
    ]
    try:
        run = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=120)
        said: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return Imported(error="its import does not come to an end")
    except (IndexError, ValueError):
        return Imported(error=f"its import ends the process with code {run.returncode}: {_short(run.stderr)}")
    used = said.pop("used", None)
    if used is not None and CUDA not in used:
        said["cuda_error"] = _load_error(run.stderr + run.stdout)
    return Imported(**{**said, "providers": tuple(said["providers"])})


def try_onnxruntime(paths: str, cuda: str = "") -> None:
    """What the process of `imported_onnxruntime` does; prints its fields as JSON.

    Args:
        paths: to search first, a JSON list.
        cuda: not empty: run a model with the CUDA provider, too.
    """
    sys.path[:] = [*json.loads(paths), *filter(None, sys.path)]
    said: dict[str, Any] = {"providers": ()}
    try:
        if cuda and importlib.util.find_spec("torch"):
            importlib.import_module("torch")  # loads the CUDA libraries that it brings
        module = importlib.import_module(MODULE)
        said["file"] = getattr(module, "__file__", None)
        said["version"] = getattr(module, "__version__", None)
        said["providers"] = module.get_available_providers()
        session = module.InferenceSession
        if cuda and CUDA in said["providers"]:
            getattr(module, "preload_dlls", lambda: None)()
            said["used"] = session(ONNX_MODEL, providers=[CUDA]).get_providers()
    except Exception as error:
        said["error"] = _said(error)
    print("\n" + json.dumps(said))


def _load_error(output: str) -> str:
    """What ONNX Runtime says of the library that it lacks."""
    found = re.search(r"Failed to load.*", output) or re.search(r".*error.*", output, re.IGNORECASE)
    return _short(found.group() if found else output)


def judge(found: Sequence[Installed], module: Imported, gpus: Sequence[str] = ()) -> Finding:
    """What is to be said of ONNX Runtime.

    Args:
        found: its distributions in one folder.
        module: what came of its import.
        gpus: see `driver_gpus`.
    """
    if not found:
        return _without_distribution(module)
    if len(found) > 1:
        return _several(found, module)
    one = found[0]
    problem = functools.partial(Finding, MODULE, "problem")
    again = (pip_command("install", "--force-reinstall", "--no-deps", f"{one.name}=={one.version}"),)
    if not one.intact:
        why = "as happens when two packages of the module onnxruntime were installed and one was removed"
        return problem(f"{one}: {one.damage()}, {why}. {_import_text(module)}", again)
    if module.error:
        text = f"{one}: {one.damage()}, but it cannot be used: {module.error}"
        return problem(text, (pip_command("install", f"{one.name}=={one.version}"),))
    if one.name == GPU_PACKAGE and CUDA not in module.providers:
        return problem(f"{one} has no {CUDA}: {module}", again)
    if module.cuda_error:
        tried = "with torch imported and onnxruntime.preload_dlls() called before"
        text = f"{one} cannot use the GPU ({'; '.join(gpus)}), {tried}: {module.cuda_error}"
        return problem(text, (pip_command("install", f"{GPU_PACKAGE}[cuda,cudnn]=={one.version}"),))
    if one.name == MODULE and gpus and _has_gpu_wheel():
        text = f"{one} computes on the CPU only, and there is a GPU ({'; '.join(gpus)}): {module}"
        return Finding(MODULE, "note", text, _replace([one.name], GPU_PACKAGE))
    return Finding(MODULE, "ok", f"{one}, {module}")


def _import_text(module: Imported) -> str:
    return f"It cannot be used: {module.error}" if module.error else f"It is {module}"


def _several(found: Sequence[Installed], module: Imported) -> Finding:
    """Distributions that wrote over each other's files."""
    owners = [one for one in found if one.intact]
    whose = f"The files are those of {owners[0]}" if len(owners) == 1 else "The files are mixed"
    others = "; ".join(f"{one}: {one.damage()}" for one in found if one not in owners[:1])
    text = f"{' and '.join(map(str, found))} are one module, and wrote over each other's files. {whose}; {others}. "
    names = [one.name for one in found]
    return Finding(MODULE, "problem", text + _import_text(module), _replace(names, _best(names)))


def _without_distribution(module: Imported) -> Finding:
    if module.error and module.error.startswith("ModuleNotFoundError: No module named 'onnxruntime'"):
        return Finding(MODULE, "ok", "not installed; only ONNX files need it: pip install 'micl-zoo[onnx]'")
    if not module.error:
        return Finding(MODULE, "note", f"belongs to no package that pip knows; {module}")
    text = f"belongs to no package that pip knows, as the rest of one that was removed, and fails: {module.error}"
    return Finding(MODULE, "problem", text, (pip_command("install", _best([])),))


def _best(names: Sequence[str]) -> str:
    """The one distribution to have: the one of micl-zoo[onnx], if there is not a third that somebody chose."""
    chosen = next((name for name in names if name not in (MODULE, GPU_PACKAGE)), None)
    return chosen or (GPU_PACKAGE if _has_gpu_wheel() else MODULE)


def _has_gpu_wheel() -> bool:
    return sys.platform in ("linux", "win32") and platform.machine() in ("x86_64", "AMD64")


def _replace(names: Sequence[str], best: str) -> tuple[str, ...]:
    return (pip_command("uninstall", "-y", *names), pip_command("install", best))


# the hub, disks, weights


def hub(*, offline: bool = False) -> Iterator[Finding]:
    """Whether it can be reached, and the folder that keeps what came from it.

    Args:
        offline: do not ask.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "note", "HF_HUB_OFFLINE is set, so only what is in the cache is used")
    elif offline:
        yield Finding("hub", "ok", f"{constants.ENDPOINT}, not asked")
    else:
        yield _reached(constants.ENDPOINT)
    cache = Path(constants.HF_HUB_CACHE)
    nearest = _existing(cache)
    held = _held(cache) if nearest == cache else "not made yet"
    try:
        with tempfile.TemporaryFile(dir=nearest):
            yield Finding("cache", "ok", f"{cache}, {held}")
    except OSError as error:
        text = f"{cache}, {held}, cannot be written ({error.strerror}): set HF_HOME to a folder that can"
        yield Finding("cache", "note", text)


def _reached(endpoint: str) -> Finding:
    utils = importlib.import_module("huggingface_hub.utils")
    try:
        status = utils.get_session().head(endpoint, timeout=3).status_code  # with the proxies and certificates of load
    except Exception as error:  # huggingface-hub's, requests' or httpx's own
        only = "only published weights that are not in the cache need it"
        return Finding("hub", "note", f"{endpoint} cannot be reached; {only} ({_said(error)})")
    return Finding("hub", "ok", f"{endpoint} can be reached (it answers {status})")


def _existing(folder: Path) -> Path:
    return next(one for one in (folder, *folder.parents) if one.is_dir())


def _held(folder: Path) -> str:
    """The size of a folder, or of so many of its files that more would take long."""
    every = (Path(where) / name for where, _, names in os.walk(folder) for name in names)
    files = list(itertools.islice(every, CACHE_FILES))
    more = "more than " if len(files) == CACHE_FILES else ""
    return more + _gigabytes(sum(file.lstat().st_size for file in files))


def disks() -> Iterator[Finding]:
    """What is free where stores and runs are written, and where weights from the hub are kept."""
    yield _free("working folder", Path.cwd(), "free some, or work on another disk")
    from huggingface_hub import constants

    yield _free("cache folder", Path(constants.HF_HUB_CACHE), "free some, or set HF_HOME to a folder on another disk")


def _free(name: str, folder: Path, advice: str) -> Finding:
    free = shutil.disk_usage(_existing(folder)).free
    text = f"{_gigabytes(free)} free for {folder}"
    if free < LOW_DISK:
        return Finding(name, "problem", f"only {text}, less than {_gigabytes(LOW_DISK)}: {advice}")
    return Finding(name, "ok", text)


def embedded_weights() -> Iterator[Finding]:
    """Whether the weights and ONNX files that come with the package are the published ones."""
    from .encoders.hub import record_onnx, record_weights
    from .encoders.zoo import RECORDS

    for record in RECORDS.values():
        if record.published and record.embedded:
            yield _embedded(f"weights of {record.name}", record.embedded, lambda of: record_weights(of).sha256, record)
        if record.onnx and record.embedded:
            yield _embedded(f"ONNX of {record.name}", record.onnx.file, lambda of: record_onnx(of)[1], record)


def golden_embeddings() -> Iterator[Finding]:
    """Whether the encoders that come with the package give the published embeddings on this machine."""
    from .encoders.golden import TOLERANCE, golden_difference, golden_file
    from .encoders.load import load
    from .encoders.zoo import RECORDS

    for record in RECORDS.values():
        if record.published and record.embedded:
            encoder = load(record.name)
            name, difference = f"embeddings of {record.name}", golden_difference(encoder, golden_file(record))
            found = f"of 4 generated images on {encoder.device.type}: {difference:.1g} from the published ones at most"
            if difference <= TOLERANCE:
                yield Finding(name, "ok", found)
            else:
                text = f"{found}, where {TOLERANCE:g} is sound: torch does not compute as it should here"
                yield Finding(name, "problem", text, torch_again())


def _embedded(name: str, file: str, sha256: Callable[[Record], str], record: Record) -> Finding:
    try:
        return Finding(name, "ok", f"in the package, sha256 {sha256(record)} as published")
    except Exception as error:
        return Finding(name, "problem", _short(str(error)), _package_again(file))


def _package_again(file: str) -> tuple[str, ...]:
    """The command that brings a file of the package back, from where the package came."""
    try:
        source = json.loads(importlib.metadata.distribution("micl-zoo").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # imported from a checkout
        source = {"dir_info": {"editable": True}}
    if source.get("dir_info", {}).get("editable"):
        return (_command("git", "-C", str(Path(__file__).parent / "embedded"), "checkout", "--", file),)
    prefix = source.get("vcs_info", {}).get("vcs", "")
    url = source.get("url", "micl-zoo")
    return (pip_command("install", "--force-reinstall", "--no-deps", f"{prefix}+{url}" if prefix else url),)
