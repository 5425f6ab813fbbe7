"""Tiny folders, written once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published import openvla as published
from published.openvla_policy import SHALLOW

from worldenv.models import vit


@pytest.fixture(scope="session")
def oft(tmp_path_factory) -> Path:
    return published.write(tmp_path_factory.mktemp("oft") / "oft", dtype=torch.float32)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "tokens"
    return published.write(folder, heads=False, dtype=torch.float32)


@pytest.fixture(scope="session")
def _shallow(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shallow") / "shallow"
    published.write(folder, SHALLOW, dtype=torch.float32)
    published.write_adapter(folder, SHALLOW)
    return folder


@pytest.fixture
def shallow(_shallow, monkeypatch) -> Path:
    """OpenVLA-OFT with an adapter beside it and a few blocks in each tower, where many are loaded:
    the depths that timm's names stand for are lowered with it."""
    pairs = zip(vit.KINDS.items(), SHALLOW.depths, strict=True)
    kinds = {name: replace(kind, depth=depth) for (name, kind), depth in pairs}
    monkeypatch.setattr(vit, "KINDS", kinds)
    return _shallow
