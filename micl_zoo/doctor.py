"""What is installed here, and whether it works: every problem comes with the commands that fix it.

A section that cannot be examined is reported, and the others go on. This file imports nothing but the standard library
at module level, because `imported_onnxruntime` runs it by its path in a process without this package.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import functools
import hashlib
import importlib
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
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from .zoo.ours import Record

IMPORTED = ("torch", "torchvision", "timm")  # in this order: each needs those before it
MODULE, GPU_PACKAGE, CUDA = "onnxruntime", "onnxruntime-gpu", "CUDAExecutionProvider"
LOW_DISK = 10**9  # bytes: less is a problem
# y = Identity(x) of one float: onnx.ModelProto of IR version 8, opset 13. A test has the onnx package read it.
ONNX_MODEL = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01g'  # IR version; the graph: its node and its name
    b"Z\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"  # its input x, float32 (1,)
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"  # its output y
    b"B\x04\n\x00\x10\r"  # the opset
)


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    name: str  # what was examined
    state: Literal["ok", "note", "problem"]  # a note is worth knowing; a problem, that something here does not work
    text: str  # what was found
    commands: tuple[str, ...] = ()  # shell commands that fix it, in order


@dataclass(frozen=True)
class Report:
    """What `examine` found."""

    findings: list[Finding]

    @property
    def problems(self) -> int:
        """How many findings are problems."""
        return sum(finding.state == "problem" for finding in self.findings)

    def table(self) -> str:
        """Return the report for a person; commands and paths are not broken into lines."""
        names = max((len(finding.name) for finding in self.findings), default=0)
        lines, indent = list[str](), " " * (names + 11)
        wrap = functools.partial(textwrap.wrap, width=120, break_long_words=False, break_on_hyphens=False)
        for one in self.findings:
            lines += wrap(f"{one.name:<{names}}  {one.state:<7}  {one.text}", subsequent_indent=indent)
            lines += [f"{indent}  {command}" for command in one.commands]
        verdict = f"{self.problems or 'No'} problem{'s' * (self.problems > 1)} found."
        return "\n".join([*lines, "", verdict])


def examine(*, offline: bool = False) -> Report:
    """Examine this installation and this machine in a few seconds; nothing that is wrong here raises."""
    sections: dict[str, Callable[[], Iterable[Finding]]] = {
        "versions": versions,
        "devices": devices,
        MODULE: onnxruntime,
        "hub": lambda: hub(offline=offline),
        "disk": disks,
        "weights": embedded_weights,
        "embeddings": golden_embeddings,
        "public encoders": public_embeddings,
    }
    from .telemetry import no_telemetry

    no_telemetry()
    findings: list[Finding] = []
    for name, section in sections.items():
        try:
            findings.extend(section())  # what comes before an error is kept
        except Exception as error:
            findings.append(Finding(name, "problem", f"could not be examined: {_said(error)}"))
    return Report(findings)


def _command(*words: str) -> str:
    """A command, quoted for the shell of this system."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


pip_command = functools.partial(_command, sys.executable, "-m", "pip")  # this interpreter's own pip


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {_short(str(error))}"


def _short(text: str) -> str:
    return textwrap.shorten(re.sub(r"\x1b\[[\d;]*m", "", text), 500, placeholder=" …")  # without colours


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"


def versions() -> Iterator[Finding]:
    """Versions of this package, Python, the system, and the packages that this one requires or can use."""
    from ._version import __version__

    yield Finding("micl-zoo", "ok", f"{__version__}, in {Path(__file__).parent}")
    yield Finding("python", "ok", f"{platform.python_version()}, {sys.executable}")
    yield Finding("platform", "ok", platform.platform())
    version, to_import = "", list(IMPORTED)
    for name, needed in _requirements().items():
        try:
            version = metadata.version(name)
            if name in to_import:
                importlib.import_module(name)
            yield Finding(name, "ok", version)
        except metadata.PackageNotFoundError:
            if needed:
                yield Finding(name, "problem", "not installed", (pip_command("install", name),))
                to_import.clear()
        except Exception as error:
            to_import.clear()  # those behind it fail because of it
            text = f"{version}, but its import fails: {_said(error)}"
            same, fix = ". torch and torchvision must be of the same release and the same build", torch_again()
            if name == "timm":
                same, fix = "", (pip_command("install", "--upgrade", name),)
            yield Finding(name, "problem", text + same, fix)


def _requirements() -> dict[str, bool]:
    """Whether each package that this one names is needed always; those of ONNX Runtime have a section."""
    found = dict.fromkeys(IMPORTED, True)
    with contextlib.suppress(metadata.PackageNotFoundError):  # imported from a checkout
        for line in metadata.requires("micl-zoo") or ():
            name = re.split(r"[^\w.-]", line)[0]
            if not name.startswith(("micl-zoo", MODULE)) and not re.search(r"extra == .dev\b", line):
                found[name] = found.get(name, False) or "extra ==" not in line
    return found


def torch_again() -> tuple[str, ...]:
    """The commands that replace torch and torchvision by a matching pair."""
    return _replace(["torch", "torchvision"], "torch", "torchvision")


def _replace(names: Sequence[str], *by: str) -> tuple[str, ...]:
    return (pip_command("uninstall", "-y", *names), pip_command("install", *by))


@functools.cache
def driver_gpus() -> tuple[str, ...]:
    """NVIDIA's GPUs as the driver shows them, "name, memory, driver" each; none without `nvidia-smi`."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(filter(None, map(str.strip, found.splitlines())))


def devices() -> Iterator[Finding]:
    """The devices of torch, and a GPU that it does not use."""
    import torch

    from .encoders.device import bf16_is_fast, usable_cores

    def bf16(device: str) -> str:
        return "bf16 is fast" if bf16_is_fast(torch.device(device)) else "bf16 is not fast, fp32 is taken"

    cores = f"{usable_cores()} usable cores, torch computes in {torch.get_num_threads()} threads"
    yield Finding("cpu", "ok", f"{cores}; {bf16('cpu')}")
    shown = driver_gpus()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cuda = torch.cuda.is_available()
    for name in [f"cuda:{number}" for number in range(torch.cuda.device_count())] if cuda else []:
        try:
            found = torch.cuda.get_device_properties(name)
            assert (torch.ones(2, device=name) + 1).sum().item() == 4
            yield Finding(name, "ok", f"{found.name}, {_gigabytes(found.total_memory)}; {bf16(name)}")
        except Exception as error:
            yield Finding(name, "problem", f"does not compute: {_said(error)}", torch_again())
    if shown and not cuda:
        yield _unused_gpu(shown, torch.version.cuda, _short(" ".join(str(one.message) for one in said)))
    if torch.backends.mps.is_available():
        yield Finding("mps", "ok", f"Apple's GPU; {bf16('mps')}")
    elif not cuda and not shown:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no GPU of NVIDIA's"
        yield Finding("gpu", "ok", f"none found, so the CPU is used (torch is built for {built})")


def _unused_gpu(shown: Sequence[str], built_for: str | None, said: str) -> Finding:
    gpus = f"the driver shows {'; '.join(shown)}, but torch"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("gpu", "note", f"{gpus} may not use it, as CUDA_VISIBLE_DEVICES hides it")
    if built_for:
        why = f"finds none. It was built for CUDA {built_for}: a driver that is older needs an update. {said}".rstrip()
        return Finding("gpu", "problem", f"{gpus} {why}", ("nvidia-smi",))
    why = "was built without CUDA. If this installs the same again: https://pytorch.org/get-started/locally/"
    return Finding("gpu", "problem", f"{gpus} {why}", torch_again())


class Installed(NamedTuple):
    """A distribution of the module `onnxruntime`."""

    name: str
    version: str
    folder: Path  # site-packages
    intact: bool  # all files of the module are there as its RECORD lists them
    files: str  # the same for a person

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def onnxruntime(site: Path | None = None) -> Iterator[Finding]:  # site: a site-packages folder, not the interpreter's
    """Whether ONNX Runtime is installed once, whole, and with the GPU that is here."""
    every, gpus = installed_onnxruntime(site), driver_gpus()
    here = sorted(one for one in every if one.folder == every[0].folder)
    yield judge(here, imported_onnxruntime(site, cuda=bool(gpus)), gpus)
    for one in every[len(here) :]:
        yield Finding(MODULE, "note", f"{one} in {one.folder} is hidden by {here[0]} in {here[0].folder}")


def installed_onnxruntime(site: Path | None = None) -> list[Installed]:
    """All distributions of the module `onnxruntime`, in the order in which their folders are searched."""
    found: dict[tuple[Path, str], Installed] = {}
    for one in metadata.distributions(path=[str(site)]) if site else metadata.distributions():
        name = re.sub(r"[-_.]+", "-", one.metadata["Name"] or "").lower()
        if name.startswith((MODULE, "ort-nightly")):
            folder = Path(str(one.locate_file(""))).resolve()
            # RECORD itself: from Python 3.12 on, Distribution.files leaves out what is missing
            rows = csv.reader((one.read_text("RECORD") or "").splitlines())  # path, "sha256=…" in base64, size
            files = {row[0]: row[1] for row in rows if row and row[0].startswith(f"{MODULE}/") and row[1]}
            if files:  # onnxruntime-genai and others have modules of their own
                damage = _damage(folder, files)
                text = damage or f"all of its {len(files)} files are its own"
                found.setdefault((folder, name), Installed(name, one.version, folder, not damage, text))
    return list(found.values())


def _damage(folder: Path, files: dict[str, str]) -> str:
    def is_own(path: str) -> bool:
        mode, _, value = files[path].partition("=")
        digest = hashlib.new(mode, (folder / path).read_bytes()).digest()
        return base64.urlsafe_b64encode(digest).decode().rstrip("=") == value

    lost = [path for path in files if not (folder / path).is_file()]
    changed = [path for path in files if path not in lost and not is_own(path)]
    counts = ((some, what) for some, what in ((lost, "missing"), (changed, "not its own")) if some)
    return " and ".join(f"{len(some)} of its {len(files)} files are {what} ({some[0]} …)" for some, what in counts)


def imported_onnxruntime(site: Path | None = None, *, cuda: bool = False) -> dict[str, Any]:
    """What `try_onnxruntime` prints in a process of its own, which it may take down, and why the provider fails."""
    from .extraction.processes import child_environment, python  # here: the process runs this file by itself

    paths = json.dumps([str(site)] if site else list(filter(None, sys.path)))
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['try_onnxruntime'](*sys.argv[2:])"
    words = python(code, __file__, paths, "cuda" * cuda, flags=["-S"] * bool(site))  # -S: no site-packages
    how: dict[str, Any] = {"env": child_environment(), "capture_output": True, "text": True, "errors": "replace"}
    try:
        run = subprocess.run(words, timeout=120, **how)
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
    """Print as JSON what importing ONNX Runtime from `paths`, a JSON list, gives; with `cuda`, run a model on it."""
    sys.path[:] = [*json.loads(paths), *filter(None, sys.path)]
    said: dict[str, Any] = {}
    try:
        if cuda:
            with contextlib.suppress(ImportError):
                importlib.import_module("torch")  # loads the CUDA libraries that it brings
        module = importlib.import_module(MODULE)
        providers, session = module.get_available_providers(), module.InferenceSession
        where = f"imported from {module.__file__}, version {module.__version__}"
        said["imported"] = f"{where}, providers {', '.join(providers)}"
        if cuda and CUDA in providers:
            getattr(module, "preload_dlls", lambda: None)()
            said["used"] = session(ONNX_MODEL, providers=[CUDA]).get_providers()
    except Exception as error:
        said["error"] = _said(error)
    print("\n" + json.dumps(said))


def judge(found: Sequence[Installed], module: dict[str, Any], gpus: Sequence[str] = ()) -> Finding:
    """Say what is right or wrong with ONNX Runtime, from its distributions in one folder and what the import gave."""
    problem, error = functools.partial(Finding, MODULE, "problem"), str(module.get("error", ""))
    imported, names = module.get("imported"), [one.name for one in found]
    wheel = GPU_PACKAGE if _has_gpu_wheel() else MODULE  # the one that micl-zoo[onnx] takes
    best = next((name for name in names if name not in (MODULE, GPU_PACKAGE)), wheel)  # a third was chosen
    outcome = f"It cannot be used: {error}" if error else f"It is {imported}"
    if not found and not error:
        return Finding(MODULE, "note", f"belongs to no package that pip knows; {imported}")
    if not found and error.startswith("ModuleNotFoundError: No module named 'onnxruntime'"):
        return Finding(MODULE, "ok", "not installed; only ONNX files need it: pip install 'micl-zoo[onnx]'")
    if not found:
        text = f"belongs to no package that pip knows, as the rest of one that was removed, and fails: {error}"
        return problem(text, (pip_command("install", best),))
    if len(found) > 1:
        owners = [one for one in found if one.intact]
        whose = f"The files are those of {owners[0]}" if len(owners) == 1 else "The files are mixed"
        others = "; ".join(f"{one}: {one.files}" for one in found if one not in owners[:1])
        both = f"{' and '.join(map(str, found))} are one module and overwrote each other's files"
        return problem(f"{both}. {whose}; {others}. {outcome}", _replace(names, best))
    (one,), exact = found, f"{names[0]}=={found[0].version}"
    again = (pip_command("install", "--force-reinstall", "--no-deps", exact),)
    if not one.intact:
        why = "as happens when two packages of the module onnxruntime were installed and one was removed"
        return problem(f"{one}: {one.files}, {why}. {outcome}", again)
    if error:
        return problem(f"{one}: {one.files}, but it cannot be used: {error}", (pip_command("install", exact),))
    if one.name == GPU_PACKAGE and CUDA not in module["imported"]:
        return problem(f"{one} has no {CUDA}: {imported}", again)
    if "cuda_error" in module:
        tried = "with torch imported and onnxruntime.preload_dlls() called before"
        text = f"{one} cannot use the GPU ({'; '.join(gpus)}), {tried}: {module['cuda_error']}"
        return problem(text, (pip_command("install", f"{GPU_PACKAGE}[cuda,cudnn]=={one.version}"),))
    if one.name == MODULE and gpus and wheel == GPU_PACKAGE:
        text = f"{one} computes on the CPU only, and there is a GPU ({'; '.join(gpus)}): {imported}"
        return Finding(MODULE, "note", text, _replace(names, GPU_PACKAGE))
    return Finding(MODULE, "ok", f"{one}, {imported}")


def _has_gpu_wheel() -> bool:
    return sys.platform in ("linux", "win32") and platform.machine() in ("x86_64", "AMD64")


def hub(*, offline: bool = False) -> Iterator[Finding]:
    """Whether the hub can be reached (`offline`: is not asked), and the folder that keeps what came from it."""
    from huggingface_hub import constants, scan_cache_dir

    endpoint, cache = constants.ENDPOINT, Path(constants.HF_HUB_CACHE)
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "note", "HF_HUB_OFFLINE is set, so only what is in the cache is used")
    elif offline:
        yield Finding("hub", "ok", f"{endpoint}, not asked")
    else:
        try:
            session = importlib.import_module("huggingface_hub.utils").get_session()  # with the proxies of load
            status = session.head(endpoint, timeout=3).status_code
            yield Finding("hub", "ok", f"{endpoint} can be reached (it answers {status})")
        except Exception as error:  # huggingface-hub's, requests' or httpx's own
            only = "only published weights that are not in the cache need it"
            yield Finding("hub", "note", f"{endpoint} cannot be reached; {only} ({_said(error)})")
    try:
        with tempfile.TemporaryFile(dir=_existing(cache)):
            held = _gigabytes(scan_cache_dir(cache).size_on_disk) if cache.is_dir() else "not made yet"
            yield Finding("cache", "ok", f"{cache}, {held}")
    except OSError as error:
        yield Finding("cache", "note", f"{cache} is not writable ({error.strerror}): set HF_HOME to a folder that is")


def _existing(folder: Path) -> Path:
    return next(one for one in (folder, *folder.parents) if one.is_dir())


def disks() -> Iterator[Finding]:
    """The free space where stores and runs are written, and where weights from the hub are kept."""
    from huggingface_hub import constants

    for name, folder, advice in (
        ("working folder", Path.cwd(), "free some, or work on another disk"),
        ("cache folder", Path(constants.HF_HUB_CACHE), "free some, or set HF_HOME to a folder on another disk"),
    ):
        free = shutil.disk_usage(_existing(folder)).free
        text = f"{_gigabytes(free)} free for {folder}"
        low = f"only {text}, less than {_gigabytes(LOW_DISK)}: {advice}"
        yield Finding(name, "problem", low) if free < LOW_DISK else Finding(name, "ok", text)


def embedded_weights() -> Iterator[Finding]:
    """Whether the weights and ONNX files that come with the package are the published ones."""
    from .zoo.hub import record_onnx, record_weights

    for record in _embedded():
        onnx = record.onnx.file if record.onnx else None
        for what, file, check in (("weights", record.embedded, record_weights), ("ONNX", onnx, record_onnx)):
            try:
                if file:
                    check(record)
                    yield Finding(f"{what} of {record.name}", "ok", "in the package, its sha256 as published")
            except Exception as error:
                yield Finding(f"{what} of {record.name}", "problem", _said(error), _package_again(str(file)))


def golden_embeddings() -> Iterator[Finding]:
    """Whether the encoders that come with the package give the published embeddings on this machine."""
    from .encoders.golden import golden_file

    for record in _embedded():
        yield _compared(record.name, record.name, golden_file(record))


def public_embeddings() -> Iterator[Finding]:
    """Whether other people's encoders in the cache give the embeddings in their golden files; none is fetched."""
    from .encoders.golden import golden_file, read_golden
    from .errors import WeightsError
    from .zoo.names import hub_of
    from .zoo.pins import is_here
    from .zoo.public import PUBLIC, is_cached

    for row in filter(is_cached, PUBLIC.values()):
        name = f"embeddings of {row.name}"
        try:
            file = golden_file(row)
        except WeightsError:
            text = f"in the cache; nobody has noted yet what it must give: `micl-zoo golden {row.name}` does"
            yield Finding(name, "note", text)
            continue
        source = read_golden(file).source
        repo, commit = hub_of(source)
        if source and repo and commit and is_here(repo, commit):
            yield _compared(row.name, source, file)
        else:
            yield Finding(
                name, "note", f"not compared: the embeddings of commit {commit} are known, the cache has another"
            )


def _compared(name: str, source: str, file: Path) -> Finding:
    from .encoders.golden import TOLERANCE, golden_difference
    from .encoders.load import load

    encoder = load(source)
    difference = golden_difference(encoder, file)
    found = f"of 4 generated images on {encoder.device.type}: {difference:.1g} from the published ones at most"
    if difference <= TOLERANCE:
        return Finding(f"embeddings of {name}", "ok", found)
    text = f"{found}, more than the {TOLERANCE:g} that is normal: torch does not compute as it should here"
    return Finding(f"embeddings of {name}", "problem", text, torch_again())


def _embedded() -> list[Record]:
    from .zoo.ours import RECORDS

    return [record for record in RECORDS.values() if record.published and record.embedded]


def _package_again(file: str) -> tuple[str, ...]:
    """The command that restores a file of the package, from where the package came."""
    try:
        source = json.loads(metadata.distribution("micl-zoo").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:  # imported from a checkout
        source = {"dir_info": {"editable": True}}
    if source.get("dir_info", {}).get("editable"):
        return (_command("git", "-C", str(Path(__file__).parent / "embedded"), "checkout", "--", file),)
    prefix = f"{source['vcs_info']['vcs']}+" if "vcs_info" in source else ""
    return (pip_command("install", "--force-reinstall", "--no-deps", prefix + source.get("url", "micl-zoo")),)
