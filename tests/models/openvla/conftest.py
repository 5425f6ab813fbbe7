"""Tiny folders, written once."""

from pathlib import Path

import pytest
import torch
from published import openvla as published


@pytest.fixture(scope="session")
def oft(tmp_path_factory) -> Path:
    return published.write(tmp_path_factory.mktemp("oft") / "oft", dtype=torch.float32)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "tokens"
    return published.write(folder, heads=False, dtype=torch.float32)
