"""What can be said of an encoder before its weights are loaded; of one on the hub, before they are fetched."""

from __future__ import annotations

import os
from dataclasses import dataclass
from logging import getLogger
from typing import Any, cast

from ..errors import WeightsError
from ..zoo.hub import hub_config
from ..zoo.names import find_place
from ..zoo.pools import Output, Pool
from ..zoo.public import PUBLIC, Public
from ..zoo.weights import EncoderConfig, local_weights
from .build import outline, timm_config

logger = getLogger(__name__)


@dataclass(frozen=True)
class About:
    """An encoder of the hub, or in a file."""

    config: EncoderConfig
    place: str  # the file, or hf-hub:OWNER/NAME@COMMIT
    bytes: int | None  # of the weights
    sha256: str | None  # of the weights; None where the hub keeps no checksum of them
    parameters: int
    shapes: dict[Output, tuple[int, ...]]  # of each output, per image
    pool: Pool  # its own
    row: Public | None  # of the curated table

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        config, row = self.config, self.row
        return {
            "name": config.name,
            "place": self.place,
            "architecture": config.architecture,
            "licence": config.license,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "parameters": self.parameters,
            "image_size": list(config.size),
            "transform": config.transform.id,
            "pool": self.pool,
            "outputs": {name: list(shape) for name, shape in self.shapes.items()},
            "why": row.why if row else "",
            "published": {"knn": row.knn, "linear": row.linear, "source": row.figures} if row and row.figures else None,
        }


def about(name: str | os.PathLike[str]) -> About:
    """Look at an encoder: of the hub its configuration is fetched and nothing else, of a file its header is read.

    Args:
        name: see `load`; none of our table, which itself says what is known.

    Raises:
        UsageError, WeightsError: see `load`. Where an encoder of the curated table cannot be looked up, what the table
            knows is returned, with a warning.
    """
    try:
        place = find_place(name)
    except WeightsError as error:
        if (row := PUBLIC.get(str(name).removeprefix("timm/"))) is None:
            raise
        logger.warning("what follows is what the table says; %s", error)
        config = timm_config(row.name)
        return About(config, f"hf-hub:{row.repository}, not looked up", None, None, *outline(config), row)
    if place.path is not None:
        found = local_weights(place.path)
        config, where, row = found.config, str(found.path), None
        size, sha256 = cast("int | None", found.path.stat().st_size), cast("str | None", found.sha256)
    else:
        pin, config = place.pinned, hub_config(place)
        where, row, file = pin.source, PUBLIC.get(config.name), pin.files[pin.weights]
        size, sha256 = file.bytes, file.sha256
    parameters, shapes, pool = outline(config)
    return About(config, where, size, sha256, parameters, shapes, pool, row)
