"""Text towers: rows of texts in the joint space of CLIP, SigLIP and PE image encoders.

Which text tower was trained with which image tower of timm is read from the tables of timm and open_clip, whose code
the towers and most tokenizers are. Weights are safetensors only, by a pinned commit or from a file.

Shapes: B texts, T tokens of the context, D numbers per row, as many as the image tower's.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import UsageError, WeightsError, nearest
from ..files import file_sha256
from ..schema import read_json, shown
from ..telemetry import no_telemetry
from ..zoo.names import hub_of
from ..zoo.pins import OPEN_CLIP, pin
from ..zoo.weights import read_tensors, shapes

if TYPE_CHECKING:
    from torch import Tensor

    Tokenizer = Callable[..., Tensor]  # (texts, context_length=...) -> (B, T) int64, cut to the context in silence

Shape = tuple[int, ...]
logger = getLogger(__name__)
INSTALL = "pip install 'micl-zoo[text]'"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
HOME, QUICK = "timm/", "_quickgelu_"  # the repositories with both files; how timm names the activation
LOCAL = "local"  # tag of encoders that were loaded from files of this machine
MAX_LETTERS = 2000  # per text; a context has 77 tokens at most
IMAGE_TENSORS = ("visual.", "logit_scale", "logit_bias")  # of both towers' file, what is not the text tower's
# timm's tag of an image tower: the family in the name of open_clip's model, where a config names timm's architecture.
FAMILIES = {"webli": "SigLIP", "webli_i18n": "SigLIP-i18n", "v2_webli": "SigLIP2", "fb": "PE-Core"}
FAMILY = re.compile("SigLIP2|SigLIP-i18n|SigLIP|PE-Core")
EXAMPLES = (
    "vit_base_patch32_clip_quickgelu_224.openai",
    "vit_base_patch16_siglip_224.v2_webli",
    "vit_pe_core_base_patch16_224.fb",
)


@dataclass(frozen=True)
class Tower:
    """The text tower that was trained with an image tower."""

    image: str  # timm's name of the image tower, `arch.tag`
    image_repo: str  # on the hub, with the image tower's weights
    model: str  # open_clip's name, of a configuration that comes with open_clip
    repo: str  # on the hub, with OPEN_CLIP
    tokenizer: str | None  # repository with TOKENIZER_FILES; None: the tokenizer comes with open_clip
    pool: str  # of the image tower's rows that are in the joint space
    dim: int  # D
    quick: str | None = None  # timm's name of the same weights with the activation they were trained with, if another


class _Pair(NamedTuple):
    model: str  # open_clip's name
    repo: str  # with OPEN_CLIP
    config: dict[str, Any]  # open_clip's, of both towers


def towers() -> dict[str, Tower]:
    """Return all text towers by timm's names of their image towers; UsageError without open_clip."""
    _open_clip()
    return _towers()


@functools.cache
def _towers() -> dict[str, Tower]:
    import timm

    by_repo, by_family = _pairs()
    found, quick = dict[str, Tower](), dict[str, str]()
    for name in timm.list_pretrained():
        config, (arch, _, tag) = timm.get_pretrained_cfg(name), name.partition(".")
        repo = config.hf_hub_id or ""
        repo += name if repo.endswith("/") else ""
        pairs = by_repo[repo] or by_family[arch, FAMILIES.get(tag, "")]
        if len(pairs) == 1:
            model, text_repo, ours = pairs[0]
            pool = "projection" if config.num_classes else "native"  # CLIP's projection is the classifier to timm
            tokenizer = ours["text_cfg"].get("hf_tokenizer_name")
            found[name] = Tower(name, repo, model, text_repo, tokenizer, pool, ours["embed_dim"])
            if QUICK in arch:
                quick[repo] = name
    return {
        name: one if QUICK in name else dataclasses.replace(one, quick=quick.get(one.image_repo))
        for name, one in found.items()
    }


def _pairs() -> tuple[dict[Any, list[_Pair]], dict[Any, list[_Pair]]]:
    """Return open_clip's models by the repository of both towers, and by timm's architecture and family."""
    open_clip = _open_clip()
    by_repo, by_family = defaultdict(list), defaultdict(list)
    for model, tag in open_clip.list_pretrained():
        weights, config = open_clip.get_pretrained_cfg(model, tag), open_clip.get_model_config(model)
        text, repo = config["text_cfg"], weights.get("hf_hub", "")
        known = repo.startswith(HOME) and repo.endswith("/")  # else it names another file than OPEN_CLIP
        known &= text.get("hf_tokenizer_name", HOME).startswith(HOME) and "hf_model_name" not in text
        # open_clip lists these weights under two models, and only one has the activation that they were trained with.
        if known and weights.get("quick_gelu", False) == config.get("quick_gelu", False):
            pair = _Pair(model, repo.rstrip("/"), config)
            by_repo[pair.repo].append(pair)
            family = FAMILY.search(model)
            by_family[config["vision_cfg"].get("timm_model_name"), family and family[0]].append(pair)
    return by_repo, by_family


def find_tower(name: str, asked: str | None = None) -> Tower:
    """Find the text tower of an image encoder.

    Args:
        name: of the encoder, `arch.tag`.
        asked: name of the encoder whose tower is taken, as a user says who made `name`.

    Raises:
        UsageError: no text tower is known.
    """
    every, (arch, _, tag) = towers(), name.partition(".")
    if asked is not None and asked not in every:
        raise UsageError(f"no text tower of open_clip is known for {asked!r}. {_known(asked)}")
    if found := every.get(asked or name):
        return found
    if tag == LOCAL and (same := [one for one in every if one.startswith(f"{arch}.")]):
        raise UsageError(
            f"the store was made from files of this machine, which do not say whose {arch} they hold: say so with "
            f"--text-tower {' or '.join(same)}"
        )
    raise UsageError(
        f"no text tower of open_clip is known for {name!r}, so texts cannot be compared with its rows: extract anew "
        f"with another encoder. {_known(name)}"
    )


def _known(name: str) -> str:
    every = towers()
    near = nearest(name, every)
    text = f"{len(every)} encoders of timm have one, such as {', '.join(EXAMPLES)}"
    return f"{near + ' ' if near else ''}{text} (micl_zoo.encoders.text.towers() lists all)"


def check_pair(tower: Tower, name: str, pool: str, shape: Sequence[int], source: str | None = None) -> None:
    """Raise a UsageError where rows of an image encoder are not in the space of a text tower.

    Args:
        tower: see `find_tower`.
        name: of the encoder, `arch.tag`.
        pool: of the rows.
        shape: of a row.
        source: where the encoder came from, `hf-hub:OWNER/NAME@COMMIT`; None where that is not known.
    """
    if name not in (tower.image, f"{tower.image.partition('.')[0]}.{LOCAL}"):
        raise UsageError(f"the store was made by {name}, and the text tower is that of {tower.image}")
    if pool != tower.pool:
        raise UsageError(
            f"rows of {name} with pool {pool!r} are not in the space that it shares with texts: extract anew with "
            f"--pool {tower.pool}"
        )
    if [*shape] != [tower.dim]:
        raise UsageError(
            f"rows of {name} have {' x '.join(map(str, shape))} numbers, and those of its text tower {tower.model} "
            f"have {tower.dim}: the store was made by another model of that name"
        )
    if (repo := hub_of(source)[0]) and repo != tower.image_repo:
        raise UsageError(
            f"the rows were made by {repo}, and the text tower of {name} belongs to {tower.image_repo}: texts "
            "can be compared with rows of that encoder only"
        )


class TextEncoder:
    """A text tower with its tokenizer and weights, on the CPU in float32. Made by `load_text`; str() names it."""

    def __init__(self, tower: Tower, model: Any, tokenizer: Tokenizer, place: str, sha256: str) -> None:
        self.tower, self.model, self.tokenizer, self.place, self.sha256 = tower, model, tokenizer, place, sha256

    def __str__(self) -> str:
        return f"{self.tower.model} of open_clip, {self.place}, sha256 {self.sha256}"

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts as they are, without a template, to (B, D) float32 of unit length; a long one is cut, and said.

        Raises:
            UsageError: a text is empty or has more than MAX_LETTERS letters.
        """
        import torch
        import torch.nn.functional as F

        check_texts(texts)
        if not texts:
            return np.zeros((0, self.tower.dim), np.float32)
        tokens = self._tokens(texts)
        if tokens.max() >= self.model.vocab_size:
            raise WeightsError(f"the tokenizer is not that of {self}: it has token {tokens.max()}, which that has not")
        with torch.inference_mode():
            rows = [F.normalize(self.model(one[None]).double(), dim=-1) for one in tokens]  # alone: no other changes it
        return torch.cat(rows).float().numpy()

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        """Return (B, T); UsageError where the tokenizer leaves nothing of a text."""
        tokens, nothing = self.tokenizer([*texts]), self.tokenizer([""])
        width = tokens.shape[1]
        whole = self.tokenizer([*texts], context_length=max(width, 4 * MAX_LETTERS + 8))  # 4 bytes per letter at most
        for text, short, long in zip(texts, tokens, whole, strict=True):
            if short.equal(nothing[0]):
                raise UsageError(f"the tokenizer of {self.tower.model} leaves nothing of the text {shown(text)}")
            if not short.equal(long[:width]):
                logger.warning(
                    "the text %s is longer than the %d tokens that %s reads: its end is left out",
                    *(shown(text), width, self.tower.model),
                )
        return tokens


def check_texts(texts: Sequence[Any]) -> None:
    """Refuse what is no text, is empty or is too long, before anything is loaded."""
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"texts must be texts, got a {type(text).__name__}")
        if not text.strip():
            raise UsageError(f"a text to search for is empty: {text!r}")
        if not text.isascii() and text.encode(errors="ignore").decode() != text:
            raise UsageError(f"a text to search for has halves of letters, as of bytes in no encoding: {shown(text)}")
        if len(text) > MAX_LETTERS:
            raise UsageError(f"a text has {len(text):,} letters, at most {MAX_LETTERS:,} are allowed: {shown(text)}")


def load_text(tower: Tower, weights: str | os.PathLike[str] | None = None, *, source: str | None = None) -> TextEncoder:
    """Load a text tower by a pinned commit from the hub, or from a file.

    Args:
        tower: see `find_tower`.
        weights: open_clip's safetensors file of both towers or of the text tower, or a folder with it, as
            OPEN_CLIP; where the tokenizer is the hub's, its files lie in the same folder. None is the hub.
        source: where the image tower came from; if both are in one repository, the same commit is taken.

    Raises:
        UsageError: open_clip or tokenizers is not installed.
        WeightsError: the weights or the tokenizer cannot be had, or do not fit.
    """
    _open_clip()
    if tower.tokenizer:
        _tokenizers()  # raises before anything is downloaded
    if weights is not None:
        file, sources, place = _local(tower, Path(weights))
        sha256 = file_sha256(file)
    else:
        file, sources, place, sha256 = _from_hub(tower, source)
    tokenizer = _hub_tokenizer(tower, *sources) if tower.tokenizer else _own_tokenizer(tower)
    encoder = TextEncoder(tower, _build(tower, file), tokenizer, place, sha256)
    if source is None:
        logger.warning(
            "the store does not say where its encoder came from: its rows are taken for those of %s", tower.image_repo
        )
    if tower.quick:
        logger.warning(
            "%s computes GELU where its weights were trained with QuickGELU, which %s computes: rows of the latter are "
            "those that texts were trained with",
            *(tower.image, tower.quick),
        )
    return encoder


def _local(tower: Tower, path: Path) -> tuple[Path, list[Path], str]:
    file = path / OPEN_CLIP if path.is_dir() else path
    sources = [file.parent / name for name in TOKENIZER_FILES] if tower.tokenizer else []
    for one in (file, *sources):
        if not one.is_file():
            what = f"tokenizer of {tower.model}" if one in sources else f"text tower of {tower.model}"
            raise WeightsError(
                f"no {what} at {str(one)!r}: {_wanted(tower)} belong in one folder, which --text-weights takes"
            )
    if file.suffix != ".safetensors":
        raise WeightsError(f"{str(file)!r} is not a .safetensors file; {_wanted(tower)} is what --text-weights takes")
    return file, sources, str(file)


def _wanted(tower: Tower) -> str:
    files = f"{OPEN_CLIP} of {tower.repo} on the hub"
    return files + (f" and {' and '.join(TOKENIZER_FILES)} of {tower.tokenizer}" if tower.tokenizer else "")


def _from_hub(tower: Tower, source: str | None) -> tuple[Path, list[Path], str, str]:
    repo, commit = hub_of(source)
    try:
        pinned = pin(tower.repo, commit if repo == tower.repo else None)
        file = pinned.fetch(OPEN_CLIP)
        beside = pinned if tower.tokenizer in (None, tower.repo) else pin(tower.tokenizer)
        sources = [beside.fetch(name) for name in TOKENIZER_FILES] if tower.tokenizer else []
    except WeightsError as error:
        raise WeightsError(f"{error}. For texts, put {_wanted(tower)} into a folder and give --text-weights") from None
    place = f"{OPEN_CLIP} of {pinned.source}" + (f", tokenizer of {beside.source}" if beside is not pinned else "")
    return file, sources, place, pinned.files[OPEN_CLIP].sha256 or file_sha256(file)


def _build(tower: Tower, file: Path) -> Any:
    """Build the text half alone, with the weights of a file, in float32."""
    import torch

    open_clip = _open_clip()
    config = open_clip.get_model_config(tower.model)
    with torch.device("meta"):  # no memory before the file is known to fit, and no time for random numbers
        model = open_clip.model._build_text_tower(
            config["embed_dim"], config["text_cfg"], config.get("quick_gelu", False)
        )
    found = shapes(file)
    names = _text_names(found)
    _check_tensors(tower, file, {k: tuple(v.shape) for k, v in model.state_dict().items()}, names, found)
    state = {names[name]: value.float() for name, value in read_tensors(file, names).items()}
    for name, value in state.items():
        if not value.isfinite().all():
            raise WeightsError(
                f"{str(file)!r} cannot be used, {name} holds NaN or infinite numbers: take other weights"
            )
    model.load_state_dict(state, assign=True)
    if model.attn_mask is not None:  # stands in no file
        model.attn_mask = model.build_causal_mask()
    return model.eval().requires_grad_(False)


def _text_names(found: Iterable[str]) -> dict[str, str]:
    """Return the tower's own name of each of its tensors in a file of open_clip's, which has one of two layouts."""
    prefix = "text." if any(name.startswith("text.") for name in found) else ""
    mine = (name for name in found if name.startswith(prefix) and not name.startswith(IMAGE_TENSORS))
    return {name: name[len(prefix) :] for name in mine}


def _check_tensors(
    tower: Tower, file: Path, wanted: Mapping[str, Shape], names: Mapping[str, str], found: Mapping[str, Shape]
) -> None:
    """Compare names and shapes of the tower's tensors with those of a file."""
    shapes = {own: found[name] for name, own in names.items()}
    for problem, some in (
        ("lacks", [name for name in wanted if name not in shapes]),
        ("has also", [name for name in shapes if name not in wanted]),
        ("has another shape of", [name for name in wanted if shapes.get(name) != wanted[name]]),
    ):
        if some:
            more = f" and {len(some) - 1} more" if len(some) > 1 else ""
            raise WeightsError(
                f"{str(file)!r} does not hold the text tower of {tower.model} in open_clip's layout: it {problem} "
                f"{some[0]}{more}; take {_wanted(tower)}"
            )


def _own_tokenizer(tower: Tower) -> Tokenizer:
    """Make CLIP's tokenizer, as open_clip's get_tokenizer does, which sets logging up for the whole process."""
    open_clip = _open_clip()
    text = open_clip.get_model_config(tower.model)["text_cfg"]
    made: Tokenizer = open_clip.SimpleTokenizer(
        context_length=text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH),
        **text.get("tokenizer_kwargs", {}),
    )
    return made


def _hub_tokenizer(tower: Tower, file: Path, settings: Path) -> Tokenizer:
    """Read a tokenizer.json, which runs no code; its tokens are those of open_clip's HFTokenizer, by transformers."""
    import torch

    text, config = _open_clip().get_model_config(tower.model)["text_cfg"], read_json(settings, WeightsError)
    clean = _open_clip().tokenizer.get_clean_fn(text.get("tokenizer_kwargs", {}).get("clean", "whitespace"))
    cure = f"take {' and '.join(TOKENIZER_FILES)} of {tower.tokenizer}"
    try:
        made = _tokenizers().Tokenizer.from_file(str(file))
        made.no_padding()
        made.no_truncation()
        pad, end = (made.token_to_id(_special(config, name)) for name in ("pad_token", "eos_token"))
        right = made.encode(clean("a")).ids[-1:] == [end] and config.get("padding_side", "right") == "right"
    except Exception as error:  # of tokenizers, which has no class of its own
        raise WeightsError(f"{str(file)!r} cannot be read as a tokenizer ({error}): {cure}") from None
    if pad is None or end is None or not right:
        raise WeightsError(f"{str(file)!r} is not the tokenizer of a text tower, whose tokens end in eos_token: {cure}")

    def tokens(texts: Sequence[str], context_length: int = text["context_length"]) -> Tensor:
        made.enable_truncation(context_length)
        made.enable_padding(length=context_length, pad_id=pad)
        return torch.tensor([one.ids for one in made.encode_batch([clean(text) for text in texts])])

    return tokens


def _special(config: Any, name: str) -> str:
    """Read a special token, which a tokenizer_config.json says as a text or as an object with its content."""
    found = config.get(name) if isinstance(config, dict) else None
    found = found.get("content") if isinstance(found, dict) else found
    if not isinstance(found, str):
        raise ValueError(f"{name} is {shown(found)}")
    return found


def _open_clip() -> Any:
    no_telemetry()
    try:
        import open_clip
    except ImportError as error:
        raise UsageError(f"texts need open_clip's text towers ({error}): {INSTALL}") from None
    return open_clip


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError(f"the texts of SigLIP need the package tokenizers ({error}): {INSTALL}") from None
    return tokenizers
