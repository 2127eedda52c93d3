"""The evaluation transform is timm's, to the pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from timm.data import create_transform

from micl_zoo.images.transform import Transform


@pytest.mark.parametrize("size", [(48, 40), (40, 48), (333, 500), (224, 224), (64, 64), (301, 300)])
@pytest.mark.parametrize("transform", [Transform(), Transform(224, 256), Transform(32, 36, "bilinear")])
def test_equal_to_timm(transform: Transform, size: tuple[int, int]) -> None:
    image = picture(5, *size)
    config = transform.to_timm()
    oracle = create_transform(
        input_size=tuple(config["input_size"]),
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
    )
    torch.testing.assert_close(transform(image), oracle(image), rtol=1e-6, atol=1e-6)


def test_timm_fields_round_trip() -> None:
    for transform in (Transform(), Transform(224, 256), Transform(32, 36, "bilinear")):
        assert Transform.from_timm(transform.to_timm()) == transform


def test_the_id_names_every_choice() -> None:
    choices = [
        Transform(),
        Transform(resize=256),
        Transform(size=192),
        Transform(interpolation="bilinear"),
        Transform(mean=(0.5, 0.5, 0.5)),
        Transform(std=(0.5, 0.5, 0.5)),
    ]
    assert len({transform.id for transform in choices}) == len(choices)


@pytest.mark.parametrize("size", [(2, 50_000), (50_000, 2), (8, 65)])
def test_a_strip_is_cut_to_its_middle(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    middle = tuple(side // 2 for side in size)
    image.paste((200, 100, 50), (middle[0] - 1, middle[1] - 1, middle[0] + 1, middle[1] + 1))
    pixels = Transform().pixels(image)
    assert pixels.shape == (224, 224, 3)
    assert pixels[112, 112, 0] > 60  # what was in the middle still is


def test_normalise_is_channelwise_and_in_channel_first_order() -> None:
    transform = Transform(size=2, resize=2)
    pixels = np.full((1, 2, 2, 3), (255, 0, 51), dtype=np.uint8)
    got = transform.normalise(torch.from_numpy(pixels))
    assert got.shape == (1, 3, 2, 2)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(got[0, :, 1, 0], torch.tensor(expected))
