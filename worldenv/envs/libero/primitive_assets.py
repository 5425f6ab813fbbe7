"""Our own asset pack for libero_spatial: MuJoCo primitives and small generated textures.

LIBERO finds its objects by relative path and its init states fix qpos and qvel only, so a pack
with the same joints, sites and body names loads every benchmark start. Resting heights and the
sizes that matter for grasping (bowl rim, drawer floor, burner, lid of the box) equal the original's
to a tenth of a millimetre; everything else is our own shape. The pack serves libero_spatial, all
ten tasks, and is written at run time: nothing of it is stored in the repository.

Liberties: walls are rings of 12 flat boxes, the bowl's foot is two pucks (so it nests in the
ramekin instead of rocking on it), fixtures never touch their own drawers and knob, nothing is
reflective. All lengths are metres, angles radians.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from worldenv.envs.libero import primitive_textures

PRIMITIVE_SUITES = ("libero_spatial",)
STAMP_FILE = "worldenv-primitive-pack.txt"
RING = 12  # boxes per ring; a multiple of 4, so that flat sides face the gripper along x and y

# Stiff, light, grippy: the contact parameters LIBERO gives every object.
_SOLID = (
    'group="0" density="100" friction="0.95 0.3 0.1" solref="0.001 1" solimp="0.998 0.998 0.001"'
)
# Fixtures meet everything except each other, which spares drawers from rubbing on their frame.
_FIXED = _SOLID + ' contype="1" conaffinity="0"'
_LOOK = 'group="1" contype="0" conaffinity="0" density="0"'

Point = tuple[float, float]


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.5g}" for value in values)


def _geom(kind: str, size: Sequence[float], pos: Sequence[float], rest: str) -> str:
    """One geom element. size: half lengths (box) or radius and half height (cylinder)."""
    return f'<geom type="{kind}" size="{_numbers(size)}" pos="{_numbers(pos)}" {rest}/>'


def _both(kind: str, size: Sequence[float], pos: Sequence[float], material: str) -> str:
    """A fixture part that is seen as it is felt: one colliding and one visible geom."""
    return _geom(kind, size, pos, _FIXED) + _geom(kind, size, pos, f'{_LOOK} material="{material}"')


def boxes(name: str, parts: Iterable[tuple[Sequence[float], Sequence[float]]]) -> str:
    """A mesh element: boxes (half lengths, centre) that are drawn in one go, which is cheaper."""
    vertices: list[float] = []
    faces: list[int] = []
    quads = ((0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3))
    for half, centre in parts:
        first = len(vertices) // 3
        for corner in range(8):  # bit 2 chooses the side along x, bit 1 along y, bit 0 along z
            signs = (corner >> 2 & 1, corner >> 1 & 1, corner & 1)
            vertices += [c + h * (2 * s - 1) for c, h, s in zip(centre, half, signs, strict=True)]
        for a, b, c, d in quads:
            faces += [first + a, first + b, first + c, first + a, first + c, first + d]
    return (
        f'<mesh name="{name}" vertex="{_numbers(vertices)}" '
        f'face="{" ".join(map(str, faces))}" inertia="shell"/>'
    )


def _disc(radius: float, low: float, high: float) -> str:
    """A colliding cylinder between the heights low and high."""
    return _geom("cylinder", (radius, (high - low) / 2), (0, 0, (low + high) / 2), _SOLID)


def _ring(foot: Point, rim: Point, thickness: float) -> str:
    """A colliding conical wall: RING boxes whose mid-surface runs from foot to rim, each (r, z)."""
    run, rise = rim[0] - foot[0], rim[1] - foot[1]
    slope = math.atan2(run, rise)  # 0 = upright, towards pi/2 = lying flat
    radius, height = (foot[0] + rim[0]) / 2, (foot[1] + rim[1]) / 2
    outer = max(foot[0], rim[0])
    size = (thickness / 2, outer * math.tan(math.pi / RING), math.hypot(run, rise) / 2)
    parts = []
    for index in range(RING):
        turn = 2 * math.pi * index / RING
        pos = (radius * math.cos(turn), radius * math.sin(turn), height)
        # Tip the upright box outwards about its own y, then turn it about z.
        tip, half = (math.cos(slope / 2), math.sin(slope / 2)), turn / 2
        quat = (math.cos(half) * tip[0], -math.sin(half) * tip[1],
                math.cos(half) * tip[1], math.sin(half) * tip[0])  # fmt: skip
        parts.append(_geom("box", size, pos, f'quat="{_numbers(quat)}" {_SOLID}'))
    return "".join(parts)


def lathe(name: str, profile: Sequence[Point], segments: int = 24) -> str:
    """A mesh element: the profile (r, z) turned about z. It is seen from the profile's right."""
    vertices: list[float] = []
    rings: list[list[int]] = []
    for radius, height in profile:
        count = 1 if radius == 0 else segments
        first = len(vertices) // 3
        for index in range(count):
            turn = 2 * math.pi * index / segments
            vertices += [radius * math.cos(turn), radius * math.sin(turn), height]
        rings.append([first + index % count for index in range(segments + 1)])
    faces: list[int] = []
    for low, high in pairwise(rings):
        for k in range(segments):
            if low[k] != low[k + 1]:
                faces += [low[k], low[k + 1], high[k + 1]]
            if high[k] != high[k + 1]:
                faces += [low[k], high[k + 1], high[k]]
    return (
        f'<mesh name="{name}" vertex="{_numbers(vertices)}" '
        f'face="{" ".join(map(str, faces))}" inertia="shell"/>'
    )


def _cylinder(radius: float, low: float, high: float) -> list[Point]:
    """The profile of a cylinder: drawn as a mesh it has a tenth of the primitive's faces."""
    return [(0, low), (radius, low), (radius, high), (0, high)]


def _material(name: str, rgb: Sequence[float], shine: float = 0.3) -> str:
    return (
        f'<material name="{name}" rgba="{_numbers(rgb)} 1" specular="{shine}" shininess="{shine}" '
        'reflectance="0"/>'
    )


def _textured(name: str, file: str, kind: str = "cube", repeat: str = "1 1") -> str:
    return (
        f'<texture name="tex-{name}" type="{kind}" file="{file}"/>'
        f'<material name="{name}" texture="tex-{name}" texrepeat="{repeat}" specular="0.1" '
        'shininess="0.1" reflectance="0"/>'
    )


def _mesh_look(mesh: str, material: str) -> str:
    return f'<geom type="mesh" mesh="{mesh}" material="{material}" {_LOOK}/>'


def _document(model: str, assets: str, inside: str, extents: Sequence[float]) -> str:
    """A robosuite object. extents: depth below, height above and radius used when placing it."""
    below, above, radius = extents
    sites = "".join(
        f'<site name="{name}" pos="{_numbers(pos)}" size="0.005" rgba="0 0 0 0"/>'
        for name, pos in (
            ("bottom_site", (0, 0, -below)),
            ("top_site", (0, 0, above)),
            ("horizontal_radius_site", (radius, radius, 0)),
        )
    )
    return (
        f'<mujoco model="{model}"><asset>{assets}</asset><worldbody><body>'
        f'<body name="object">{inside}</body>{sites}</body></worldbody></mujoco>\n'
    )


# What robosuite's placement sampler sees of every movable object, and of every fixture.
_MOVABLE = (0.06, 0.04, 0.025)
_FIXTURE = (0.045, 0.045, 0.045)


def bowl() -> str:
    """The black bowl: rim radius 54 mm, 52 mm high, standing on z = 1.6 mm."""
    skin = [(0, 0.0016), (0.030, 0.0016), (0.0445, 0.0150), (0.0542, 0.0515), (0.0532, 0.0525)]
    lining = [(0.0532, 0.0525), (0.0515, 0.0510), (0.0425, 0.0180), (0.030, 0.0110), (0, 0.0100)]
    assets = (
        lathe("akita_black_bowl_skin", skin)
        + lathe("akita_black_bowl_lining", lining)
        + _material("akita_black_bowl_dark", (0.10, 0.11, 0.14), 0.6)
        + _material("akita_black_bowl_inside", (0.24, 0.26, 0.32), 0.4)
    )
    inside = (
        _mesh_look("akita_black_bowl_skin", "akita_black_bowl_dark")
        + _mesh_look("akita_black_bowl_lining", "akita_black_bowl_inside")
        + _disc(0.030, 0.0016, 0.0120)
        + _disc(0.0425, 0.0120, 0.0165)
        + _ring((0.0434, 0.0155), (0.0525, 0.0515), 0.0028)
    )
    return _document("akita_black_bowl", assets, inside, _MOVABLE)


def plate() -> str:
    """The plate: radius 73 mm, a flat middle of radius 46 mm, standing on z = -2.5 mm."""
    skin = [(0, -0.0025), (0.046, -0.0025), (0.0735, 0.0140), (0.0725, 0.0160), (0.047, 0.0062),
            (0, 0.0058)]  # fmt: skip
    assets = (
        lathe("plate_skin", skin)
        + lathe("plate_band", [(0.0662, 0.0141), (0.0600, 0.0117)])
        + _material("plate_white", (0.86, 0.85, 0.80), 0.1)
        + _material("plate_blue", (0.20, 0.42, 0.72))
    )
    inside = (
        _mesh_look("plate_skin", "plate_white")
        + _mesh_look("plate_band", "plate_blue")
        + _disc(0.046, -0.0025, 0.0057)
        + _ring((0.044, 0.0030), (0.0705, 0.0125), 0.0045)
    )
    return _document("plate", assets, inside, _MOVABLE)


def ramekin() -> str:
    """The ramekin: radius 45 mm, 43 mm high, standing on z = 0.7 mm."""
    skin = [(0, 0.0007), (0.0375, 0.0007), (0.0448, 0.0405), (0.0448, 0.0430), (0.0405, 0.0430),
            (0.0345, 0.0078), (0, 0.0073)]  # fmt: skip
    assets = lathe("ramekin_skin", skin) + _material("ramekin_glaze", (0.24, 0.56, 0.52), 0.3)
    inside = (
        _mesh_look("ramekin_skin", "ramekin_glaze")
        + _disc(0.036, 0.0007, 0.0073)
        + _ring((0.0355, 0.0020), (0.0416, 0.0424), 0.0050)
    )
    return _document("glazed_rim_porcelain_ramekin", assets, inside, _MOVABLE)


def cookies() -> str:
    """The cookie box: lying flat, 19 mm high."""
    size = (0.0310, 0.0413, 0.0094)
    inside = _geom("box", size, (0, 0, 0), f'{_LOOK} material="cookies"') + _geom(
        "box", size, (0, 0, 0), _SOLID
    )
    assets = _textured("cookies", "../../textures/cookies.png", "2d")
    return _document("cookies", assets, inside, _MOVABLE)


Box = tuple[tuple[float, float, float], tuple[float, float, float]]  # half lengths, centre


def _drawer(level: str, lift: float) -> tuple[str, str]:
    """One drawer: its meshes and its body. lift: height of its floor; it slides out along -y."""
    middle, handle = lift + 0.0245, lift + 0.0250
    wood: list[Box] = [
        ((0.107, 0.081, 0.004), (0.0035, 0.0105, lift - 0.004)),
        ((0.0024, 0.080, 0.031), (-0.102, 0.0105, middle)),
        ((0.0024, 0.080, 0.031), (0.109, 0.0105, middle)),
        ((0.107, 0.0035, 0.031), (0.0035, 0.0905, middle)),
    ]
    front: list[Box] = [((0.109, 0.005, 0.0335), (0.0035, -0.0725, middle))]
    metal: list[Box] = [
        ((0.045, 0.007, 0.006), (-0.0028, -0.1016, handle)),
        ((0.005, 0.010, 0.005), (0.0292, -0.0850, handle)),
        ((0.005, 0.010, 0.005), (-0.0356, -0.0850, handle)),
    ]
    name = f"wooden_cabinet_{level}"
    looks = (("wood", wood), ("front", front), ("metal", metal))
    meshes = "".join(boxes(f"{name}_{kind}", parts) for kind, parts in looks)
    geoms = "".join(_mesh_look(f"{name}_{kind}", f"wooden_cabinet_{kind}") for kind, _ in looks)
    geoms += "".join(_geom("box", half, pos, _FIXED) for half, pos in wood + front + metal)
    site = (lift + 0.0265) if level == "top" else lift + 0.0275
    return meshes, (
        f'<body name="cabinet_{level}"><inertial pos="0 0 0" mass="3" diaginertia="1 1 1"/>'
        f'<joint name="{level}_level" type="slide" axis="0 1 0" limited="true" '
        'range="-0.16 0.01" damping="50"/>'
        f'<site name="{level}_region" type="box" size="0.02993 0.07561 0.10224" group="0" '
        f'pos="0.0033 0.0113 {site:.5g}" quat="0.70711 0 0.70711 0" rgba="0 0 0 0"/>'
        f"{geoms}</body>"
    )


def cabinet() -> str:
    """The wooden cabinet: three drawers 54 mm deep inside a frame with a 223 mm high top."""
    frame: list[Box] = [
        ((0.005, 0.0955, 0.1070), (-0.1122, 0.0163, 0.1135)),
        ((0.005, 0.0955, 0.1070), (0.1190, 0.0163, 0.1135)),
        ((0.1190, 0.0025, 0.1070), (0.0034, 0.1093, 0.1135)),
        ((0.1273, 0.0960, 0.0014), (0.0039, 0.0158, 0.2216)),
    ]
    frame += [((0.1117, 0.0895, 0.0010), (0.0038, 0.0187, z)) for z in (0.0081, 0.0793, 0.1493)]
    drawers = [
        _drawer(level, lift)
        for level, lift in (("top", 0.15915), ("middle", 0.08944), ("bottom", 0.02083))
    ]
    assets = (
        _textured("wooden_cabinet_wood", "../textures/cabinet.png")
        + _textured("wooden_cabinet_front", "../textures/drawer.png")
        + _material("wooden_cabinet_metal", (0.78, 0.76, 0.70), 0.7)
        + boxes("wooden_cabinet_frame", frame)
        + "".join(meshes for meshes, _ in drawers)
    )
    inside = (
        '<body name="base"><site name="top_side" type="box" group="0" rgba="0 0 0 0" '
        'size="0.12534 0.09438 0.00147" pos="0.0035 0.0157 0.2215" quat="1 0 0 0"/>'
        + _mesh_look("wooden_cabinet_frame", "wooden_cabinet_wood")
        + "".join(_geom("box", half, pos, _FIXED) for half, pos in frame)
        + "".join(body for _, body in drawers)
        + "</body>"
    )
    return _document("wooden_cabinet", assets, inside, _FIXTURE)


def stove() -> str:
    """The flat stove: one burner, its upper face at z = 25.5 mm, and a knob on a hinge."""
    dark, steel = "flat_stove_dark", "flat_stove_steel"
    plain = f'{_LOOK} material="{steel}"'
    burner = (
        '<body name="burner" pos="0.15 0 0">'
        '<site name="cook_region" type="box" group="0" size="0.075 0.075 0.0025" pos="0 0 0" '
        'quat="1 0 0 0" rgba="0 0 0 0"/>'
        + _geom("box", (0.095, 0.095, 0.0127), (0, 0, 0.0128), _FIXED)
        + _geom("box", (0.095, 0.095, 0.0105), (0, 0, 0.0105), plain)
        + _mesh_look("flat_stove_plate", dark)
        + _mesh_look("flat_stove_ring", steel)
        + _mesh_look("flat_stove_core", dark)
        + '<body name="burner_plate"/>'
        '<site name="burner" type="cylinder" size="0.0625 0.0005" pos="0 0 0.0262" '
        'rgba="0.9 0.05 0.05 1"/></body>'
    )
    knob = (
        '<body name="button" quat="0.70711 0 0 0.70711">'
        '<inertial pos="0 0 0" mass="3" diaginertia="1 1 1"/>'
        '<joint name="button" type="hinge" axis="0 0 1" limited="true" range="-0.005 2.1" '
        'damping="1"/>'
        + _geom("cylinder", (0.044, 0.0062), (0.0013, 0.0046, 0.0066), _FIXED)
        + _mesh_look("flat_stove_knob", dark)
        + _both("box", (0.009, 0.040, 0.0121), (0.0013, 0.0012, 0.0250), steel)
        + "</body>"
    )
    assets = (
        _material(dark, (0.10, 0.10, 0.11), 0.3)
        + _material(steel, (0.50, 0.53, 0.58), 0.4)
        + lathe("flat_stove_plate", _cylinder(0.075, 0.0030, 0.0250))
        + lathe("flat_stove_ring", _cylinder(0.058, 0.0200, 0.0256))
        + lathe("flat_stove_core", _cylinder(0.044, 0.0200, 0.0260))
        + lathe("flat_stove_knob", _cylinder(0.044, 0.0004, 0.0128))
    )
    inside = f'<body name="base">{burner}{knob}</body>'
    return _document("flat_stove", assets, inside, _FIXTURE)


def table_scene() -> str:
    """Floor, three walls, the table (LIBERO sets its size and place), two lights, the cameras."""
    hidden = f'{_LOOK} rgba="0 0 0 0" type="cylinder" size="0.05 0.1"'  # no camera sees them
    legs = "".join(f'<geom name="table_leg{index}_visual" {hidden}/>' for index in (1, 2, 3, 4))
    wall = f'{_LOOK} material="walls_mat" type="box"'
    floor = f'{_LOOK} material="floorplane" type="box"'
    cameras = (
        ("frontview", "1 0 1.45", "0.56 0.43 0.43 0.56"),
        ("birdview", "-0.2 0 3", "0.7071 0 0 0.7071"),
        ("agentview", "0.5 0 1.35", "0.653 0.271 0.271 0.653"),
        ("sideview", "-0.0565 1.276 1.488", "0.0099 0.0069 0.5912 0.8064"),
    )
    views = "".join(
        f'<camera name="{name}" mode="fixed" pos="{pos}" quat="{quat}"/>'
        for name, pos, quat in cameras
    )
    lights = "".join(
        f'<light name="light{index}" pos="{pos}" dir="{way}" diffuse="{glow} {glow} {glow}" '
        'specular="0.2 0.2 0.2" directional="false" castshadow="false"/>'
        for index, pos, way, glow in ((1, "1 1.2 3.5", "-0.3 -0.3 -1", 0.62),
                                      (2, "-1.5 -1.5 3.5", "0.4 0.4 -1", 0.45))
    )  # fmt: skip
    return (
        '<mujoco model="table_arena"><asset>'
        '<texture name="texplane" type="2d" file="../textures/light-gray-floor-tile.png"/>'
        '<material name="floorplane" texture="texplane" texrepeat="1 1" texuniform="true" '
        'specular="0" shininess="0" reflectance="0"/>'
        '<texture name="tex-wall" type="2d" file="../textures/light-gray-plaster.png"/>'
        '<material name="walls_mat" texture="tex-wall" texrepeat="1 1" texuniform="true" '
        'emission="0.35" specular="0" shininess="0" reflectance="0"/>'
        + _textured("table_texture", "../textures/table.png", "2d")
        + "</asset><worldbody>"
        # The floor is felt as a plane but drawn as a box, at a fifth of the cost.
        '<geom name="floor" type="plane" size="3 3 0.125" group="0" condim="3"/>'
        f'<geom name="floor_visual" size="3 3 0.01" pos="0 0 -0.01" {floor}/>'
        f'<geom name="wall_rear_visual" size="0.01 3 1.5" pos="-2 0 1.5" {wall}/>'
        f'<geom name="wall_left_visual" size="3 0.01 1.5" pos="0 2.5 1.5" {wall}/>'
        f'<geom name="wall_right_visual" size="3 0.01 1.5" pos="0 -2.5 1.5" {wall}/>'
        '<body name="table" pos="0 0 0.4">'
        '<geom name="table_collision" type="box" size="0.4 0.4 0.4" group="0" '
        'friction="1 0.005 0.0001"/>'
        f'<geom name="table_visual" type="box" size="0.4 0.4 0.4" {_LOOK} '
        'material="table_texture"/>'
        '<site name="table_top" pos="0 0 0.4" size="0.001" rgba="0 0 0 0"/>'
        f"{legs}</body>{lights}{views}</worldbody></mujoco>\n"
    )


FILES = {
    "scenes/libero_tabletop_base_style.xml": table_scene,
    "stable_scanned_objects/akita_black_bowl/akita_black_bowl.xml": bowl,
    "stable_scanned_objects/plate/plate.xml": plate,
    "stable_scanned_objects/glazed_rim_porcelain_ramekin/glazed_rim_porcelain_ramekin.xml": ramekin,
    "stable_hope_objects/cookies/cookies.xml": cookies,
    "articulated_objects/wooden_cabinet.xml": cabinet,
    "articulated_objects/flat_stove.xml": stove,
}


def pack_version() -> str:
    """A short hash of the code that writes the pack: changed code, another folder in the cache."""
    digest = hashlib.sha256()
    for file in (Path(__file__), Path(primitive_textures.__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def write_pack(folder: Path) -> None:
    """Writes the whole pack into `folder` (created if absent); the stamp comes last."""
    folder = Path(folder)
    for name, build in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(build(), encoding="utf-8")
    primitive_textures.write_textures(folder / "textures")
    (folder / STAMP_FILE).write_text(pack_version(), encoding="utf-8")
