"""What is installed here, and whether it works: every problem comes with the commands that fix it.

A section that cannot be examined is reported, and the others go on. This file imports nothing but the standard library
at module level, because `imported_onnxruntime` runs it by its path in a process without this package.
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
from importlib.metadata import PackageNotFoundError, PackagePath, distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

    from .encoders.zoo import Record

State = Literal["ok", "note", "problem"]

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
        commands: shell commands that fix it, in order.
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
        """The report for a person: name, state and text, with the commands below, and a verdict in the last line.

        Args:
            width: characters per line. Commands and paths are not broken.
        """
        names = max((len(finding.name) for finding in self.findings), default=0)
        indent, lines = " " * (names + 11), list[str]()
        wrap = functools.partial(textwrap.wrap, break_long_words=False, break_on_hyphens=False)
        for finding in self.findings:
            text = wrap(finding.text, max(width - len(indent), 40)) or [""]
            lines.append(f"{finding.name:<{names}}  {finding.state:<7}  {text[0]}")
            lines += [indent + more for more in [*text[1:], *(f"  {command}" for command in finding.commands)]]
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
            findings.extend(section())  # what comes before an error is kept
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
    """Versions of this package, Python, the system, and the packages that this one requires or can use."""
    from ._version import __version__

    yield Finding("micl-zoo", "ok", f"{__version__}, in {Path(__file__).parent}")
    yield Finding("python", "ok", f"{platform.python_version()}, {sys.executable}")
    yield Finding("platform", "ok", platform.platform())
    version, to_import = "", list(IMPORTED)
    for name, needed in _requirements().items():
        try:
            version = importlib.metadata.version(name)
            if name in to_import:
                importlib.import_module(name)
            yield Finding(name, "ok", version)
        except PackageNotFoundError:
            if needed:
                yield Finding(name, "problem", "not installed", (pip_command("install", name),))
                to_import.clear()
        except Exception as error:
            to_import.clear()  # those behind it fail because of it
            text = f"{version}, but its import fails: {_said(error)}"
            if name == "timm":
                yield Finding(name, "problem", text, (pip_command("install", "--upgrade", name),))
            else:
                text += ". torch and torchvision must be of the same release and the same build"
                yield Finding(name, "problem", text, torch_again())


def _requirements() -> dict[str, bool]:
    """Whether each package that this one names is needed always; those of ONNX Runtime have a section."""
    found = dict.fromkeys(IMPORTED, True)
    try:
        lines = importlib.metadata.requires("micl-zoo") or []
    except PackageNotFoundError:  # imported from a checkout
        lines = []
    for line in lines:
        name = re.split(r"[^\w.-]", line)[0]
        if not name.startswith(("micl-zoo", MODULE)) and not re.search(r"extra == .dev\b", line):
            found[name] = found.get(name, False) or "extra ==" not in line
    return found


def torch_again() -> tuple[str, ...]:
    """The commands that replace torch and torchvision by a matching pair."""
    return _replace(["torch", "torchvision"], "torch", "torchvision")


def _replace(names: Sequence[str], *by: str) -> tuple[str, ...]:
    return (pip_command("uninstall", "-y", *names), pip_command("install", *by))


# devices


@functools.cache
def driver_gpus() -> tuple[str, ...]:
    """NVIDIA's GPUs as the driver shows them, "name, memory, driver" each; none without `nvidia-smi`."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in found.stdout.splitlines() if line.strip())


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
        yield from (_gpu(torch.device("cuda", number)) for number in range(torch.cuda.device_count()))
    elif shown:
        yield _unused_gpu(shown, torch.version.cuda, _short(" ".join(str(one.message) for one in said)))
    if torch.backends.mps.is_available():
        yield Finding("mps", "ok", f"Apple's GPU; {_bf16(torch.device('mps'))}")
    elif not cuda and not shown:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no GPU of NVIDIA's"
        yield Finding("gpu", "ok", f"none found, so the CPU is used (torch is built for {built})")


def _bf16(device: torch.device) -> str:
    from .encoders.device import bf16_is_fast

    return "bf16 is fast" if bf16_is_fast(device) else "bf16 is not fast, fp32 is taken"


def _gpu(device: torch.device) -> Finding:
    import torch

    try:
        found = torch.cuda.get_device_properties(device)
        text = f"{found.name}, {_gigabytes(found.total_memory)}; {_bf16(device)}"
        assert (torch.ones(2, device=device) + 1).sum().item() == 4
    except Exception as error:
        return Finding(str(device), "problem", f"does not compute: {_said(error)}", torch_again())
    return Finding(str(device), "ok", text)


def _unused_gpu(shown: Sequence[str], built_for: str | None, said: str) -> Finding:
    gpus = f"the driver shows {'; '.join(shown)}, but torch "
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("gpu", "note", f"{gpus}may not use it, as CUDA_VISIBLE_DEVICES hides it")
    if built_for:
        text = f"{gpus}finds none. It was built for CUDA {built_for}: a driver that is older needs an update. {said}"
        return Finding("gpu", "problem", text.rstrip(), ("nvidia-smi",))
    text = f"{gpus}was built without CUDA. If this installs the same again: https://pytorch.org/get-started/locally/"
    return Finding("gpu", "problem", text, torch_again())


# ONNX Runtime


class Installed(NamedTuple):
    """A distribution of the module `onnxruntime`.

    Attributes:
        name, version, folder: of the distribution.
        intact: whether all files of the module are there with the bytes that RECORD lists.
        files: the same for a person.
    """

    name: str
    version: str
    folder: Path
    intact: bool
    files: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def onnxruntime(site: Path | None = None) -> Iterator[Finding]:
    """Whether ONNX Runtime is installed once, whole, and with the GPU that is here.

    Args:
        site: a site-packages folder to look at, in place of the interpreter's.
    """
    every, gpus = installed_onnxruntime(site), driver_gpus()
    here = [one for one in every if one.folder == every[0].folder]
    yield judge(here, imported_onnxruntime(site, cuda=bool(gpus)), gpus)
    for one in every[len(here) :]:
        yield Finding(MODULE, "note", f"{one} in {one.folder} is hidden by {here[0]} in {here[0].folder}")


def installed_onnxruntime(site: Path | None = None) -> list[Installed]:
    """All distributions of the module `onnxruntime`, in the order in which their folders are searched."""
    found: dict[tuple[Path, str], Installed] = {}
    for one in distributions(path=[str(site)]) if site else distributions():
        name = re.sub(r"[-_.]+", "-", one.metadata["Name"] or "").lower()
        folder = Path(str(one.locate_file(""))).resolve()
        files = [file for file in one.files or () if file.parts[0] == MODULE and file.hash]
        # onnxruntime-genai and others have modules of their own
        if name.startswith((MODULE, "ort-nightly")) and files and (folder, name) not in found:
            damage = _damage(files)
            text = damage or f"all of its {len(files)} files are its own"
            found[folder, name] = Installed(name, one.version, folder, not damage, text)
    folders = list(dict.fromkeys(folder for folder, _ in found))
    return sorted(found.values(), key=lambda one: (folders.index(one.folder), one.name))


def _damage(files: Sequence[PackagePath]) -> str:
    lost = [file for file in files if not Path(file.locate()).is_file()]
    changed = [file for file in files if file not in lost and _differs(file)]
    counts = ((some, what) for some, what in ((lost, "missing"), (changed, "not its own")) if some)
    return " and ".join(f"{len(some)} of its {len(files)} files are {what} ({some[0]} …)" for some, what in counts)


def _differs(file: PackagePath) -> bool:
    """Whether the file has another size or hash than RECORD says."""
    size = Path(file.locate()).stat().st_size
    if size > HASHED_BYTES or file.hash is None or file.size not in (None, size):
        return file.size not in (None, size)
    digest = hashlib.new(file.hash.mode, file.read_binary()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value


def imported_onnxruntime(site: Path | None = None, *, cuda: bool = False) -> dict[str, Any]:
    """Import ONNX Runtime in a process of its own, which it may take down.

    Args:
        site: see `onnxruntime`.
        cuda: also run a model of one operator with the CUDA provider.

    Returns:
        What `try_onnxruntime` found; `error` if the module cannot be used, `cuda_error` if the provider cannot.
    """
    paths = json.dumps([str(site)] if site else list(filter(None, sys.path)))
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['try_onnxruntime'](*sys.argv[2:])"
    alone = ["-S"] if site else []  # without site-packages
    words = [sys.executable, *alone, "-c", code, __file__, paths, "cuda" if cuda else ""]
    try:
        run = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=120)
        said: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": "its import does not come to an end"}
    except (IndexError, ValueError):
        return {"error": f"its import ends the process with code {run.returncode}: {_short(run.stderr)}"}
    if CUDA not in said.get("used", [CUDA]):
        output = run.stderr + run.stdout
        found = re.search(r"Failed to load.*", output) or re.search(r".*error.*", output, re.IGNORECASE)
        said["cuda_error"] = _short(found.group() if found else output)
    return said


def try_onnxruntime(paths: str, cuda: str = "") -> None:
    """Print as JSON what importing ONNX Runtime gives: file, version, providers, those used with CUDA, or an error.

    Args:
        paths: folders to search first, a JSON list.
        cuda: whether to run a model with the CUDA provider too; empty for no.
    """
    sys.path[:] = [*json.loads(paths), *filter(None, sys.path)]
    said: dict[str, Any] = {}
    try:
        if cuda and importlib.util.find_spec("torch"):
            importlib.import_module("torch")  # loads the CUDA libraries that it brings
        module = importlib.import_module(MODULE)
        said |= {"file": getattr(module, "__file__", None), "version": getattr(module, "__version__", None)}
        said["providers"] = module.get_available_providers()
        session = module.InferenceSession
        if cuda and CUDA in said["providers"]:
            getattr(module, "preload_dlls", lambda: None)()
            said["used"] = session(ONNX_MODEL, providers=[CUDA]).get_providers()
    except Exception as error:
        said["error"] = _said(error)
    print("\n" + json.dumps(said))


def judge(found: Sequence[Installed], module: dict[str, Any], gpus: Sequence[str] = ()) -> Finding:
    """Say what is right or wrong with ONNX Runtime.

    Args:
        found: its distributions in one folder.
        module: see `imported_onnxruntime`.
        gpus: see `driver_gpus`.
    """
    problem, error = functools.partial(Finding, MODULE, "problem"), module.get("error")
    imported = "" if error else "imported from {file}, version {version}, providers ".format(**module)
    imported += ", ".join(module.get("providers", ()))
    outcome = f"It cannot be used: {error}" if error else f"It is {imported}"
    names = [one.name for one in found]
    if not found and error and error.startswith("ModuleNotFoundError: No module named 'onnxruntime'"):
        return Finding(MODULE, "ok", "not installed; only ONNX files need it: pip install 'micl-zoo[onnx]'")
    if not found and not error:
        return Finding(MODULE, "note", f"belongs to no package that pip knows; {imported}")
    if not found:
        text = f"belongs to no package that pip knows, as the rest of one that was removed, and fails: {error}"
        return problem(text, (pip_command("install", _best(names)),))
    if len(found) > 1:
        return problem(f"{_several(found)} {outcome}", _replace(names, _best(names)))
    one = found[0]
    again = (pip_command("install", "--force-reinstall", "--no-deps", f"{one.name}=={one.version}"),)
    if not one.intact:
        why = "as happens when two packages of the module onnxruntime were installed and one was removed"
        return problem(f"{one}: {one.files}, {why}. {outcome}", again)
    if error:
        text = f"{one}: {one.files}, but it cannot be used: {error}"
        return problem(text, (pip_command("install", f"{one.name}=={one.version}"),))
    if one.name == GPU_PACKAGE and CUDA not in module["providers"]:
        return problem(f"{one} has no {CUDA}: {imported}", again)
    if "cuda_error" in module:
        tried = "with torch imported and onnxruntime.preload_dlls() called before"
        text = f"{one} cannot use the GPU ({'; '.join(gpus)}), {tried}: {module['cuda_error']}"
        return problem(text, (pip_command("install", f"{GPU_PACKAGE}[cuda,cudnn]=={one.version}"),))
    if one.name == MODULE and gpus and _has_gpu_wheel():
        text = f"{one} computes on the CPU only, and there is a GPU ({'; '.join(gpus)}): {imported}"
        return Finding(MODULE, "note", text, _replace(names, GPU_PACKAGE))
    return Finding(MODULE, "ok", f"{one}, {imported}")


def _several(found: Sequence[Installed]) -> str:
    """What is wrong with distributions that overwrote each other's files."""
    owners = [one for one in found if one.intact]
    whose = f"The files are those of {owners[0]}" if len(owners) == 1 else "The files are mixed"
    others = "; ".join(f"{one}: {one.files}" for one in found if one not in owners[:1])
    return f"{' and '.join(map(str, found))} are one module and overwrote each other's files. {whose}; {others}."


def _best(names: Sequence[str]) -> str:
    """The one distribution to have: that of micl-zoo[onnx], unless a third was chosen."""
    chosen = next((name for name in names if name not in (MODULE, GPU_PACKAGE)), None)
    return chosen or (GPU_PACKAGE if _has_gpu_wheel() else MODULE)


def _has_gpu_wheel() -> bool:
    return sys.platform in ("linux", "win32") and platform.machine() in ("x86_64", "AMD64")


# the hub, disks, weights


def hub(*, offline: bool = False) -> Iterator[Finding]:
    """Whether the hub can be reached, and the folder that keeps what came from it.

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
        text = f"{cache}, {held}, is not writable ({error.strerror}): set HF_HOME to a folder that is"
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
    """The size of a folder, or of its first CACHE_FILES files."""
    every = (Path(where) / name for where, _, names in os.walk(folder) for name in names)
    files = list(itertools.islice(every, CACHE_FILES))
    more = "more than " if len(files) == CACHE_FILES else ""
    return more + _gigabytes(sum(file.lstat().st_size for file in files))


def disks() -> Iterator[Finding]:
    """The free space where stores and runs are written, and where weights from the hub are kept."""
    from huggingface_hub import constants

    for name, folder, advice in (
        ("working folder", Path.cwd(), "free some, or work on another disk"),
        ("cache folder", Path(constants.HF_HUB_CACHE), "free some, or set HF_HOME to a folder on another disk"),
    ):
        free = shutil.disk_usage(_existing(folder)).free
        text = f"{_gigabytes(free)} free for {folder}"
        if free < LOW_DISK:
            yield Finding(name, "problem", f"only {text}, less than {_gigabytes(LOW_DISK)}: {advice}")
        else:
            yield Finding(name, "ok", text)


def embedded_weights() -> Iterator[Finding]:
    """Whether the weights and ONNX files that come with the package are the published ones."""
    from .encoders.hub import record_onnx, record_weights
    from .encoders.zoo import RECORDS

    for record in RECORDS.values():
        if record.published and record.embedded:
            yield _embedded(f"weights of {record.name}", record.embedded, lambda of: record_weights(of).sha256, record)
        if record.onnx and record.embedded:
            yield _embedded(f"ONNX of {record.name}", record.onnx.file, lambda of: record_onnx(of)[1], record)


def _embedded(name: str, file: str, sha256: Callable[[Record], str], record: Record) -> Finding:
    try:
        return Finding(name, "ok", f"in the package, sha256 {sha256(record)} as published")
    except Exception as error:
        return Finding(name, "problem", _short(str(error)), _package_again(file))


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
                text = f"{found}, more than the {TOLERANCE:g} that is normal: torch computes wrong numbers here"
                yield Finding(name, "problem", text, torch_again())


def _package_again(file: str) -> tuple[str, ...]:
    """The command that restores a file of the package, from where the package came."""
    try:
        source = json.loads(importlib.metadata.distribution("micl-zoo").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # imported from a checkout
        source = {"dir_info": {"editable": True}}
    if source.get("dir_info", {}).get("editable"):
        return (_command("git", "-C", str(Path(__file__).parent / "embedded"), "checkout", "--", file),)
    prefix = source.get("vcs_info", {}).get("vcs", "")
    url = source.get("url", "micl-zoo")
    return (pip_command("install", "--force-reinstall", "--no-deps", f"{prefix}+{url}" if prefix else url),)
