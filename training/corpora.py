"""What follows from the images that an encoder was trained on: its uses, its limits, the terms of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from micl_zoo.encoders.zoo import FILE_TERMS, IN1K, TIN200


@dataclass(frozen=True)
class Corpus:
    """What follows from the images that an encoder was trained on.

    Attributes:
        images: how many; a run on another number of them was on other images, whatever its recipe says.
        about: what they show, and whose they are.
        terms: what that means for the weights.
        uses, limits: what such an encoder is good and bad at.
        own_sets: measured sets that are parts of the same data, and what that means.
        hub_dataset, hub_license: their names on the Hugging Face hub.
        license: of the weights, in the table of encoders.
    """

    images: int
    about: str
    terms: str
    uses: tuple[str, ...]
    limits: tuple[str, ...]
    own_sets: Mapping[str, str]
    hub_dataset: str
    hub_license: str
    license: str = FILE_TERMS


IMAGENET_TERMS = (
    "The file is under Apache-2.0. It was made from images under ImageNet's terms, which allow non-commercial research "
    "and education; whoever uses the weights judges what that means for them."
)
PEOPLE = "It was not tested for social bias and must not be used to judge people, or to tell who somebody is."
CORPORA = {
    TIN200: Corpus(
        images=100_000,
        about="Tiny ImageNet-200, training part: photographs of 200 of ImageNet's classes, at 64 x 64 pixels. The "
        "images belong to their owners.",
        terms=IMAGENET_TERMS,
        uses=(
            "Trying the package from end to end.",
            "Near-duplicates, colour and layout, coarse grouping of small pictures.",
            "A start for fine-tuning on little data.",
        ),
        limits=(
            "It was trained on few and small pictures. Encoders trained on a thousand times the data are far better at "
            "telling what is in a photograph; take one of those where that matters.",
            "It has seen 64 x 64 pixels only: fine texture, text, small objects and faces mean nothing to it.",
            "It knows the things of 200 ImageNet classes, as photographed by the people who uploaded them: mostly from "
            f"the web of the 2000s and mostly Western. Other things and places are represented worse. {PEOPLE}",
        ),
        own_sets={
            "tin200": "the validation part of the corpus: the classes of the training, and a few of its images also "
            "occur in the training part"
        },
        hub_dataset="zh-plus/tiny-imagenet",
        hub_license="apache-2.0",
    ),
    IN1K: Corpus(
        images=1_281_167,
        about="ImageNet-1k (ILSVRC 2012), training part: photographs of 1,000 classes. The images belong to "
        "their owners.",
        terms=IMAGENET_TERMS,
        uses=(
            "Retrieval, grouping, near-duplicates and classifiers on frozen features of photographs.",
            "A start for fine-tuning.",
        ),
        limits=(
            "It knows the things of ImageNet's classes, many of them breeds of dogs and other animals, as photographed "
            "by the people who uploaded them: mostly from the web of the 2000s and mostly Western. Other things and "
            "places, drawings, text, medical and satellite images are represented worse.",
            f"People occur in the images without being asked for, and unevenly. {PEOPLE}",
        ),
        own_sets={"imagenet-1k": "the validation part of the corpus: the classes of the training"},
        hub_dataset="ILSVRC/imagenet-1k",
        hub_license="apache-2.0",
    ),
}
