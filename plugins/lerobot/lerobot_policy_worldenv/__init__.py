"""worldenv in LeRobot: policy `worldenv`, environment `worldenv_world`, judge `worldenv_reflector`.

LeRobot imports this package by its name whenever one of its commands begins, so nothing of worldenv
that takes time to import is imported here.
"""

from importlib.metadata import version

from worldenv.runtime.errors import UserError

LEROBOT = "0.6"
"""The versions of LeRobot whose protocols these are."""


def _check(found: str) -> None:
    if found.split(".")[:2] != LEROBOT.split("."):
        raise UserError(
            f"lerobot_policy_worldenv: expected lerobot {LEROBOT}.x, whose protocols it follows, "
            f"got {found}. Run `pip install 'lerobot>={LEROBOT}.1,<0.7'`, or install the plug-in "
            "of another version of worldenv."
        )


_check(version("lerobot"))

from lerobot_policy_worldenv import configuration_worldenv  # noqa: E402 (of this version only)

__all__ = ["configuration_worldenv"]
