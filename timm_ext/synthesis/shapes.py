"""Implicit shapes: functions of position that grow outward from a structure's inside."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from timm_ext.data.noise import Field

Point = tuple[float, float, float]
Coordinates = tuple[Field, Field, Field]


class Shape(Protocol):
    """What the phantom needs of a shape: a function to rank voxels by, and where to look."""

    def rank(self, coordinates: Coordinates) -> Field:
        """Return a value that is about 1 on the surface of the shape and smaller inside."""

    def box(self) -> tuple[Point, Point]:
        """Return the lowest and highest corner, in mm, of a box around twice the shape's thickness."""


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid, turned by `yaw` about the S axis and then `pitch` about the R axis.

    Attributes:
        centre: R, A, S in mm.
        radii: semi-axes in mm before turning.
        yaw: degrees; positive turns R towards A.
        pitch: degrees; positive turns A towards S.
    """

    centre: Point
    radii: Point
    yaw: float = 0.0
    pitch: float = 0.0

    def rank(self, coordinates: Coordinates) -> Field:
        """Return the distance from the centre in units of the radius in that direction."""
        x, y, z = (value - np.float32(middle) for value, middle in zip(coordinates, self.centre, strict=True))
        yaw, pitch = np.deg2rad([self.yaw, self.pitch]).astype(np.float32)
        y, z = y * np.cos(pitch) + z * np.sin(pitch), z * np.cos(pitch) - y * np.sin(pitch)
        x, y = x * np.cos(yaw) + y * np.sin(yaw), y * np.cos(yaw) - x * np.sin(yaw)
        a, b, c = (np.float32(1 / radius) for radius in self.radii)
        squared = np.square(x * a) + np.square(y * b) + np.square(z * c)
        return np.asarray(np.sqrt(squared), dtype=np.float32)

    def box(self) -> tuple[Point, Point]:
        """Return a box of the largest radius, and half as much again, on all sides."""
        reach = 1.5 * max(self.radii)
        return _box([self.centre], reach)


@dataclass(frozen=True)
class Tube:
    """A tube along a chain of balls (R, A, S, radius; mm), squeezed along R by `flatten`."""

    balls: Sequence[tuple[float, float, float, float]]
    flatten: float = 1.0

    def rank(self, coordinates: Coordinates) -> Field:
        """Return the smallest distance to the chain's segments in units of the radius there."""
        stretch = np.array([self.flatten, 1.0, 1.0], dtype=np.float32)
        scaled = (coordinates[0] * stretch[0], coordinates[1], coordinates[2])
        points = np.array(self.balls, dtype=np.float32)
        points[:, :3] *= stretch
        ranks = [_segment(scaled, first, last) for first, last in pairwise(points)]
        return np.asarray(np.minimum.reduce(ranks), dtype=np.float32)

    def box(self) -> tuple[Point, Point]:
        """Return a box around the chain that leaves room for twice its largest radius."""
        return _box([ball[:3] for ball in self.balls], 2 * max(ball[3] for ball in self.balls))


def _segment(coordinates: Coordinates, first: Field, last: Field) -> Field:
    along = last[:3] - first[:3]
    offset = [value - start for value, start in zip(coordinates, first, strict=False)]
    length = np.float32(max(float(np.square(along).sum()), 1e-6))
    t = np.clip((offset[0] * along[0] + offset[1] * along[1] + offset[2] * along[2]) / length, 0.0, 1.0)
    squared = sum(np.square(part - t * step) for part, step in zip(offset, along, strict=True))
    return np.asarray(np.sqrt(squared) / (first[3] + t * (last[3] - first[3])), dtype=np.float32)


def _box(points: Sequence[Point], reach: float) -> tuple[Point, Point]:
    low, high = np.min(points, axis=0) - reach, np.max(points, axis=0) + reach
    return (float(low[0]), float(low[1]), float(low[2])), (float(high[0]), float(high[1]), float(high[2]))
