"""Every field of the configuration and of the scripts' arguments, on both ways in."""

import json
import math
import os
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from table import Row, as_arguments, bad_values, ends_in_a_named_error, fields_of, nested

from worldenv import cli, export, push
from worldenv.config import Config, load
from worldenv.fields import Range, bare, hints
from worldenv.play.command import PlayArguments
from worldenv.presets import preset
from worldenv.runtime.errors import UserError

SCRIPTS = {
    "eval": cli.EvalArguments,
    "collect": cli.CollectArguments,
    "imagine": cli.ImagineArguments,
    "export": export.ExportArguments,
    "push": push.PushArguments,
    "play": PlayArguments,
}


def read(folder, text: str | bytes):
    path = folder / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(path)


def train(arguments: list[str]):
    sys.argv = ["worldenv-train", *arguments]
    return cli.parse(cli.TrainArguments, cli.TrainArguments(config=preset("smoke")))


def script(name: str, arguments: list[str]):
    sys.argv = [f"worldenv-{name}", *arguments]
    return cli.parse(SCRIPTS[name])


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def from_json():
    for name, hint in fields_of(Config):
        for fault, value in bad_values(hint):
            text = json.dumps(nested(name, value))
            yield Row(f"{name}: {fault}", lambda f, t=text: read(f, t), f"config {name}: expected")


def from_the_command_line():
    """Each kind of fault that can be typed, at one field of each type: it takes a fiftieth of a
    second, and what is typed is checked as what is read."""
    seen = set()
    for name, hint in fields_of(Config):
        flag = f"--{name.replace('_', '-')}"
        for fault, value in [*bad_values(hint), *not_numbers(hint)]:
            words = as_arguments(name, value)
            known = (fault, bare(hint)[0]) in seen
            seen.add((fault, bare(hint)[0]))
            if known and not os.environ.get("WORLDENV_SLOW"):
                continue
            if words and fault in ("below", "nan", "misspelt", "no entry", "an entry twice"):
                told = flag if fault == "misspelt" else f"config {name}: expected"
                yield Row(f"{flag}: {fault}", lambda f, w=words: train(w), told)


def not_numbers(hint):
    if bare(hint)[0] is float:
        yield "nan", math.nan


def of_other_scripts():
    for name, cls in SCRIPTS.items():
        for field, hint in fields_of(cls):
            for fault, value in bad_values(hint):
                words = as_arguments(field, value)
                ranged = fault in ("below", "above", "no entry", "an entry twice")
                if words and (ranged or fault == "beyond any machine") and field != "source":
                    flag = words[0]
                    act = lambda f, n=name, w=words: script(n, w)  # noqa: E731
                    yield Row(f"worldenv-{name} {flag}: {fault}", act, flag)


TEXTS = {
    "nothing": b"",
    "white space": b" \n",
    "cut short": b'{"seed": 1',
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "text": b'"default"',
    "a key twice": b'{"seed": 1, "seed": 2}',
    "a part twice": b'{"sft": {"lr": 1.0, "lr": 2.0}}',
    "an unknown key": b'{"sed": 1}',
    "an unknown key of a part": b'{"sft": {"stepz": 1}}',
    "a part that is a list": b'{"env": [1]}',
    "a part that is null": b'{"env": null}',
    "NaN": b'{"sft": {"lr": NaN}}',
    "Infinity": b'{"sft": {"lr": Infinity}}',
    "1e999": b'{"sft": {"lr": 1e999}}',
    "five thousand digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "nested a hundred thousand deep": b"[" * 100_000,
    "deep inside a field": b'{"env": {"tasks": ' + b"[" * 900 + b"]" * 900 + b"}}",
    "Latin-1": '{"run_dir": "/daten/für"}'.encode("latin-1"),
    "UTF-16": '{"seed": 1}'.encode("utf-16"),
    "NUL bytes": b"\0" * 64,
    "larger than any": b" " * (1 << 20) + b"{}",
    "single quotes": b"{'seed': 1}",
    "a comment": b'{"seed": 1} // mine',
    "two objects": b"{}{}",
    "a patch that does not divide": b'{"env": {"image_size": 24}}',
    "heads that do not divide": b'{"policy": {"heads": 3}}',
    "an odd head": b'{"simulator": {"width": 6, "heads": 2}}',
    "an autoencoder's patch of 3": b'{"env": {"image_size": 24}, "simulator": {"patch": 3, '
    b'"tokenizer": "autoencoder"}}',
    "frames that no chunk meets": b'{"collect": {"record_every": 3}}',
    "no start": b'{"evaluate": {"starts": [20, 20]}}',
    "starts backwards": b'{"evaluate": {"starts": [30, 20]}}',
    "no episode held out": b'{"collect": {"episodes": 3, "held_out": 0.1}}',
}


def texts():
    for name, text in TEXTS.items():
        yield Row(f"config.json: {name}", lambda f, t=text: read(f, t), "config")


FROM_JSON, TYPED = [*from_json(), *texts()], [*from_the_command_line(), *of_other_scripts()]


def test_the_table_is_long_enough():
    assert len(FROM_JSON) > 500
    assert len(TYPED) > 60


@pytest.mark.parametrize("row", FROM_JSON, ids=str)
def test_a_bad_value_in_config_json_is_named(row, tmp_path, capsys):
    ends_in_a_named_error(row, tmp_path, capsys)


@pytest.mark.parametrize("row", TYPED, ids=str)
def test_a_bad_value_on_the_command_line_is_named(row, tmp_path, capsys):
    ends_in_a_named_error(row, tmp_path, capsys)


def test_both_ways_in_say_the_same(tmp_path):
    for name, words, value in (
        ("env.image_size", ["0"], 0),
        ("env.image_size", ["-64"], -64),
        ("env.chunk", ["0"], 0),
        ("env.max_steps", ["-5"], -5),
        ("env.workers", ["0"], 0),
        ("env.tasks", ["8", "8"], [8, 8]),
        ("policy.heads", ["0"], 0),
        ("collect.held_out", ["2"], 2),
        ("evaluate.fixture_seeds", [], []),
        ("evaluate.fixture_seeds", ["100000000000000000000"], [10**20]),
    ):
        with pytest.raises(UserError) as typed:
            train([f"--{name.replace('_', '-')}", *words])
        with pytest.raises(UserError) as stored:
            read(tmp_path, json.dumps(nested(name, value)))
        said = str(stored.value).removeprefix(f"{tmp_path / 'config.json'}: ")
        assert said.replace("[", "(").split(", got")[0] == str(typed.value).split(", got")[0]
        assert said.startswith(f"config {name}: expected")


def test_lists_are_taken_with_commas_or_spaces():
    for words in (["0,1"], ["0", "1"]):
        assert train(["--env.tasks", *words]).config.env.tasks == (0, 1)
    assert train(["--evaluate.starts", "3,5"]).config.evaluate.starts == (3, 5)
    assert script("eval", ["--fixture-seeds", "1,2", "3"]).fixture_seeds == (1, 2, 3)


@pytest.mark.parametrize(
    "words", [["--data"], ["--data", "a", ""], ["--run-dir", ""], ["--env.assets", ""]], ids=str
)
def test_a_path_that_says_nothing_is_refused(words, capsys):
    """An unset variable of the shell trained from scripted demonstrations, or in the current
    folder."""
    with pytest.raises(SystemExit):
        train(words)
    said = " ".join(capsys.readouterr().err.split())
    assert f"parsing {words[0]}: " in said
    config = train(["--data", "a", "b", "--run-dir", "c"]).config
    assert (config.data.paths, config.run_dir) == ((Path("a"), Path("b")), Path("c"))


def test_what_editors_and_people_write_is_taken(tmp_path):
    assert read(tmp_path, b'\xef\xbb\xbf{"seed": 3}').seed == 3
    whole = read(tmp_path, '{"sft": {"lr": 1}, "run_dir": "/daten/für"}')
    assert isinstance(whole.sft.lr, float)
    assert str(whole.run_dir) == "/daten/für"
    assert read(tmp_path, '{"env": {"image_size": 96}}').env.image_size == 96


def test_every_number_declares_its_range():
    def unranged(cls, at=""):
        for name, hint in hints(cls).items():
            kind, notes = bare(hint)
            if is_dataclass(hint):
                yield from unranged(hint, f"{at}{name}.")
            elif kind in (int, float) and not any(isinstance(n, Range) for n in notes):
                yield f"{at}{name}"

    for cls in (Config, *SCRIPTS.values()):
        assert fields(cls)
        assert list(unranged(cls)) == []
