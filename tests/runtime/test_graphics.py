"""Finding a GL library by rendering with it."""

import pytest

from worldenv.runtime import graphics
from worldenv.runtime.errors import UserError


@pytest.mark.libero
def test_choose_finds_a_backend_that_renders(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert graphics.probe(graphics.choose()) is None


def test_failures_are_reported_together(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(graphics, "probe", lambda backend: f"no {backend} here")
    with pytest.raises(UserError, match="egl: no egl here; osmesa: no osmesa here"):
        graphics.choose()


def test_a_backend_the_user_names_is_tried_alone(monkeypatch: pytest.MonkeyPatch):
    tried = []
    monkeypatch.setattr(graphics, "probe", lambda backend: tried.append(backend) or "broken")
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(UserError, match="unset MUJOCO_GL"):
        graphics.choose()
    assert tried == ["glfw"]


@pytest.mark.libero
def test_a_broken_backend_says_why():
    assert "nonsense" in graphics.probe("nonsense")
