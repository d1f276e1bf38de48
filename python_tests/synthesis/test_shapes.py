import numpy as np
import pytest

from timm_ext.synthesis.shapes import Ellipsoid, Tube


def at(*points):
    return tuple(np.array(axis, dtype=np.float32) for axis in zip(*points, strict=True))


def test_an_ellipsoid_ranks_one_on_its_surface():
    shape = Ellipsoid((1, 2, 3), (4, 5, 6))
    rank = shape.rank(at((1, 2, 3), (5, 2, 3), (1, 7, 3), (1, 2, -3), (1, 2, 15)))
    np.testing.assert_allclose(rank, [0, 1, 1, 1, 2], atol=1e-6)


def test_yaw_turns_r_towards_a_and_pitch_turns_a_towards_s():
    turned = Ellipsoid((0, 0, 0), (8, 2, 2), yaw=90).rank(at((0, 8, 0), (8, 0, 0)))
    np.testing.assert_allclose(turned, [1, 4], rtol=1e-5)
    tilted = Ellipsoid((0, 0, 0), (2, 8, 2), pitch=45).rank(at((0, 8 * 0.5**0.5, 8 * 0.5**0.5)))
    np.testing.assert_allclose(tilted, [1], rtol=1e-5)


def test_a_tube_ranks_by_the_radius_of_its_nearest_part():
    shape = Tube(((0, 0, 0, 1), (10, 0, 0, 3)))
    rank = shape.rank(at((0, 1, 0), (10, 3, 0), (5, 2, 0), (5, 4, 0), (-1, 0, 0)))
    np.testing.assert_allclose(rank, [1, 1, 1, 2, 1], rtol=1e-5)


def test_a_flat_tube_is_thin_along_r():
    rank = Tube(((0, 0, 0, 2), (0, 10, 0, 2)), flatten=2.0).rank(at((1, 5, 0), (0, 5, 2)))
    np.testing.assert_allclose(rank, [1, 1], rtol=1e-5)


@pytest.mark.parametrize(
    "shape", [Ellipsoid((3, 0, 0), (2, 4, 6), yaw=30), Tube(((0, 0, 0, 1), (5, 5, 5, 3)))]
)
def test_the_box_holds_the_shape(shape):
    axes = np.meshgrid(*[np.arange(-20, 21, dtype=np.float32)] * 3, indexing="ij")
    inside = shape.rank(tuple(axes)) <= 1
    low, high = shape.box()
    for axis, bottom, top in zip(axes, low, high, strict=True):
        assert bottom <= axis[inside].min()
        assert axis[inside].max() <= top
