"""Gathers what a model card says: what an encoder is, what it is good and bad at, what it cost, what was measured.

The text stands in the templates beside this file. Every number comes out of a record; where there is none the card says
"not measured". What follows from the images that an encoder was trained on stands in corpora.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from micl_zoo.encoders.device import ONNX_PRECISIONS
from micl_zoo.errors import UsageError, unknown
from micl_zoo.files import read_regular
from micl_zoo.zoo.ours import RECORDS, is_name, timm_architecture, vit_sizes

from ..corpora import CORPORA, PEOPLE
from ..evaluation import tables
from ..evaluation.protocols import METHODS, PIXELS
from ..evaluation.tables import Column, Markdown, cell, code, markdown, merge, plain, with_interval
from ..pretraining.verdict import terms_text, told
from ..run.gpus import gpu_watts
from .trained import Trained, of_run, published, read_all

HERE = Path(__file__).parent
CORE_WATTS = 5  # assumed of a processor's core: server processors are sold with 2 to 8 W per core
# Fields of a recipe that the rows of a card say; all others are listed.
SAID = {
    "name", "corpus", "seed", "image_size", "patch_size", "embed_dim", "depth", "num_heads", "pixel_mean", "pixel_std",
    "epochs", "warmup_epochs", "batch_size", "base_lr", "min_lr", "beta1", "beta2", "weight_decay", "precision",
    "views", "mask_ratio", "kappa", "temperature", "negatives", "contrast_batch", "crop_size", "crop_scale_min",
    "crop_scale_max", "crop_ratio_min", "crop_ratio_max", "interpolation", "flip_probability", "view_color",
    "color_gain", "color_bias", "grey_probability", "save_dtype", "checkpoint_minutes", "keep_epochs",
}  # fmt: skip


OUTPUTS = {
    "native": "the row that timm pools",
    "projection": "the projection into the space of texts",
    "mean": "mean of the patch tokens",
}


# Whole documents.


def card(encoder: str | None, measured: Sequence[Path] = (), *, hub: bool = False, ablations: bool = False) -> str:
    """Write what `micl-zoo card` prints.

    Args:
        encoder: name of a published one, or a run's folder; None is the repository's card of all that are published.
        measured: records of a run's encoder.
        hub: add the front matter that the Hugging Face hub reads.
        ablations: write docs/ablations.md instead.

    Raises:
        UsageError, TrainingError: nothing there to describe, or records that are not of these weights.
    """
    if ablations:
        return ablations_page()
    if encoder is None:
        return repository_card()
    if not Path(encoder).is_dir():
        if not is_name(encoder):
            raise UsageError(f"no folder of a training run at {encoder!r}, and {unknown('model', encoder, RECORDS)}")
        if measured:
            raise UsageError(f"the records of {encoder} come with the package; --eval is for a run's folder")
        return one_card(published(encoder), hub=hub)
    return one_card(of_run(Path(encoder), measured), hub=hub)


def repository_card(records: Path | None = None) -> str:
    """Write MODEL_CARD.md: every published encoder, and what is not published yet."""
    entries = [RECORDS[name] for name in sorted(RECORDS)]
    cards = {entry.name: _body(published(entry.name, records), "###") for entry in entries if entry.published}
    waiting = [entry for entry in entries if not entry.published]
    return tables.render(HERE / "repository.md.jinja", cards=cards, waiting=waiting)


def ablations_page(records: Path | None = None) -> str:
    """Write docs/ablations.md: the same ViT by several methods, and by MiCL with one thing changed."""
    shown, made = {}, []
    for pattern, what in (("rivals", "other methods"), ("ablations", "one thing changed")):
        found = read_all(records, f"{pattern}*.json")
        arms = {name: arm for record in found.values() for name, arm in record["arms"].items()}
        lines: dict[tuple[str, ...], list[list[str]]] = {}  # by head: those on the same sets are in one table
        for head, these in map(_compared, found.values()):
            there = lines.setdefault(head, [])
            there += [line for line in these if line[1:] not in [other[1:] for other in there]]  # pixels, once
        shown[pattern] = {
            "arms": {name: arm["trained"] for name, arm in arms.items()},
            "networks": dict.fromkeys(map(_network, arms.values())),
            "tables": [markdown(*one) for one in lines.items()],
        }
        made += [(what, file, record) for file, record in found.items()]
    if not made:
        raise UsageError("there are no records of benchmarks/rivals.py: see training/records/ in the repository")
    return tables.render(HERE / "ablations.md.jinja", **shown, provenance=_provenance(made))


def one_card(trained: Trained, *, hub: bool = False, repo: str | None = None) -> str:
    """Write the card of one encoder; one for the hub loads from `repo` there, by default that of the table."""
    repo = (repo or (trained.entry and trained.entry.hub_repo) or "OWNER/NAME") if hub else None
    head = f"{front_matter(trained)}\n\n" if hub else ""
    return f"{head}# Model card: {plain(trained.name)}\n\n{_body(trained, '##', repo)}"


def check_card(file: Path, text: str, command: str) -> None:
    """Compare a document that is there with what would be written now."""
    if not file.exists():
        raise UsageError(f"{str(file)!r} does not exist. Write it by: {command}")
    there, wanted = read_regular(file).decode("utf-8", "replace").splitlines(), text.splitlines()
    if there == wanted:
        return
    lines = zip(there, wanted, strict=False)  # the shorter may be the beginning of the longer
    number = next((place for place, (one, other) in enumerate(lines) if one != other), min(len(there), len(wanted)))
    here = repr(there[number]) if number < len(there) else "the end of the file"
    raise UsageError(
        f"{str(file)!r} is not what the records say, from line {number + 1} on: {here}. Write it anew by: {command}"
    )


def front_matter(trained: Trained) -> str:
    """Write the YAML that the Hugging Face hub reads: licence, library, task, data, results."""
    from huggingface_hub import EvalResult, ModelCardData

    corpus, whole = trained.corpus, _figures(trained)
    found = product(whole["results"].get(trained.name, {}).items(), _measured_once(whole))
    results = [
        EvalResult(
            task_type="image-classification", dataset_type=name, dataset_name=name, metric_type="accuracy",
            metric_name=f"{one.heading}, accuracy in percent", metric_value=figure["accuracy"],
        )
        for (name, each), one in found
        if (figure := one.find(each))
    ]  # fmt: skip
    data = ModelCardData(
        model_name=trained.name,
        license=corpus.hub_license if corpus else _hub_license(trained),
        base_model=_hub_name(trained.start),
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=["image-feature-extraction", "timm", "micl-zoo", "self-supervised-learning", "contrastive-learning"],
        datasets=[corpus.hub_dataset] if corpus else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml().strip()}\n---"


# The parts of a card.


def _body(trained: Trained, heading: str, repo: str | None = None) -> Markdown:
    recipe, run = trained.recipe, trained.run
    start, config = trained.start, trained.config
    if start and config:
        architecture, changed = config.architecture, config.model_args
    else:
        architecture, changed = timm_architecture(**vit_sizes(vars(recipe)))
    parameters, frozen = trained.parameters
    return tables.render(
        HERE / "card.md.jinja",
        h=heading, t=trained, r=recipe, run=run, repo=repo, result=run["result"], data=run["data"],
        corpus=trained.corpus, transform=trained.transform, last=trained.record["curve"][-1], architecture=architecture,
        changed=f" with {', '.join(f'{key}={_number(value)}' for key, value in changed.items())}" if changed else "",
        parameters=parameters, frozen=frozen, start=start,
        start_terms=terms_text(start["license"]) if start and start.get("license") else "",
        change=told(run, recipe), output=_output(trained),
        view_patches=recipe.kept // recipe.views,
        others={key: value for key, value in run["recipe"].items() if key not in SAID},  # newer fields, too
        notes=trained.entry.notes if trained.entry else (),
        machine=_machine, PEOPLE=PEOPLE, PIXELS=PIXELS,
        tuned=_finetuning(trained), exports=_exports(trained.export), again=_again(trained),
        provenance=_provenance(trained.made), **_compute(run), **_evaluation(trained),
    )  # fmt: skip


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _output(trained: Trained) -> str:
    width, own = trained.recipe.embed_dim, trained.config.pool if trained.start and trained.config else "cls"
    if own in OUTPUTS:
        return f"{OUTPUTS[own]}; other rows: encoder.pools"
    patches = (trained.recipe.image_size // trained.recipe.patch_size) ** 2
    return (
        f"class token, {width} numbers; mean of the {patches} patch tokens, {width}; both, {2 * width}; or every token"
    )


def _hub_license(trained: Trained) -> str:
    """Name the licence as the hub does: an identifier of its list, `other`, or `unknown`."""
    is_name = re.fullmatch(r"[a-z0-9][a-z0-9.-]+", trained.license)
    return trained.license if is_name else "other" if trained.start else "unknown"


def _hub_name(start: Mapping[str, Any] | None) -> str | None:
    """Name the hub's repository of a start, without its commit."""
    source = (start or {}).get("source") or ""
    return source.removeprefix("hf-hub:").partition("@")[0] if source.startswith("hf-hub:") else None


def _compute(run: Mapping[str, Any]) -> dict[str, Any]:
    """Say what computed, how many of them, the watts that are assumed of each, and what follows."""
    machine, processes, hours = run["machine"], run.get("processes", 1), run["result"]["hours"]
    if gpu := machine.get("card"):
        device, count, watts = "GPU", processes, gpu_watts(gpu)
    else:
        threads = (machine.get("threads") or machine["cores"]) * processes  # older records do not say
        device, count, watts = "core", min(threads, machine["cores"]), CORE_WATTS
    used = hours * count * (watts or 0)
    return {
        "device": device, "devices": f"{count} {device}{'s' * (count > 1)}", "device_hours": hours * count,
        "watts": watts, "energy": f"{used / 1000:,.1f} kWh" if used >= 1000 else f"{used:,.0f} Wh",
        "rate": hours and f"{run['result']['images_seen'] / (hours * 3600):,.0f}",  # recorded to a thousandth
    }  # fmt: skip


def _figures(trained: Trained) -> dict[str, Any]:
    """Join all evaluations into one record, the encoder first."""
    own_first = sorted(trained.evaluations.items(), key=lambda item: len(item[1]["results"]))
    whole = merge(dict(own_first))
    order = sorted(whole["results"], key=lambda subject: subject != trained.name)
    return {**whole, "results": {subject: whole["results"][subject] for subject in order}}


def _measured_once(record: Mapping[str, Any]) -> list[Column]:
    """List the columns at a glance that are of one measurement, without those of several draws."""
    found = [results for *_, results in tables.rows(record)]
    shown = tables.columns(record, glance=True)
    return [one for one in shown if any("low" in (one.find(each) or {}) for each in found)]


def _evaluation(trained: Trained) -> dict[str, Any]:
    """Gather tables and facts of the evaluation; `whole` is None where there is none."""
    if not trained.evaluations:
        return {"whole": None, "scores": []}
    whole, name, own = _figures(trained), trained.name, trained.corpus
    alone = {**whole, "results": {name: whole["results"][name]}}
    methods = {one.method.name: one.method for one in tables.columns(whole)}
    settings = {key: len(value) if isinstance(value, list) else value for key, value in whole["protocol"].items()}
    scores = [
        (data, ours, column.find(whole["results"].get("random", {}).get(data, {})))
        for column in tables.columns(alone, glance=True)
        if column.method.name == "knn"
        for data, _, found in tables.rows(alone)
        if (ours := column.find(found))
    ]
    own_set = f"{own.key} is {own.own_test}." if own and own.key in whole["data"] else ""
    if own and len(whole["data"]) > bool(own_set):
        own_set += f" The encoder was not trained on {'the others' if own_set else 'any of them'}."
    return {
        "whole": whole,
        "scores": scores,
        "precisions": sorted({one["encoder"]["precision"] for one in trained.evaluations.values()}),
        "about": [method.about.format(**settings) for method in methods.values()],
        "sets": _sets(whole["data"]),
        "own_sets": own_set.strip(),
        "table": tables.table(whole),
        "by_pool": tables.pool_table(alone, name),
        "left_out": dict.fromkeys(
            f"{data}, {method.heading.format(key)}: {figure['left_out']}."
            for data, _, found in tables.rows(whole)
            for method in METHODS.values()
            for key, figure in found.get(method.name, {}).items()
            if "left_out" in figure
        ),
    }


def _sets(data: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for name, facts in data.items():
        terms = CORPORA[name].terms if name in CORPORA else "not known here"
        counts = [f"{facts['classes']:,}", _part(facts, "train"), _part(facts, "test"), str(facts.get("refused", 0))]
        lines.append([name, *counts, facts.get("known", "-"), terms])
    return markdown(["data", "classes", "train images", "test images", "refused", "files", "terms"], lines)


def _part(facts: Mapping[str, Any], part: str) -> str:
    taken, there = facts[f"{part}_images"], facts.get(f"{part}_images_there")
    return f"{taken:,}" if there in (None, taken) else f"{taken:,} of {there:,}"


def _again(trained: Trained) -> dict[str, Any] | None:
    """Compare the same recipe with other seeds, figure by figure."""
    if not (trained.repeats and trained.evaluations):
        return None
    lines, outside, held = list[list[str]](), list[bool](), list[bool]()
    for heading, name, (first, *others) in repeated(trained):
        accuracies = [one["accuracy"] for one in (first, *others)]
        left = [not first["low"] <= one <= first["high"] for one in accuracies[1:]]
        shown = [f"{one:.1f}{', outside' * out}" for one, out in zip(accuracies[1:], left, strict=True)]
        lines.append([heading, name, with_interval(first), *shown])
        if expected := tables.further_run(accuracies):
            spread = f"{mean(accuracies):.1f} ± {stdev(accuracies):.1f}"
            lines[-1] += [spread, f"{expected[0]:.1f} to {expected[1]:.1f}"]
        outside += left
        held += tables.foretold(accuracies)
    seeds = [f"seed {run['recipe']['seed']}" for run in (trained.run, *(repeat.run for repeat in trained.repeats))]
    predicts = 1 + len(trained.repeats) >= tables.RUNS_TO_PREDICT
    table = markdown(
        ["", "data", f"published, {seeds[0]}", *seeds[1:], *["mean ± deviation", "a further run"] * predicts], lines
    )
    counts = {"outside": sum(outside), "figures": len(outside), "held": sum(held), "asked": len(held)}
    return {"table": table, "predicts": predicts, **counts}


def repeated(trained: Trained) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Go through column, set, and the figures of the encoder and of each repetition, where all have one."""
    again = {repeat.evaluation_file: {**repeat.evaluation, "results": {}} for repeat in trained.repeats}
    merge({**trained.evaluations, **again})
    ours = _figures(trained)
    theirs = [repeat.evaluation["results"][trained.name] for repeat in trained.repeats]
    for column, (name, found) in product(_measured_once(ours), ours["results"][trained.name].items()):
        runs = [one for results in (found, *(each.get(name, {}) for each in theirs)) if (one := column.find(results))]
        if len(runs) == 1 + len(theirs):
            yield column.heading, name, runs


def _compared(record: Mapping[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Make the head and the lines of a table of all arms of a record."""
    data, shown, arms = record["data"], _measured_once(record), record["arms"]
    training, lines = _training(next(iter(arms.values()))), []
    for subject, found in record["results"].items():
        arm, line = arms.get(subject), [training, subject]
        if arm:
            line += [f"{arm['minutes']:,.1f}", f"{arm['images_seen']:,}", f"{arm['images_per_second']:,.0f}"]
        else:
            line += ["-"] * 3
        for column in shown:
            row = [column.find(found.get(name, {})) for name in data]
            line += [
                *map(cell, row),
                f"{sum(one['accuracy'] for one in row if one) / len(row):.1f}" if all(row) else "-",
            ]
        lines.append(line)
    head = ["training", "method", "minutes", "images seen", "images/s"]
    for column, (first, *others) in product(shown, [[*data, "mean"]]):
        head += [f"{column.heading}: {first}", *others]
    return tuple(head), lines


def _training(arm: Mapping[str, Any]) -> str:
    """Say what the arms of a record have alike."""
    budget, recipe = arm["settings"]["budget"], arm["settings"]["recipe"]
    where = "" if arm["clock"] == "processor" else f" of {arm['machine']['card']}"
    length = f"{budget['images']:,} images" if budget["images"] else f"{budget['minutes']:g} min{where}"
    return f"{length}, {recipe['depth']} blocks, seed {recipe['seed']}"


def _network(arm: Mapping[str, Any]) -> str:
    recipe = arm["settings"]["recipe"]
    patches = (recipe["crop_size"] // recipe["patch_size"]) ** 2
    return f"{recipe['depth']} blocks {recipe['embed_dim']} wide on {patches} patches"


def _finetuning(trained: Trained) -> str:
    lines = [
        [
            one["data"]["source"], with_interval(one["top1"]), with_interval(one.get("top5")),
            _part(one["data"], "train"), f"{one['test_images']:,}", code(one["recipe"]["name"]),
            f"{one['recipe']['epochs']:g}", f"{one['steps']:,} x {one['recipe']['batch_size']:,}", f"{one['hours']:g}",
            _machine(one["machine"]),
        ]
        for one in trained.finetunings.values()
    ]  # fmt: skip
    head = ["data", "top-1 % (95 %)", "top-5 %", "train images", "test images", "recipe", "epochs", "steps", "hours"]
    return markdown([*head, "machine"], lines) if lines else ""


def _exports(record: Mapping[str, Any] | None) -> str:
    """Write the drift and the speed of each precision as a table."""
    if record is None:
        return ""
    head = ["precision", "MB", "mean cosine", "least cosine", "same neighbour"]
    head += [*[f"k-NN {name}" for name in record["knn_percent"]], "images/s"]
    lines = []
    for precision in (one for one in ONNX_PRECISIONS if one in record["drift"]):
        row, name = record["drift"][precision], f"onnx {precision}"
        accuracy = [f"{of[name]:.2f} ({of[name] - of['torch fp32']:+.2f})" for of in record["knn_percent"].values()]
        drift = [f"{row['bytes'] / 1e6:.1f}", f"{row['cosine_mean']:.6f}", f"{row['cosine_min']:.6f}"]
        speed = f"{record['images_per_second'][name]['median']:.1f}"
        lines.append([precision, *drift, f"{100 * row['neighbour_agreement']:.1f} %", *accuracy, speed])
    return markdown(head, lines)


def _provenance(made: Iterable[tuple[str, str, Mapping[str, Any]]]) -> tuple[Markdown, Markdown]:
    """Say of each record by which command, with which code, where and when it was made."""
    lines, versions = [["what", "record", "date", "commit", "machine", "command"], ["---"] * 6], []
    for what, file, one in made:
        date = str(one.get("date") or one.get("started") or "")[:10] or "not recorded"
        commit, _, dirty = (one.get("commit") or "not recorded").partition("-")
        commit = code(commit[:12]) + ", with changes" * bool(dirty)
        machine = plain(_machine(one["machine"])) if "machine" in one else "not recorded"
        lines.append([what, code(file), plain(date), commit, machine, code(one.get("command") or "not recorded")])
        versions.append((", ".join(f"{name} {version}" for name, version in one.get("versions", {}).items()), file))
    most = Counter(text for text, _ in versions).most_common(1)[0][0]
    others, usual = "", most.split(", ")
    for text, file in versions:
        if text != most:
            other = ", ".join(one for one in text.split(", ") if one not in usual) or text
            others += f" For {code(file, table=False)}: {plain(other)}."
    table = "\n".join(["| " + " | ".join(line) + " |" for line in lines])
    return Markdown(table), Markdown(f"Versions: {plain(most)}.{others}")


def _machine(machine: Mapping[str, Any]) -> str:
    processor = f"{machine['processor']}, {machine['cores']} cores"
    return f"{machine['card']}, {machine['card_memory_gib']:g} GiB ({processor})" if machine.get("card") else processor
