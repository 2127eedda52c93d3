"""A run goes to the hub as one commit and comes back as it was; what must not go there does not."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import TWIN, picture
from hub import OWNER, TOKEN, Hub, environment_for, hub_on_loopback
from safetensors.torch import load_file
from test_card import evaluation

import micl_zoo
from micl_zoo.cli import main
from micl_zoo.errors import ExportError, MiclZooError, TrainingError, UsageError
from micl_zoo.files import file_sha256
from micl_zoo.images.transform import Transform
from micl_zoo.training.pretraining.pretrain import pretrain
from micl_zoo.training.release import publish as module
from micl_zoo.training.release.card import check_card
from micl_zoo.training.release.publish import LoadedBack, publish, row_text
from micl_zoo.training.release.trained import run_record
from micl_zoo.zoo import ours
from micl_zoo.zoo.ours import RECORDS, OnnxFile, Record
from micl_zoo.zoo.weights import header, save_weights

NAME, REPO = "vit_ti16.mine", f"{OWNER}/tiny-mine"
PLAIN = {"README.md", "config.json", "model.safetensors"}
PLAIN |= {f"records/{name}" for name in ("run.json", "metrics.jsonl", f"{NAME}.json")}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("publish")
    (folder / "images").mkdir()
    for number in range(8):
        picture(number).save(folder / "images" / f"{number}.png")
    options = [*TWIN, "epochs=1", "warmup_epochs=0", f"name={NAME}"]
    pretrain("vit_ti16.tin200", folder / "images", folder / "run", overrides=options, device="cpu")
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def record(run: Path) -> Path:
    """Of an evaluation, with a path that is nobody's business."""
    file = run.parent / "my-own-name.json"
    file.write_text(json.dumps(evaluation(file_sha256(run / "encoder" / "model.safetensors"), NAME)))
    return file


# huggingface_hub sends large files by an argument that the httpx below it would have under another name
sends = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_on_loopback() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "hf-hub:evil/repo"},
        {"architecture": "resnet18"},
        {"model_args": {"depth": 100_000}},
        {"pretrained_cfg": {"url": "https://evil/x", "file": "/etc/passwd", "hf_hub_id": "evil/repo"}},
        None,
    ],
    ids=str,
)
def test_another_configuration_beside_the_weights_is_not_published(run: Path, changes: Any) -> None:
    file = run / "encoder" / "config.json"
    good = file.read_text()
    file.write_text("{" if changes is None else json.dumps(json.loads(good) | changes))
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write("[default]\nsecret = 1\n")
    made = publish(run, REPO, export=None, dry_run=True)
    assert (made.folder / "config.json").read_text() == good
    assert "secret" not in (made.folder / "records" / "metrics.jsonl").read_text()


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, ["publish", *map(str, words)])


def files(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def pasted(row: str) -> Record:
    """The record that a row is, where the table stands."""
    found = eval(row.strip().removesuffix(","), vars(ours))
    assert isinstance(found, Record)
    return found


FETCH = """
import json, sys
from pathlib import Path
import numpy as np
from huggingface_hub import hf_hub_download
from PIL import Image
import micl_zoo
from micl_zoo.zoo import ours
from micl_zoo.zoo.hub import download
from micl_zoo.files import file_sha256
row, folder, picture = sys.argv[1:]
record = eval(row.strip().removesuffix(","), vars(ours))
ours.RECORDS[record.name] = record
file = hf_hub_download(record.hub_repo, "model.safetensors", revision=record.hub_commit)
assert file_sha256(Path(file)) == record.sha256
encoder = micl_zoo.load(record.name, device="cpu")
assert encoder.record is record
placed = download(record.name, folder, onnx=True)
assert [one.kept for one in placed] == [False] * 3, placed
exported = micl_zoo.load(record.name, device="cpu", backend="onnx")
assert exported.record is record
by_repository = micl_zoo.load(record.hub_repo, device="cpu")
assert by_repository.record is record
assert by_repository.source == f"hf-hub:{record.hub_repo}@{record.hub_commit}"
assert by_repository.config.license == record.license
encoders = (encoder, exported, by_repository)
print(json.dumps([one.embed(Image.open(picture))[0].tolist() for one in encoders]))
"""


@sends
def test_a_run_to_the_hub_and_back(hub: Hub, run: Path, record: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    done = invoke(run, "--repo", REPO, "--eval", record, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    whole = PLAIN | {"model.onnx", "model.json", f"records/{NAME}.eval.json"}
    ((repo, commit, summary, sent),) = hub.made
    assert (repo, summary, set(sent)) == (REPO, f"Publish {NAME}", whole)
    assert hub.commits[REPO, commit].keys() == whole | {".gitattributes"}
    assert files(run / "hub") == whole
    assert (said["commit"], said["url"]) == (commit, f"{hub.url}/{REPO}/commit/{commit}")
    assert all(hub.commits[REPO, commit][name] == (run / "hub" / name).read_bytes() for name in whole)
    for name in ("config.json", "model.safetensors"):
        assert (run / "hub" / name).read_bytes() == (run / "encoder" / name).read_bytes()

    row = pasted(said["row"])
    assert dataclasses.asdict(row) == dataclasses.asdict(pasted(row_text(row)))
    assert (row.hub_repo, row.hub_commit, row.metrics) == (REPO, commit, {"tin200": 60.2, "caltech101": 62.2})
    assert run_record(run)["weights"] == {"sha256": row.sha256, "bytes": row.bytes}
    assert json.loads((run / "hub" / "records" / str(row.training_record)).read_text()) == run_record(run)
    image = tmp_path / "image.png"
    picture(3).save(image)
    asked = [said["row"], str(tmp_path / "fetched"), str(image)]
    words = [sys.executable, "-W", "error::UserWarning", "-c", FETCH, *asked]
    fetched = subprocess.run(words, env=environment_for(hub, tmp_path / "cache"), capture_output=True, text=True)
    assert fetched.returncode == 0, fetched.stderr
    expected = micl_zoo.load(run / "encoder", device="cpu").embed(image)[0]
    rows = np.array(json.loads(fetched.stdout.splitlines()[-1]))
    np.testing.assert_allclose(rows[0], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(rows[1], expected, rtol=0, atol=1e-4)
    assert (rows[2] == rows[0]).all()
    for name in ("config.json", "model.safetensors", "model.onnx"):
        assert (tmp_path / "fetched" / name).read_bytes() == (run / "hub" / name).read_bytes()

    again = invoke(run, "--repo", REPO, "--no-onnx", "--message", "Without ONNX")  # the old files would contradict
    assert again.exit_code == 0, again.output
    assert hub.commits[REPO, hub.heads[REPO]].keys() == PLAIN | {".gitattributes"}
    assert hub.made[1][2:] == ("Without ONNX", ["README.md", "model.json", "model.onnx", f"records/{NAME}.eval.json"])


def test_the_card_speaks_of_its_repository(run: Path, record: Path) -> None:
    made = publish(run, REPO, export=None, measured=[record], dry_run=True)
    text = (run / "hub" / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---\n", 2)[1])
    assert head["library_name"] == "timm"
    assert f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in text
    assert f'micl_zoo.load("{REPO}")' in text
    assert "OWNER/NAME" not in text
    assert f"| evaluation | `records/{NAME}.eval.json` |" in text
    assert "| training | `records/run.json` |" in text
    written = "".join(file.read_text("utf-8") for file in (run / "hub").rglob("*") if file.suffix in (".md", ".jsonl"))
    assert str(run) not in written
    assert "my-own-name" not in written
    assert made.files == {name: (run / "hub" / name).stat().st_size for name in PLAIN | {f"records/{NAME}.eval.json"}}
    with pytest.raises(UsageError, match="is not what the records say"):  # the card in the run's folder is another
        check_card(run / "hub" / "README.md", "# Other\n", "write it")


def test_a_dry_run_needs_no_network_and_prints_the_row(
    run: Path, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: pytest.fail("asked for a token"))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("asked the hub"))
    done = invoke(run, "--repo", REPO, "--no-onnx", "--dry-run", "--eval", record, "--out", run.parent / "there")
    assert done.exit_code == 0, done.output
    assert files(run.parent / "there") == PLAIN | {f"records/{NAME}.eval.json"}
    size = (run / "encoder" / "model.safetensors").stat().st_size
    assert f"{size:>15,}  model.safetensors\n" in done.output
    assert f"A dry run, nothing was sent to https://huggingface.co/{REPO}\n" in done.output
    row = done.output.partition("\n\n")[2]
    assert row.startswith('    Record(\n        name="vit_ti16.mine",\n        summary="ViT, ')
    assert '        hub_commit="<commit>",\n' in row
    assert '        corpus="8 images of one\'s own",\n        license="unknown",\n' in row
    assert "        transform=Transform(size=(32, 32), resize=(32, 32)),\n" in row
    assert '        metrics={"tin200": 60.2, "caltech101": 62.2},\n    ),\n' in row
    assert pasted(row).transform == Transform.square(32, 32)
    bare = invoke(run, "--repo", REPO, "--no-onnx", "--dry-run").output
    assert "zoo/ours.py, without metrics, as no record with k-NN was given by --eval" in bare
    assert files(run / "hub") == PLAIN


def test_rows_are_written_as_the_table_is() -> None:
    for record in RECORDS.values():
        assert pasted(row_text(record)) == record
    default = row_text(RECORDS["vit_ti16.tin200"])
    assert '        corpus="tin200",\n' in default
    assert "        onnx=OnnxFile(\n            file=" in default
    small = dataclasses.replace(RECORDS["vit_s16.tin200"], onnx=OnnxFile("model.onnx", "fp32", "0" * 64, 3))
    assert pasted(row_text(small)) == small


def test_a_row_takes_over_what_the_table_says(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = dataclasses.replace(RECORDS["vit_s16.tin200"], name=NAME)
    monkeypatch.setitem(RECORDS, NAME, waiting)
    run_json = json.loads((run / "run.json").read_text())
    run_json["data"]["images"] = 100_000  # of the recipe's corpus
    (run / "run.json").write_text(json.dumps(run_json))
    made = publish(run, REPO, export=None, dry_run=True)
    assert made.record.summary == waiting.summary
    assert (made.record.corpus, made.record.license) == (ours.TIN200, ours.FILE_TERMS)
    assert '        corpus="tin200",\n' in made.row
    assert f"| licence | {ours.FILE_TERMS} |" in (run / "hub" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "micl/", "/tiny", "micl/a b", "micl/a--b", "micl/a.git", "-a/b"])
def test_a_name_that_is_no_repository(run: Path, repo: str) -> None:
    with pytest.raises(UsageError, match=r"is no repository of the hub: give OWNER/NAME"):
        publish(run, repo, export=None, dry_run=True)
    assert not (run / "hub").exists()


def test_what_is_not_published(run: Path, hub: Hub, record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="no run to describe"):
        publish(run / "encoder", REPO, export=None)
    other = run.parent / "other.json"
    other.write_text(json.dumps(evaluation("abc", NAME)))
    with pytest.raises(UsageError, match=r"other.json is of other weights"):
        publish(run, REPO, export=None, measured=[record, other])
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageError, match=r"there is no token for the hub: make one that may write to micl .*HF_TOKEN"):
        publish(run, REPO, export=None)
    monkeypatch.undo()
    run_json = json.loads((run / "run.json").read_text())
    result = run_json.pop("result")
    (run / "run.json").write_text(json.dumps(run_json))
    with pytest.raises(TrainingError, match="is not finished"):
        publish(run, REPO, export=None, dry_run=True)
    (run / "run.json").write_text(json.dumps(run_json | {"result": result}))
    assert not (run / "hub").exists()
    assert not hub.requests


def test_a_smoke_twin_is_not_for_others(hub: Hub, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "smoke"
    pretrain("vit_ti16.tin200", image_folder(16), folder, smoke=True, overrides=["epochs=1"], device="cpu", workers=0)
    with pytest.raises(UsageError, match=r"vit_ti16.smoke is a smoke-test recipe"):
        publish(folder, REPO, export=None)
    assert not hub.requests
    assert publish(folder, REPO, export=None, dry_run=True).record.name == "vit_ti16.smoke"


@pytest.mark.parametrize("there", ["encoder", "checkpoints", "."])
def test_no_folder_but_its_own_is_replaced(run: Path, there: str) -> None:
    before = files(run)
    with pytest.raises(UsageError, match=r"was not built by publish: give a new or empty folder by --out"):
        publish(run, REPO, export=None, out=run / there, dry_run=True)
    assert files(run) == before


def test_what_does_not_embed_alike_is_not_sent(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(run, REPO, export=None, dry_run=True)
    older = {name: (run / "hub" / name).stat().st_mtime_ns for name in files(run / "hub")}
    by_timm = module._by_timm
    monkeypatch.setattr(module, "_by_timm", lambda *args: by_timm(*args) * 1.001)
    with pytest.raises(ExportError, match=r"timm embeds otherwise than micl_zoo .* where 1e-05 is allowed. Nothing"):
        publish(run, REPO, export=None)
    monkeypatch.undo()
    assert not hub.made
    assert {name: (run / "hub" / name).stat().st_mtime_ns for name in files(run / "hub")} == older
    assert {child.name for child in run.iterdir() if child.name.startswith(".hub")} == set()


def test_without_onnx_installed_there_is_a_way_on(run: Path) -> None:
    def export(**_: object) -> None:
        raise UsageError("an export needs onnx: pip install 'micl-zoo[onnx]'")

    with pytest.raises(UsageError, match=r"pip install 'micl-zoo\[onnx\]'; or leave the ONNX file out by --no-onnx"):
        publish(run, REPO, export=export, dry_run=True)
    assert not (run / "hub").exists()


def test_several_records_have_names_of_their_own(run: Path, record: Path) -> None:
    data = json.loads(record.read_text())
    second, tuned = run.parent / "second.json", run.parent / "result.json"
    second.write_text(json.dumps(data))
    recipe = {"name": "small", "epochs": 15, "batch_size": 64}
    weights = {"encoder": NAME, "encoder_sha256": data["encoder"]["weights_sha256"]}
    facts = {key: data[key] for key in ("date", "commit", "machine", "versions")}
    result = {"top1": {"accuracy": 70.0, "low": 68.0, "high": 72.0}, "test_images": 9, "steps": 3, "hours": 0.1}
    result |= {"data": data["data"]["caltech101"], "encoder": weights, "recipe": recipe, "command": "it", **facts}
    tuned.write_text(json.dumps(result))
    publish(run, REPO, export=None, measured=[record, second, tuned], dry_run=True)
    names = {f"records/{NAME}.{kind}.json" for kind in ("eval", "eval-2", "finetune")}
    assert files(run / "hub") == PLAIN | names
    text = (run / "hub" / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in names)


def test_an_onnx_file_of_other_weights_is_not_sent(
    run: Path, monkeypatch: pytest.MonkeyPatch, encoder_folder: Path
) -> None:
    load, other = module.load, micl_zoo.load(encoder_folder, device="cpu")

    def export(weights: Path, out: Path) -> None:
        (out / "model.onnx").write_bytes(b"stands for an exported file")

    def loads(*args: Any, backend: str = "torch", **options: Any) -> Any:
        return other if backend == "onnx" else load(*args, **options)

    monkeypatch.setattr(module, "load", loads)
    with pytest.raises(ExportError, match=r"model.onnx embeds otherwise than micl_zoo: a difference of .* --no-onnx"):
        publish(run, REPO, export=export, dry_run=True)
    assert not (run / "hub").exists()


def test_what_the_hub_refuses_is_one_line_and_the_folder_stays(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(repo: str) -> str:
        monkeypatch.setattr(module, "check", lambda *_: LoadedBack(0, 0.0, None))  # seen to elsewhere
        result = invoke(run, "--repo", repo, "--no-onnx")
        assert result.exit_code == 1
        assert result.output.startswith("Error: ")
        assert result.output.count("\n") == 1
        assert f"Nothing was published. What was built stays in {run / 'hub'}" in result.output
        assert files(run / "hub") == PLAIN
        return result.output

    assert "the token may not write to others/tiny: take one with write access to others" in refused("others/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    assert "the hub does not know the token: make a new one" in refused(REPO)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert f"{REPO} could not be sent to http://127.0.0.1:1: " in refused(REPO)
    assert not hub.made


@sends
def test_a_private_repository_and_nothing_new(run: Path, hub: Hub) -> None:
    made = [publish(run, REPO, export=None, private=True) for _ in range(2)]
    assert hub.private == {REPO}
    assert len(hub.made) == 1
    assert made[0].commit == made[1].commit == hub.heads[REPO]


@pytest.mark.parametrize("name", ["../../elsewhere.x", "/tmp/elsewhere.x", "a.b/../../x", "..", ".x", "a.b\n"])
def test_nothing_is_written_by_a_name_that_leads_elsewhere(run: Path, name: str) -> None:
    weights = run / "encoder" / "model.safetensors"
    config = header(weights)["config"] | {"micl_zoo": {"name": name}}
    save_weights(run / "encoder", load_file(weights), config, {}, "float32")
    before = files(run.parent)
    with pytest.raises(MiclZooError, match=r"arch\.tag"):
        publish(run, REPO, export=None, dry_run=True)
    assert files(run.parent) == before
