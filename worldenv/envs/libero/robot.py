"""LIBERO's robot: a Panda arm moved by OSC_POSE deltas, seen by two cameras."""

from worldenv.data.camera import Camera
from worldenv.data.embodiment import Embodiment, Entry

CAMERAS = ("agentview", "robot0_eye_in_hand")
RENDER_SIZES = (128, 256)  # pixels; the larger one for models that see more than the smaller

_PROPRIO = (
    *(Entry(axis, "position", 0.01) for axis in "xyz"),
    *(Entry(f"angle_{axis}", "rotation", 0.03) for axis in "xyz"),
    *(Entry(f"{side}_finger", "gripper", 0.001) for side in ("left", "right")),
)
ACTION = ("translate",) * 3 + ("turn",) * 3 + ("grip",)
PROPRIO_DIMS, ACTION_DIMS = len(_PROPRIO), len(ACTION)


def embodiment(
    image_size: int,
    chunk: int = 8,
    cameras: tuple[Camera, ...] = (),
    views: int = len(CAMERAS),
) -> Embodiment:
    """As models see it in images of `image_size` pixels from the first `views` of its cameras,
    commanded `chunk` actions at a time; cameras: those of its tasks (`cameras.of_tasks`).
    """
    return Embodiment(
        name="libero-panda",
        views=CAMERAS[:views],
        proprio=_PROPRIO,
        action=ACTION,
        image_size=image_size,
        render_size=render_size(image_size),
        rotation=180,  # LIBERO's cameras look at the table upside down
        chunk=chunk,
        control_hz=20.0,
        gripper_closes=1,
        gripper_open=0.07,
        cameras=cameras[:views],
    )


def render_size(image_size: int) -> int:
    """Side of what is rendered for images of `image_size` pixels."""
    return next((size for size in RENDER_SIZES if size >= image_size), image_size)
