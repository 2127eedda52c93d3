"""A model card, written from records: what an encoder is, what it is good and bad at, what it cost, what was measured.

Every number comes out of a record; where there is none the card says "not measured". What follows from the images an
encoder was trained on stands in corpora.py.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from micl_zoo.encoders.device import ONNX_PRECISIONS
from micl_zoo.encoders.weights import WEIGHTS_FILE
from micl_zoo.encoders.zoo import RECORDS, timm_architecture
from micl_zoo.errors import UsageError

from ..evaluation.evaluate import PIXELS
from ..evaluation.labelled import KNOWN_SETS
from ..evaluation.tables import (
    RUNS_TO_PREDICT,
    cell,
    classifier_table,
    columns,
    figures,
    foretold,
    further_run,
    markdown,
    merge,
    with_interval,
)
from ..pretraining.plan import frozen_count, parameter_count
from .corpora import PEOPLE
from .trained import Trained, of_run, published

WIDTH = 120  # of a line of text
GLANCE = ("k-NN 20", "linear", "logreg", "5-shot")
NOT_MEASURED = "Not measured."
CORE_WATTS = 5  # assumed of a processor's core: server processors are sold with 2 to 8 W a core
# Assumed of a GPU: the most its board may draw, by NVIDIA's data sheets.
CARD_WATTS = {"H200": 700, "H100": 700, "A100": 400, "L40S": 350, "RTX 4090": 450}

CROPPED = "Only the centre square of a picture is seen."

Section = tuple[str, str]  # title and text
Rows = Mapping[str, object]


# Whole cards.


def card(encoder: str | None, measured: Sequence[Path] = (), *, hub: bool = False) -> str:
    """What `micl-zoo card` prints.

    Args:
        encoder: name of a published one, or a run's folder; None is the repository's card of all that are published.
        measured: records of a run's encoder.
        hub: with the front matter that the Hugging Face hub reads.

    Raises:
        UsageError, TrainingError: nothing there to describe, or records that are not of these weights.
    """
    if encoder is None:
        return repository_card()
    if not Path(encoder).is_dir():
        if measured:
            raise UsageError(f"the records of {encoder} come with the package; --eval is for a run's folder")
        return one_card(published(encoder), hub=hub)
    return one_card(of_run(Path(encoder), measured), hub=hub)


def repository_card(records: Path | None = None) -> str:
    """MODEL_CARD.md: every published encoder, the methods beside each other, and what is not published yet."""
    entries = [RECORDS[name] for name in sorted(RECORDS)]
    cards = [published(entry.name, records) for entry in entries if entry.published]
    parts = [
        "# Model card",
        "<!-- Written by `micl-zoo card -o MODEL_CARD.md` from training/records/: change those, and not this file. -->",
        _text(
            "The encoders that are published with micl-zoo. Every figure here comes from a record in "
            "[training/records](training/records), with the command that made it."
        ),
    ]
    for trained in cards:
        alone = dataclasses.replace(trained, rivals={}, ablations={})  # once for all, below
        parts += [f"## {trained.name}", _headed(_sections(alone), "###")]
    if cards:
        parts += [f"## {title}\n\n{text}" for title, text in _comparisons(cards[0])]
    waiting = [
        f"`{entry.name}`: {entry.summary.removesuffix('; no weights published yet')}"
        for entry in entries
        if not entry.published
    ]
    parts += ["## Not published yet", _text("Recipes without weights, and so without figures:"), _list(waiting)]
    return "\n\n".join(parts) + "\n"


def one_card(trained: Trained, *, hub: bool = False, repo: str | None = None) -> str:
    """The card of one encoder, with the hub's front matter or without.

    Args:
        trained: what to describe.
        hub: it is for the hub, and loads from there.
        repo: OWNER/NAME of the repository there; None is that of the table, if it says one.
    """
    head = [front_matter(trained)] if hub else []
    repo = (repo or (trained.entry and trained.entry.hub_repo) or "OWNER/NAME") if hub else None
    parts = [*head, f"# Model card: {trained.name}", _headed(_sections(trained, repo), "##")]
    return "\n\n".join(parts) + "\n"


def check_card(file: Path, text: str, command: str) -> None:
    """Hold a card that is there against what would be written now.

    Raises:
        UsageError: it differs, with the first line that does and the command that writes it anew.
    """
    if not file.exists():
        raise UsageError(f"{str(file)!r} does not exist. Write it by: {command}")
    there, wanted = file.read_text(encoding="utf-8").splitlines(), text.splitlines()
    if there == wanted:
        return
    lines = zip(there, wanted, strict=False)  # the shorter may be the beginning of the longer
    number = next((place for place, (one, other) in enumerate(lines) if one != other), min(len(there), len(wanted)))
    here = repr(there[number]) if number < len(there) else "the end of the file"
    raise UsageError(
        f"{str(file)!r} is not what the records say, from line {number + 1} on: {here}. Write it anew by: {command}"
    )


def front_matter(trained: Trained) -> str:
    """The YAML that the Hugging Face hub reads: licence, library, task, data, results."""
    from huggingface_hub import EvalResult, ModelCardData

    corpus, results = trained.corpus, []
    for name, found in _figures(trained)["results"].get(trained.name, {}).items():
        for heading, find in columns({"results": {trained.name: {name: found}}}):
            if heading in GLANCE[:3] and (figure := find(found)):
                results.append(EvalResult(
                    task_type="image-classification", dataset_type=name, dataset_name=name,
                    metric_type="accuracy", metric_name=f"{heading}, accuracy in percent",
                    metric_value=figure["accuracy"],
                ))  # fmt: skip
    data = ModelCardData(
        model_name=trained.name,
        license=corpus.hub_license if corpus else "unknown",
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=["image-feature-extraction", "timm", "micl-zoo", "self-supervised-learning", "contrastive-learning"],
        datasets=[corpus.hub_dataset] if corpus else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml().strip()}\n---"


# The sections of a card.


def _sections(trained: Trained, repo: str | None = None) -> Iterator[Section]:
    """Of a card, or with `repo` of that repository's card on the hub."""
    yield "Details", _details(trained, repo)
    yield "Load it", _loading(trained, repo)
    yield from _judgement(trained)
    yield "Training", _training(trained)
    yield "Compute and energy", _compute(trained)
    yield "Evaluation", _evaluation(trained)
    yield from _again(trained)
    yield from _comparisons(trained)
    yield "Fine-tuning", _finetuning(trained)
    yield "As ONNX", _onnx(trained)
    yield "Reproduce", _reproduce(trained)


def _details(trained: Trained, repo: str | None) -> str:
    recipe, transform = trained.recipe, trained.transform
    shape = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    architecture, changed = timm_architecture(**{key: getattr(recipe, key) for key in shape})
    changes = f" with {', '.join(f'{key}={value:g}' for key, value in changed.items())}" if changed else ""
    total, frozen = parameter_count(recipe) + frozen_count(recipe), frozen_count(recipe)
    patches, width = (recipe.image_size // recipe.patch_size) ** 2, recipe.embed_dim
    rows = {
        "architecture": f"vision transformer, timm's `{architecture}`{changes}: patches of {recipe.patch_size} x "
        f"{recipe.patch_size}, {width} wide, {recipe.depth} blocks, {recipe.num_heads} heads",
        "parameters": f"{total:,}"
        + (f", {frozen:,} of them the position table, which is not trained" if frozen else ""),
        "input": f"RGB, {transform.size} x {transform.size}: shorter side resized to {transform.resize} "
        f"({transform.interpolation}, by Pillow), centre crop, mean {_numbers(transform.mean)} and deviation "
        f"{_numbers(transform.std)} of pixels in 0..1",
        "output": f"class token, {width} numbers; mean of the {patches} patch tokens, {width}; both, {2 * width}; or "
        "every token",
        "file": f"`{WEIGHTS_FILE if repo else trained.file}`, {recipe.save_dtype}, {trained.weights['bytes']:,} bytes",
        "sha256": f"`{trained.weights['sha256']}`",
        "method": "MiCL, masked image contrastive learning ([arXiv 2411.09858](https://arxiv.org/abs/2411.09858), also "
        "called OCL), in an implementation of its own",
        "licence": trained.license,
    }
    return _table(rows)


def _loading(trained: Trained, repo: str | None) -> str:
    lines = ["import micl_zoo", "", f"encoder = {trained.load}"]
    if repo:
        lines = ["import timm", "", f'encoder = timm.create_model("hf-hub:{repo}", pretrained=True)  # (B, 3, S, S)']
        lines += ["", "import micl_zoo  # with the transform, files and folders of images, ONNX"]
        lines += ["from huggingface_hub import snapshot_download", ""]
        lines += [f'encoder = micl_zoo.load(weights=snapshot_download("{repo}"))']
    rows = f'rows = encoder.embed(["cat.jpg", "dog.jpg"])  # (2, {trained.recipe.embed_dim}) float32, unit length'
    return "\n".join(["```python", *lines, rows, "```"])


def _judgement(trained: Trained) -> Iterator[Section]:
    corpus = trained.corpus
    if corpus is None:
        own = "To be said by whoever trained it: this run was on images of their own"
        yield "Intended uses", _text(f"{own}, and what it is good for depends on what they show.")
        yield (
            "Limits and biases",
            _list([f"{own}; things that they do not show are represented worse.", CROPPED, PEOPLE]),
        )
        yield "Data and terms", _text(f"{own}: what they show, whose they are, and under which terms. {_used(trained)}")
        return
    yield "Intended uses", _list(corpus.uses)
    yield "Limits and biases", _list([*corpus.limits, CROPPED])
    yield "Data and terms", "\n\n".join(map(_text, (f"{corpus.about} {_used(trained)}", corpus.terms)))


def _used(trained: Trained) -> str:
    data = trained.run["data"]
    refused = len(data.get("refused", []))
    left_out = f"; {refused:,} of them could not be decoded and were replaced by others" if refused else ""
    return f"{data['images']:,} images were used{left_out}, their labels were not."


def _training(trained: Trained) -> str:
    notes = [_text(note) for note in (trained.entry.notes if trained.entry else ())]
    last = trained.record["curve"][-1]
    end = f"The last step's loss was {last['loss']:.2f}"
    contrasted = f"{trained.recipe.contrast_size:,} images that are contrasted with each other"
    end += f", its contrastive accuracy {last['accuracy']:.1%} among {contrasted}.".replace("%", " %")
    resumed = trained.run.get("resumed", [])
    if resumed:
        end += f" The run was interrupted and went on with other code or elsewhere {len(resumed)} times."
    return "\n\n".join([_table(_training_rows(trained)), _text(end), *notes])


def _training_rows(trained: Trained) -> Rows:
    r, result, data = trained.recipe, trained.run["result"], trained.run["data"]
    views, total = trained.run["recipe"].get("views", 2), r.num_patches
    each = math.floor(total * (1 - r.mask_ratio)) // views
    color = (
        f"gain within ±{r.color_gain:g} and bias within ±{r.color_bias:g} a channel, on normalised pixels; grey with "
    )
    color += f"probability {r.grey_probability:g}"
    stretched = (
        f"; positions stretched to the {r.image_size} of the finished encoder" if r.crop_size < r.image_size else ""
    )
    rows = {
        "recipe": f"`{r.name}`, seed {r.seed}",
        "data": f"`{data['source']}`, fingerprint `{data['fingerprint'][:16]}…`",
        "length": f"{result['steps']:,} steps of {r.batch_size:,} images = {result['images_seen']:,} images seen, "
        f"{r.epochs:g} epochs",
        "crops": f"{r.crop_size} x {r.crop_size} pixels from {r.crop_scale_min:g} to {r.crop_scale_max:g} of the "
        f"image's area, width / height {r.crop_ratio_min:.2f} to {r.crop_ratio_max:.2f}, {r.interpolation}; flipped "
        f"with probability {r.flip_probability:g}{stretched}",
        "views": f"{views} of {each} patches each, disjoint, out of {total} (mask ratio {r.mask_ratio:g})",
        "colour per view": color if r.view_color else "none, as in the paper",
        "loss": f"symmetric cross-entropy of tSP similarities, kappa {r.kappa:g}, temperature {r.temperature:g}; "
        f"{r.negatives} negatives: {r.contrast_size:,} images contrasted with each other",
        "optimiser": f"AdamW, betas {r.beta1:g} and {r.beta2:g}, weight decay {r.weight_decay:g}, none on "
        "biases and norms",
        "learning rate": f"{r.base_lr:g} x {r.batch_size:,} / 256 = {r.lr:g}, after {r.warmup_epochs:g} epochs of "
        f"linear warm-up; half a cosine down to {r.min_lr:g}",
        "precision": f"{result['precision']} autocast" if result["precision"] != "fp32" else "fp32",
    }
    others = {key: value for key, value in trained.run["recipe"].items() if key not in SAID}  # newer fields, too
    return {**rows, "other settings": ", ".join(f"{key}={value}" for key, value in others.items())}


SAID = {
    "name", "corpus", "seed", "image_size", "patch_size", "embed_dim", "depth", "num_heads", "pixel_mean", "pixel_std",
    "epochs", "warmup_epochs", "batch_size", "base_lr", "min_lr", "beta1", "beta2", "weight_decay", "precision",
    "views", "mask_ratio", "kappa", "temperature", "negatives", "contrast_batch", "crop_size", "crop_scale_min",
    "crop_scale_max", "crop_ratio_min", "crop_ratio_max", "interpolation", "flip_probability", "view_color",
    "color_gain", "color_bias", "grey_probability", "save_dtype", "checkpoint_minutes", "keep_epochs",
}  # fmt: skip


def _compute(trained: Trained) -> str:
    run, result = trained.run, trained.run["result"]
    hours, (device, count, watts) = result["hours"], _devices(run)
    devices = f"{hours:g} h x {count} {device}{'s' * (count > 1)}"
    energy = f"no watts to assume for {run['machine'].get('card')}"
    if watts is not None:
        used = hours * count * watts
        shown = f"{used / 1000:,.1f} kWh" if used >= 1000 else f"{used:,.0f} Wh"
        energy = f"{devices} x {watts} W = {shown}; the watts are assumed, the rest of the machine is left out"
    rate = "not measured, the run took seconds"  # hours are recorded to a thousandth
    if hours:
        rate = f"{result['images_seen']:,} / ({hours:g} x 3,600 s) = {result['images_seen'] / (hours * 3600):,.0f}"
        rate += ", over the whole run"
    rows = {
        "hardware": f"{_machine(run['machine'])}; processes: {run.get('processes', 1)}",
        "device hours": f"{devices} = {hours * count:,.4g} {device} hours",
        "images a second": rate,
        "energy": f"not measured. Estimate: {energy}",
    }
    return _table(rows)


def _devices(run: Mapping[str, Any]) -> tuple[str, int, int | None]:
    """What computed, how many of them, and the watts that are assumed of each."""
    machine = run["machine"]
    if gpu := machine.get("card"):
        return "GPU", run.get("processes", 1), next((watts for name, watts in CARD_WATTS.items() if name in gpu), None)
    threads = machine.get("threads", machine["cores"]) * run.get("processes", 1)  # older records do not say
    return "core", min(threads, machine["cores"]), CORE_WATTS


def _figures(trained: Trained) -> dict[str, Any]:
    """All evaluations as one record, the encoder first."""
    own_first = sorted(trained.evaluations.items(), key=lambda item: len(item[1]["results"]))
    whole = merge(dict(own_first))
    order = sorted(whole["results"], key=lambda subject: subject != trained.name)
    return {**whole, "results": {subject: whole["results"][subject] for subject in order}}


def _evaluation(trained: Trained) -> str:
    if not trained.evaluations:
        command = f"micl-zoo eval all {trained.target} --data SET --baseline random --baseline pixels -o FILE"
        return f"{NOT_MEASURED} `{command}` does it."
    whole = _figures(trained)
    shown = columns(whole)
    parts = [_text(_protocol(whole, trained)), _sets(whole, trained)]
    parts += ["At a glance, ± half of the 95 % interval (few-shot: ± the deviation over draws):"]
    parts += [figures(whole, [one for one in shown if one[0] in GLANCE], cell)]
    if knn := [one for one in shown if one[0].startswith("k-NN")]:
        parts += ["k-NN by number of neighbours, with 95 % intervals:", figures(whole, knn, with_interval)]
    if {"linear", "logreg"} & {heading for heading, _ in shown}:
        said = "Classifiers on frozen features, with 95 % intervals, and the setting that the validation images chose:"
        parts += [said, classifier_table(whole)]
    if shots := [one for one in shown if one[0].endswith("-shot")]:
        parts += ["Few-shot, ± the deviation over draws of the training images:", figures(whole, shots, cell)]
    parts += [_list(left_out)] if (left_out := list(_left_out(whole))) else []
    return "\n\n".join([*parts, *_upright(trained)])


def _protocol(whole: Mapping[str, Any], trained: Trained) -> str:
    """How the figures were made, in sentences."""
    how, precisions = whole["protocol"], {one["encoder"]["precision"] for one in trained.evaluations.values()}
    baselines = {
        "random": '"random" is the same ViT as it is initialised, before any step',
        "pixels": f'"pixels" are the images\' own, at {PIXELS} x {PIXELS}',
    }
    beside = "; ".join(text for name, text in baselines.items() if name in whole["results"])
    said = [
        "Accuracy in percent of the test images, with 95 % bootstrap intervals over them. One training run, one seed"
        + (": for others, see below." if trained.repeats else "."),
        *([f"{beside}."] if beside else []),
        f"k-NN: cosine of class tokens, votes weighted with temperature {how['temperature']:g}.",
        f"Linear: a linear layer, {how['epochs']} epochs at each of {len(how['learning_rates'])} learning rates. "
        f"Logreg: logistic regression at each of {len(how['inverse_penalties'])} values of C. Validation images out of "
        "the training part choose between them, and at a glance between the pools; the test images are asked once.",
        f"Few-shot: logistic regression (C {how['few_shot_c']:g}) on class tokens, {how['draws']} draws.",
        f"Seed {how['seed']}; embedded in {' and '.join(sorted(precisions))}.",
    ]
    return " ".join(said)


def _sets(whole: Mapping[str, Any], trained: Trained) -> str:
    own = trained.corpus.own_sets if trained.corpus else {}
    lines = []
    for name, facts in whole["data"].items():
        known = KNOWN_SETS.get(name)
        images = [_part(facts, part) for part in ("train", "test")]
        terms = known.terms if known else "not known here"
        lines.append(
            [name, f"{facts['classes']:,}", *images, str(facts.get("refused", 0)), facts.get("known", "-"), terms]
        )
    head = ["data", "classes", "images learnt from", "images asked", "refused", "files", "terms"]
    said = [f"{name} is {own[name]}." for name in whole["data"] if name in own]
    if own and len(said) < len(whole["data"]):
        said.append(f"The encoder was not trained on {'the others' if said else 'any of them'}.")
    return "\n\n".join([markdown(head, lines), *([_text(" ".join(said))] if said else [])])


def _part(facts: Mapping[str, Any], part: str) -> str:
    taken, there = facts[f"{part}_images"], facts.get(f"{part}_images_there")
    return f"{taken:,}" if there in (None, taken) else f"{taken:,} of {there:,}"


def _left_out(whole: Mapping[str, Any]) -> Iterator[str]:
    """Few-shot figures that there cannot be, and why."""
    seen = set()
    for sets in whole["results"].values():
        for name, found in sets.items():
            for shots, figure in found.get("few-shot", {}).items():
                if "left_out" in figure and (name, shots) not in seen:
                    seen.add((name, shots))
                    yield f"{name}, {shots}-shot: {figure['left_out']}."


def _upright(trained: Trained) -> Iterator[str]:
    if one := trained.upright:
        yield _text(
            f"Copies of one scene under the {one['images_of_the_scene']} EXIF orientations embed alike: mean cosine "
            f"{one['mean_pairwise_cosine']:.4f}, against {one['highest_cosine_to_another']:.4f} at most to any other "
            f"of {one['other_images']} photographs."
        )


def _again(trained: Trained) -> Iterator[Section]:
    """The same recipe with other seeds, figure by figure."""
    if not (trained.repeats and trained.evaluations):
        return
    lines: list[list[str]] = []
    outside: list[bool] = []
    held: list[bool] = []
    for heading, name, (first, *again) in repeated(trained):
        accuracies = [first["accuracy"], *(one["accuracy"] for one in again)]
        left = [not first["low"] <= one <= first["high"] for one in accuracies[1:]]
        shown = [f"{one:.1f}{', outside' * out}" for one, out in zip(accuracies[1:], left, strict=True)]
        lines.append([heading, name, with_interval(first), *shown])
        if expected := further_run(accuracies):
            spread = f"{mean(accuracies):.1f} ± {stdev(accuracies):.1f}"
            lines[-1] += [spread, f"{expected[0]:.1f} to {expected[1]:.1f}"]
        outside += left
        held += foretold(accuracies)
    said = (
        "Trained again by the same recipe, from another start and in another order, and measured on the same images. "
        f"{sum(outside)} of {len(outside)} figures of the repetitions lie outside the interval of the published "
        "encoder's, which is one over test images alone."
    )
    head = ["", "data", f"published, seed {trained.recipe.seed}"]
    head += [f"seed {repeat.run['recipe']['seed']}" for repeat in trained.repeats]
    if 1 + len(trained.repeats) >= RUNS_TO_PREDICT:
        head += ["mean ± deviation", "a further run"]
        said += (
            " The last column is for whoever trains it once more: where that run's figure lies in 95 of 100 cases, if "
            "runs are spread as a normal distribution (Student's t)."
        )
    if held:
        said += f" Asked of each run in turn, by the others, this holds for {sum(held)} of {len(held)} figures."
    yield "With other seeds", "\n\n".join([_text(said), markdown(head, lines)])


def repeated(trained: Trained) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Column, set, and the figures of the encoder and of each repetition, where all have one.

    Raises:
        UsageError: a repetition was measured on other images, or with other settings.
    """
    again = {repeat.evaluation_file: {**repeat.evaluation, "results": {}} for repeat in trained.repeats}
    merge({**trained.evaluations, **again})
    ours = _figures(trained)
    glance = [column for column in columns(ours) if column[0] in GLANCE[:3]]
    theirs = [repeat.evaluation["results"][trained.name] for repeat in trained.repeats]
    for (heading, find), (name, found) in product(glance, ours["results"][trained.name].items()):
        runs = [one for results in (found, *(each.get(name, {}) for each in theirs)) if (one := find(results))]
        if len(runs) == 1 + len(theirs):
            yield heading, name, runs


def _comparisons(trained: Trained) -> Iterator[Section]:
    """The same ViT trained by several methods, and by MiCL with one thing changed, from benchmarks/rivals.py."""
    if trained.rivals:
        yield "MiCL beside other methods", _compared("other methods", trained.rivals)
    if trained.ablations:
        base = " Each arm but `micl-paper` is `micl-ours` with what its line says changed."
        yield "MiCL with one thing changed", _compared("one thing changed", trained.ablations, base)


def _compared(what: str, records: Mapping[str, Mapping[str, Any]], more: str = "") -> str:
    """Tables of records, by file, and what their arms are."""
    said = (
        "Not the published encoder: the same small ViT, trained in each way on the same images and machine. "
        "Accuracy in percent of the test images, ± half of the 95 % interval, of class token or mean of the patch "
        "tokens, whichever the training images choose. The interval is of the test images alone, not of seeds."
    )
    arms = {name: arm["trained"] for record in records.values() for name, arm in record["arms"].items()}
    if "micl-ours" in arms:
        more += " Arms are described as on the day of their record; the encoder above has a later recipe."
    tables = [part for record in records.values() for part in _compared_tables(record)]
    made = "\n".join(["```sh", *dict.fromkeys(record["command"] for record in records.values()), "```"])
    rows = [_provenance(what, file, record) for file, record in records.items()]
    parts = [_text(said + more), _list(f"`{name}`: {text}" for name, text in arms.items()), *tables, made]
    return "\n\n".join([*parts, _plain_table(PROVENANCE, rows)])


def _compared_tables(record: Mapping[str, Any]) -> Iterator[str]:
    yield f"**{_alike(next(iter(record['arms'].values())))}**"
    for heading, find in columns(record):
        if heading in GLANCE[:3]:
            lines = []
            for subject, found in record["results"].items():
                row = [find(found.get(name, {})) for name in record["data"]]
                over_sets = f"{sum(one['accuracy'] for one in row if one) / len(row):.1f}" if all(row) else "-"
                lines.append([subject, *_arm(record, subject), *map(cell, row), over_sets])
            table = markdown(["method", "minutes", "images seen", "images/s", *record["data"], "mean"], lines)
            yield f"{heading}:\n\n{table}"


def _alike(arm: Mapping[str, Any]) -> str:
    """What all arms of a record had alike."""
    budget, recipe = arm["settings"]["budget"], arm["settings"]["recipe"]
    patches = (recipe["crop_size"] // recipe["patch_size"]) ** 2
    what = (
        f"for a ViT of {recipe['depth']} blocks {recipe['embed_dim']} wide on {patches} patches, seed {recipe['seed']}"
    )
    if budget["images"]:
        return f"Equal images: {budget['images']:,} {what}"
    where = "one processor core" if arm["clock"] == "processor" else arm["machine"]["card"]
    return f"Equal time: {budget['minutes']:g} minutes of {where} {what}"


def _arm(record: Mapping[str, Any], subject: str) -> list[str]:
    arm = record["arms"].get(subject, {})
    return [_amount(arm.get(key), digits) for key, digits in ARM_FACTS.items()]


ARM_FACTS = {"minutes": 1, "images_seen": 0, "images_per_second": 0}  # digits


def _amount(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _finetuning(trained: Trained) -> str:
    if not trained.finetunings:
        return NOT_MEASURED
    lines = []
    for one in trained.finetunings.values():
        recipe, data = one["recipe"], one["data"]
        lines.append([
            data["source"], with_interval(one["top1"]), with_interval(one.get("top5")),
            _part(data, "train"), f"{one['test_images']:,}",
            f"`{recipe['name']}`", f"{recipe['epochs']:g}", f"{one['steps']:,} x {recipe['batch_size']:,}",
            f"{one['hours']:g}", _machine(one["machine"]),
        ])  # fmt: skip
    head = ["data", "top-1 % (95 %)", "top-5 %", "images trained on", "images asked", "recipe", "epochs", "steps"]
    said = "All weights are trained on, with a linear head; those of the last step are tested, and nothing is chosen."
    return "\n\n".join([said, markdown([*head, "hours", "machine"], lines)])


def _onnx(trained: Trained) -> str:
    made, record = trained.onnx, trained.export
    parts = [
        _text(f"`micl-zoo export {trained.target} -o DIR` writes a file for ONNX Runtime and compares it with PyTorch.")
    ]
    if made:
        parts = [
            _text(
                f"`{trained.onnx_file}` holds the same weights for ONNX Runtime, in {made.precision}: "
                f"{made.bytes:,} bytes, sha256 `{made.sha256}`."
            )
        ]
    if record is None:
        return "\n\n".join([*parts, f"What precisions lose: {NOT_MEASURED.lower()}"])
    torch_rate = record["images_per_second"]["torch fp32"]["median"]
    said = (
        f"What the precisions of `micl-zoo export` lose against PyTorch in float32, on {record['photographs']} "
        "photographs; k-NN accuracy in percent, with its change; images/s of the model alone on "
        f"{_machine(record['machine'])}, where PyTorch does {torch_rate:.1f}. {_sentence(record['int8_note'])}"
    )
    head = ["precision", "MB", "mean cosine", "least cosine", "same neighbour"]
    head += [*[f"k-NN {name}" for name in record["knn_percent"]], "images/s"]
    lines = [_onnx_line(record, precision) for precision in ONNX_PRECISIONS if precision in record["drift"]]
    return "\n\n".join([*parts, _text(said), markdown(head, lines)])


def _onnx_line(record: Mapping[str, Any], precision: str) -> list[str]:
    row, name = record["drift"][precision], f"onnx {precision}"
    accuracy = [f"{of[name]:.2f} ({of[name] - of['torch fp32']:+.2f})" for of in record["knn_percent"].values()]
    drift = [f"{row['bytes'] / 1e6:.1f}", f"{row['cosine_mean']:.6f}", f"{row['cosine_min']:.6f}"]
    agreement = f"{100 * row['neighbour_agreement']:.1f} %"
    return [precision, *drift, agreement, *accuracy, f"{record['images_per_second'][name]['median']:.1f}"]


def _reproduce(trained: Trained) -> str:
    """Every command, and with which code, on what and when it ran."""
    made: list[tuple[str, str, Mapping[str, Any]]] = [("training", trained.run_file, trained.run)]
    made += [("evaluation", file, one) for file, one in trained.evaluations.items()]
    for again in trained.repeats:
        made += [("training again", again.file, again.run), ("evaluation", again.evaluation_file, again.evaluation)]
    made += [("fine-tuning", file, one) for file, one in trained.finetunings.items()]
    made += [("ONNX", f"{trained.name}.export.json", trained.export)] if trained.export else []
    made += [("orientations", f"{trained.name}.upright.json", trained.upright)] if trained.upright else []
    commands = ["```sh", *[one["command"] for *_, one in made if "command" in one], "```"]
    lines = [_provenance(what, file, one) for what, file, one in made]
    return "\n\n".join(["\n".join(commands), _plain_table(PROVENANCE, lines)])


PROVENANCE = ("what", "record", "date", "commit", "machine", "versions")


def _provenance(what: str, file: str, one: Mapping[str, Any]) -> list[str]:
    date = str(one.get("date") or one.get("started") or "")[:10] or "not recorded"
    commit, _, dirty = (one.get("commit") or "not recorded").partition("-")
    commit = f"`{commit[:12]}`" + ", with changes" * bool(dirty)
    machine = _machine(one["machine"]) if "machine" in one else "not recorded"
    return [what, f"`{file}`", date, commit, machine, _versions(one.get("versions", {}))]


# Small pieces of text.


def _text(words: str) -> str:
    return textwrap.fill(words, WIDTH, break_long_words=False, break_on_hyphens=False)


def _list(items: Iterable[str]) -> str:
    return "\n".join(textwrap.indent(_text(item), "  ").replace("  ", "- ", 1) for item in items)


def _headed(sections: Iterable[Section], level: str) -> str:
    return "\n\n".join(f"{level} {title}\n\n{text}" for title, text in sections)


def _table(rows: Rows) -> str:
    return _plain_table(["", ""], [[key, str(value)] for key, value in rows.items()])


def _plain_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Of cells too long to be lined up."""
    texts = ["| " + " | ".join(line) + " |" for line in [head, *lines]]
    return "\n".join([texts[0], "|" + "---|" * len(head), *texts[1:]])


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _machine(machine: Mapping[str, Any]) -> str:
    processor = f"{machine['processor']}, {machine['cores']} cores"
    return f"{machine['card']}, {machine['card_memory_gib']:g} GiB ({processor})" if "card" in machine else processor


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
