"""What is measured about two sets of logits, against NumPy in words, and what the verdict makes of it."""

from typing import Any

import numpy as np
import pytest

from shardconv.errors import CheckError, ConfigError
from shardconv.verify.agreement import Measured, compare
from shardconv.verify.differences import gap, in_sum, join, surprise
from shardconv.verify.logit_request import Bounds
from shardconv.verify.noise import ORDERS, ROUNDED
from shardconv.verify.routing import certain, first_use, routes, unrouted

Array = np.ndarray[Any, Any]


def test_a_gap_by_its_definition() -> None:
    random = np.random.default_rng(0)
    found, expected = (random.standard_normal((5, 9)).astype(np.float32) for _ in range(2))
    found[0] = expected[0]
    measured = gap(found, expected)
    for row in range(5):
        a, b = found[row].astype(float), expected[row].astype(float)
        p, q = np.exp(b) / np.exp(b).sum(), np.exp(a) / np.exp(a).sum()
        assert measured.worst[row] == max(abs(a - b)) and measured.mean[row] == pytest.approx(sum(abs(a - b)) / 9)
        assert measured.kl[row] == pytest.approx(sum(p * np.log(p / q)), abs=1e-15)
        assert measured.cosine[row] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)))
        assert measured.top1[row] == (list(a).index(max(a)) == list(b).index(max(b)))
        assert measured.top5[row] == len({*sorted(range(9), key=a.__getitem__)[-5:]} & {*sorted(range(9), key=b.__getitem__)[-5:]}) / 5
    assert measured.kl[0] == 0.0 and measured.kl[1] > 0.01 and measured.top5[0] == 1.0
    kept = np.array([True, True, False, True, False])
    summed = in_sum(measured, kept)
    assert (summed.positions, summed.max_abs, summed.cosine) == (3, max(measured.worst[kept]), min(measured.cosine[kept]))
    assert (summed.mean_kl, summed.top1) == (measured.kl[kept].mean(), measured.top1[kept].mean())
    assert in_sum(join([measured, measured]), np.ones(10, bool)).mean_abs == pytest.approx(measured.mean.mean())


def test_surprise_is_that_of_the_next_token() -> None:
    sure = np.full((3, 4), -1e9, np.float32)
    sure[[0, 1, 2], [2, 1, 3]] = 0.0
    assert surprise(sure, np.array([0, 2, 1])).tolist() == [0.0, 0.0]
    assert np.exp(surprise(np.zeros((3, 4), np.float32), np.array([0, 2, 1])).mean()) == pytest.approx(4)


# Routers


def test_positions_are_judged_up_to_the_first_that_hangs_on_noise() -> None:
    scores = np.tile(np.float32([5.0, 3.0, 1.0]), (2, 6, 1))
    scores[1, 3] = [5.0, 3.0, 2.9999]  # the second of two chosen is hardly better than the third
    scores[0, 5] = [9.0, 9.0, 9.0]  # padding
    inside = np.array([[True] * 5 + [False], [True] * 6])
    noise = np.random.default_rng(0).choice([-1e-5, 1e-5], scores.shape).astype(np.float32)
    noise[0, 5] = 100.0
    told = {ROUNDED: scores, **dict.fromkeys(ORDERS, scores + noise)}
    expected = np.ones((2, 6), bool)
    expected[0, 5] = expected[1, 3] = False
    np.testing.assert_array_equal(certain(told, 2, inside), expected)
    assert certain(told, 1, inside)[1].all()
    assert certain(told, 3, inside).all()  # all are chosen
    assert certain({}, 0, inside).all()


def test_experts_that_only_positions_went_to_that_are_not_judged_are_unrouted() -> None:
    scores = np.tile(np.float32([5.0, 3.0, 1.0, 0.0]), (2, 6, 1))
    scores[0, 4], scores[1, 2] = [0.0, 1.0, 3.0, 5.0], [0.0, 5.0, 3.0, 1.0]
    routed = routes({ROUNDED: scores}, 2)
    assert routed is not None and routes({}, 2) is None
    assert routed[0, :4].tolist() == [[True, True, False, False]] * 4 and routed[0, 4].tolist() == [False, False, True, True]
    first = first_use(routed)
    assert first.tolist() == [[0, 0, 4, 4], [0, 0, 2, 6]]
    told = {judged: unrouted(first, np.array(judged, np.int32)) for judged in [(6, 6), (5, 2), (4, 6), (4, 2)]}
    assert told == {(6, 6): (), (5, 2): (), (4, 6): (3,), (4, 2): (2, 3)}


@pytest.mark.parametrize(("decided", "unjudged", "reasons"), [(4, 4, 0), (1, 0, 1)])
def test_what_is_in_doubt_does_not_count_and_little_that_is_not_is_not_enough(decided: int, unjudged: int, reasons: int) -> None:
    expected = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    jump = expected.copy()
    jump[4:] += np.float32([1, 0, 0, 0, 0])
    noise = gap(expected * np.float32(1 + 1e-6), expected)
    flags = np.arange(8) < decided
    measured = Measured(np.arange(8) % 5, expected, expected, (noise, noise), noise, flags)
    report = compare([(measured, jump)], Bounds())
    assert report.unjudged == unjudged and report.jax.positions == 8 - unjudged
    assert len(report.reasons) == reasons
    assert all(reason.startswith("the mean difference is 0.1, and ") for reason in report.reasons)


def test_points_to_draw_are_pairs_of_both_sides_and_the_same_for_a_seed() -> None:
    expected = np.random.default_rng(0).standard_normal((800, 5)).astype(np.float32)
    noise = gap(expected, expected)
    pairs = [(Measured(np.arange(800) % 5, expected, expected, (noise,), noise, np.ones(800, bool)), expected + 1)] * 3
    scatter = compare(pairs, Bounds(), seed=1).scatter
    assert 1990 < len(scatter) <= 2000 and all(found == pytest.approx(reference + 1, abs=1e-6) for reference, found in scatter)
    assert len(set(scatter)) > 1000
    assert compare(pairs, Bounds(), seed=1).scatter == scatter != compare(pairs, Bounds(), seed=2).scatter


def test_nothing_to_compare_and_too_little() -> None:
    with pytest.raises(ConfigError, match="there are none"):
        compare([], Bounds())
    logits = np.zeros((3, 62), np.float32)
    same = gap(logits, logits)
    measured = Measured(np.arange(3), logits, logits, (same,), same, np.ones(3, bool))
    with pytest.raises(CheckError, match="61 logits a token, and the PyTorch model has 62"):
        compare([(measured, logits[:, :61])], Bounds())
