"""Which OpenGL library MuJoCo can render with: EGL, else OSMesa, found by rendering.

A missing or broken driver may end the process that tries it, and MuJoCo fixes its choice at import,
so each attempt runs in a process of its own. `python -m worldenv.runtime.graphics` prints the
choice.

One rule for the caller's variables: none is inherited, each is a wish. What MUJOCO_GL and
MUJOCO_EGL_DEVICE_ID name is tried first; if it is no backend of ours or does not render, it is
overruled, and one line says so. Devices in CUDA_VISIBLE_DEVICES are tried before others; it hides
GPUs from CUDA, which no renderer needs, so no value of it is wrong here. PYOPENGL_PLATFORM and
displays follow from the choice.
"""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache

from worldenv.runtime.errors import UserError

INSTALL_COMMAND = (
    "apt-get install -y libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libosmesa6 (as root)"
)
CHOSEN = "WORLDENV_GRAPHICS"  # set for workers: the choice their environment was built from
VARIABLES = (
    "MUJOCO_GL",
    "MUJOCO_EGL_DEVICE_ID",
    "PYOPENGL_PLATFORM",
    "CUDA_VISIBLE_DEVICES",
    "EGL_PLATFORM",
    "DISPLAY",
    "WAYLAND_DISPLAY",
    CHOSEN,
)
_DEVICES = 8  # EGL devices tried beside those named
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


def candidates(wishes: Mapping[str, str]) -> list[str]:
    """What to try, best first: backends, those of EGL with a device, such as "egl:0"."""
    if backends() == ("cgl",):
        return ["cgl"]
    wanted = wishes.get("MUJOCO_GL", "").strip().lower()
    named = [wishes.get("MUJOCO_EGL_DEVICE_ID", "").strip()]
    named += [part.strip() for part in wishes.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    devices = [str(int(name)) for name in named if re.fullmatch(r"[0-9]{1,3}", name)]
    devices += [str(number) for number in range(_DEVICES)]
    egl = [f"egl:{device}" for device in dict.fromkeys(devices)]
    return ["osmesa", *egl] if wanted == "osmesa" else [*egl, "osmesa"]


def overruled(wishes: Mapping[str, str], choice: str) -> list[str]:
    """The variables among `wishes` that `choice` does not follow, as NAME=value."""
    backend, _, device = choice.partition(":")
    follows = {
        "MUJOCO_GL": wishes.get("MUJOCO_GL", "").strip().lower() in ("", backend),
        "PYOPENGL_PLATFORM": wishes.get("PYOPENGL_PLATFORM", "").lower() in ("", backend),
        "MUJOCO_EGL_DEVICE_ID": wishes.get("MUJOCO_EGL_DEVICE_ID", "").strip() in ("", device)
        or backend != "egl",
    }
    return [f"{name}={wishes[name]}" for name, good in follows.items() if not good]


def environment(choice: str, base: Mapping[str, str]) -> dict[str, str]:
    """`base` with the graphics variables of `choice` (see `candidates`) and no others."""
    built = {name: value for name, value in base.items() if name not in VARIABLES}
    backend, _, device = choice.partition(":")
    built |= {"MUJOCO_GL": backend, CHOSEN: choice}
    if backend != "cgl":
        built["PYOPENGL_PLATFORM"] = backend
    if device:
        built["MUJOCO_EGL_DEVICE_ID"] = device
    return built


def probe(choice: str) -> str | None:
    """Render one small picture with `choice` in another process: None, or why it failed."""
    try:
        result = subprocess.run(
            [sys.executable, "-c", _RENDER],
            env=environment(choice, os.environ),
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
    """What renders here, such as "egl:0" or "osmesa"; tried once a process for the same wishes.

    Raises UserError with each attempt's failure.
    """
    if os.environ.get(CHOSEN):  # by the process that started this one
        return os.environ[CHOSEN]
    return _choose(tuple((name, os.environ[name]) for name in VARIABLES if name in os.environ))


@cache
def _choose(wishes: tuple[tuple[str, str], ...]) -> str:
    failures: dict[str, str] = {}
    devices = math.inf  # how many EGL has at most, by what failed
    for choice in candidates(dict(wishes)):
        number = int(choice.partition(":")[2] or -1)
        if number >= devices:
            continue
        failure = probe(choice)
        if failure is None:
            if wrong := overruled(dict(wishes), choice):
                print(f"graphics: {', '.join(wrong)} overruled: {choice} renders", file=sys.stderr)
            return choice
        if "must be an integer between" in failure:  # no such device
            devices = min(devices, number)
        failures[choice] = failure
    tried = "; ".join(f"{choice}: {why}" for choice, why in failures.items())
    raise UserError(f"MuJoCo cannot render here ({tried}). Install: {INSTALL_COMMAND}.")


def adopt() -> str:
    """Give this process the environment of `choose()`, before it imports MuJoCo or robosuite.

    Of CUDA_VISIBLE_DEVICES a non-empty value is removed too (robosuite refuses most): a program
    that computes on a GPU leaves simulators to worker processes.
    """
    choice = choose()
    built = environment(choice, os.environ)
    for name in VARIABLES:
        if name in built:
            os.environ[name] = built[name]
        elif os.environ.get(name):
            del os.environ[name]
    os.environ[CHOSEN] = choice
    return choice


if __name__ == "__main__":
    try:
        print(f"MuJoCo renders with {choose()}")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
