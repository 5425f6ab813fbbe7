"""The plug-in, in LeRobot where that is installed, else in a stand-in of its shapes."""

import importlib.metadata
import importlib.util
import sys

import pytest
import stand_in_lerobot as stand_in

REAL = importlib.util.find_spec("lerobot") is not None


@pytest.fixture(scope="module", autouse=True)
def plugin():
    """Its package, imported as LeRobot would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(stand_in.PLUGIN)
        if not REAL:
            own = importlib.metadata.version
            version = lambda name: stand_in.VERSION if name == "lerobot" else own(name)  # noqa: E731
            patch.setattr(importlib.metadata, "version", version)
            sys.modules.update(stand_in.modules())
        yield importlib.import_module("lerobot_policy_worldenv")
        if not REAL:
            stand_in.forget()
