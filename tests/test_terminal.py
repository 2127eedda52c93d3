"""The command line as a guest on a terminal: names that act, outputs that are gone, signals, limits."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from conftest import TWIN, picture
from markdown_it import MarkdownIt
from PIL import Image

from micl_zoo.cli import main
from micl_zoo.errors import MiclZooError
from micl_zoo.limits import refused_by_system
from micl_zoo.printing import Output, json_line, printable
from micl_zoo.progress import LINE_SECONDS, progress
from micl_zoo.sources.reader import Reader
from micl_zoo.stores.contact_sheet import Tile, write_contact_sheet
from micl_zoo.training.evaluation.tables import Markdown, code, markdown, plain

HOSTILE = "a\x1b]0;title\x07\x9b31m\u202e\u200b\n[red]<script>|`b`<!--&amp;*$c$\\"
posix = pytest.mark.skipif(os.name != "posix", reason="signals, limits and closed files as POSIX has them")


def unsafe(text: str) -> list[str]:
    return [letter for letter in text if not letter.isprintable() and letter != "\n"]


# Names from outside.


@pytest.fixture
def hostile_images(tmp_path: Path) -> Path:
    """A labelled set whose folders, classes and files have names that act."""
    for number in range(16):
        part, kind = ("train" if number < 10 else "test"), ("y" if number % 2 else HOSTILE)
        folder = tmp_path / HOSTILE / part / kind
        folder.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / f"{number}{HOSTILE}.jpg", format="JPEG")
    (tmp_path / HOSTILE / "train" / "y" / f"bad{HOSTILE}.jpg").write_bytes(b"")
    return tmp_path / HOSTILE


@posix
def test_no_command_prints_what_acts(hostile_images: Path, encoder_folder: Path, tmp_path: Path) -> None:
    def run(*words: object, code: int = 0) -> str:
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == code, (words[0], result.output, result.exception)
        assert not unsafe(result.output), words[0]
        return result.stdout

    def called(name: str) -> Path:
        return tmp_path / f"{name}{HOSTILE}"

    one = next(hostile_images.glob("test/y/*.jpg"))
    own = ("--weights", encoder_folder)
    where = ("--workers", 0, "--precision", "fp32")
    run("extract", hostile_images, "-o", called("store"), *own, *where)
    summary = json.loads(run("extract", one, "-o", called("other"), *own, *where, "--json").splitlines()[0])
    assert summary["out"] == str(called("other"))
    ledger = (called("store") / "errors.jsonl").read_text(encoding="utf-8")
    assert not unsafe(ledger)
    assert json.loads(ledger)["id"] == f"train/y/bad{HOSTILE}.jpg"

    sheet = tmp_path / f"sheet{HOSTILE}.png"
    assert printable(str(one)) in run("search", called("store"), one, *own, "--picture", sheet)
    assert sheet.stat().st_size
    found = run("search", called("store"), "--id", f"test/y/{one.name}", *own, "--json").splitlines()
    assert json.loads(found[0])["query"] == f"test/y/{one.name}"
    run("verify", called("store"), *own)
    run("convert", called("store"), tmp_path / f"rows{HOSTILE}.npy")
    ids = (tmp_path / f"rows{HOSTILE}.npy.ids.json").read_text(encoding="utf-8")
    assert not unsafe(ids)
    assert f"test/y/{one.name}" in json.loads(ids)

    record, trained = called("record").with_suffix(".json"), called("run")
    changes = [word for change in (*TWIN, "epochs=1", "warmup_epochs=0") for word in ("--set", change)]
    run("train", "vit_ti16.tin200", "--data", hostile_images / "train", "--out", trained, *changes)
    run("report", trained)
    measure = ("--data", hostile_images, "--device", "cpu", "--workers", 0, "-o", record)
    run("eval", "knn", trained, *measure, "--plot", tmp_path / "plot.svg")
    run("card", trained, "--eval", record)
    run("card", trained, "--hub", "-o", called("card"))
    run("card", trained, "--check", called("record"), code=1)
    for words in (("info", HOSTILE), ("train", HOSTILE, "--data", "x", "--out", "y"), ("extract", HOSTILE, "-o", "y")):
        run(*words, code=1)
    for words in (("search", HOSTILE, HOSTILE), ("verify", HOSTILE), ("report", HOSTILE), ("import", one, "-o", "y")):
        run(*words, code=1)
    for words in ((HOSTILE,), (f"--{HOSTILE}",), ("extract", "a", "-o", "b", "--pool", HOSTILE), ("verify", "-k")):
        run(*words, code=2)

    page = (trained / "report.html").read_text(encoding="utf-8")
    assert not unsafe(page)
    assert printable(str(hostile_images), keep="\n") in html_text(page)
    card = called("card").read_text(encoding="utf-8")
    assert not unsafe(card)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["model_name"]
    assert printable(str(hostile_images / "train")) in markdown_texts(body)


def html_text(page: str) -> str:
    """The text of a page; it has the elements of the template only."""

    class Reader(HTMLParser):
        text = ""

        def handle_data(self, data: str) -> None:
            self.text += data

        def handle_starttag(self, tag: str, attrs: object) -> None:
            assert tag != "script"

    (reader := Reader()).feed(page)
    return reader.text


def markdown_texts(text: str) -> list[str]:
    """Each piece of text, and of code, that Markdown shows; there is no HTML in it."""
    found = []
    for block in MarkdownIt("commonmark").enable("table").parse(text):
        assert block.type != "html_block"
        for token in block.children or ():
            assert token.type not in ("html_inline", "image")
            found.append(token.content)
    return found


@pytest.mark.parametrize(
    "name", [HOSTILE, "`", "a``b`", "|", "a\\|b", "[x](y)", "![x](y)", "<b>", "a&lt;b", "\\", "* x"]
)
def test_markdown_shows_a_name_as_it_is(name: str) -> None:
    (shown,) = markdown_texts(code(name, table=False))
    assert shown == printable(name)
    assert "".join(markdown_texts(plain(f"_{name}"))) == f"_{printable(name)}"
    table = markdown(["one", "two"], [[name, "x"], [code(name), Markdown("**y**")]])
    tokens = MarkdownIt("commonmark").enable("table").parse(table)
    cells = [block for block in tokens if block.type == "inline"]
    assert len(cells) == 6
    shown_cells = ["".join(token.content for token in cell.children or ()) for cell in cells]
    assert shown_cells == ["one", "two", printable(name), "x", printable(name), "y"]


@pytest.mark.parametrize(
    "name", ["x" * 100_000, "🙂" * 50, "\u05d0\u05d1\u05d2 abc", "e" + "\u0301" * 5000, "", HOSTILE]
)
def test_captions_of_any_name(name: str, tmp_path: Path) -> None:
    write_contact_sheet(tmp_path / "a.png", [(Tile("query", name, b""), [Tile("1", name, b"")])], Reader().read)
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width > 100


# Outputs.


def output(encoding: str, **how: bool) -> tuple[Output, io.BytesIO]:
    kept = io.BytesIO()
    return Output(io.TextIOWrapper(kept, encoding, newline="\n"), **how), kept


def test_output_escapes_what_acts_and_what_it_has_no_letters_for() -> None:
    for encoding, wanted in (("utf-8", "ü"), ("ascii", r"\xfc"), ("latin-1", "ü")):
        out, kept = output(encoding)
        print("ü\x1b\x9b\udcff", "\r\n漢"[:2], file=out, flush=True)
        assert kept.getvalue().decode(encoding) == f"{wanted}\\x1b\\x9b\\udcff \\x0d\n\n"
        assert not hasattr(out, "buffer")
    bar, kept = output("utf-8", escape=False)
    bar.write("\x1b[31m")
    bar.flush()
    assert kept.getvalue() == b"\x1b[31m"


def program(*words: str, shell: str = 'exec "$@"', **settings: object) -> subprocess.CompletedProcess[str]:
    """Run the program, by a line of shell."""
    call = ["sh", "-c", shell, "sh", sys.executable, *words]
    return subprocess.run(call, capture_output=True, text=True, timeout=100, **settings)  # type: ignore[call-overload]


SHORT = (["models", "--json"], ["extract", "--help"], ["info", "vit_b16"])


@posix
@pytest.mark.parametrize("words", SHORT, ids=" ".join)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_is_gone_and_a_full_disk(words: list[str], unbuffered: str) -> None:
    settings = {"env": os.environ | {"PYTHONUNBUFFERED": unbuffered}}
    # The reader ends before the program begins; what the program ends with goes to standard error.
    gone = program("-m", "micl_zoo", *words, shell='{ sleep 0.1; "$@"; echo $? >&2; } | true', **settings)
    assert gone.stderr.split() == ["141"]
    full = program("-m", "micl_zoo", *words, shell='exec "$@" >/dev/full', **settings)
    assert (full.returncode, full.stderr) == (1, "Error: standard output cannot be written: No space left on device\n")


@posix
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_files_do_not_matter(closed: str, tmp_path: Path) -> None:
    assert program("-m", "micl_zoo", "models", shell=f'exec "$@" {closed}').returncode == 0
    assert program("-m", "micl_zoo", "verify", "x", shell=f'exec "$@" {closed}').returncode == 1
    code = "import micl_zoo.__main__ as m, sys, os; m._open_standard_files(); f = open(sys.argv[1], 'w')\n"
    code += "print(f.fileno(), file=f); print(1, sys.stdin.read()[:0]); print(2, file=sys.stderr)"
    assert program("-c", code, str(tmp_path / "file"), shell=f'exec "$@" {closed}').returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


@posix
def test_a_full_disk_behind_standard_error_does_not_matter() -> None:
    lost = program("-m", "micl_zoo", "verify", "x", shell='exec "$@" 2>/dev/full')
    assert (lost.returncode, lost.stdout) == (1, "")


def test_library_output_that_fails_ends_the_program_even_if_swallowed() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    out = Output(Full(), results=True)
    for _ in range(2):
        with pytest.raises(MiclZooError, match="standard output cannot be written: No space left on device"):
            print("x", file=out)
    print("x", file=Output(Full()))  # standard error is given up


@posix
@pytest.mark.parametrize(
    "settings",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"COLUMNS": "1"}, {"HOME": "/none"}, {"TMPDIR": "/none"}],
)
def test_odd_surroundings(settings: dict[str, str]) -> None:
    for words, wanted in ((["verify", "ü\udcff漢"], 1), (["--help"], 0), (["models"], 0)):
        result = program("-m", "micl_zoo", *words, env=os.environ | settings)
        assert result.returncode == wanted
        assert "Traceback" not in result.stderr


# Signals.

HIT = "import os, signal, sys; hit = lambda: os.kill(os.getpid(), getattr(signal, sys.argv[1]))\n"
MOMENTS = {  # what the command `info` does
    "in the command": "hit()",
    "in an import": "import hits",
    "in an import that makes another error of it": """
        try:
            import hits
        except BaseException:
            raise ImportError from None""",
    "in a destructor": "type('A', (), {'__del__': lambda self: hit()})()",
    "twice": """
        try:
            hit()
        finally:
            hit()
            os._exit(9)""",
    "beside a thread that does not end": """
        import threading, time
        threading.Thread(target=time.sleep, args=(60,)).start()
        hit()""",
    "in a process that was forked": """
        if not (pid := os.fork()):
            hit()
            os._exit(9)
        assert os.waitpid(pid, 0)[1] >> 8 == 128 + getattr(signal, sys.argv[1])
        hit()""",
}


@posix
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_program_quietly(moment: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "hits.py").write_text("from __main__ import hit; hit()")
    found = "import micl_zoo.cli.zoo as zoo\ndef find(name):\n" + textwrap.indent(
        textwrap.dedent(MOMENTS[moment]), "    "
    )
    run = "\nzoo.find_record = find\nfrom micl_zoo.__main__ import main\nmain(['info', 'vit_b16'])"
    result = program("-c", HIT + found + run, name, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 128 + getattr(signal, name), result.stderr
    assert result.stderr in ("", f"Error: stopped by {name}\n")
    assert not result.stdout


@posix
def test_after_the_work_is_done_a_signal_changes_nothing() -> None:
    late = "import atexit\natexit.register(lambda: None)\nclass A:\n  def __del__(self, hit=hit): hit()\nsys.kept = A()"
    run = "\nfrom micl_zoo.__main__ import main\nmain(['models'])"
    result = program("-c", HIT + late + run, "SIGINT")
    assert (result.returncode, result.stderr) == (0, "")


@posix
def test_nohup_is_heeded() -> None:
    run = "from micl_zoo.__main__ import main\nimport micl_zoo.zoo.ours\nhit()\nmain(['models'])"
    assert program("-c", HIT + run, "SIGHUP", shell='trap "" HUP; exec "$@"').returncode == 0


def interrupted(at: float, how: signal.Signals, *words: object) -> tuple[int, str]:
    """Run the program in a process group that gets a signal after some seconds: exit code and output."""
    call = [sys.executable, "-m", "micl_zoo", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(call, **pipes) as process:  # type: ignore[call-overload]
        time.sleep(at)
        if process.poll() is None:
            os.killpg(process.pid, how)
        return process.wait(120), process.stdout.read()


@posix
@pytest.mark.parametrize("at", [0.5, 3, pytest.param(None, marks=pytest.mark.slow)])
def test_signals_during_extract(
    at: float | None, image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    images = image_folder(40)
    for number, seconds in enumerate([at] if at else [0.3 + 0.4 * step for step in range(25)]):
        words = ("extract", images, "-o", tmp_path / f"s{number}", "--weights", encoder_folder, "--shard-rows", 4)
        code, said = interrupted(seconds, signal.SIGINT, *words, "--workers", 2, "--processes", 1 + number % 2)
        assert code in (0, 130), (seconds, said)
        assert "Traceback" not in said, (seconds, said)
        assert "Exception ignored" not in said, (seconds, said)


# Limits.


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EACCES, "Permission denied", "a\x1b"), r"^Permission denied: a\x1b \(choose another place"),
        (OSError(errno.ENOSPC, "No space left on device", b"b"), r"^No space left on device: b \(free some space"),
        (OSError(errno.EXDEV, "Invalid link", "a", None, "b"), r"^Invalid link: a -> b$"),
        (
            OSError(errno.EMFILE, "Too many open files", "a"),
            r"^too many open files, this process may have [\d,]+ \(ulimit",
        ),
        (OSError(errno.EFBIG, "File too large", "a"), "^File too large.*: a. Raise the limit"),
        (
            BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
            "^no further process or thread can be started",
        ),
        (RuntimeError("can't start new thread"), "^no further process or thread can be started"),
        (MemoryError(), "^not enough memory: close other programs"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore"),
            "^not enough memory: ",
        ),
        (ImportError("libtorch.so: failed to map segment from shared object"), "^not enough memory: libtorch"),
    ],
)
@posix
def test_what_the_system_refuses_is_a_sentence(error: Exception, says: str) -> None:
    said = refused_by_system(error)
    assert said is not None
    assert re.search(says, said), said
    assert "\n" not in said


def test_other_errors_are_not_the_system_s() -> None:
    assert refused_by_system(RuntimeError("x")) is None
    assert refused_by_system(KeyError("x")) is None


@posix
@pytest.mark.parametrize(
    ("limit", "value", "act"),
    [
        ("AS", 300 << 20, "bytearray(1 << 30)"),
        ("NOFILE", 10, "[open(sys.argv[1], 'a') for _ in range(11)]"),
        ("FSIZE", 8, "open(sys.argv[1], 'w').write('x' * 100_000)"),
    ],
)
def test_a_limit_is_named(limit: str, value: int, act: str, tmp_path: Path) -> None:
    code = f"""
import resource, sys
import micl_zoo.cli.zoo as zoo
from micl_zoo.__main__ import main
def find(name):
    resource.setrlimit(resource.RLIMIT_{limit}, ({value}, {value}))
    {act}
zoo.find_record = find
main(["info", "vit_b16"])
"""
    result = program("-c", code, str(tmp_path / "file"))
    assert result.returncode == 1
    assert {"AS": "(ulimit -v)", "NOFILE": "(ulimit -n)", "FSIZE": "(ulimit -f)"}[limit] in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


@posix
def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    code = "import os, micl_zoo.cli.zoo as zoo\nzoo.find_record = lambda name: os.getcwd()\n"
    code += "from micl_zoo.__main__ import main\nmain(['info', 'vit_b16'])"
    result = program("-c", code, shell=f'cd {tmp_path}; mkdir gone; cd gone; rmdir ../gone; exec "$@"')
    wanted = "Error: the current folder does not exist any more: change to another\n"
    assert (result.returncode, result.stderr) == (1, wanted)


def test_json_line_is_one_line() -> None:
    assert not unsafe(json_line({HOSTILE: [HOSTILE, None]}).replace("\n", "\x00"))
    assert json.loads(json_line({HOSTILE: HOSTILE})) == {HOSTILE: HOSTILE}


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress("a\x1bname", 400, done=100, unit="steps") as tick:
        now[0] += LINE_SECONDS - 1
        tick(50, "loss 1")
        assert not capsys.readouterr().err
        now[0] += 1
        tick(50, "loss 0.9")
        tick(1)
        now[0] += LINE_SECONDS
        tick(198)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "a\\x1bname: 200/400 steps  0:01:00 gone, 0:02:00 left  loss 0.9"
    assert second == "a\\x1bname: 399/400 steps  0:02:00 gone, 0:00:00 left  loss 0.9"
    with progress("hidden", 3, show=False) as tick:
        now[0] += LINE_SECONDS
        tick()
    assert not capsys.readouterr().err
