"""Where to hold an object: grasps of a hand that points down, chosen from geometry alone.

Objects are clouds of points that fill their collision geometry, so that one rule serves them all: a
run of material that fits between the fingers can be held. Of a box that is the box, of a bowl its
rim on either side. Lengths are metres, angles radians, the world's z axis points up.

Liberties: the arm above the hand counts only by how far it must stretch; weights are set by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from worldenv.runtime.errors import UserError

# The Panda hand around its grip site, fingers open; x across the fingers, y along their opening,
# z towards the tips. Boxes reach far up: a hand clear of all obstacles can come from above.
TIP, PALM = 0.012, -0.028  # heights of the finger tips and the palm, along z
_REACH_UP = 0.25
_HAND_BOXES = (
    np.array([[-0.012, 0.038, -_REACH_UP], [0.012, 0.060, TIP]]),
    np.array([[-0.012, -0.060, -_REACH_UP], [0.012, -0.038, TIP]]),
    np.array([[-0.034, -0.106, -_REACH_UP], [0.034, 0.106, PALM]]),
)
_WIDEST = 0.068  # of what fits between the fingers
_RIM_DEPTH, _SOLID_DEPTH = 0.013, 0.025  # of the grip site below the object's top
_MARGIN = 0.010  # clearance below which a grasp is penalised
# The Panda's arm from shoulder to wrist, stretched as far as it still moves well; the wrist is
# above a hand that points down and a little behind it.
_ARM, _WRIST_ABOVE, _WRIST_BEHIND = 0.69, 0.21, 0.088


@dataclass(frozen=True)
class Grasp:
    """Where the grip site goes (position [3]) and the hand's turn about z (yaw, rad)."""

    position: np.ndarray
    yaw: float
    cost: float

    def resembles(self, other: Grasp) -> bool:
        """True if trying both would be trying the same thing twice."""
        turn = abs(self.yaw - other.yaw)
        near = np.linalg.norm(self.position - other.position) < 0.015
        return bool(near and min(turn, np.pi - turn) < np.deg2rad(29))


def choose_grasp(
    points: np.ndarray,
    obstacles: np.ndarray,
    shoulder: np.ndarray,
    journey: np.ndarray,
    candidate: int = 0,
) -> Grasp:
    """The candidate-th best of the grasps of an object, skipping those like a better one.

    points [N, 3]: the object, filled; obstacles [M, 3]: everything else; shoulder [3]: the robot's;
    journey [3]: the way the object is to be carried. Across starts of one task the order hardly
    changes: little turning of the wrist is preferred, and the side of a rim nearer to the robot;
    clearance and reach count only where they are scarce.
    """
    near = np.linalg.norm(obstacles[:, :2] - points[:, :2].mean(0), axis=1) < 0.25
    around = np.concatenate([points, obstacles[near]])
    distinct: list[Grasp] = []
    grasps = _grasps(points, around, shoulder, journey)
    for grasp in sorted(grasps, key=lambda grasp: grasp.cost):
        if not any(grasp.resembles(better) for better in distinct):
            distinct.append(grasp)
    if not distinct:
        raise UserError(
            "The scripted expert found no part of the object between 0 and "
            f"{_WIDEST * 100:.1f} cm wide to hold. Check the asset's collision geometry (group 0)."
        )
    return distinct[candidate % len(distinct)]


def _grasps(
    points: np.ndarray, around: np.ndarray, shoulder: np.ndarray, journey: np.ndarray
) -> Iterator[Grasp]:
    """Every place where a part of the object fits between the fingers, hand pointing down."""
    low, top = points[:, 2].min(), points[:, 2].max()
    centre = (points[:, :2].min(0) + points[:, :2].max(0)) / 2
    rim = [part for yaw in _YAWS for part in _parts(points, top - _RIM_DEPTH, centre, yaw)]
    hollow = len(rim) > 1.5 * len(_YAWS)
    height = top - _RIM_DEPTH
    if not hollow:
        height = max((low + top) / 2, top - _SOLID_DEPTH, low + TIP)
    for yaw in _YAWS:
        for middle, width in _parts(points, height, centre, yaw):
            if width > _WIDEST:
                continue
            axis = np.array([np.sin(yaw), -np.cos(yaw)])
            position = np.append(centre + middle * axis, height)
            lack = max(0.0, _MARGIN - _clearance(around, position, yaw))
            places = (position - shoulder, position + journey - shoulder)
            scarce = 10.0 * lack + 5.0 * sum(map(_overreach, places))
            turn = 0.01 * yaw if yaw >= 0 else -0.02 * yaw  # two mirrored grasps are never equal
            reach = 0.1 * max(np.linalg.norm(place[:2]) for place in places)
            yield Grasp(position, yaw, scarce + turn + reach + width)


_YAWS = np.deg2rad(np.arange(-75, 91, 15))


def _parts(
    points: np.ndarray, height: float, centre: np.ndarray, yaw: float
) -> list[tuple[float, float]]:
    """Runs of material (middle, width) along the fingers' opening, through the object's centre."""
    axis, across = np.array([np.sin(yaw), -np.cos(yaw)]), np.array([np.cos(yaw), np.sin(yaw)])
    flat = points[:, :2] - centre
    slab = (np.abs(points[:, 2] - height) < 0.008) & (np.abs(flat @ across) < 0.010)
    along = np.sort(flat[slab] @ axis)
    runs = np.split(along, np.flatnonzero(np.diff(along) > 0.02) + 1)
    return [((run[0] + run[-1]) / 2, run[-1] - run[0]) for run in runs if len(run)]


def _overreach(place: np.ndarray) -> float:
    """How far the arm would be overstretched 5 cm above `place` [3] (relative to the shoulder)."""
    rise = place[2] + 0.05 + _WRIST_ABOVE
    limit = _WRIST_BEHIND + np.sqrt(max(_ARM**2 - rise**2, 0.0))
    return max(0.0, float(np.linalg.norm(place[:2]) - limit))


def _clearance(points: np.ndarray, position: np.ndarray, yaw: float) -> float:
    """Least signed distance of points [N, 3] to the open hand at a pose and all way up from it."""
    local = (points - position) @ hand_rotation(yaw)
    least = np.inf
    for low, high in _HAND_BOXES:
        outside = np.maximum(low - local, local - high)
        distance = np.linalg.norm(np.maximum(outside, 0), axis=1) + np.minimum(outside.max(1), 0)
        least = min(least, float(distance.min()))
    return least


def hand_rotation(yaw: float) -> np.ndarray:
    """[3, 3] of a hand that points down, turned by yaw about z; at 0 its fingers open along y."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, s, 0.0], [s, -c, 0.0], [0.0, 0.0, -1.0]])
