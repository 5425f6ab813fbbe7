"""robosuite's Panda with a light visual: low-polygon solids instead of 168 thousand mesh faces.

Used with the primitive pack only. Joints, inertias, collision meshes, actuators, sites and cameras
stay robosuite's own, so the physics is the same to the last bit; only what is drawn differs. Import
it after `assets.configure_libero`, since robosuite chooses its GL library when imported.

Liberties: sizes were read off the bounding boxes of the original's meshes, link by link; hand and
fingers are drawn with robosuite's own collision meshes (264 faces). Lengths in metres.
"""

import math
from xml.etree import ElementTree

from libero.libero.envs.robots import MountedPanda
from robosuite.models.grippers import GRIPPER_MAPPING, PandaGripper
from robosuite.models.mounts import MOUNT_MAPPING, RethinkMount
from robosuite.robots import ROBOT_CLASS_MAPPING, SingleArm

from worldenv.envs.libero.primitive_assets import lathe

ROBOT = "LightPanda"  # what LIBERO is asked for; it puts "Mounted" before it

WHITE, GREY, BLACK = "0.93 0.94 0.95 1", "0.62 0.65 0.69 1", "0.20 0.21 0.23 1"
Point = tuple[float, float, float]
# body: (radius, one end, other end, colour) of rounded cylinders, in the body's frame
RODS: dict[str, list[tuple[float, Point, Point, str]]] = {
    "link0": [
        (0.080, (-0.040, 0, 0.000), (-0.040, 0, 0.075), WHITE),
        (0.057, (0, 0, 0.050), (0, 0, 0.140), WHITE),
        (0.030, (-0.140, 0, 0.035), (-0.060, 0, 0.035), GREY),
    ],
    "link1": [
        (0.055, (0, 0, -0.192), (0, 0, -0.075), WHITE),
        (0.050, (0, 0, -0.120), (0, -0.060, 0), WHITE),
        (0.056, (0, -0.129, 0), (0, 0, 0), WHITE),
    ],
    "link2": [
        (0.056, (0, 0, 0), (0, 0, 0.129), WHITE),
        (0.050, (0, 0, 0.060), (0, -0.140, 0), WHITE),
        (0.055, (0, -0.194, 0), (0, -0.110, 0), WHITE),
    ],
    "link3": [
        (0.055, (0, 0, -0.121), (0, 0, -0.060), WHITE),
        (0.046, (0, 0, -0.080), (0.080, 0.050, 0), WHITE),
        (0.056, (0.0825, 0, 0), (0.0825, 0.111, 0), GREY),
    ],
    "link4": [
        (0.056, (0, 0, 0), (0, 0, 0.111), WHITE),
        (0.047, (0, 0, 0.050), (-0.0825, 0.070, 0), WHITE),
        (0.055, (-0.0825, 0.050, 0), (-0.0825, 0.124, 0), WHITE),
    ],
    "link5": [
        (0.055, (0, 0, -0.259), (0, 0, -0.195), WHITE),
        (0.042, (0, 0.010, -0.215), (0, 0.065, -0.130), WHITE),
        (0.034, (0, 0.068, -0.150), (0, 0.085, -0.010), WHITE),
        (0.050, (0, 0.016, 0), (0, 0.130, 0), GREY),
    ],
    "link6": [
        (0.048, (0, 0, -0.015), (0, 0, 0.056), WHITE),
        (0.040, (0, 0, 0.016), (0.088, 0.010, 0), WHITE),
        (0.046, (0.088, -0.051, 0), (0.088, 0.082, 0), WHITE),
    ],
    "link7": [
        (0.044, (0, 0, 0.050), (0, 0, 0.104), GREY),
        (0.016, (0.020, 0.020, 0.083), (0.062, 0.062, 0.083), BLACK),
    ],
    "pedestal": [(0.170, (0, 0, -0.600), (0, 0, -0.002), BLACK)],
}
# body: (mesh, quat, colour) of collision meshes that are drawn as well
SHELLS = {
    "right_gripper": ("hand", "0.707107 0 0 0.707107", WHITE),
    "leftfinger": ("finger", "1 0 0 0", GREY),
    "rightfinger": ("finger", "0 0 0 1", GREY),
}
_LOOK = {"type": "mesh", "group": "1", "contype": "0", "conaffinity": "0"}


def _rod_mesh(name: str, radius: float, length: float) -> ElementTree.Element:
    """A cylinder along z with bevelled ends, around the origin; 192 faces."""
    bevel, half = min(0.35 * radius, 0.4 * length), length / 2
    profile = [(0, -half), (radius - bevel, -half), (radius, bevel - half), (radius, half - bevel),
               (radius - bevel, half), (0, half)]  # fmt: skip
    return ElementTree.fromstring(lathe(name, profile, segments=20))


def _rod_pose(start: Point, end: Point) -> tuple[float, str, str]:
    """Length, centre and quaternion (w x y z) of a rod along z put between two points."""
    way = [b - a for a, b in zip(start, end, strict=True)]
    length = math.hypot(*way)
    centre = " ".join(f"{(a + b) / 2:.5f}" for a, b in zip(start, end, strict=True))
    x, y, z = (value / length for value in way)
    if z < -0.9999:
        return length, centre, "0 1 0 0"
    norm = math.sqrt(2 * (1 + z))  # the shortest turn of (0, 0, 1) into the rod's direction
    return length, centre, f"{norm / 2:.6f} {-y / norm:.6f} {x / norm:.6f} 0"


def _lighten(root: ElementTree.Element) -> None:
    """Replaces the visual mesh geoms of a robosuite model by the solids above, in place."""
    asset = root.find("asset")
    for body in root.iter("body"):
        for geom in body.findall("geom"):
            if geom.get("group") == "1" and geom.get("type") == "mesh":
                body.remove(geom)
        name = body.get("name")
        for index, (radius, start, end, colour) in enumerate(RODS.get(name, [])):
            length, centre, quat = _rod_pose(start, end)
            mesh = f"{name}_rod{index}"
            asset.append(_rod_mesh(mesh, radius, length))
            look = _LOOK | {"mesh": mesh, "pos": centre, "quat": quat, "rgba": colour}
            ElementTree.SubElement(body, "geom", look)
        if name in SHELLS:
            mesh, quat, colour = SHELLS[name]
            ElementTree.SubElement(
                body, "geom", _LOOK | {"mesh": mesh, "quat": quat, "rgba": colour}
            )
    for site in root.iter("site"):  # robosuite hides its markers, but they would be drawn unseen
        site.set("rgba", "0 0 0 0")
    used = {geom.get("mesh") for geom in root.iter("geom")}
    for mesh in asset.findall("mesh"):
        if mesh.get("name") not in used:
            asset.remove(mesh)


class _Light:
    """Edits the XML while robosuite loads it: before names are collected and prefixed."""

    def resolve_asset_dependency(self) -> None:
        super().resolve_asset_dependency()
        _lighten(self.root)


class LightMount(_Light, RethinkMount):
    """The pedestal as one cylinder."""


class LightPandaGripper(_Light, PandaGripper):
    """The hand and fingers, drawn with their collision meshes."""


class MountedLightPanda(_Light, MountedPanda):
    """LIBERO's arm on a pedestal; robosuite registers the class by its name."""

    @property
    def default_mount(self) -> str:
        return "LightMount"

    @property
    def default_gripper(self) -> str:
        return "LightPandaGripper"


MOUNT_MAPPING["LightMount"] = LightMount
GRIPPER_MAPPING["LightPandaGripper"] = LightPandaGripper
ROBOT_CLASS_MAPPING[MountedLightPanda.__name__] = SingleArm
