"""One reader for files of facts: JSON becomes a frozen dataclass, or one sentence says what is wrong with it.

A schema is a dataclass whose annotations say all: types, `Literal` for closed sets, `Annotated[int, Between(1, 64)]`
for ranges. Not msgspec or pydantic: a machine that has torch, timm and pyarrow alone must read these files, too.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import os
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from .errors import MiclZooError, UsageError, nearest
from .files import read_regular

P = ParamSpec("P")
T = TypeVar("T")
MAX_BYTES = 64 << 20  # of a file of facts; the largest, metrics.jsonl of a long run, is read line by line
NUMPY = np.number | np.bool_  # scalars of arrays, which people have at hand
MANY = 20  # fields that are too many to be listed in an error
SHOWN = 60  # letters of a wrong value in an error
_NAMES: dict[Any, str] = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"}
_NAMES |= {type(None): "null", os.PathLike: "a name or a path", Iterable: "a list", Callable: "a function"}


@dataclass(frozen=True)
class Between:
    """Range of a number, or of the length of a text, list or object; both ends are allowed."""

    least: float = -math.inf
    most: float = math.inf

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"at least {self.least:,}"
        return f"at most {self.most:,}" if self.least == -math.inf else f"{self.least:,} to {self.most:,}"


class _Wrong(ValueError):
    """One value that is not what its annotation says."""


def read_json(file: Path, error: type[MiclZooError], cure: str = "") -> Any:
    """Parse a JSON file; `error` where it cannot be read or is none, which ends in `cure`, what to do about it."""
    try:
        data = read_regular(file, MAX_BYTES + 1)
    except OSError as problem:
        raise error(f"cannot read {str(file)!r}: {problem.strerror or problem}{_tail(cure)}") from None
    if len(data) > MAX_BYTES:
        raise error(f"{str(file)!r} is too large for what it should be: over {MAX_BYTES:,} bytes{_tail(cure)}")
    return parse_json(data, repr(str(file)), error, cure)


def parse_json(data: bytes | str, what: str, error: type[MiclZooError], cure: str = "") -> Any:
    """Parse JSON; `what` names it in the `error`."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as problem:  # ValueError: no JSON, no UTF-8, a number of thousands of digits
        why = "it is nested too deep" if isinstance(problem, RecursionError) else str(problem)[:200]
        raise error(f"{what} is damaged, it is no JSON ({why}){_tail(cure)}") from None


def read(
    kind: type[T], found: Any, what: str, error: type[MiclZooError], cure: str = "", *,
    others: bool = False, said: str = "is damaged",
) -> T:  # fmt: skip
    """Make a `kind`, a dataclass, of parsed JSON; lists become tuples where it says so, whole numbers floats.

    Args:
        found: what JSON gave.
        what: names the file, and the place in it, in the error.
        error: is raised where a field is missing, of another type or outside its range, or unknown.
        cure: what to do about it; ends the error.
        others: accept unknown fields, and leave them out.
        said: says of a file that may be good for others what is the matter.
    """
    try:
        return _object(kind, found, "", others)
    except _Wrong as problem:
        raise error(f"{what} {said}: {problem}{_tail(cure)}") from None


def wrong_fields(made: Any) -> list[str]:
    """Say what of a dataclass that is made already is not what its annotations say; what is, becomes that.

    NumPy's numbers become Python's, and what can be gone through once a tuple; whole numbers stay.
    """
    wrong = []
    for name, kind in _hints(made.__class__).items():
        found = getattr(made, name)
        try:
            value = _value(kind, found, name, False)
            if isinstance(found, NUMPY) or not isinstance(found, int):
                object.__setattr__(made, name, value)
        except _Wrong as problem:
            wrong.append(str(problem))
    return wrong


def wrong_value(kind: Any, found: Any, at: str) -> str:
    """Say what of a value is not what an annotation says; nothing where it is."""
    try:
        _value(kind, found, at, False)
    except _Wrong as problem:
        return str(problem)
    return ""


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Make arguments that are not what the annotations of a function say a UsageError, before anything is done."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*values: P.args, **named: P.kwargs) -> T:
        bound = signature.bind(*values, **named)
        for name, found in bound.arguments.items():
            try:
                made = _value(_hints(function)[name], found, name, False)
                if isinstance(found, dict) and not isinstance(made, dict):  # as JSON has a dataclass
                    raise _Wrong(f"{name} must be a {type(made).__name__}, it is a dict")
                bound.arguments[name] = made
            except _Wrong as problem:
                raise UsageError(f"{function.__name__}: {problem}") from None
        return function(*bound.args, **bound.kwargs)

    return call


def _tail(cure: str) -> str:
    return f": {cure}" if cure else ""


def _object(kind: type[T], found: Any, at: str, others: bool) -> T:
    if not isinstance(found, dict):
        raise _Wrong(f"{at or 'it'} must be an object, it is {shown(found)}")
    hints, fields = _hints(kind), {one.name: one for one in dataclasses.fields(kind) if one.init}  # type: ignore[arg-type]
    prefix = f"{at}." if at else ""
    if not others and (unknown := [key for key in found if key not in fields]):
        near = nearest(str(unknown[0]), fields) if len(fields) > MANY else f"those are {', '.join(fields)}"
        raise _Wrong(f"{prefix}{shown(unknown[0])} is no field of it; {near or f'it may have {len(fields)} others'}")
    for name, one in fields.items():
        if name not in found and one.default is one.default_factory is dataclasses.MISSING:
            raise _Wrong(f"{prefix}{name} is missing")
    given = {name: _value(hints[name], found[name], prefix + name, others) for name in fields if name in found}
    try:
        return kind(**given)
    except ValueError as problem:  # from a __post_init__, which checks what lies between fields
        raise _Wrong(f"{at or 'it'} cannot be: {problem}") from None


@functools.cache
def _hints(kind: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _value(kind: Any, found: Any, at: str, others: bool) -> Any:
    """Check one value against its annotation."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return found
    if origin is Annotated:
        return _bounded(_value(args[0], found, at, others), args[1:], at)
    if origin is Literal:
        for one in args:
            if (type(found) is type(one) or isinstance(found, str)) and found == one:
                return one
        near = nearest(str(found), map(str, args))
        hint = f" ({near})" if near else ""
        raise _Wrong(f"{at} must be one of {', '.join(map(str, args))}, it is {shown(found)}{hint}")
    if origin in (Union, types.UnionType):
        return _one_of(args, found, at, others)
    if dataclasses.is_dataclass(kind) and not isinstance(found, kind):  # type: ignore[arg-type]
        return _object(kind, found, at, others)  # type: ignore[arg-type]
    if origin in (list, tuple, dict, Sequence):
        return _many(origin, args, found, at, others)
    if isinstance(found, NUMPY):
        found = found.item()
    if kind is float and type(found) is int and abs(found) < 2**63:
        found = float(found)
    if not _is(origin or kind, found):
        raise _Wrong(f"{at} must be {_NAMES.get(origin or kind, f'a {kind.__name__}')}, it is {shown(found)}")
    return found


def _is(kind: type[Any], found: Any) -> bool:
    if kind is os.PathLike:  # whoever takes a path takes text, too, and some text can be none
        return isinstance(found, str | os.PathLike) and _is_path(os.fspath(found))
    if kind is Iterable and isinstance(found, str | bytes):
        return False
    if isinstance(found, bool) and kind is not bool:  # True is an int to Python
        return False
    return isinstance(found, kind) and (kind is not float or math.isfinite(found))


def _is_path(text: str | bytes) -> bool:
    try:
        return isinstance(text, str) and bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _one_of(kinds: tuple[Any, ...], found: Any, at: str, others: bool) -> Any:
    if found is None and type(None) in kinds:
        return None
    problems = []
    if any(get_origin(kind) is os.PathLike for kind in kinds):
        kinds = tuple(kind for kind in kinds if kind is not str)
    for kind in kinds:
        if kind is not type(None):
            try:
                return _value(kind, found, at, others)
            except _Wrong as problem:
                problems.append(str(problem))
    names_first = get_origin(kinds[0]) is os.PathLike and not isinstance(found, list | tuple)
    raise _Wrong(problems[0 if names_first else -1])


def _many(origin: Any, args: tuple[Any, ...], found: Any, at: str, others: bool) -> Any:
    if origin is dict:
        if not isinstance(found, dict):
            raise _Wrong(f"{at} must be an object, it is {shown(found)}")
        return {name: _value(args[1], one, f"{at}.{shown(name)}", others) for name, one in found.items()}
    if origin is Sequence and isinstance(found, Iterable) and not isinstance(found, str | bytes | dict):
        found = list(found)
    if not isinstance(found, list | tuple):
        raise _Wrong(f"{at} must be a list, it is {shown(found)}")
    kinds = [args[0]] * len(found) if origin in (list, Sequence) or args[-1] is ... else args
    if len(kinds) != len(found):
        raise _Wrong(f"{at} must have {len(kinds)} values, it has {len(found)}")
    pairs = zip(kinds, found, strict=True)
    values = (_value(kind, one, f"{at}[{place}]", others) for place, (kind, one) in enumerate(pairs))
    return (tuple if origin is Sequence else origin)(values)


def _bounded(found: Any, limits: tuple[Any, ...], at: str) -> Any:
    for limit in limits:
        if isinstance(limit, Between) and found is not None:
            sized = isinstance(found, str | list | tuple | dict)
            size = len(found) if sized else found
            if not limit.least <= size <= limit.most:
                raise _Wrong(f"{at} {'has a length of' if sized else 'is'} {shown(size)}, and must be {limit}")
    return found


def shown(found: Any) -> str:
    """Write a value from outside into an error, shortened."""
    text = found if isinstance(found, str) else _json(found)
    text = text if len(text) <= SHOWN else text[:SHOWN] + "…"
    return repr(text) if isinstance(found, str) else text


def _json(found: Any) -> str:
    if isinstance(found, list | tuple | dict) and len(found) > SHOWN:
        return f"{'an object' if isinstance(found, dict) else 'a list'} of {len(found):,} entries"
    try:
        return json.dumps(found)
    except (TypeError, ValueError, RecursionError):
        return f"a {type(found).__name__}"
