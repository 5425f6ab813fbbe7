"""Command lines as dataclasses: how words become values, and that they are checked."""

from pathlib import Path
from typing import Any, TypeVar, get_args

import tyro

from worldenv.fields import bare, check

_Arguments = TypeVar("_Arguments")


def parse(kind: type[_Arguments], default: _Arguments | None = None) -> _Arguments:
    """The command line as a dataclass of arguments, checked as the configuration is."""
    arguments = tyro.cli(kind, default=default or kind(), registry=_WORDS)
    check(arguments, lambda name: f"--{name.replace('_', '-')}")
    return arguments


_WORDS = tyro.constructors.ConstructorRegistry()


@_WORDS.primitive_rule
def _list_of_numbers(info: Any) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Whole numbers in a row, however people part them: `0 1`, `0,1`."""
    if info.type_origin is not tuple or bare(get_args(info.type)[0])[0] is not int:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="INT [INT ...]",
        instance_from_str=lambda words: tuple(int(x) for w in words for x in w.split(",")),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [str(number) for number in value],
    )


@_WORDS.primitive_rule
def _path(info: Any) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """A path. An empty word is none, though Python takes it for the folder one is in."""
    if info.type is not Path and set(get_args(info.type)) != {Path, type(None)}:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: _named_path(words[0]),
        is_instance=lambda value: value is None or isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


@_WORDS.primitive_rule
def _list_of_paths(info: Any) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """One path or more: a flag that names none was not meant so."""
    if info.type_origin is not tuple or get_args(info.type)[0] is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="PATH [PATH ...]",
        instance_from_str=lambda words: tuple(map(_named_path, words or [""])),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [str(path) for path in value] or ["none"],
    )


def _named_path(word: str) -> Path:
    if not word:
        raise ValueError("expected a path, got nothing")
    return Path(word)
