"""LIBERO, the real benchmark: `env` over `pool`, whose workers run `server` on `worker`.

Importing this package registers the suites (`gymnasium.make_vec("worldenv/libero_spatial-v0",
num_envs=2)`) and loads no simulator.
"""

import gymnasium

from worldenv.data.libero_tasks import SUITES

# Control steps after which an episode of each suite is cut off (openvla-oft's figures).
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}


def environment_id(suite: str) -> str:
    """The registered id of a LIBERO suite."""
    return f"worldenv/{suite}-v0"


for _suite in SUITES:
    gymnasium.register(
        id=environment_id(_suite),
        entry_point="worldenv.envs.libero.env:LiberoEnv",
        vector_entry_point="worldenv.envs.libero.env:LiberoVectorEnv",
        kwargs={"suite": _suite, "max_steps": MAX_STEPS[_suite]},
        order_enforce=False,
    )
