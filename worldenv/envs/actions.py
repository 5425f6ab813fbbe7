"""What environments ask of the actions they are given."""

import numpy as np

from worldenv.runtime.errors import UserError


def check_actions(actions: np.ndarray, expected: tuple[int, ...], live: list[int]) -> None:
    """Raises UserError unless actions are floating [B, C, A] and finite in the live rows."""
    if actions.shape != expected:
        raise UserError(
            f"Actions must have shape {list(expected)} [environments, chunk, action dims], "
            f"got {list(actions.shape)}."
        )
    if not np.issubdtype(actions.dtype, np.floating):
        raise UserError(f"Actions must be floating point, got {actions.dtype}. Cast to float32.")
    for i in live:
        finite = np.isfinite(actions[i])
        if not finite.all():
            step, dim = np.argwhere(~finite)[0]
            raise UserError(
                f"Actions must be finite, got {actions[i, step, dim]} in row {i}, chunk step "
                f"{step}, dim {dim}. Check the policy's output."
            )
