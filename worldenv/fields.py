"""Checks declared beside a field and made in one place, whichever way its value came in.

    @dataclass(frozen=True)
    class Oven:
        degrees: Annotated[int, Range(50, 250)] = 180
        rungs: Annotated[tuple[Annotated[int, Range(0, 4)], ...], Items()] = (2,)

        def rules(self):  # what one field says of another
            yield self.degrees < 200 or 4 not in self.rungs, "rungs", "none so near the top"

`check` knows int, float, bool, str, Path, Literal, tuples, unions with None and nested dataclasses
(in tuples too).
What it passes is in canonical form (a float field never holds an int, a tuple never a list), so
equal configurations have equal fingerprints. A bool is no number, text is no number, and no number
is NaN or infinite.
"""

import dataclasses
import math
import numbers
import os
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from worldenv.runtime.errors import UserError, nearest

Label = Callable[[str], str]
"""From a field's dotted name to what a message calls it."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included (`above`: low itself is not); a multiple of `step`."""

    low: float | None = None
    high: float | None = None
    above: bool = False
    step: int = 1

    def holds(self, value: float) -> bool:
        """Whether `value` is within."""
        low = self.low is None or value > self.low or (value == self.low and not self.above)
        high = self.high is None or value <= self.high
        return low and high and (self.step == 1 or value % self.step == 0)

    def __str__(self) -> str:
        if self.low is not None and self.high is not None and not self.above:
            words = [f"from {_number(self.low)} to {_number(self.high)}"]
        else:
            words = [] if self.low is None else [("above " if self.above else "of at least ")]
            words = [w + _number(self.low) for w in words]
            words += [] if self.high is None else [f"at most {_number(self.high)}"]
        words = [" and ".join(words)] if words else []
        return ", ".join([*words, *([f"a multiple of {self.step}"] if self.step > 1 else [])])


@dataclass(frozen=True)
class Items:
    """Of a list: how many entries at least, and whether an entry may come twice."""

    least: int = 1
    distinct: bool = True


@dataclass(frozen=True)
class Pattern:
    """Of a text: what it must look like, as a regular expression and in words."""

    regex: str
    words: str


def check(instance: Any, label: Label) -> None:
    """Bring every field of a dataclass to its canonical form, and ask its `rules`.

    Raises UserError `<label(field)>: expected ..., got ...` for the first that is not of its type,
    set or range, or breaks a rule. rules: an optional method that yields (holds, field, expected).
    """
    for name, hint in hints(type(instance)).items():
        value = getattr(instance, name)
        kind, _ = bare(hint)
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, kind):
                raise _refusal(label(name), "a table of fields", value)
            check(value, lambda inner, outer=name: label(f"{outer}.{inner}"))
            continue
        canonical = _canonical(hint, value, label(name))
        if canonical is not value:
            object.__setattr__(instance, name, canonical)
    for holds, name, expected in instance.rules() if hasattr(instance, "rules") else ():
        if not holds:
            value = instance
            for part in name.split("."):
                value = getattr(value, part)
            raise _refusal(label(name), expected, value)


def build(cls: type, values: Any, label: Label, at: str = "") -> Any:
    """A dataclass from nested dicts, as JSON gives them; fields left out keep their defaults.

    at: dotted name of the field it becomes. UserError for what is no dict and for unknown keys,
    naming the nearest; `check` does the rest.
    """
    if not isinstance(values, dict):
        raise _refusal(label(at), "a table of fields", values)
    known = hints(cls)
    kwargs = {}
    for key, value in values.items():
        if key not in known:
            guess = nearest(key, known)
            hint = f"; did you mean {guess!r}?" if guess else ""
            raise UserError(f"{label(at)}: unknown key {_shown(key)}{hint}")
        inner, _ = bare(known[key])
        inside = f"{at}.{key}" if at else key
        if dataclasses.is_dataclass(inner):
            value = build(inner, value, label, inside)
        elif get_origin(inner) is tuple and dataclasses.is_dataclass(get_args(inner)[0]):
            if not isinstance(value, list | tuple):
                raise _refusal(label(inside), "a list of tables of fields", value)
            value = tuple(build(get_args(inner)[0], entry, label, inside) for entry in value)
        kwargs[key] = value
    for field in dataclasses.fields(cls):
        given = field.default is not dataclasses.MISSING or field.name in kwargs
        if not given and field.default_factory is dataclasses.MISSING:
            name = f"{at}.{field.name}" if at else field.name
            raise UserError(f"{label(name)}: expected {expected(known[field.name])}, got none.")
    return cls(**kwargs)


@cache
def hints(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields, with what `Annotated` says of them."""
    known = get_type_hints(cls, include_extras=True)
    return {field.name: known[field.name] for field in dataclasses.fields(cls)}


def bare(hint: Any) -> tuple[Any, tuple]:
    """A hint without `Annotated`, and what that said."""
    if get_origin(hint) is Annotated:
        kind, *notes = get_args(hint)
        return kind, tuple(notes)
    return hint, ()


def expected(hint: Any) -> str:
    """What a hint admits, in words."""
    kind, notes = bare(hint)
    if _is_union(kind):
        return " or ".join(expected(k) for k in get_args(kind) if k is not types.NoneType) + (
            " or nothing"
        )
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return _expected_list(get_args(kind), notes)
    if dataclasses.is_dataclass(kind):
        return "a table of fields"
    words = {int: "a whole number", float: "a number", bool: "true or false"}
    base = words.get(kind, {str: "text", Path: "a path"}.get(kind, str(kind)))
    for note in notes:
        if isinstance(note, Pattern):
            base = note.words
        elif isinstance(note, Range):
            base = f"{base} {note}".replace(" a multiple", ", a multiple").replace(",,", ",")
    return base


def _expected_list(kinds: tuple, notes: tuple) -> str:
    one = re.sub(r"^an? ", "", expected(kinds[0]))
    one = re.sub(r"^(whole number|number|path|table)", r"\1s", one)
    if kinds[-1] is not Ellipsis:
        return f"{len(kinds)} {one}"
    rules = [f"at least {n.least}" for n in notes if isinstance(n, Items) and n.least]
    rules += ["none twice" for n in notes if isinstance(n, Items) and n.distinct]
    return ", ".join([f"a list of {one}", *rules])


def _canonical(hint: Any, value: Any, name: str) -> Any:
    """`value` as the hint wants it, or UserError."""
    kind, notes = bare(hint)
    if _is_union(kind):
        if value is None:
            return None
        (kind,) = (k for k in get_args(kind) if k is not types.NoneType)
        return _canonical(kind, value, name)
    if get_origin(kind) is tuple:
        return _canonical_list(kind, notes, value, name)
    if get_origin(kind) is Literal:
        if value in get_args(kind) and type(value) in {type(k) for k in get_args(kind)}:
            return value
        guess = nearest(value, map(str, get_args(kind))) if isinstance(value, str) else None
        raise _refusal(name, expected(hint), value, f" Did you mean {guess!r}?" if guess else "")
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, kind):
            raise _refusal(name, "a table of fields", value)
        check(value, lambda inner: f"{name}.{inner}")
        return value
    converted = _converted(kind, value)
    if converted is None:
        raise _refusal(name, expected(hint), value)
    for note in notes:
        if isinstance(note, Range) and not note.holds(converted):
            raise _refusal(name, expected(hint), value)
        if isinstance(note, Pattern) and not re.fullmatch(note.regex, converted):
            raise _refusal(name, expected(hint), value)
    return converted


def _canonical_list(kind: Any, notes: tuple, value: Any, name: str) -> tuple:
    kinds, words = get_args(kind), _expected_list(get_args(kind), notes)
    if not isinstance(value, list | tuple):
        raise _refusal(name, words, value)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(value) != len(kinds):
        raise _refusal(name, words, value)
    try:
        canonical = tuple(_canonical(k, v, name) for k, v in zip(kinds, value, strict=True))
    except UserError as error:
        if dataclasses.is_dataclass(kinds[0]):
            raise
        raise _refusal(name, words, value) from error  # what is said is of the whole list
    for note in notes:
        if isinstance(note, Items):
            repeated = note.distinct and len(set(canonical)) < len(canonical)
            if len(canonical) < note.least or repeated:
                raise _refusal(name, words, value)
    return value if value == canonical and isinstance(value, tuple) else canonical


def _converted(kind: type, value: Any) -> Any:
    """`value` as the plain type `kind`; None where it is of another."""
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else None
    if kind is int:
        return int(value) if isinstance(value, numbers.Integral) else None
    if kind is float and isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:
            return None
        return number if math.isfinite(number) else None
    if kind is str:
        return value if isinstance(value, str) and _storable(value) else None
    if kind is Path and isinstance(value, str | os.PathLike):
        return Path(value) if _storable(os.fspath(value)) else None
    return None


def _storable(text: str) -> bool:
    """Whether a text can be a file's name: not empty, no NUL, nothing that cannot be encoded."""
    try:
        return bool(text) and "\0" not in text and bool(os.fsencode(text))
    except UnicodeEncodeError:
        return False


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _refusal(name: str, words: str, value: Any, hint: str = "") -> UserError:
    return UserError(f"{name}: expected {words}, got {_shown(value)}.{hint}")


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e6 else f"{value:,}"


def _shown(value: Any) -> str:
    """A value in a message: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, dict):
        return f"a table of {len(value)} fields"
    if isinstance(value, list | tuple) and len(value) > 12:
        return f"{len(value)} entries beginning with {_shown(value[0])}"
    text = repr(str(value)) if isinstance(value, Path) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
