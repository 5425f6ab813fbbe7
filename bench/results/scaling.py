"""Regions and the figure about several processes: measured, killed, and on paper for GPUs."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results.defaults import NOT_YET
from bench.results.runs import listed, processor, prose, read, table
from bench.scaling.model import (
    ALONE,
    PAPER,
    ROLLOUT,
    TOLERANCE,
    TWO,
    Cluster,
    Kind,
    against,
    compared,
    gpu_counts,
    stale,
    worth,
)
from worldenv.report.charts import COLOURS, MARKERS, PALETTE, as_svg, drawing

TITLE = "Messages over computing of a step, on nodes of 8 H100: on paper, not run on a GPU"
MOST = 512  # GPUs in the figure


def measured(results: Path) -> list[dict[str, Any]]:
    """What `bench.scaling` left of each machine."""
    return [read(path) for path in sorted((results / "bench").glob("scaling-*.json"))]


def scaling(results: Path) -> str:
    """A table of each machine: times as fast as one process, and what the model says."""
    return "\n\n".join(_machine(found) for found in measured(results)) or NOT_YET


def _machine(report: dict[str, Any]) -> str:
    arms = report["arms"]
    others = [name for name in arms if name != ALONE]
    errors = {(row["work"], row["arm"]): row for row in compared(arms)}
    rows = []
    for kind, one in arms[ALONE]["work"].items():
        cells = []
        for name in others:
            row = errors[kind, name]
            speeds = (one["seconds"] / row[f"{how}_seconds"] for how in ("measured", "predicted"))
            cells.append("{:.2f} ({:.2f})".format(*speeds))
        messages = 1000 * arms[TWO]["work"][kind]["exchange_seconds"]
        rows.append((kind, f"{one['seconds']:.2f} s", *cells, f"{messages:.0f} ms"))
    head = ("work", ALONE, *others, "sum of 2")
    worst = max(errors.values(), key=lambda row: abs(row["error"]))
    off = [row for row in errors.values() if abs(row["error"]) > TOLERANCE]
    threaded = next(name for name in others if arms[name]["threads"] > 1)
    said = [
        f"{processor(report['machine'])}, {report['machine']['cores']} cores: times as fast as "
        f"{ALONE}, and what the model says (in brackets), which is off by {worst['error']:+.0%} at "
        f"most ({worst['work']}, {worst['arm']})"
        + (f"; by more than {TOLERANCE:.0%} in {len(off)} of {len(errors)}." if off else "."),
        f"Rollout on {TWO}: {worth(arms):.0%} of twice one.",
        f"Against {threaded}, {TWO} take {_against(arms, threaded)} as long.",
    ]
    whole = report.get("whole", {}).get("total_seconds")
    if whole:
        times = listed([f"{seconds:.0f} s on {name}" for name, seconds in whole.items()])
        said.append(f"A tenth of the default run from end to end: {times}.")
    return "\n\n".join((table(head, rows), prose(*said)))


def _against(arms: dict[str, Any], threaded: str) -> str:
    """Two processes over one of as many threads: training, and the rollout."""
    ratios = against(arms, threaded)
    rollout = ratios.pop(ROLLOUT)
    least, most = min(ratios.values()), max(ratios.values())
    return f"{least:.2f} to {most:.2f} times (training) and {rollout:.2f} times (rollout)"


def staleness(results: Path) -> str:
    """Whether it could pay that one process imagines while another updates."""
    said = []
    for report in measured(results):
        found = stale(report)
        saved, most = (1 - found[way] / found["shared"] for way in ("stale", "least"))
        verdict = f"would save {saved:.0%}" if saved > 0 else f"would take {-saved:.0%} longer"
        said.append(
            "- **One process imagining while another updates**, one iteration stale, "
            f"{verdict} ({processor(report['machine'])}): of an iteration the rollout is "
            f"{found['imagined']:.1f} s of one process beside another and the update "
            f"{found['updated']:.1f} s, and it would take the longer of the two; shared over two "
            f"processes both take {found['shared']:.1f} s, sums of gradients "
            f"{found['exchange']:.1f} s of them. Half of the computing each is "
            f"{found['least']:.1f} s: no order of the work saves more than {max(0.0, most):.0%} "
            "(`python -m bench.scaling`)."
        )
    return "\n".join(said) or NOT_YET


def kills(results: Path) -> str:
    """What came of ranks that `bench.kills` killed."""
    path = results / "kills" / "results.json"
    if not path.exists():
        return NOT_YET
    found = read(path)
    rows, wrong = found["kills"], found["wrong"]
    named = {"kill": "killed", "stop": "stopped", "memory": "out of memory"}
    each = Counter(named[row["kind"]] for row in rows)
    ranks = sorted({row["resumed_on"] for row in rows})
    said = [
        f"{len(rows)} ranks ({listed([f'{n} {how}' for how, n in each.items()])}), in "
        f"{sum(bool(n) for n in found['kills_by_stage'].values())} stages of {found['runs']} runs "
        f"that went on with {ranks[0]} to {ranks[-1]} ranks:",
        f"{len(wrong)} went wrong." if wrong else "all as undisturbed, bit for bit, nothing lost.",
        f"Of {found['kills_with_others_left']} that had others, {found['of_these_named']} were "
        f"named by them; the last rank had ended after {found['slowest_end_seconds']:.0f} s at "
        f"most ({processor(found['machine'])}).",
    ]
    return prose(*said)


# ---------------------------------------------------------------- on paper


def kinds(results: Path) -> tuple[list[Kind], float]:
    """What is drawn, and the bytes a second that a gather brings as measured on two ranks; the
    rollout is left out where that was not."""
    path = results / "bench" / PAPER
    if not path.exists():
        return [], 0.0
    every = [Kind(**kind) for kind in read(path)["kinds"]]
    for report in measured(results):
        messages = report["arms"][TWO]["messages"]
        return every, messages["gather_large_bytes"] / messages["gather_large_seconds"]
    return [kind for kind in every if kind.way != "gathered"], 0.0


def on_paper(results: Path) -> str:
    """From how many GPUs on messages count, of each kind."""
    shown, gathers = kinds(results)
    if not shown:
        return NOT_YET
    cluster, rows = Cluster(), []
    for kind in shown:
        ends = (_from(kind.first(above, cluster, gathers), kind) for above in (0.1, 1.0))
        seconds = cluster.compute(kind.flops)
        rows.append((kind.name, f"{kind.samples}", f"{seconds:.3g} s", *ends))
    head = ("a step of", "samples", "one GPU computes", "messages > 10%", "messages > computing")
    models = listed(list(read(results / "bench" / PAPER)["models"].values()))
    said = [
        f"On paper, not run on a GPU ({models}; the batches of `openvla-oft-wan`):",
        f"{cluster.flops / 1e12:.0f} TFLOP/s of which {cluster.reached:.0%} are reached,",
        f"NVLink {cluster.nvlink / 1e9:.0f} and InfiniBand {cluster.infiniband / 1e9:.0f} GB/s a "
        f"GPU of which {cluster.of_link:.0%} are, no message hidden behind computing.",
    ]
    if gathers:
        size = next(kind.size for kind in shown if kind.way == "gathered")
        said.append(
            f"A rollout's {size / 1e9:.1f} GB of decisions go to every rank through its host, at "
            f"the {gathers / 1e9:.2f} GB/s measured here."
        )
    return "\n\n".join((table(head, rows), prose(*said)))


def _from(gpus: int | None, kind: Kind) -> str:
    return f"from {gpus} GPUs on" if gpus else f"not up to {kind.samples} GPUs, a sample each"


def lines(results: Path) -> list[tuple[str, list[int], list[float]]]:
    """Name, GPUs and ratios of every kind that takes time worth dividing."""
    shown, gathers = kinds(results)
    cluster = Cluster()
    found = []
    for kind in shown:
        if cluster.compute(kind.flops) > 1e-3:
            every = gpu_counts(cluster, min(kind.samples, MOST))
            gpus = [n for n in every if n.bit_count() == 1]  # even shares
            found.append((kind.name, gpus, [kind.ratio(cluster, n, gathers) for n in gpus]))
    return found


def described(shown: Sequence[tuple[str, list[int], list[float]]]) -> str:
    """The figure's data in words."""
    ends = (f"{name}: {y[0]:.2g} on {x[0]} to {y[-1]:.2g} on {x[-1]} GPUs" for name, x, y in shown)
    return "; ".join(ends)


def figure(results: Path) -> str:
    """The ratio of messages to computing over the number of GPUs, as the text of an SVG."""
    shown = lines(results)
    style = {"svg.hashsalt": TITLE, "figure.facecolor": "white", "font.size": 9}
    with drawing(640, 300, **style) as drawn:
        axes = drawn.subplots()
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        colours = (*COLOURS, "ink")
        for (name, x, y), colour in zip(shown, colours, strict=False):
            marker = MARKERS.get(colour, "v")
            dashes = (0, (4, 2)) if "sharded" in name else "-"  # two lie on each other
            axes.plot(x, y, PALETTE[colour], ls=dashes, marker=marker, markersize=4, label=name)
        for level in (0.1, 1.0):
            axes.axhline(level, color=PALETTE["muted"], linewidth=1, linestyle="--")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(xlabel="GPUs", title=TITLE)
        if shown:
            axes.legend(loc="lower right")
        return as_svg(drawn, Title=TITLE, Description=described(shown))
