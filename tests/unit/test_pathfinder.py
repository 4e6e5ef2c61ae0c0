"""Pathfinder images: labels by the generator's own record, bytes of the published strokes, and statistics of the golden samples."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from hgrn2_bench.errors import ConfigError
from suites.lra import strokes
from suites.lra.pathfinder import COLLISION, draw, draw_many, paint, parameters, sketch
from suites.lra.strokes import Pen, dash, disc, step

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(resolution):
    return np.load(GOLDEN / f"pathfinder{resolution}_sample.npz")["images"]


def ink(images):
    return (images > 64).sum(axis=(1, 2))


def pieces(images):
    return np.array([ndimage.label(image > 64, np.ones((3, 3)))[1] for image in images])


def levels(images):
    return np.array([len(np.unique(image)) for image in images])


def grey(images):
    return images.mean(axis=(1, 2))


@pytest.fixture(scope="module")
def drawings():
    return {
        (r, length): [sketch(parameters(r, length), 5, i) for i in range(n)] for r, length, n in ((32, 14, 60), (64, 6, 10), (128, 9, 10))
    }


@pytest.mark.parametrize(("resolution", "count"), [(32, 200), (128, 20)])
@pytest.mark.parametrize("statistic", [ink, pieces, levels, grey])
def test_statistics_are_those_of_the_golden_images(resolution, count, statistic, images):
    ours, theirs = statistic(images[resolution][:count]), statistic(golden(resolution))
    error = math.hypot(ours.std() / len(ours) ** 0.5, theirs.std() / len(theirs) ** 0.5)
    assert abs(ours.mean() - theirs.mean()) < 4 * error
    assert 0.6 < ours.std() / theirs.std() < 1.7


@pytest.fixture(scope="module")
def images():
    return {r: draw_many(parameters(r), 0, range(n))["images"] for r, n in ((32, 200), (128, 20))}


def test_share_of_ink_and_brightness_are_the_published_ones(images):
    for resolution, share, mean, spread in ((32, 0.125, 20.1, 50.8), (128, 0.040, 7.9, 35.7)):
        ours = images[resolution]
        assert np.mean(ours > 64) == pytest.approx(share, rel=0.06)
        assert (ours.mean(), ours.std()) == (pytest.approx(mean, rel=0.06), pytest.approx(spread, rel=0.04))
        assert (ours.min(axis=(1, 2)) == 0).all()
        assert (ours.max(axis=(1, 2)) == 255).all()


def test_labels_follow_from_the_record_of_the_paths(drawings):
    for (resolution, length), items in drawings.items():
        p = parameters(resolution, length)
        for d in items:
            starts, ends = [path.dashes[0].tail for path in d.paths], [path.dashes[-1].head for path in d.paths]
            assert (starts.index(d.markers[0]) == ends.index(d.markers[1])) == d.label
            assert [len(path.dashes) for path in d.paths] == [p.contour_length] * 2
            assert {len(path.dashes) for path in d.distractors} <= {p.distractor_length}
            assert len(d.distractors) <= p.num_distractors


def test_the_dashes_of_a_path_follow_one_another(drawings):
    for (resolution, length), items in drawings.items():
        p = parameters(resolution, length)
        for path in (path for d in items for path in (*d.paths, *d.distractors)):
            for one, other in zip(path.dashes, path.dashes[1:], strict=False):
                assert math.dist(one.head, other.tail) <= 2 * max(p.margins) + 3
                assert 1 < math.dist(one.head, other.head) <= p.dash_length + 2 * max(p.margins) + 3


def test_dashes_keep_clear_of_all_that_was_taken_before(drawings):
    for d in drawings[128, 9]:
        chains = [path.dashes for path in d.distractors]
        for i, later in enumerate(chains):
            for earlier in (*(path.dashes for path in d.paths), *chains[:i]):
                assert all(overlap(a, b) < COLLISION for a in earlier for b in later)


def overlap(one, other):
    """The greatest sum of the spaces of two dashes on a sheet of their own."""
    sheet = np.zeros((2, 200, 200), int)
    for layer, each in zip(sheet, (one, other), strict=True):
        y, x, n = each.anchor[0] + 30, each.anchor[1] + 30, each.stamp.reach
        layer[y - n : y + n + 1, x - n : x + n + 1] = each.stamp.space
    return sheet.sum(axis=0).max()


def test_both_markers_are_painted_where_the_record_says(drawings):
    for d in drawings[128, 9]:
        image = paint(parameters(128, 9), d)
        assert all(
            image[y - 1 : y + 2, x - 1 : x + 2].min() > 229 for y, x in d.markers if 2 < y < 125 and 2 < x < 125
        )  # dashes: at most 229


def test_labels_are_balanced():
    labels = [sketch(parameters(32, 6), 0, i).label for i in range(400)]
    assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / 20


def test_an_item_depends_on_parameters_seed_and_index_alone():
    p = parameters(32)
    many = draw_many(p, 3, range(4, 8))
    image, label = draw(p, 3, 6)
    assert (many["images"].shape, many["images"].dtype, many["labels"].dtype) == ((4, 32, 32), np.uint8, np.uint8)
    assert (many["images"][2] == image).all()
    assert many["labels"][2] == label
    assert not (draw(p, 4, 6)[0] == image).all()
    assert not (draw(p, 3, 7)[0] == image).all()


def test_no_indices_give_no_images():
    assert draw_many(parameters(32), 0, range(0))["images"].shape == (0, 32, 32)


def test_a_dash_and_a_marker_have_the_bytes_of_the_golden_images():
    pen = Pen(2, 0.5, 1)
    row = np.rint(dash(pen, math.pi).ink * (1.5 / (2 * 147 / 255)))[pen.reach]
    assert row[2:5].tolist() == [151, 176, 133]
    assert b"\x97\xb0\x85" in golden(32)[0].tobytes()
    middle = disc(3.0)[5:8, 4:10].astype(int)
    assert middle.tolist() == [[66, 252, 255, 255, 255, 178], [152, 255, 246, 251, 250, 253], [178, 252, 251, 254, 252, 244]]


def test_reduction_keeps_a_flat_picture_flat():
    assert (strokes.reduce(np.full((17, 17), 200, np.uint8), 9) == 200).all()


@pytest.mark.parametrize(("angle", "end"), [(0, (0, 5)), (90, (5, 0)), (180, (0, -5)), (-90, (-5, 0)), (45, (4, 4)), (-135, (-3, -3))])
def test_steps_round_up_and_stay_on_the_axes(angle, end):
    assert step((0, 0), math.radians(angle), 5) == end


def test_an_unknown_resolution_or_difficulty_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"resolution=48 is not one of Pathfinder's: 32, 64, 128, 256"):
        parameters(48)
    with pytest.raises(ConfigError, match=r"contour_length=5 is not one of Pathfinder's: 6, 9, 14"):
        parameters(32, 5)
