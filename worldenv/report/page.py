"""The report of a run: one HTML file with its numbers, curves and videos, readable offline and on a
phone.

Reads `results.json`, `metrics.jsonl` and `media/` of a run folder. A video `media/<name>.mp4` may
have a poster `<name>.png` and a text `<name>.json` ({"title", "caption"}); other PNGs are shown as
pictures. Whatever a run has not produced yet is replaced by a sentence that says so. Nothing is
fetched from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worldenv.data.libero_tasks import SUITES, instruction_of
from worldenv.report import curves, gate, measures
from worldenv.report.charts import bar, interval_chart
from worldenv.report.parts import (
    PAGE,
    absent,
    duration,
    embedded,
    is_number,
    p_value,
    plain,
    points,
    span,
    text,
)
from worldenv.report.statistics import (
    Interval,
    bootstrap_difference,
    mcnemar,
    paired_difference,
    wilson,
)
from worldenv.report.video import side_by_side, write_video
from worldenv.runtime.errors import UserError, write_error
from worldenv.runtime.logging import read_metrics

__all__ = ["side_by_side", "write_report", "write_video"]

_LARGEST_MEDIUM = 24 * 2**20
_COLOURS = {"before": "before", "after": "accent"}


def write_report(run_dir: Path | str, missing: Sequence[str] = ()) -> Path:
    """Build `<run_dir>/report.html` and return its path.

    missing: what could not be drawn, and why, to be said on the page. UserError without a
    results.json, or where the disk refuses; a page of earlier results is gone then.
    """
    run_dir = Path(run_dir)
    path = run_dir / "report.html"
    path.unlink(missing_ok=True)
    results = _read_json(run_dir / "results.json")
    metrics = curves.group_metrics(read_metrics(run_dir))
    sections: list[tuple[str, str]] = [
        ("Imagined and real", _media(run_dir / "media", missing)),
        ("Task by task", _tasks(results)),
        ("Post-training inside the world", curves.posttraining(metrics)),
        ("The gate", gate.section(results)),
        ("The learned world", curves.world(results)),
        *measures.sections(run_dir / "measures"),
        ("The reflector", curves.reflector(results)),
        ("Losses", curves.losses(metrics)),
        ("Time and machine", _machine(results)),
    ]
    body = [_headline(results)]
    body += [f"<section><h2>{title}</h2>{content}</section>" for title, content in sections]
    draft = path.with_suffix(".tmp")
    try:
        draft.write_text(PAGE.replace("{{body}}", "\n".join(body)), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise write_error(path, error) from error
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: expected the run's results, got no such file. Run worldenv-train first."
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path}: expected JSON, got {error}. Remove the file and run the stage again."
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: expected a JSON object, got {type(content).__name__}. "
            "Remove the file and run the stage again."
        )
    return content


# --- success in the real benchmark


def _pairs(results: dict[str, Any]) -> list[tuple[dict, dict]]:
    """Evaluation episodes of both policies with the same task, start and seed."""
    return _paired(results.get("evaluation") or {})


def _paired(evaluation: dict[str, list[dict]]) -> list[tuple[dict, dict]]:
    def keyed(rows: list[dict] | None) -> dict[tuple, dict]:
        return {(r["task"], r["start"], r["seed"]): r for r in rows or []}

    before, after = keyed(evaluation.get("sft")), keyed(evaluation.get("posttrained"))
    return [(before[k], after[k]) for k in sorted(before.keys() & after.keys())]


def _rate(results: dict[str, Any], policy: str) -> tuple[int, int] | None:
    """Successes and episodes of "sft" or "posttrained"."""
    rows = (results.get("evaluation") or {}).get(policy)
    if rows:
        return sum(bool(r["success"]) for r in rows), len(rows)
    counts = results.get(policy) or {}
    return (counts["successes"], counts["episodes"]) if counts.get("episodes") else None


def _difference(pairs: Sequence[tuple[dict, dict]], key: str) -> tuple[Interval, Interval, Any]:
    """Paired t interval, bootstrap interval and McNemar's test, clustered by task and start."""
    before, after = ([bool(pair[i][key]) for pair in pairs] for i in (0, 1))
    clusters = [(first["task"], first["start"]) for first, _ in pairs]
    return (
        paired_difference(before, after, clusters),
        bootstrap_difference(before, after, clusters),
        mcnemar(before, after),
    )


def _headline(results: dict[str, Any]) -> str:
    sft, post = _rate(results, "sft"), _rate(results, "posttrained")
    head = (
        f'<p class="eyebrow">worldenv · preset {text(results.get("preset", "?"))} · seed '
        f"{text(results.get('seed', '?'))}</p>"
    )
    if sft is None:
        return f"<header>{head}<h1>Not evaluated yet</h1>{absent('evaluation')}</header>"
    rates = {"before": sft} if post is None else {"before": sft, "after": post}
    big = " <i>→</i> ".join(
        f'<b class="{name}">{wins / total:.0%}</b>' for name, (wins, total) in rates.items()
    )
    lines = [f"<h1>{big}</h1>"]
    if post is None:
        lines.append(
            '<p class="lead">Success of imitation alone. Post-training has not run yet.</p>'
        )
    else:
        where = "in real LIBERO itself" if _in_reality(results) else "inside the learned world only"
        lines.append(
            f'<p class="lead">Success in real LIBERO on {post[1]} held-out episodes, before '
            f"and after post-training {where}.</p>"
        )
        lines += [_verdict(results), gate.warning(results)]
    rows = []
    trained = "Post-trained in reality" if _in_reality(results) else "Post-trained in imagination"
    labels = {"before": "Imitation (SFT)", "after": trained}
    for name, (wins, total) in rates.items():
        interval = wilson(wins, total)
        label = f"{labels[name]} · {wins} of {total}"
        rows.append((label, interval.mean, interval.low, interval.high, _COLOURS[name]))
    chart = interval_chart("Success rates", rows) + f"<figcaption>{_WILSON}</figcaption>"
    chart = f'<figure class="wide">{chart}</figure>'
    others = _without_oracle(results) + _sampled(results)
    return f"<header>{head}{''.join(lines)}{chart}{others}</header>"


def _in_reality(results: dict[str, Any]) -> bool:
    return results.get("world") == "real"


_WILSON = "Share of successful episodes with 95% Wilson intervals."


def _verdict(results: dict[str, Any]) -> str:
    pairs = _pairs(results)
    if pairs:
        change, resampled, test = _difference(pairs, "success")
        detail = (
            f"Paired over {len(pairs)} episodes: {test.gained} gained, {test.lost} lost, exact "
            f"McNemar p = {p_value(test.p)}; bootstrap over starts {span(resampled)}."
        )
    elif results.get("paired_difference"):
        stated = results["paired_difference"]
        change = Interval(*(float(stated[k]) for k in ("mean", "low", "high")))
        detail = "Episode by episode outcomes were not stored."
    else:
        return absent("paired comparison")
    sure = "lies above zero" if change.low > 0 else "includes zero"
    if change.high < 0:
        sure = "lies below zero: post-training did harm"
    return (
        f'<p class="verdict"><strong>{points(change.mean)} points</strong> (95% interval '
        f"{span(change)}, clustered by start). The interval {sure}.</p><p>{detail}</p>"
    )


def _without_oracle(results: dict[str, Any]) -> str:
    pairs = _pairs(results)
    stated = results.get("no_oracle") or {}
    if _judged(pairs):
        change = _difference(pairs, "success_no_oracle")[0]
        rates = [sum(bool(p[i]["success_no_oracle"]) for p in pairs) / len(pairs) for i in (0, 1)]
    elif stated.get("paired_difference"):
        change = Interval(*(float(stated["paired_difference"][k]) for k in ("mean", "low", "high")))
        rates = [stated[k]["successes"] / stated[k]["episodes"] for k in ("sft", "posttrained")]
    else:
        return ""
    return (
        f"<p>Where the reflector ends episodes instead of the simulator's success signal: "
        f"{rates[0]:.0%} → {rates[1]:.0%}, difference {points(change.mean)} points "
        f"({span(change)}).</p>"
    )


def _judged(pairs: Sequence[tuple[dict, dict]]) -> bool:
    """Whether a reflector has ruled on them."""
    return bool(pairs) and all(e.get("success_no_oracle") is not None for p in pairs for e in p)


def _sampled(results: dict[str, Any]) -> str:
    """The same with noise, where it was evaluated."""
    pairs = _paired((results.get("sampled") or {}).get("evaluation") or {})
    said = []
    for key, how in (("success", ""), ("success_no_oracle", ", ended by the reflector")):
        if pairs and (key == "success" or _judged(pairs)):
            change = _difference(pairs, key)[0]
            rates = [sum(bool(p[i][key]) for p in pairs) / len(pairs) for i in (0, 1)]
            said.append(
                f"Acting with the noise of post-training{how}: {rates[0]:.0%} → {rates[1]:.0%}, "
                f"difference {points(change.mean)} points ({span(change)})."
            )
    return f"<p>{' '.join(said)}</p>" if said else ""


def _tasks(results: dict[str, Any]) -> str:
    pairs = _pairs(results)
    if not pairs:
        return absent("paired evaluation")
    parts = [_task_table(results, pairs, "success")]
    if len({first["task"] for first, _ in pairs}) > 1:
        noisy = _paired((results.get("sampled") or {}).get("evaluation") or {})
        for title, rows, key in (
            ("Ended by the reflector", pairs, "success_no_oracle"),
            ("With the noise of post-training", noisy, "success"),
        ):
            if rows and (key == "success" or _judged(rows)):
                parts.append(f"<h3>{title}</h3>{_task_table(results, rows, key)}")
    return "".join(parts)


def _task_table(results: dict[str, Any], pairs: Sequence[tuple[dict, dict]], key: str) -> str:
    rows = []
    for task in sorted({first["task"] for first, _ in pairs}):
        own = [pair for pair in pairs if pair[0]["task"] == task]
        change, _, test = _difference(own, key)
        cells = [f'<td class="name">{text(_task_name(results, task))}</td>']
        for index, colour in enumerate(_COLOURS.values()):
            wins = sum(bool(pair[index][key]) for pair in own)
            interval = wilson(wins, len(own))
            cells.append(
                f"<td>{wins}/{len(own)} <small>{interval.low:.0%}–{interval.high:.0%}</small>"
                f"{bar(interval.mean, colour)}</td>"
            )
        cells.append(f"<td>{points(change.mean)} <small>{span(change)}</small></td>")
        cells.append(f"<td>+{test.gained} −{test.lost}</td><td>{p_value(test.p)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(
        f"<th>{t}</th>" for t in ("Task", "Before", "After", "Points", "Pairs", "McNemar p")
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _task_name(results: dict[str, Any], task: int) -> str:
    names = SUITES.get(str(results.get("suite", "")), ())
    for entry in results.get("tasks") or []:
        if isinstance(entry, dict) and entry.get("id", entry.get("task")) == task:
            return str(entry.get("instruction") or f"task {task}")
    return f"{task}. {instruction_of(names[task])}" if 0 <= task < len(names) else f"task {task}"


# --- media and machine


def _media(folder: Path, missing: Sequence[str]) -> str:
    notes = "".join(f'<p class="absent">Not drawn: {text(what)}</p>' for what in missing)
    videos = sorted(folder.glob("*.mp4"))
    posters = {video.with_suffix(".png") for video in videos}
    figures = []
    for path in [*videos, *(p for p in sorted(folder.glob("*.png")) if p not in posters)]:
        notes_file = path.with_suffix(".json")
        said = _read_json(notes_file) if notes_file.exists() else {}
        title = text(said.get("title", path.stem.replace("_", " ").replace("-", " ")))
        caption = f"<strong>{title}</strong> {text(said.get('caption', ''))}"
        if path.stat().st_size > _LARGEST_MEDIUM:
            figures.append(f"<p>{caption} (too large to embed: {text(path.name)})</p>")
            continue
        source = embedded(path)
        if path.suffix == ".png":
            element = f'<img src="{source}" alt="{title}">'
        else:
            poster = path.with_suffix(".png")
            still = f' poster="{embedded(poster)}"' if poster.exists() else ""
            element = (
                f'<video controls autoplay muted loop playsinline{still} src="{source}"></video>'
            )
        figures.append(f"<figure>{element}<figcaption>{caption}</figcaption></figure>")
    if not figures:
        return notes or absent("comparison of rollouts")
    return f'{notes}<div class="media">{"".join(figures)}</div>'


def _machine(results: dict[str, Any]) -> str:
    parts = []
    stages = {k: v for k, v in (results.get("stages") or {}).items() if isinstance(v, dict)}
    if stages:
        total = sum(v.get("seconds", 0) for v in stages.values()) or 1
        rows = [
            f"<tr><td>{text(name)}</td>"
            f"<td>{duration(v.get('seconds', 0))}{bar(v.get('seconds', 0) / total)}</td>"
            f"<td>{_gigabytes(v.get('peak_memory_bytes'))}</td>"
            f'<td class="details"><small>{_details(v)}</small></td></tr>'
            for name, v in stages.items()
        ]
        rows.append(f"<tr><th>total</th><th>{duration(total)}</th><th></th><th></th></tr>")
        parts.append(f'<div class="scroll"><table>{"".join(rows)}</table></div>')
    else:
        parts.append(absent("timing of stages"))
    speed = results.get("frames_per_second")
    facts = {f"frames/s {k}": v for k, v in speed.items()} if isinstance(speed, dict) else {}
    if is_number(speed):
        facts["imagined frames/s"] = speed
    facts["real episodes used"] = _real_episodes(results)
    facts["peak memory"] = _gigabytes(results.get("peak_memory_bytes")) or None
    machine = results.get("machine") or {}
    if isinstance(machine, dict):
        machine = dict(machine)
        if is_number(machine.get("memory_bytes")):
            machine["memory"] = _gigabytes(machine.pop("memory_bytes"))
        facts |= machine
    else:
        facts["machine"] = machine
    facts["commit"] = results.get("commit")
    command = results.get("command")
    facts["command"] = " ".join(command) if isinstance(command, list) else command
    items = "".join(
        f"<dt>{text(k)}</dt><dd>{text(plain(v))}</dd>" for k, v in facts.items() if v is not None
    )
    return "".join([*parts, f"<dl>{items}</dl>"])


def _real_episodes(results: dict[str, Any]) -> str | int | None:
    """How many, and what for."""
    total, used = results.get("real_episodes_used"), results.get("real_episodes")
    if not used:
        return total
    return f"{total}: " + ", ".join(f"{n} {what}" for what, n in used.items() if n)


def _gigabytes(size: object) -> str:
    return f"{size / 2**30:.1f} GB" if is_number(size) else ""


def _details(stage: dict[str, Any]) -> str:
    shown = [
        f"{k.replace('_', ' ')} {plain(v)}"
        for k, v in stage.items()
        if k not in ("seconds", "peak_memory_bytes")
        and isinstance(v, int | float | str)
        and not isinstance(v, bool)
    ]
    return text(" · ".join(shown))
