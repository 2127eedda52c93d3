"""Repositories of the hub at one commit: what is asked, noted, checked, refused, and what is never shown."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hub import TOKEN, Hub, environment_for, hub_on_loopback
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from micl_zoo.errors import UsageError, WeightsError
from micl_zoo.zoo.pins import MOST_FILES, Pin, PinnedFile, parse, pin

REPO, WEIGHTS = "timm/tiny.a1", "model.safetensors"
FIRST, SECOND = "1" * 40, "0123456789abcdef0123456789abcdef01234567"
CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILES = {WEIGHTS: CONTENT, "config.json": b'{"architecture": "x"}', "README.md": b"---\nlicense: mit\n---\n"}


def set_hub(patched: pytest.MonkeyPatch, **settings: object) -> None:
    """Change what huggingface_hub has read from the environment, in all the places where its versions keep that."""
    for name, value in settings.items():
        for module in (constants, file_download):
            patched.setattr(module, name, value, raising=False)
    forget_sessions()


def forget_sessions() -> None:
    """In huggingface_hub 0.x a session knows from its start whether there is a network."""
    getattr(_http, "reset_sessions", lambda: None)()


def ask(patched: pytest.MonkeyPatch, url: str) -> None:
    """Make this process ask a hub, and no other."""
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    set_hub(patched, ENDPOINT=url, HUGGINGFACE_CO_URL_TEMPLATE=template, HF_HUB_OFFLINE=False)


@contextmanager
def no_network() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        set_hub(patched, HF_HUB_OFFLINE=True)
        yield
    forget_sessions()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """With a repository; this process asks it alone, and keeps what it gets in a folder of the test."""
    set_hub(monkeypatch, HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path / "hub"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of huggingface_hub, between its tries
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_on_loopback() as hub:
        ask(monkeypatch, hub.url)
        hub.put(REPO, FIRST, dict(FILES))
        hub.cards[REPO] = {"license": "apache-2.0"}
        yield hub


def cached(folder: Path, name: str = WEIGHTS) -> Path:
    return next(folder.glob(f"hub/models--*/snapshots/*/{name}")).resolve()


def notes(folder: Path) -> list[Path]:
    return sorted(folder.glob("micl-zoo/pins/*.json"))


def test_names() -> None:
    assert parse("timm/a.b") == parse("hf-hub:timm/a.b") == parse("hf_hub:timm/a.b") == ("timm/a.b", None)
    assert parse("timm/a@refs/pr/1") == ("timm/a", "refs/pr/1")
    assert parse("hf-hub:gpt2@v1.0") == ("gpt2", "v1.0")
    for text in (
        "gpt2",
        "vit_ti16",
        "",
        "./a",
        "../a",
        "/a/b",
        "a/b/c",
        "a/b@",
        "a--b/c",
        "a/b.git",
        "é/b",
        "a\\b",
        "a /b",
    ):
        assert parse(text) is None, text
    for text in ("hf-hub:", "hf-hub:./a", "hf-hub:a/b@", "hf-hub:a/b@x y", "hf_hub:a/b/c", "hf-hub:a/b@\n"):
        with pytest.raises(UsageError, match="names nothing on the hub: give hf-hub:OWNER/NAME or"):
            parse(text)
    for repo, revision in (("../x", None), ("a/b@c", None), ("a/b", ""), ("hf-hub:a/b", None)):
        with pytest.raises(UsageError, match="names nothing on the hub"):
            pin(repo, revision)


def test_a_pin_takes_one_request_and_its_files_are_those(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = pin(REPO)
    assert [request.lower() for request in hub.requests] == [f"get /api/models/{REPO}/revision/main?blobs=true"]
    assert (made.repo, made.commit, made.license) == (REPO, FIRST, "apache-2.0")
    assert made.source == f"hf-hub:{REPO}@{FIRST}"
    assert parse(made.source) == (REPO, FIRST)
    assert made.files[WEIGHTS] == PinnedFile(len(CONTENT), SHA256)
    config = made.files["config.json"]
    assert (config.bytes, config.sha256) == (21, None)
    assert not (tmp_path / "hub").exists()
    assert not caplog.messages
    assert made.fetch(made.weights).read_bytes() == CONTENT
    assert made.fetch("config.json").read_bytes() == FILES["config.json"]
    assert all(FIRST in request for request in hub.requests[1:])
    before = len(hub.requests)
    assert made.fetch(WEIGHTS).read_bytes() == CONTENT
    assert pin(REPO, FIRST) == made
    assert len(hub.requests) == before  # a noted commit, and a file in the cache
    assert caplog.messages == [f"licence of {REPO}: apache-2.0, see {hub.url}/{REPO}"]
    with pytest.raises(WeightsError, match=rf"@{FIRST} has no file 'other': see {hub.url}/{REPO}/tree/{FIRST}"):
        made.fetch("other")
    untold = Pin(REPO, FIRST, None, {WEIGHTS: PinnedFile(len(CONTENT), None)})
    with pytest.raises(WeightsError, match=f"no checksum of {WEIGHTS} of {made.source} was told"):
        untold.fetch(WEIGHTS)


def test_a_branch_that_moved_a_tag_and_a_short_commit(hub: Hub) -> None:
    before = pin(REPO)
    hub.put(REPO, SECOND, {**FILES, WEIGHTS: CONTENT[::-1]})
    hub.tags[REPO, "v/1"] = FIRST
    assert pin(REPO, "main").commit == pin(REPO, SECOND[:8]).commit == SECOND
    assert pin(REPO, "v/1") == pin(REPO, FIRST) == before
    assert before.fetch(WEIGHTS).read_bytes() == CONTENT
    assert pin(REPO).fetch(WEIGHTS).read_bytes() == CONTENT[::-1]


def test_what_is_noted_holds_without_a_network(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    way_on = f"Without a network, run micl-zoo download hf-hub:{REPO} --to FOLDER where there is one, bring FOLDER"
    with no_network(), pytest.raises(WeightsError, match=f"{REPO} on the hub: HF_HUB_OFFLINE is set. {way_on}"):
        pin(REPO)
    assert not hub.requests
    made = pin(REPO)
    made.fetch(WEIGHTS)
    hub.put(REPO, SECOND, FILES)
    for trouble in (503, 429):
        hub.trouble = trouble
        assert pin(REPO) == made
        assert f"status {trouble}" in caplog.messages[-1]
        assert caplog.messages[-1].endswith(f": main of {REPO} is commit {FIRST}, from the cache")
    hub.trouble, asked = None, len(hub.requests)
    with no_network():
        assert pin(REPO) == pin(REPO, FIRST) == made
        assert made.fetch(WEIGHTS).read_bytes() == CONTENT
        with pytest.raises(
            WeightsError, match=rf"cannot fetch config.json of hf-hub:{REPO}@{FIRST}: HF_HUB_OFFLINE is set"
        ):
            made.fetch("config.json")
        with pytest.raises(WeightsError, match=f"cannot find {REPO}@{SECOND} on the hub: HF_HUB_OFFLINE is set"):
            pin(REPO, SECOND)
        assert len(hub.requests) == asked


def test_a_hub_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pin(REPO)
    with hub_on_loopback() as other:
        pass
    ask(monkeypatch, other.url.replace("//", "//me:secret@"))
    with pytest.raises(
        WeightsError, match=rf"asking {other.url} failed \(.*[Cc]onnection.*Without a network"
    ) as caught:
        pin(REPO)  # noted for the other hub alone
    assert "secret" not in str(caught.value)
    with pytest.raises(WeightsError, match=r"asking .* failed"):
        made.fetch(WEIGHTS)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_other_bytes_in_the_cache_are_fetched_once_more(hub: Hub, tmp_path: Path, name: str) -> None:
    made = pin(REPO)
    made.fetch(name)
    good = FILES[name]
    for bad in (good[:-7] + b"garbage", good[:-1], b""):
        cached(tmp_path, name).write_bytes(bad)
        assert made.fetch(name).read_bytes() == good
    cached(tmp_path, name).write_bytes(good[:-7] + b"garbage")
    said = rf"are not those of hf-hub:{REPO}@{FIRST}: .*expected .*HF_HUB_OFFLINE"
    with no_network(), pytest.raises(WeightsError, match=said):
        made.fetch(name)


def test_other_bytes_on_the_server_are_never_loaded(hub: Hub) -> None:
    made = pin(REPO)
    hub.instead[WEIGHTS] = CONTENT[:-7] + b"garbage"
    bad = hashlib.sha256(hub.instead[WEIGHTS]).hexdigest()
    for _ in range(2):
        with pytest.raises(WeightsError, match=rf"sha256 {bad}, expected {SHA256}.*what the hub sent is wrong, too"):
            made.fetch(WEIGHTS)
    hub.instead.clear()
    assert made.fetch(WEIGHTS).read_bytes() == CONTENT


def test_refusals_say_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    page = f"{hub.url}/{REPO}"
    with pytest.raises(
        WeightsError, match=f"cannot find a/b on the hub: there is no a/b, or it is private: .*{hub.url}"
    ):
        pin("a/b")
    with pytest.raises(WeightsError, match=f"cannot find {REPO}@v9 on the hub: there is no revision 'v9': see {page}"):
        pin(REPO, "v9")
    hub.private.add(REPO)
    with pytest.raises(WeightsError, match=r"or it is private: .*`hf auth login`"):
        pin(REPO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    made = pin(REPO)
    hub.gated.add(REPO)
    with pytest.raises(WeightsError, match=f"it is gated: accept its terms at {page}, and log in by `hf auth login`"):
        made.fetch(WEIGHTS)
    hub.gated.clear()
    del hub.commits[REPO, FIRST][WEIGHTS]
    with pytest.raises(WeightsError, match=f"there is no such file at that commit: see {page}/tree/{FIRST}"):
        made.fetch(WEIGHTS)
    for trouble, said in ((403, "take a token that may read it"), (500, "try again later"), (418, "HF_ENDPOINT")):
        hub.trouble = trouble
        with pytest.raises(WeightsError, match=f"status {trouble}.*{said}") as caught:
            pin(REPO, "v9")
        assert str(caught.value).count("\n") == 0
    hub.trouble = 429
    with pytest.raises(WeightsError, match=r"no more requests for now \(status 429\): wait some minutes, or log in"):
        made.fetch(WEIGHTS)


def test_a_token_is_never_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    made = pin(REPO)
    for token in ("hf_abcdefgh12345678", "secret", "sec\x01ret", "sécret"):  # unknown, or none that a header can have
        monkeypatch.setenv("HF_TOKEN", token)
        for call in (lambda: pin(REPO, "v9"), lambda: made.fetch(WEIGHTS)):
            with pytest.raises(WeightsError) as caught:
                call()
            shown = "".join(traceback.format_exception(caught.value)) + caplog.text
            assert not [one for one in (token, "ret'", "cret") if one in shown.replace("secrets", "")], shown
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh12345678")
    with pytest.raises(WeightsError, match="the hub does not know the token: give a new one to `hf auth login`"):
        pin(REPO, "v9")


def test_a_renamed_repository(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.renamed["old/name"] = REPO
    made = pin("old/name")
    assert (made.repo, caplog.messages) == (REPO, [f"old/name is {REPO} on the hub now"])
    with no_network():
        assert pin("old/name") == pin(REPO) == pin("old/name", FIRST) == made


def test_a_download_that_is_cut_goes_on_where_it_was(hub: Hub) -> None:
    made = pin(REPO)
    hub.cuts[WEIGHTS] = [100_000, 50_000]
    while hub.cuts[WEIGHTS]:
        with suppress(WeightsError):  # huggingface_hub 0.x leaves the second try to its caller
            made.fetch(WEIGHTS)
    assert made.fetch(WEIGHTS).read_bytes() == CONTENT


def test_a_download_that_is_killed_is_done_again(hub: Hub, tmp_path: Path) -> None:
    code = f"import sys; from micl_zoo.zoo.pins import pin; p = pin({REPO!r}); p.fetch({WEIGHTS!r})"
    hub.stalls.add(WEIGHTS)
    with subprocess.Popen([sys.executable, "-c", code], env=environment_for(hub, tmp_path)) as process:
        assert hub.stalled.wait(60)
        process.kill()
    hub.stalls.clear()
    hub.resumes.set()
    assert not list(tmp_path.glob("hub/models--*/snapshots/*/*"))
    assert pin(REPO).fetch(WEIGHTS).read_bytes() == CONTENT


def test_a_damaged_note_is_none(hub: Hub, tmp_path: Path) -> None:
    made, files = pin(REPO), notes(tmp_path)
    assert len(files) == 2  # of main, and of the commit
    good = json.loads(files[0].read_text())
    for bad in ("", "{", json.dumps({**good, "more": 1}), json.dumps({**good, "pin": {**good["pin"], "commit": "x"}})):
        for file in files:
            file.write_text(bad)
        assert pin(REPO, FIRST) == made  # asked again, and noted again
        assert pin(REPO) == made
        for file in files:
            file.write_text(bad)
        with no_network(), pytest.raises(WeightsError, match=r"cannot find .*HF_HUB_OFFLINE is set"):
            pin(REPO)
    for file in files:
        file.write_text(json.dumps({**good, "asked": "another"}))
    hub.requests.clear()
    assert pin(REPO, FIRST) == made
    assert hub.requests


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pin(REPO)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(WeightsError, match=r"cannot fetch .*is full: make room, or set HF_HOME to another"):
        made.fetch(WEIGHTS)
    monkeypatch.setattr("micl_zoo.zoo.pins.atomic_path", full)
    assert pin(REPO) == made


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["config.json", "pytorch_model.bin"],
            "pickles alone .pytorch_model.bin.*micl-zoo import FILE -o FOLDER",
        ),
        (["a.safetensors", "b.safetensors"], "has 2 safetensors files .a.safetensors, b.safetensors. and none is"),
        (["model.safetensors.index.json", "model-1-of-2.safetensors"], "in several files .*: write them into one"),
        (["open_clip_model.safetensors"], "both towers in open_clip's own layout"),
        (["README.md"], "no weights among its 1 files"),
        (["below/model.safetensors"], "no weights among its 0 files"),
    ],
)
def test_weights_that_cannot_be_taken(names: list[str], said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        _ = Pin(REPO, FIRST, None, dict.fromkeys(names, PinnedFile(1, None))).weights


def test_the_weights_file() -> None:
    one = PinnedFile(1, None)
    for names, chosen in (
        ([WEIGHTS, "open_clip_model.safetensors", "pytorch_model.bin"], WEIGHTS),
        (["a.safetensors", "open_clip_model.safetensors"], "a.safetensors"),
        ([WEIGHTS, "model.safetensors.index.json"], WEIGHTS),
    ):
        assert Pin(REPO, FIRST, None, dict.fromkeys(names, one)).weights == chosen


@pytest.mark.parametrize(
    ("card", "found"),
    [
        (None, None),
        ({}, None),
        ({"license": "other", "license_name": "dinov3-license"}, "dinov3-license"),
        ({"license": "other"}, "other"),
        ({"license": ["mit", "apache-2.0"]}, "mit, apache-2.0"),
        ({"license": "a\nb" + 300 * "c"}, "a b" + 197 * "c"),
        ({"license": {"a": 1}}, None),
    ],
    ids=str,
)
def test_the_licence_on_the_card(
    hub: Hub, card: dict[str, Any] | None, found: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    hub.cards[REPO] = card or {}
    made = pin(REPO)
    assert made.license == found
    made.fetch(WEIGHTS)
    assert f"licence of {REPO}: {found or 'unknown'}, see" in caplog.text


def test_names_of_files_from_the_hub_stay_below_the_cache(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = ["../../x.safetensors", "/etc/x", "a//b", "a/./b", "C:x", "a\\..\\b", "a\0", "a\nb", "x" * 5000, ""]
    hub.put(REPO, SECOND, {**FILES, **dict.fromkeys(odd, b"x")})
    made = pin(REPO)
    assert set(made.files) == set(FILES)
    assert f"{REPO}: {len(odd)} names of files that are no paths are left out" in caplog.text
    for name in odd:
        with pytest.raises(WeightsError, match="has no file"):
            made.fetch(name)
        with pytest.raises(ValueError, match="a file is"):
            Pin(REPO, FIRST, None, {name: PinnedFile(1, None)})
    hub.put(REPO, SECOND, {str(number): b"" for number in range(MOST_FILES + 1)})
    with pytest.raises(WeightsError, match="has 10,001 files, and that of an encoder at most 10,000: download config"):
        pin(REPO)


def test_what_no_hub_would_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import hf_api

    good = {"id": REPO, "sha": FIRST, "siblings": [{"rfilename": "a", "size": 1, "blobId": FIRST}]}
    sibling = {"rfilename": "a", "size": 1, "lfs": {"sha256": SHA256, "size": 1, "pointerSize": 1}}
    for bad, said in (
        ({"sha": None}, "commit must be a text"),
        ({"sha": "../x"}, "the commit is '../x'"),
        ({"id": "../../x"}, "the repository is"),
        ({"siblings": [{**sibling, "size": -1}]}, "bytes is -1"),
        ({"siblings": [{**sibling, "lfs": {**sibling["lfs"], "sha256": "x"}}]}, "sha256 is 'x'"),  # type: ignore[dict-item]
        ({"siblings": [{**sibling, "lfs": {"size": 1}}]}, "asking .* failed"),
    ):
        answer = {**good, **bad}
        monkeypatch.setattr(hf_api.HfApi, "model_info", lambda *_, answer=answer, **__: hf_api.ModelInfo(**answer))
        with pytest.raises(WeightsError, match=said):
            pin(REPO)
    monkeypatch.setattr(hf_api.HfApi, "model_info", lambda *_, **__: hf_api.ModelInfo(**good))
    with pytest.raises(WeightsError, match=f"is commit {FIRST}, and {SECOND} was asked for"):
        pin(REPO, SECOND)
