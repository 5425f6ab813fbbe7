"""A scripted expert for LIBERO's pick-and-place suites: the stand-in for human demonstrations.

It sees privileged poses and collision geometry, chooses a grasp from geometry alone (`grasps`) and
drives the hand by feedback, so that it also copes with action noise. Every command is a function of
the present state and the phase (reach, close, carry, open): a policy without memory can imitate it.
Lengths are metres, the world's z axis points up.

Liberties: the arm above the hand is ignored (objects are approached straight from above), capsules
and meshes count as their boxes, and the search for a path is one safe travelling height.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from worldenv.envs.libero.grasps import PALM, TIP, choose_grasp, hand_rotation
from worldenv.runtime.errors import UserError

if TYPE_CHECKING:  # the simulator imports MuJoCo and robosuite
    from worldenv.envs.libero.worker import LiberoSimulator

EXPERT_SUITES = ("libero_spatial", "libero_object")
OPEN, CLOSE = -1.0, 1.0

_SPACING = 0.007  # of the points that stand for an object
_HIGH = 0.03  # clearance of a travelling hand or object above what it passes


def plan(simulator: LiberoSimulator, attempt: int) -> Iterator[np.ndarray]:
    """Actions [7] that solve the task from where `simulator` was reset to, by the attempt's
    grasp."""
    return pick_and_place(Scene(simulator), single_goal(simulator), attempt)


def single_goal(simulator: LiberoSimulator) -> tuple[str, str, str]:
    """The goal (relation, object, target), or a UserError naming what is supported."""
    goals = [tuple(goal) for goal in simulator.goal_state]
    known = simulator.suite in EXPERT_SUITES
    if not known or len(goals) != 1 or len(goals[0]) != 3 or goals[0][0] not in ("on", "in"):
        raise UserError(
            f"The scripted expert solves {' and '.join(EXPERT_SUITES)} (put one object on or in "
            f"another), got {simulator.suite} with the goal {goals}. Choose one of these suites, "
            "or train from the benchmark's own demonstration files: worldenv-train --data PATH."
        )
    return goals[0]


class Scene:
    """What the expert knows of the simulated world: the hand, and where everything is."""

    def __init__(self, simulator: LiberoSimulator) -> None:
        self._simulator = simulator
        env = simulator.env
        self._model, self._data = env.sim.model._model, env.sim.data._data
        self._hand_body = self._model.body(env.robots[0].robot_model.eef_name).id
        self._roots: dict[str, int] = dict(env.obj_body_id)

    def shoulder(self) -> np.ndarray:
        """Position [3] of the arm's shoulder, above the middle of the robot's base."""
        return self._data.body("robot0_link2").xpos.copy()

    @property
    def objects(self) -> list[str]:
        """Names of the objects and fixtures that have a body (sites have none)."""
        return list(self._roots)

    def hand(self) -> tuple[np.ndarray, np.ndarray]:
        """Grip site position [3] and hand rotation [3, 3]."""
        position = self._simulator.proprio()[:3].astype(np.float64)
        return position, self._data.xmat[self._hand_body].reshape(3, 3)

    def finger_opening(self) -> float:
        """Distance of the finger pads."""
        left, right = self._simulator.proprio()[6:8]
        return float(left - right)

    def position(self, name: str) -> np.ndarray:
        """World position [3] of an object's body or of a site."""
        if name in self._roots:
            return self._data.xpos[self._roots[name]].copy()
        return self._data.site_xpos[self._model.site(name).id].copy()

    def owner(self, name: str) -> str:
        """The object a site belongs to; an object is its own."""
        if name in self._roots:
            return name
        body = self._model.site(name).bodyid[0]
        return next(key for key, root in self._roots.items() if self._descends(body, root))

    def points(self, name: str) -> np.ndarray:
        """Points [N, 3] that fill the object's collision geometry, in the world frame."""
        root = self._roots[name]
        solid = [
            self._geom_points(geom)
            for geom in range(self._model.ngeom)
            if self._model.geom_group[geom] == 0
            and self._descends(self._model.geom_bodyid[geom], root)
        ]
        return np.concatenate(solid)

    def _geom_points(self, geom: int) -> np.ndarray:
        centre, half = np.split(self._model.geom_aabb[geom], 2)
        axes = [np.linspace(-h, h, int(np.ceil(2 * h / _SPACING)) + 1) for h in half]
        local = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
        if self._model.geom_type[geom] == 5:  # mjGEOM_CYLINDER: pull the box's corners in
            radius = np.linalg.norm(local[:, :2], axis=1, keepdims=True)
            local[:, :2] *= half[0] / np.maximum(radius, half[0])
        rotation = self._data.geom_xmat[geom].reshape(3, 3)
        return (local + centre) @ rotation.T + self._data.geom_xpos[geom]

    def _descends(self, body: int, root: int) -> bool:
        while body > root:  # MuJoCo numbers children after their parents
            body = self._model.body_parentid[body]
        return body == root


def pick_and_place(
    scene: Scene, goal: tuple[str, str, str], candidate: int
) -> Iterator[np.ndarray]:
    """The actions [7] that bring the goal's object on or into its target, by feedback from `scene`.

    candidate: 0 takes the best grasp, 1 the best that differs from it, and so on (modulo).
    """
    relation, name, target = goal
    points = scene.points(name)
    obstacles = np.concatenate([scene.points(n) for n in scene.objects if n != name])
    journey = scene.position(target) - scene.position(name)
    grasp = choose_grasp(points, obstacles, scene.shoulder(), journey, candidate)
    rotation = hand_rotation(grasp.yaw)

    everything = np.concatenate([points, obstacles])
    position, _ = scene.hand()
    height = _highest_between(everything, position, grasp.position) + TIP + _HIGH
    yield from travel(scene, lambda: grasp.position, rotation, height, OPEN)
    yield from set_gripper(scene, CLOSE)

    position, _ = scene.hand()
    below = position[2] - points[:, 2].min()  # how far the object hangs below the grip site
    target_points = scene.points(scene.owner(target))
    drop = _release_height(relation, scene.position(target), target_points, below)

    def destination() -> np.ndarray:
        # The object may have slipped in the hand, so the offset is measured anew each step; it is
        # bounded so that the hand does not run from an object it has lost.
        offset = np.clip(scene.hand()[0][:2] - scene.position(name)[:2], -0.08, 0.08)
        return np.append(scene.position(target)[:2] + offset, drop)

    height = _highest_between(obstacles, position, destination()) + below + _HIGH
    yield from travel(scene, destination, rotation, height, CLOSE)
    yield from set_gripper(scene, OPEN)
    up, _ = scene.hand()
    up[2] += 0.10
    yield from travel(scene, lambda: up, rotation, up[2], OPEN)


def travel(
    scene: Scene,
    goal: Callable[[], np.ndarray],
    rotation: np.ndarray,
    height: float,
    gripper: float,
    *,
    tolerance: float = 0.006,
    limit: int = 120,
) -> Iterator[np.ndarray]:
    """Moves the grip site to `goal()` over a funnel: high while far, down as it comes above it.

    height: what the hand keeps while it is far from the goal sideways. It waits with the sideways
    motion until it is high enough, so leaving a place goes up first.
    """
    previous = np.full(3, np.inf)
    for _ in range(limit):
        position, current = scene.hand()
        error = goal() - position
        turn = _axis_angle(rotation @ current.T)
        aside, distance = np.linalg.norm(error[:2]), np.linalg.norm(error)
        blocked = np.linalg.norm(position - previous) < 0.0007 and distance < 0.015
        if (distance < tolerance or blocked) and np.linalg.norm(turn) < 0.1:
            return
        previous = position
        needed = min(max(height, goal()[2]), goal()[2] + 4.0 * max(aside - 0.008, 0.0))
        error[2] = needed - position[2]
        error[:2] *= np.clip((0.06 - error[2]) / 0.04, 0.0, 1.0)
        yield _action(error, turn, gripper)


def set_gripper(scene: Scene, gripper: float, *, limit: int = 12) -> Iterator[np.ndarray]:
    """Opens or closes the fingers in place until they stop moving."""
    hold, rotation = (value.copy() for value in scene.hand())
    opening = scene.finger_opening()
    for step in range(limit):
        position, current = scene.hand()
        yield _action(hold - position, _axis_angle(rotation @ current.T), gripper)
        previous, opening = opening, scene.finger_opening()
        if step >= 6 and abs(previous - opening) < 0.0005:  # robosuite ramps the force for 8
            return


def _release_height(relation: str, target: np.ndarray, points: np.ndarray, below: float) -> float:
    """Height of the grip site at which to let go of an object that hangs `below` it.

    target [3], points [N, 3]: place and matter of what the object is put on or into.
    """
    middle = np.linalg.norm(points[:, :2] - target[:2], axis=1) < 0.02
    floor = points[middle, 2].max()
    if relation == "in":  # near the floor, but the palm is wider than a basket and stays above it
        return max(floor + 0.02 + below, points[:, 2].max() + PALM + 0.008)
    return floor + below - 0.003  # a light press makes contact certain


def _highest_between(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    """Height of the highest of points [N, 3] within 10 cm of the way from start to end, seen from
    above; the ends' own height where there is none."""
    way = (end - start)[:2]
    share = np.clip((points[:, :2] - start[:2]) @ way / max(way @ way, 1e-9), 0.0, 1.0)
    aside = np.linalg.norm(points[:, :2] - start[:2] - share[:, None] * way, axis=1)
    return float(points[aside < 0.10, 2].max(initial=min(start[2], end[2])))


def _axis_angle(rotation: np.ndarray) -> np.ndarray:
    """Rotation [3, 3] (not half a turn) as axis times angle [3] (rad). By hand: scipy's last digits
    are others, and with them every demonstration."""
    r = rotation
    vector = np.array([r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]]) / 2
    sine, cosine = np.linalg.norm(vector), (np.trace(r) - 1) / 2
    return vector * (np.arctan2(sine, cosine) / max(sine, 1e-9))


def _action(error: np.ndarray, turn: np.ndarray, gripper: float) -> np.ndarray:
    """[7] float32 OSC_POSE command that reduces a position error (m) and a rotation error (rad)."""
    move, rotate = np.clip(10.0 * error, -1.0, 1.0), np.clip(3.0 * turn, -0.5, 0.5)
    return np.concatenate([move, rotate, [gripper]]).astype(np.float32)
