"""Names that are nearly right, and the message for those that are not."""

import pytest

from worldenv.runtime.errors import UserError, nearest, unknown


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("learning_rat", "learning_rate"),
        ("LEARNING-RATE", "learning_rate"),
        ("libero-spacial", "libero-spatial"),
        ("qqqq", None),
        ("", None),
    ],
)
def test_nearest_finds_the_likely_name(name, expected):
    assert nearest(name, ["learning_rate", "batch", "libero-spatial"]) == expected


def test_unknown_names_the_guess_and_the_candidates():
    error = unknown("preset", "smok", ["smoke", "default"])
    assert isinstance(error, UserError)
    assert str(error) == "Unknown preset 'smok'. Did you mean 'smoke'? Known: default, smoke."
    assert "Did you mean" not in str(unknown("preset", "zzz", ["smoke"]))
