"""Which statistics an OpenVLA policy's units are in: dataset_statistics.json, or config.json's."""

import math
from typing import Any

from worldenv.config import PolicyConfig
from worldenv.data.embodiment import Embodiment
from worldenv.models.folder import few, read_json
from worldenv.models.openvla_inputs import Range
from worldenv.runtime.errors import UserError, nearest

SUFFIX = "_no_noops"  # of data from which idle steps were dropped


def statistics(
    config: PolicyConfig, described: Any, embodiment: Embodiment, uses_proprio: bool
) -> tuple[Range, Range | None]:
    """Bounds of actions and of proprio (None unless it is used).

    described: norm_stats of config.json, used without a dataset_statistics.json. UserError where
    they lack the key, or are of other dimensions than the embodiment.
    """
    path, where = config.folder / "dataset_statistics.json", ""
    if path.exists():
        table = read_json(path)
    else:
        table, path, where = described, config.folder / "config.json", "norm_stats."
    if not isinstance(table, dict) or not table:
        raise UserError(
            f"{config.folder}: expected statistics of the policy's data in dataset_statistics.json "
            "or in config.json's norm_stats, got none. Without them its units are unknown: "
            "download the folder again."
        )
    key = _key(config.unnorm_key, table, str(path))
    entry = table[key] if isinstance(table[key], dict) else {}
    place = f"{path}: {where}{key}"
    action = _range(entry.get("action"), embodiment.A, f"{place}.action")
    if not uses_proprio:
        return action, None
    state = _range(entry.get("proprio"), embodiment.P, f"{place}.proprio")
    if not any(state.low) and not any(state.high):
        raise UserError(
            f"{place}.proprio: expected bounds of measured proprio, got zeros only, as where a "
            "policy does not use it. Name another policy.unnorm_key, or policy.proprio false."
        )
    return action, state


def _key(asked: str | None, table: dict[str, Any], path: str) -> str:
    present = f"It has: {few(sorted(table), most=30)}."
    if asked is None:
        if len(table) > 1:
            raise UserError(f"{path}: expected policy.unnorm_key to say whose. {present}")
        return next(iter(table))
    for key in (asked, asked + SUFFIX):
        if key in table:
            return key
    guess = nearest(asked, table)
    hint = f" Did you mean {guess!r}?" if guess else ""
    raise UserError(f"{path}: no statistics of policy.unnorm_key {asked!r}.{hint} {present}")


def _range(entry: Any, dims: int, place: str) -> Range:
    if not isinstance(entry, dict):
        raise UserError(f"{place}: expected statistics, got none. Use the folder's own file.")
    low, high = (_numbers(entry, name, dims, place) for name in ("q01", "q99"))
    if any(a > b for a, b in zip(low, high, strict=True)):
        raise UserError(f"{place}: expected q01 of at most q99, got {low} and {high}.")
    still = [False] * dims
    if "min" in entry and "max" in entry:
        ends = (_numbers(entry, name, dims, place) for name in ("min", "max"))
        still = [a == b for a, b in zip(*ends, strict=True)]
    mask = entry.get("mask", [True] * dims)
    if not isinstance(mask, list) or [type(m) for m in mask] != [bool] * dims:
        raise UserError(f"{place}.mask: expected {dims} times true or false, got {mask!r}.")
    return Range(low, high, mask, still)


def _numbers(entry: dict[str, Any], name: str, dims: int, place: str) -> list[float]:
    value = entry.get(name)
    numbers = isinstance(value, list) and all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in value
    )
    if not numbers or len(value) != dims:
        got = f"{len(value)} entries" if isinstance(value, list) else repr(value)[:80]
        raise UserError(
            f"{place}.{name}: expected {dims} numbers, got {got}. They are of another robot, or "
            "the file is damaged: use the policy's own."
        )
    return value
