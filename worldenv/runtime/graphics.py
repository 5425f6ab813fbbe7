"""Which OpenGL library MuJoCo can render with: EGL, else OSMesa, found by rendering.

A missing or broken driver may end the process that tries it, and MuJoCo fixes its choice at import,
so each attempt runs in a process of its own. `python -m worldenv.runtime.graphics` prints the
choice.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys

from worldenv.runtime.errors import UserError

INSTALL_COMMAND = (
    "apt-get install -y libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libosmesa6 (as root)"
)
_TIMEOUT = 60  # seconds; the first EGL context on a busy machine takes a few

_RENDER = """
import mujoco
xml = '<mujoco><worldbody><light pos="0 0 2"/><geom size="1"/></worldbody></mujoco>'
model = mujoco.MjModel.from_xml_string(xml)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data)
assert renderer.render().max() > 0, "the picture is black"
"""


def backends() -> tuple[str, ...]:
    """The values of MUJOCO_GL worth trying on this system, best first."""
    return ("cgl",) if platform.system() == "Darwin" else ("egl", "osmesa")


def probe(backend: str) -> str | None:
    """Render one small picture with `backend` in another process: None, or why it failed."""
    environment = os.environ | {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    if backend == "cgl":
        environment.pop("PYOPENGL_PLATFORM")
    try:
        result = subprocess.run(
            [sys.executable, "-c", _RENDER],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no picture after {_TIMEOUT} s"
    if result.returncode == 0:
        return None
    # MuJoCo prints harmless exceptions while the interpreter exits; the error is the first one.
    errors = re.findall(r"^[\w.]*Error: .*$", result.stderr, flags=re.MULTILINE)
    return errors[0] if errors else f"exit status {result.returncode}"


def choose() -> str:
    """The MUJOCO_GL value that renders here; one the user has set is tried alone.

    Raises UserError with each attempt's failure.
    """
    asked = os.environ.get("MUJOCO_GL")
    failures = {}
    for backend in (asked,) if asked else backends():
        failure = probe(backend)
        if failure is None:
            return backend
        failures[backend] = failure
    tried = "; ".join(f"{backend}: {why}" for backend, why in failures.items())
    hint = " Or unset MUJOCO_GL, which names this backend." if asked else ""
    raise UserError(f"MuJoCo cannot render here ({tried}). Install: {INSTALL_COMMAND}.{hint}")


if __name__ == "__main__":
    try:
        print(f"MuJoCo renders with {choose()}")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
