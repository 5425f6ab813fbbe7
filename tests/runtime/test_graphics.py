"""Finding a GL library by rendering with it, whatever the caller's variables say."""

import os

import pytest

from worldenv.runtime import graphics
from worldenv.runtime.errors import UserError

TABLE = [  # the caller's variables; what is tried first; what is overruled when egl:0 renders
    ({}, "egl:0", []),
    ({"CUDA_VISIBLE_DEVICES": ""}, "egl:0", []),
    ({"CUDA_VISIBLE_DEVICES": "-1"}, "egl:0", []),
    ({"CUDA_VISIBLE_DEVICES": "0"}, "egl:0", []),
    ({"CUDA_VISIBLE_DEVICES": "1"}, "egl:1", []),
    ({"CUDA_VISIBLE_DEVICES": "2,3"}, "egl:2", []),
    ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"}, "egl:0", []),
    ({"CUDA_VISIBLE_DEVICES": "MIG-GPU-1/2/3"}, "egl:0", []),
    ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "egl:0", []),
    ({"MUJOCO_EGL_DEVICE_ID": ""}, "egl:0", []),
    ({"MUJOCO_EGL_DEVICE_ID": "0"}, "egl:0", []),
    ({"MUJOCO_EGL_DEVICE_ID": "7"}, "egl:7", ["MUJOCO_EGL_DEVICE_ID=7"]),
    ({"MUJOCO_EGL_DEVICE_ID": "-1"}, "egl:0", ["MUJOCO_EGL_DEVICE_ID=-1"]),
    ({"MUJOCO_EGL_DEVICE_ID": "first"}, "egl:0", ["MUJOCO_EGL_DEVICE_ID=first"]),
    ({"MUJOCO_EGL_DEVICE_ID": "²"}, "egl:0", ["MUJOCO_EGL_DEVICE_ID=²"]),
    ({"MUJOCO_EGL_DEVICE_ID": "0", "CUDA_VISIBLE_DEVICES": "1"}, "egl:0", []),
    ({"MUJOCO_EGL_DEVICE_ID": "0", "CUDA_VISIBLE_DEVICES": ""}, "egl:0", []),
    ({"PYOPENGL_PLATFORM": "egl"}, "egl:0", []),
    ({"PYOPENGL_PLATFORM": "osmesa"}, "egl:0", ["PYOPENGL_PLATFORM=osmesa"]),
    ({"PYOPENGL_PLATFORM": "x11"}, "egl:0", ["PYOPENGL_PLATFORM=x11"]),
    ({"MUJOCO_GL": ""}, "egl:0", []),
    ({"MUJOCO_GL": "egl"}, "egl:0", []),
    ({"MUJOCO_GL": "EGL "}, "egl:0", []),
    ({"MUJOCO_GL": "osmesa"}, "osmesa", ["MUJOCO_GL=osmesa"]),
    ({"MUJOCO_GL": "glx"}, "egl:0", ["MUJOCO_GL=glx"]),
    ({"MUJOCO_GL": "wgl"}, "egl:0", ["MUJOCO_GL=wgl"]),
    ({"MUJOCO_GL": "glfw", "DISPLAY": ":99"}, "egl:0", ["MUJOCO_GL=glfw"]),
    ({"MUJOCO_GL": "nonsense"}, "egl:0", ["MUJOCO_GL=nonsense"]),
    ({"MUJOCO_GL": "disabled"}, "egl:0", ["MUJOCO_GL=disabled"]),
    ({"DISPLAY": "nowhere:7", "WAYLAND_DISPLAY": "x"}, "egl:0", []),
]


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graphics.platform, "system", lambda: "Linux")
    for name in graphics.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    graphics._choose.cache_clear()
    yield
    graphics._choose.cache_clear()


@pytest.mark.parametrize(("wishes", "first", "wrong"), TABLE, ids=lambda value: str(value))
def test_the_callers_variables_are_wishes(wishes, first, wrong, monkeypatch, capsys):
    """Only egl:0 renders: a wish is tried first, overruled in one line, and never inherited."""
    for name, value in wishes.items():
        monkeypatch.setenv(name, value)
    tried = []
    monkeypatch.setattr(
        graphics,
        "probe",
        lambda choice: tried.append(choice) or (choice != "egl:0" and "no") or None,
    )
    assert graphics.choose() == graphics.choose() == "egl:0"
    assert tried[0] == first
    assert tried.count("egl:0") == 1  # found once for the process
    said = capsys.readouterr().err
    assert said.count("\n") == bool(wrong)
    assert all(name in said for name in wrong)
    built = graphics.environment("egl:0", os.environ)
    assert {name: built[name] for name in graphics.VARIABLES if name in built} == {
        "MUJOCO_GL": "egl",
        "MUJOCO_EGL_DEVICE_ID": "0",
        "PYOPENGL_PLATFORM": "egl",
        graphics.CHOSEN: "egl:0",
    }


@pytest.mark.libero
@pytest.mark.parametrize(
    "wishes",
    [
        {"MUJOCO_EGL_DEVICE_ID": "7", "CUDA_VISIBLE_DEVICES": "GPU-8932f937"},
        {"MUJOCO_GL": "wgl", "PYOPENGL_PLATFORM": "x11", "DISPLAY": "nowhere:7"},
        {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "egl"},
    ],
    ids=str,
)
def test_what_is_chosen_renders(wishes, monkeypatch):
    for name, value in wishes.items():
        monkeypatch.setenv(name, value)
    assert graphics.probe(graphics.choose()) is None


def test_failures_are_reported_together(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graphics, "probe", lambda choice: f"no {choice} here")
    with pytest.raises(UserError, match=r"no egl:\d here; osmesa: no osmesa here"):
        graphics.choose()


@pytest.mark.libero
def test_a_broken_backend_says_why():
    assert "nonsense" in graphics.probe("nonsense")
