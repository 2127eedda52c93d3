"""Every set of images that a recipe or a record names: its size, its terms, and what follows for an encoder of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from micl_zoo.zoo.ours import FILE_TERMS

IMAGENET_TERMS = "ImageNet's: non-commercial research and education"
PEOPLE = "It was not tested for social bias and must not be used to judge people or to identify them."
OTHERS = "mostly from the web of the 2000s and mostly Western. Other things and places"


@dataclass(frozen=True)
class Corpus:
    """A set of images with labels. An encoder is trained on its training part, or measured on both of its parts."""

    key: str  # its name in recipes and records, and of its folder
    classes: int
    images: int  # of the training part
    test_images: int
    terms: str  # of its images
    sha256: Mapping[str, str] = field(default_factory=dict)  # of its files, where this project pins them
    title: str = ""  # name of its training part, for people
    pixels: int | None = None  # side in pixels, where all images have the same size
    about: str = ""  # what the images show, and whose they are
    caution: str = ""  # what a user should know before anything else
    uses: tuple[str, ...] = ()  # what an encoder trained on it is good for
    limits: tuple[str, ...] = ()  # what it is bad at
    own_test: str = ""  # how its test part relates to the training
    hub_dataset: str = ""  # its name on the Hugging Face hub
    hub_license: str = "apache-2.0"  # of weights trained on it, as the hub writes it
    license: str = FILE_TERMS  # the same in the table of encoders

    @property
    def text(self) -> str:
        """One line for people, which records made before 0.2 hold in the place of the key."""
        of = f" of {self.pixels} x {self.pixels}" if self.pixels else ""
        return f"{self.title or self.key}, {self.images:,} images{of}"


_CORPORA = (
    Corpus(
        "imagenet-1k",
        classes=1000,
        images=1_281_167,
        test_images=50_000,
        terms=IMAGENET_TERMS,
        title="ImageNet-1k train",
        about="ImageNet-1k (ILSVRC 2012), training part: photographs of 1,000 classes. The images belong to their "
        "owners.",
        uses=(
            "Retrieval, grouping, near-duplicates and classifiers on frozen features of photographs.",
            "A start for fine-tuning.",
        ),
        limits=(
            "It knows the things of ImageNet's classes, many of them breeds of dogs and other animals, as photographed "
            f"by the people who uploaded them: {OTHERS}, drawings, text, medical and satellite images are represented "
            "worse.",
            f"People occur in the images without having been asked, and unevenly. {PEOPLE}",
        ),
        own_test="the validation part of the corpus: the classes of the training",
        hub_dataset="ILSVRC/imagenet-1k",
    ),
    Corpus(
        "tin200",
        classes=200,
        images=100_000,
        test_images=5_000,
        terms=IMAGENET_TERMS,
        sha256={
            "train-000.parquet": "1f5f482e6c4fd9a765214fc4d44d27c2659528bbec79891fbd22468fc3821a4f",
            "train-001.parquet": "afd6b6b502400ac32c96213e501ad8fe97962397c86dd0973651f71ee29f620c",
            "train-002.parquet": "8f61dba4c188f05e0c55e114c4d46d52955d7ad7a45b5d25b38426411fee7c96",
            "train-003.parquet": "e24d3ad3b0ae799d640cd30ccb6a2966428d46b7b554e32e1dd747ed7f0fd60f",
            "val.parquet": "8d40dbb9edb6db8e95186f2c58e391077a149b028ccf24b5ef00a32863250982",
        },
        title="Tiny ImageNet-200 train",
        pixels=64,
        about="Tiny ImageNet-200, training part: photographs of 200 of ImageNet's classes, at 64 x 64 pixels. The "
        "images belong to their owners.",
        caution="Encoders trained on a thousand times the data are far better at telling what is in a photograph: take "
        "one of those where that matters.",
        uses=(
            "Trying the package from end to end.",
            "Near-duplicates, colour and layout, coarse grouping of small pictures.",
            "A start for fine-tuning on little data.",
        ),
        limits=(
            "It has seen 64 x 64 pixels only: fine texture, text, small objects and faces mean nothing to it.",
            "It knows the things of 200 ImageNet classes, as photographed by the people who uploaded them: "
            f"{OTHERS} are represented worse. {PEOPLE}",
        ),
        own_test="the validation part of the corpus: the classes of the training, and a few of its images also occur "
        "in the training part",
        hub_dataset="zh-plus/tiny-imagenet",
    ),
    Corpus(
        "caltech101",
        classes=100,
        images=3_000,
        test_images=1_672,
        terms="CC BY 4.0",
        sha256={
            "train.parquet": "0e0a80f19eb5f628b9f0d06ab252849780c22a304e54fb1721c85d945b13940a",
            "test.parquet": "2a3945f9871d2b40e3e6aef370eb55259364a0eb3bda8dc451405b67fc49b3ee",
        },
    ),
    Corpus(
        "flowers5",
        classes=5,
        images=2_000,
        test_images=800,
        terms="unknown; for evaluation only",
        sha256={
            "train.parquet": "1eb60a6eb1f2d892ea739df5acc12a4d0de166920c6dacab17a49e40f61f0e3d",
            "test.parquet": "a8464e57ac3a9c609d4f7387501fa3e6ae046494daa412e13852825affb7c03c",
        },
    ),
    Corpus(
        "cifar10",
        classes=10,
        images=5_000,
        test_images=2_000,
        terms="none stated by its makers",
        sha256={
            "train.parquet": "e22981316064b46bdd138fa031d39f9b0dacc39c0e0c869f01158c5cf52210a2",
            "test.parquet": "1c0ae13d7dd0ea4dc9a1f9650a8cd3a506789fec46fc40eae7f06476e70efda7",
        },
    ),
)
CORPORA = {corpus.key: corpus for corpus in _CORPORA}


def corpus_text(key: str) -> str:
    """Describe a corpus in one line for people; a key that is none of these is a user's own text."""
    return CORPORA[key].text if key in CORPORA else key


def corpus_key(text: str) -> str:
    """The key of a corpus by its key or its line for people; other text, such as a user's own, as it is."""
    return next((one.key for one in _CORPORA if text == one.text), text)
