"""Notes of a listing: what could not be listed, and what was left out, why and how often."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .places import as_text, suffix_of, to_uri

MOST_PROBLEMS = 100_000  # told one by one: 40 MB; a list of as many lines without a path is no list
NO_ENDING = "no ending"


class Problem(NamedTuple):
    """An entry of a source that could not be listed; `extract` makes it a line of the ledger."""

    id: str  # its name below the source
    uri: str  # its place
    detail: str  # one sentence, with what to do


@dataclass
class Notes:
    """What a listing has to say besides its images; those of its pieces add up."""

    problems: list[Problem] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)  # files and members that are no images, by their endings
    skipped: Counter[str] = field(default_factory=Counter)  # all else that was left out, by the reason in words
    renamed: Counter[str] = field(default_factory=Counter)  # ids that repeat, by what was done with them
    untold: int = 0  # problems above MOST_PROBLEMS

    def problem(self, name: str, place: str, detail: str) -> None:
        """Add an entry that could not be listed."""
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(Problem(as_text(name), to_uri(place), detail))
        else:
            self.untold += 1

    def other(self, name: str) -> None:
        """Count a file or a member that is no image."""
        ending = suffix_of(name)
        self.others[ending if 1 < len(ending) <= 12 and ending.isprintable() else NO_ENDING] += 1

    def add(self, later: Notes) -> None:
        """Add the notes of a later piece."""
        room = MOST_PROBLEMS - len(self.problems)
        self.problems += later.problems[:room]
        self.untold += later.untold + len(later.problems[room:])
        for name in ("others", "skipped", "renamed"):
            getattr(self, name).update(getattr(later, name))

    def __bool__(self) -> bool:
        return bool(self.problems or self.others or self.skipped or self.renamed)

    @property
    def unlisted(self) -> int:
        """Number of entries that could not be listed."""
        return len(self.problems) + self.untold

    def left_out(self) -> str:
        """Say what was left out; "" for nothing."""
        others = [counted(self.others)] if self.others else []
        return ", ".join([*others, *(f"{count:,} {why}" for why, count in self.skipped.items())])

    def text(self) -> str:
        """Say in one line, for people, what there is besides images; "" for nothing."""
        said = [f"{self.unlisted:,} could not be listed"] if self.problems else []
        said += [f"left out: {left}"] if (left := self.left_out()) else []
        said += [f"{count:,} ids repeat and {what}" for what, count in self.renamed.items()]
        return "; ".join(said)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the problems one by one, for JSON."""
        counters = {name: dict(getattr(self, name)) for name in ("others", "skipped", "renamed")}
        return {"unlisted": self.unlisted, **counters}


def counted(others: Counter[str]) -> str:
    """Say how many other files there are, by their endings, for people."""
    kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in others.most_common(3))
    return f"{others.total():,} other files" + (f" ({kinds}{', …' if len(others) > 3 else ''})" if others else "")
