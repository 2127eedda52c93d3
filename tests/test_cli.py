"""The command line as people meet it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import TWIN

from micl_zoo import __version__
from micl_zoo.cli import main
from micl_zoo.cli._options import LocalPath
from micl_zoo.errors import Interrupted
from micl_zoo.extraction.runner import Event, Times
from micl_zoo.extraction.work import Work
from micl_zoo.stores.parts import Rows
from micl_zoo.stores.store import Store
from micl_zoo.zoo.ours import RECORDS
from micl_zoo.zoo.public import PUBLIC

README = Path(__file__).parent.parent / "README.md"


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def every_command() -> dict[str, click.Command]:
    """By what is typed behind `micl-zoo`."""
    found: dict[str, click.Command] = {"": main, **main.commands}
    for name, group in main.commands.items():
        if isinstance(group, click.Group):
            context = click.Context(group)
            found |= {f"{name} {below}": group.get_command(context, below) for below in group.list_commands(context)}
    return found


@pytest.mark.parametrize("name", every_command())
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = run(*name.split(), "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"micl-zoo {name}".strip() in result.output
    for parameter in every_command()[name].params:
        if parameter.param_type_name == "option":
            assert getattr(parameter, "help", None), f"{name} {parameter.name} has no help"


@pytest.mark.skipif(not README.exists(), reason="the installed package has no README beside its tests")
def test_every_command_is_in_the_readme_or_the_documents() -> None:
    files = [README, *(README.parent / "docs").glob("*.md")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    missing = [name for name in main.commands if f"micl-zoo {name}" not in text]
    below = [name for name in every_command() if " " in name]
    assert len(below) == 8
    missing += [name for name in below if not re.search(rf"(micl-zoo {name}|`{name.split()[1]}`)", text)]
    assert not missing


def local_paths() -> Iterator[tuple[str, click.Parameter]]:
    for name, command in every_command().items():
        yield from ((name, parameter) for parameter in command.params if isinstance(parameter.type, LocalPath))


@pytest.mark.parametrize(("name", "parameter"), list(local_paths()), ids=lambda one: getattr(one, "name", one))
@pytest.mark.parametrize(("given", "said"), [("s3://bucket/x", "'s3://bucket/x' is an address"), ("", "it is empty")])
def test_an_address_never_becomes_a_folder(name: str, parameter: click.Parameter, given: str, said: str) -> None:
    with pytest.raises(click.UsageError, match=said):
        parameter.type_cast_value(
            click.Context(every_command()[name]), [given] if parameter.nargs < 0 or parameter.multiple else given
        )


NUMBERS = [(name, one) for name, command in every_command().items() for one in command.params]


@pytest.mark.parametrize(
    ("name", "parameter"),
    [(name, one) for name, one in NUMBERS if isinstance(one.type, click.types.FloatParamType)],
    ids=lambda one: getattr(one, "name", one),
)
@pytest.mark.parametrize("given", ["nan", "inf", "-inf", "1e99", "-1"])
def test_a_number_has_an_end(name: str, parameter: click.Parameter, given: str) -> None:
    with pytest.raises(click.UsageError):
        parameter.type_cast_value(click.Context(every_command()[name]), given)


def test_version() -> None:
    assert run("--version").output == f"micl-zoo, version {__version__}\n"


def test_extract_says_what_it_did(image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path) -> None:
    folder, out = image_folder(5), tmp_path / "s"
    (folder / "bad.jpg").write_bytes(b"")
    words = ("extract", folder, "-o", out, "--weights", encoder_folder, "--workers", 0, "--precision", "fp32")
    result = run(*words)
    assert result.exit_code == 0
    assert "5 of 6 images embedded by vit_ti16.tin200 in fp32, 32 numbers each" in result.output
    assert f"1 could not be embedded: see {out / 'errors.jsonl'}" in result.output
    assert "1 shard was done already" in run(*words).output
    assert run(*words, "--strict").exit_code == 3


def test_extract_sums_up_for_machines_or_not_at_all(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    folder = image_folder(5)
    (folder / "bad.jpg").write_bytes(b"")
    words = ("extract", folder, "--weights", encoder_folder, "--workers", 0, "-o")
    said = next(
        json.loads(line) for line in run(*words, tmp_path / "a", "--json").output.splitlines() if line[0] == "{"
    )
    assert (said["images"], said["embedded"], said["refused"], said["failed"]) == (6, 5, 1, {})
    assert said["images_per_second"] > 0
    assert said["bottleneck"] in ("read", "decode", "transfer", "model", "write")
    assert said["manifest"]["shape"] == [32]
    quiet = run(*words, tmp_path / "b", "--quiet")
    assert (quiet.output, quiet.exit_code) == ("", 0)
    assert run(*words, tmp_path / "b", "--quiet", "--strict").exit_code == 3


def test_shards_that_failed_are_said(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(job: object, encoder: object, store: Store, work: Work) -> Iterator[Event]:
        for shard in iter(work):
            if shard == 1:
                work.failed[1] = "the process on cpu was ended by signal 9"
            elif shard is not None:
                index = store.shard(shard)
                rows = Rows(index.table["id"].to_pylist(), np.zeros((len(index), 32)), [])
                store.write_part(shard, rows)
                yield Event(shard, len(index), 0, True, Times())

    monkeypatch.setattr("micl_zoo.extraction.engines.run_here", fails)
    result = run("extract", image_folder(5), "-o", tmp_path / "s", "--weights", encoder_folder, "--shard-rows", 2)
    assert result.exit_code == 1
    assert "3 of 5 images embedded" in result.output
    assert "shard 1 failed twice: the process on cpu was ended by signal 9. The same command tries" in result.output


def test_several_sources(image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path) -> None:
    folder = image_folder(4)
    words = ("-o", tmp_path / "s", "--weights", encoder_folder, "--workers", 0)
    assert "2 of 2 images" in run("extract", folder / "000.jpg", folder / "002.jpg", *words).output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("extract", "nowhere", "-o", "x"), "no such source: 'nowhere'"),
        (("info", "vit_l61"), "Did you mean vit_l16"),
        (("train", "vit_l61", "--data", "x", "--out", "y"), "unknown recipe 'vit_l61'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(words: tuple[str, ...], text: str) -> None:
    result = run(*words)
    assert result.exit_code == 1
    assert text in result.output
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1


def test_wrong_usage_is_exit_code_2() -> None:
    assert run("extract", "x").exit_code == 2
    assert run("extract", "x", "-o", "y", "--pool", "max").exit_code == 2


@pytest.mark.parametrize("signal", [2, 15])
def test_a_run_that_was_told_to_stop_exits_as_a_shell_says_it(signal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **options: object) -> None:
        raise Interrupted("the run was interrupted", signal=signal)

    monkeypatch.setattr("micl_zoo.training.pretraining.pretrain.pretrain", stopped)
    result = run("train", "vit_ti16.tin200", "--data", "x", "--out", "y")
    assert (result.exit_code, result.output) == (128 + signal, "Error: the run was interrupted\n")


def test_a_ctrl_c_that_nobody_heeds(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("micl_zoo.extraction.extract.extract", stopped)
    result = run("extract", "x", "-o", "y")
    assert (result.exit_code, result.output) == (130, "\nError: stopped by SIGINT\n")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("train a --data b --data c --out d/ --gpus 2", "train a --data b --data c --out d"),
        ("train --out=d --data -b a --gpus=2 --restarts 3", "train a --data -b --out d"),
        (
            "train a --data b --out d --nodes 2 --rdzv e:1 --smoke --set f=1 --mfu 0.50 --knn g --knn-minutes 30",
            "train a --data b --out d --set f=1 --smoke --knn g --knn-minutes 30.0 --mfu 0.5",
        ),
        (
            "eval finetune --data b --out d --gpus 1 --workers 0 -- -a",
            "eval finetune --data b --out d --workers 0 -- -a",
        ),
    ],
)
def test_ranks_get_the_parsed_call_without_the_options_of_the_launcher(
    given: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = list[list[str]]()
    monkeypatch.setattr("sys.argv", ["python", "something else"])
    monkeypatch.setattr("micl_zoo.training.run.launch.launch", lambda words, **how: started.append(words))
    for call in (given, words + " --gpus 4" if "--" not in words.split() else given):
        assert run(*call.split()).exit_code == 0
    assert started == [words.split()] * 2


def test_unpublished_weights_on_the_command_line(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    result = run("extract", image_folder(1), "-o", tmp_path / "s", "--model", "vit_l16")
    assert result.exit_code == 1
    assert "micl-zoo train vit_l16.in1k --data IMAGES --out RUN" in result.output
    assert not (tmp_path / "s").exists()


def test_models_and_info() -> None:
    listing = run("models").output
    assert all(name in listing for name in RECORDS)
    rows = [json.loads(line) for line in run("models", "--json").output.splitlines()]
    assert rows[0]["published"]
    ours = sorted(RECORDS, key=lambda name: (not RECORDS[name].published, name))
    assert [row["name"] for row in rows] == [*ours, *PUBLIC]
    text = run("info", "vit_b16").output
    assert "86 M parameters" in text
    assert "not measured" in text
    assert "Three ways on" in text
    assert json.loads(run("info", "vit_l16.in1k", "--json").output)["transform"]["resize"] == [256, 256]


def test_train_writes_an_encoder(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    sets = [word for change in [*TWIN, "epochs=1", "warmup_epochs=0"] for word in ("--set", change)]
    result = run("train", "vit_ti16.tin200", "--data", image_folder(8), "--out", tmp_path / "r", *sets)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "r" / "encoder" / "model.safetensors").exists()
    assert "--set epochs=1" in json.loads((tmp_path / "r" / "run.json").read_text())["command"]


def test_help_and_import_load_nothing_heavy() -> None:
    heavy = [
        "importlib.metadata",
        "torch",
        "timm",
        "onnx",
        "numpy",
        "pyarrow",
        "PIL",
        "rich",
        "httpx",  # of huggingface_hub, whose constants say where the cache is
        "safetensors",
    ]
    code = (
        "import sys; import micl_zoo; micl_zoo.__all__, dir(micl_zoo)\n"
        "from micl_zoo.cli import main\n"
        f"helps = {[[*name.split(), '--help'] for name in every_command()]}\n"
        "for words in [*helps, ['models'], ['info', 'vit_ti16', '--json']]:\n"
        "    main(words, standalone_mode=False)\n"
        f"print(sorted(name for name in {heavy} if name in sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
