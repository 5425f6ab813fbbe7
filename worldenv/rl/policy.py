"""What rollouts, updates and imitation ask of a policy, from the small network to a published 7B.

Only what is trained is ever copied: `trainable` is what an update can take back and a checkpoint of
a round holds, `twin` is a second policy that shares all the rest.
"""

import copy
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Observation = Mapping[str, Any]
"""image `[B, V, H, W, 3]` uint8, proprio `[B, P]` float32, instruction: B strings."""
HEADS = "heads"  # the trainable group with a learning rate of its own


@runtime_checkable
class Policy(Protocol):
    """A `torch.nn.Module` from an observation to a distribution over chunks of actions.

    laplace: mu and log_scale `[B, C, A]` in the policy's own units. categorical: mu holds the
    logits `[B, C, A, K]` of K tokens, log_scale is None. Both float32, as is everything trainable,
    and on the policy's device, to which it moves what it is shown.
    """

    distribution: Literal["laplace", "categorical"]
    feature_width: int

    def __call__(self, observation: Observation) -> tuple[Tensor, Tensor | None]:
        """(mu, log_scale)."""

    def both(self, observation: Observation) -> tuple[Tensor, Tensor | None, Tensor]:
        """(mu, log_scale, features `[B, feature_width]`) of one forward pass."""

    def augmented(
        self, observation: Observation, generator: torch.Generator, shift: int, noise: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(mu, log_scale) for imitation, of an observation disturbed as this policy needs it.

        shift: of images, in pixels; noise `[P]`: standard deviations to add to proprio.
        """

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """The demonstrations' proprio `[P]`; a published policy keeps the ones it came with."""

    def normalise(self, action: Tensor) -> Tensor:
        """Actions `[B, C, A]` of the environment in own units, or as token ids: what to imitate."""

    def command(self, action: Tensor) -> Tensor:
        """Drawn actions `[B, C, A]`, in own units or token ids, as the environment executes them
        (float32)."""

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters that are trained, by group: "all", or "adapter" and "heads". Those of no
        group have `requires_grad` False, come from a folder, and are never copied or written."""


def trainable(policy: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name. ValueError where one is not float32: its updates
    would be rounded away."""
    found = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    for name, parameter in found.items():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name}: expected a trainable float32, got {parameter.dtype}")
    return found


def parameter_groups(policy: Policy, lr: float, head_lr: float | None = None) -> list[dict]:
    """An optimizer's groups; the heads train at head_lr, where it is given, all others at lr."""
    groups = policy.trainable_groups()
    listed = [id(p) for parameters in groups.values() for p in parameters]
    if sorted(listed) != sorted(map(id, trainable(policy).values())):
        raise ValueError(
            f"{type(policy).__name__}.trainable_groups: expected every parameter that requires a "
            f"gradient once, and no other; got {len(listed)} in {[*groups]}"
        )
    return [
        {"params": parameters, "lr": head_lr if head_lr and name == HEADS else lr}
        for name, parameters in groups.items()
    ]


def twin(policy: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A frozen policy that has copies of `tensors` in place of those of their names and shares all
    others with `policy`.

    Unlike `torch.func.functional_call`, which puts them into the policy for the time of a call, it
    can be asked while other threads use the policy.
    """
    # What is in the memo is not copied.
    memo: dict[int, Any] = {}
    for name, own in [*policy.named_parameters(), *policy.named_buffers()]:
        if name not in tensors:
            memo[id(own)] = own
            continue
        # Laid out as the policy's own, for which kernels are chosen.
        value = torch.empty_like(own, requires_grad=False).copy_(tensors[name])
        parameter = isinstance(own, nn.Parameter)
        memo[id(own)] = nn.Parameter(value, requires_grad=False) if parameter else value
    return copy.deepcopy(policy, memo)
