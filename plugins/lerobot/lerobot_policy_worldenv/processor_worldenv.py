"""What stands around the policy and the judge: nothing, for their numbers lie in their weights."""

from typing import Any

from lerobot.processor import make_policy_processor_pipelines

from lerobot_policy_worldenv.configuration_worldenv import WorldenvConfig, WorldenvReflectorConfig


def make_worldenv_pre_post_processors(
    config: WorldenvConfig, dataset_stats: Any = None
) -> tuple[Any, Any]:
    """(before, after) of the policy: batches and actions pass as they are."""
    return make_policy_processor_pipelines(input_steps=[], output_steps=[])


def make_worldenv_reflector_pre_post_processors(
    config: WorldenvReflectorConfig, dataset_stats: Any = None
) -> tuple[Any, Any]:
    """(before, after) of the judge: batches pass as they are."""
    return make_policy_processor_pipelines(input_steps=[], output_steps=[])
