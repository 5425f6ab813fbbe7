"""Started as several processes by `test_ranks.py`: each writes what it found to `<folder>/<rank>`.

python ranked.py <what> <folder>
"""

import os
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

from worldenv.runtime import parallel, ranks  # noqa: E402 - threads first
from worldenv.runtime.errors import UserError  # noqa: E402
from worldenv.runtime.seeds import generator  # noqa: E402
from worldenv.runtime.watch import Watch  # noqa: E402

CPU = torch.device("cpu")


def trained() -> dict:
    """Three steps of a network, a parameter of which only one piece needs, and values of pieces."""
    torch.manual_seed(0)
    first, second = torch.nn.Linear(700, 500), torch.nn.Linear(500, 3)
    spare = torch.nn.Parameter(torch.ones(5))
    never = torch.nn.Parameter(torch.ones(2))
    parameters = [*first.parameters(), *second.parameters(), spare, never]
    optimizer = torch.optim.AdamW(parameters, 1e-2, fused=True)
    logged = []
    for step in range(3):

        def loss(piece: int, step: int = step):
            x = torch.randn(8, 700, generator=generator("x", step, piece))
            value = second(first(x).tanh()).square().mean()
            if piece == 1:
                value = value + spare.square().sum()
            return value, {"piece": piece}

        pieces = [lambda k=k: loss(k) for k in range(4)]
        value, rest, norm = parallel.gradients(parameters, pieces, max_norm=0.5)
        assert never.grad is None
        optimizer.step()
        logged.append((float(value), float(norm), [r["piece"] for r in rest]))
    values = parallel.shared([lambda k=k: torch.full((2,), float(k)) for k in range(7)])
    return {"parameters": parameters, "logged": logged, "values": values}


def told() -> dict:
    """What ranks tell each other, and an error of the first."""
    once = ranks.together(lambda: (os.getpid(), ranks.count()))
    try:
        ranks.together(lambda: 1 / 0)
        error = None
    except ZeroDivisionError as raised:
        error = str(raised)
    claims = ranks.Claims(9)
    mine = list(claims)
    return {
        "gathered": ranks.gather({"rank": ranks.number(), "x": torch.ones(2) * ranks.number()}),
        "once": once,
        "error": error,
        "mine": mine,
        "merged": ranks.merge({k: k * k for k in mine}),
    }


def lost() -> dict:
    """The last rank stops, dies or fails; what the others say of it."""
    folder, how = Path(sys.argv[2]), os.environ["HOW"]
    watch, last = Watch(folder), ranks.number() == ranks.count() - 1
    print("about to", how, flush=True)
    (folder / f"pid-{ranks.number()}").write_text(str(os.getpid()))
    try:
        if last and how == "fail":
            raise RuntimeError("the disk is on fire")
        while last or how == "hang":
            time.sleep(0.1)
        ranks.gather(0)
    except RuntimeError as error:
        blamed = None if last else watch.explain()
        watch.say(blamed or error)
        return {"blamed": str(blamed)}


def main() -> None:
    """Do what the first word says, as the rank that the environment says."""
    try:
        ranks.join(CPU)
        found = globals()[sys.argv[1]]()
    except UserError as error:
        found = {"refused": str(error)}
    torch.save(found, Path(sys.argv[2]) / str(os.environ.get("RANK", "alone")))
    if sys.argv[1] != "lost":
        ranks.leave()


if __name__ == "__main__":
    main()
