"""One repository of the hub at one commit: what it held then, noted for later, and its files, checked at every use."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import re
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import UsageError, WeightsError
from ..files import atomic_path, file_sha256, read_regular
from ..schema import Between, read, read_json, shown
from ..telemetry import no_telemetry
from .weights import CONFIG_FILE, CONVERSION, PICKLES, WEIGHTS_FILE

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

PREFIXES = ("hf-hub:", "hf_hub:")  # timm takes both
MAIN = "main"
COMMIT = re.compile("[0-9a-f]{40}")
SHA256 = re.compile("[0-9a-f]{64}")
MOST_FILES, LONGEST_NAME = 10_000, 400  # of a repository; those of encoders have tens of files, with short names
SHARDS = f"{WEIGHTS_FILE}.index.json"
OPEN_CLIP = "open_clip_model.safetensors"  # both towers, under open_clip's names
FULL_DISK = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
BUSY = (408, 429)  # the hub answers, and would say something else later

logger = getLogger(__name__)


@dataclass(frozen=True)
class PinnedFile:
    """What a file of a repository must be."""

    bytes: Annotated[int, Between(0)] | None
    sha256: str | None  # of large files (LFS, Xet)
    git_oid: str | None = None  # git's own sha1, of the others

    def __post_init__(self) -> None:
        for name, pattern in (("sha256", SHA256), ("git_oid", COMMIT)):
            if (found := getattr(self, name)) is not None and not pattern.fullmatch(found):
                raise ValueError(f"{name} is {shown(found)}")

    def wrong(self, file: Path) -> str:
        """Say how a file differs from this one; "" where it does not."""
        size = file.stat().st_size
        if self.bytes not in (None, size):
            return f"{size:,} bytes, expected {self.bytes:,}"
        if self.sha256 is not None:
            found, expected, what = file_sha256(file), self.sha256, "sha256"
        else:
            found, expected, what = _git_oid(file), str(self.git_oid), "git's sha1"
        return "" if found == expected else f"{what} {found}, expected {expected}"


@dataclass(frozen=True)
class Pin:
    """A repository of the hub at one commit."""

    repo: str  # OWNER/NAME, as the hub calls it now
    commit: str  # all 40 digits
    license: Annotated[str, Between(1, 200)] | None  # as the card says; None where it says nothing
    files: Annotated[dict[str, PinnedFile], Between(0, MOST_FILES)]

    def __post_init__(self) -> None:
        if not _is_repo(self.repo):
            raise ValueError(f"the repository is {shown(self.repo)}")
        if not COMMIT.fullmatch(self.commit):
            raise ValueError(f"the commit is {shown(self.commit)}")
        if odd := [name for name in self.files if not _is_path(name)]:
            raise ValueError(f"a file is {shown(odd[0])}")

    @property
    def source(self) -> str:
        """Name that gives this commit wherever a hub name is taken: hf-hub:OWNER/NAME@COMMIT."""
        return f"{PREFIXES[0]}{self.repo}@{self.commit}"

    @property
    def weights(self) -> str:
        """Name of the weights file; WeightsError where there is no single safetensors file of the encoder."""
        names = [name for name in self.files if "/" not in name]
        found = [name for name in names if name.endswith(".safetensors") and name != OPEN_CLIP]
        if WEIGHTS_FILE in found:
            return WEIGHTS_FILE
        if SHARDS in names:
            raise WeightsError(
                f"the weights of {self.source} are in several files ({SHARDS}): write them into one {WEIGHTS_FILE} by "
                "safetensors.torch.save_file, put timm's config.json beside it, and give the folder"
            )
        if len(found) == 1:
            return found[0]
        raise WeightsError(f"{self.source} {_without_weights(names, found)}")

    def fetch(self, name: str) -> Path:
        """Return a file, from the cache or the hub; its bytes are checked at every call.

        Wrong bytes in the cache are fetched once more. A download that was cut off or killed is never taken for the
        file: the next call completes it.

        Raises:
            WeightsError: no such file, not reachable, not allowed, or not the pinned bytes.
        """
        if name not in self.files:
            raise WeightsError(f"{self.source} has no file {name!r}: see {_page(self.repo)}/tree/{self.commit}")
        if self.files[name].sha256 is self.files[name].git_oid is None:
            way_on = "see whether HF_ENDPOINT names a hub, or download the files into a folder and give that"
            raise WeightsError(f"no checksum of {name} of {self.source} was told, so it could be anything: {way_on}")
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        if name.endswith(".safetensors") and not try_to_load_from_cache(self.repo, name, revision=self.commit):
            logger.warning("licence of %s: %s, see %s", self.repo, self.license or "unknown", _page(self.repo))
        wrong, file, why = "", Path(), "what the hub sent is wrong, too"
        for force in (False, True):
            try:
                file = Path(hf_hub_download(self.repo, name, revision=self.commit, force_download=force))
                found = self.files[name].wrong(file)
            except Exception as error:  # huggingface-hub raises its own, httpx's, requests' and OSError
                why = _why(error, self.repo, self.commit).way_on(self.source)
                if wrong:
                    break
                # a traceback of theirs may show the token: from None
                raise WeightsError(f"cannot fetch {name} of {self.source}: {why}") from None
            if not found:
                return file
            wrong = found
        raise WeightsError(
            f"the bytes of {name} in {str(file.parent)!r} are not those of {self.source}: {wrong}. Delete it and load "
            f"again: they were to be fetched anew, but {why}"
        )


@dataclass(frozen=True)
class _Note:
    """What was learnt, for the times without a network."""

    asked: str  # endpoint, repository and revision
    pin: Pin


@dataclass(frozen=True)
class _Why:
    """Why something was not had from the hub."""

    text: str  # the reason, and what to do about it
    passing: bool  # it says nothing about the repository, and what was noted still holds

    def way_on(self, name: str) -> str:
        """Add what helps where the hub is out of reach; `name` is what `micl-zoo download` takes."""
        if not self.passing:
            return self.text
        return (
            f"{self.text}. Without a network, run micl-zoo download {name} --to FOLDER where there is one, bring "
            "FOLDER here and give its path in place of the name"
        )


def parse(text: str) -> tuple[str, str | None] | None:
    """Read the name of a repository on the hub.

    Args:
        text: `hf-hub:OWNER/NAME`, or without the prefix where there is an owner; `@REVISION` may follow.

    Returns:
        The repository and the revision, which is None where none is named; None where it is no such name.

    Raises:
        UsageError: the prefix is there, and no possible name after it.
    """
    prefix = next((one for one in PREFIXES if text.startswith(one)), "")
    repo, at, revision = text[len(prefix) :].partition("@")
    if _is_repo(repo) and (not at or _is_revision(revision)) and (prefix or "/" in repo):
        return repo, revision if at else None
    if prefix:
        raise UsageError(
            f"{shown(text)} names nothing on the hub: give hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION"
        )
    return None


def pin(repo: str, revision: str | None = None, *, name: str | None = None) -> Pin:
    """Find the commit of a revision and what it holds, by one request; no file is downloaded.

    What was learnt is noted. A full commit that is noted needs no request, and without a network any note will do.

    Args:
        repo: OWNER/NAME.
        revision: branch, tag or commit; None is main.
        name: what the user calls it, for the way on; None is the repository's own name.

    Raises:
        UsageError: an impossible name.
        WeightsError: no such repository or revision, not allowed, or not reachable and not noted.
    """
    asked = f"{repo}@{revision}" if revision is not None else repo
    if parse(f"{PREFIXES[0]}{asked}") != (repo, revision):
        raise UsageError(f"{shown(asked)} names nothing on the hub: give OWNER/NAME, or OWNER/NAME@REVISION")
    revision = revision or MAIN
    if COMMIT.fullmatch(revision) and (noted := _noted(repo, revision)):
        return noted
    from huggingface_hub import HfApi, constants

    limit = constants.HF_HUB_ETAG_TIMEOUT  # seconds; without one, a network that swallows packets is waited for
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=limit)
    except Exception as error:  # huggingface-hub raises its own, httpx's, requests' and OSError
        why = _why(error, repo, revision)
        if why.passing and (noted := _noted(repo, revision)):
            logger.warning("%s: %s of %s is commit %s, from the cache", why.text, revision, repo, noted.commit)
            return noted
        raise WeightsError(f"cannot find {asked} on the hub: {why.way_on(name or PREFIXES[0] + asked)}") from None
    made = _pin(info, repo, revision)
    for name in {repo, made.repo}:
        for one in {revision, made.commit}:
            _note(name, one, made)
    return made


def is_here(repo: str, commit: str) -> bool:
    """Whether a commit loads without a request: it is noted, and its weights and what says how to build it are here."""
    from huggingface_hub import try_to_load_from_cache

    noted = _noted(repo, commit)
    files = [noted.weights, CONFIG_FILE] if noted else []
    return bool(files) and all(isinstance(try_to_load_from_cache(repo, one, revision=commit), str) for one in files)


# What the hub answers.


def _pin(info: ModelInfo, repo: str, revision: str) -> Pin:
    siblings = info.siblings or []
    where = f"what the hub answers for {repo}"
    if len(siblings) > MOST_FILES:
        raise WeightsError(
            f"{repo} has {len(siblings):,} files, and that of an encoder at most {MOST_FILES:,}: download config.json "
            f"and {WEIGHTS_FILE} into a folder, and give that"
        )
    files = {
        one.rfilename: {
            "bytes": one.size,
            "sha256": one.lfs.sha256 if one.lfs is not None else None,
            "git_oid": one.blob_id if one.lfs is None else None,
        }
        for one in siblings
        if _is_path(one.rfilename)
    }
    if len(files) < len(siblings):
        logger.warning("%s: %d names of files that are no paths are left out", repo, len(siblings) - len(files))
    found = {"repo": info.id, "commit": info.sha, "license": _license(info.card_data), "files": files}
    made = read(Pin, found, where, WeightsError, "try again, or see whether HF_ENDPOINT names a hub")
    if COMMIT.fullmatch(revision) and made.commit != revision:
        raise WeightsError(f"{where} is commit {made.commit}, and {revision} was asked for: HF_ENDPOINT names no hub")
    if made.repo != repo:
        logger.warning("%s is %s on the hub now", repo, made.repo)
    return made


def _license(card: Any) -> str | None:
    """Return the licence on a card, on one line; its own name where it is none of the hub's list."""
    found, own = (getattr(card, name, None) for name in ("license", "license_name"))
    if found in (None, "other") and isinstance(own, str):
        found = own
    text = ", ".join(map(str, found)) if isinstance(found, list) else found
    return " ".join(text.split())[:200] or None if isinstance(text, str) else None


def _is_repo(text: str) -> bool:
    no_telemetry()  # there is no way to another import of it but through here
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(text)
    except ValueError:
        return False
    return text.isascii()  # older versions take any letters


def _is_revision(text: str) -> bool:
    return 0 < len(text) <= LONGEST_NAME and text.isprintable() and " " not in text


def _is_path(name: object) -> bool:
    """Whether this is the path of a file below a folder, on any machine."""
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        return False
    return not set(name) & set('\\:*?"<>|') and not {"", ".", ".."} & set(name.split("/"))


def _without_weights(names: list[str], found: list[str]) -> str:
    """Say what a repository has where one file of weights should be, and what to do."""
    if found:
        return f"has {len(found)} safetensors files ({_some(found)}) and none is {WEIGHTS_FILE}: give the path of one"
    if OPEN_CLIP in names:
        return f"has both towers in open_clip's own layout ({OPEN_CLIP}): take timm's repository of the image tower"
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        danger = f"has pickles alone ({_some(pickles)}), which can run code when they are read"
        return f"{danger}: download one, and {CONVERSION}"
    return f"has no weights among its {len(names):,} files: it takes {WEIGHTS_FILE} and timm's config.json"


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")


def _git_oid(file: Path) -> str:
    data = read_regular(file)
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


# Notes.


def _key(repo: str, revision: str) -> str:
    return f"{_page(repo)}@{revision}"


def _note_file(key: str) -> Path:
    """Where a note stands; branches differ by what some file systems cannot tell apart."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "micl-zoo" / "pins" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _note(repo: str, revision: str, pin: Pin) -> None:
    key = _key(repo, revision)
    try:
        with atomic_path(_note_file(key), unique=True) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(_Note(key, pin))), encoding="utf-8")
    except OSError as error:  # the cache is read only, or full: only the next time without a network misses it
        logger.info("%s is not noted: %s", key, error)


def _noted(repo: str, revision: str) -> Pin | None:
    key = _key(repo, revision)
    file = _note_file(key)
    try:
        if not file.exists():
            return None
        note = read(_Note, read_json(file, WeightsError), repr(str(file)), WeightsError)
    except (WeightsError, OSError) as error:  # OSError: of a folder that may not be entered
        logger.warning("a note is not used: %s", error)
        return None
    return note.pin if note.asked == key else None


# What went wrong.


def _why(error: Exception, repo: str, revision: str) -> _Why:
    """Say why the hub refused, or was not reached, and what to do."""
    from huggingface_hub import constants

    chain = _chain(error)
    response = next((found for one in chain if (found := getattr(one, "response", None)) is not None), None)
    if response is not None:
        return _refusal(response.status_code, response.headers, repo, revision)
    for one in chain:
        if isinstance(one, OSError) and one.errno in FULL_DISK:
            return _Why(f"the disk of {constants.HF_HOME} is full: make room, or set HF_HOME to another", False)
        if isinstance(one, OSError) and one.errno in NO_ACCESS and one.filename:
            return _Why(f"{one.filename!r} cannot be used ({one.strerror}): set HF_HOME to a place that can", False)
    if constants.HF_HUB_OFFLINE:
        return _Why("HF_HUB_OFFLINE is set", True)
    said = _public(" ".join(str(chain[-1]).split()))[:200] or type(chain[-1]).__name__
    return _Why(_public(f"asking {constants.ENDPOINT} failed ({said})"), True)


def _refusal(status: int, headers: Any, repo: str, revision: str) -> _Why:
    """Say what an answer of the hub means; see huggingface_hub's hf_raise_for_status."""
    code, login = headers.get("X-Error-Code"), "log in by `hf auth login` or set HF_TOKEN"
    if code == "GatedRepo":
        return _Why(f"it is gated: accept its terms at {_page(repo)}, and {login}", False)
    if code == "RevisionNotFound":
        return _Why(f"there is no revision {revision!r}: see {_page(repo)}/commits/main", False)
    if code == "EntryNotFound":
        return _Why(f"there is no such file at that commit: see {_page(repo)}/tree/{revision}", False)
    if status == 401 and "Invalid" in headers.get("X-Error-Message", ""):
        return _Why("the hub does not know the token: give a new one to `hf auth login` or HF_TOKEN, or none", False)
    if code == "RepoNotFound" or status in (401, 404):
        return _Why(f"there is no {repo}, or it is private: look the name up at {_page()}, or {login}", False)
    if status == 403:
        return _Why(f"access is refused (status 403): see {_page(repo)}, and take a token that may read it", False)
    if status in BUSY:
        return _Why(f"the hub takes no more requests for now (status {status}): wait some minutes, or {login}", True)
    later = "try again later" if status >= 500 else "see whether HF_ENDPOINT names a hub"
    return _Why(f"the hub answers with status {status}: {later}", status >= 500)


def _chain(error: BaseException) -> list[BaseException]:
    """List an error and its causes: the library says "an error happened", and what happened in its cause."""
    chain = [error]
    while len(chain) < 20 and (cause := chain[-1].__cause__ or chain[-1].__context__):
        chain.append(cause)
    return chain


def _public(text: str) -> str:
    """Take out of a text what is secret: tokens, passwords in addresses, signatures behind them."""
    from huggingface_hub import get_token

    with contextlib.suppress(OSError, ValueError):  # of a damaged file, in which case no token was sent
        if token := get_token():
            text = text.replace(token, "…")
    text = re.sub(r"(?i)bearer\s+\S+|\bhf_[a-z0-9]{8,}", "…", text)
    return re.sub(r"\?\S+", "", re.sub(r"://[^/@\s]*@", "://", text))


def _page(repo: str = "") -> str:
    from huggingface_hub import constants

    return _public(f"{constants.ENDPOINT}/{repo}".rstrip("/"))
