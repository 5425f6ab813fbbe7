"""The gate in a report: what was asked of each round's world before a policy was trained in it."""

from __future__ import annotations

from typing import Any

from worldenv.report.parts import absent, plain, text

_SAID = {
    "passed": "Round {n} passed.",
    "forced": "Round {n} failed, and was trained in with --force: what follows was learned in a "
    "world that is not fit for it.",
    "off": "The gate was off in round {n}, whose world would have been refused.",
}


def section(results: dict[str, Any]) -> str:
    """A table of the measures of every round against their limits."""
    rounds = _rounds(results)
    if not rounds:
        return absent("gate")
    said = "".join(
        f"<p>{_SAID[g['verdict']].format(n=n)}{_tasks(g)}</p>" for n, g in rounds.items()
    )
    titles = ("Round", "Measure", "Limit", "Measured (95% interval)", "")
    head = "".join(f"<th>{title}</th>" for title in titles)
    rows = "".join(_row(n, row) for n, gate in rounds.items() for row in gate["measures"])
    return f'{said}<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _tasks(gate: dict[str, Any]) -> str:
    """Which tasks were trained in, and so measured, if not all."""
    if "tasks" not in gate:
        return ""
    named = ", ".join(str(task) for task in gate["tasks"])
    return (
        f" Of the tasks only {named} were trained in, and are measured here: of the others the "
        "world is not right, as the table of tasks says."
    )


def warning(results: dict[str, Any]) -> str:
    """For the top of the page: that a policy was trained in a refused world, if one was."""
    forced = [n for n, gate in _rounds(results).items() if gate["verdict"] == "forced"]
    return "".join(f'<p class="verdict">{_SAID["forced"].format(n=n)}</p>' for n in forced)


def _rounds(results: dict[str, Any]) -> dict[str, dict]:
    """What the gate said, by round."""
    stages = (results.get("stages") or {}).items()
    return {
        name.removeprefix("posttrain-"): record["gate"]
        for name, record in stages
        if isinstance(record, dict) and "gate" in record
    }


def _row(number: str, row: dict[str, Any]) -> str:
    limit = f"at {'least' if row['least'] else 'most'} {plain(row['limit'])} {row['unit']}"
    figure = "none" if row["value"] is None else f"{plain(row['value'])} {row['unit']}"
    if row["low"] is not None and row["low"] != row["high"]:
        figure += f" <small>{plain(row['low'])} to {plain(row['high'])}, n = {row['n']}</small>"
    cells = (number, row["what"], limit)
    shown = "".join(f"<td>{text(cell)}</td>" for cell in cells)
    return f"<tr>{shown}<td>{figure}</td><td>{'passes' if row['passed'] else 'fails'}</td></tr>"
