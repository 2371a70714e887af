"""Tests of extras/intervals.py: statistics agree with textbooks and independent computations."""

import math

import numpy as np
import pytest

from extras.intervals import (bootstrap_interval, compare, critical_t, holm, rank_correlation,
                              split_half_reliability, two_sided_p, upper_p, verdict)


@pytest.mark.parametrize("freedom, t", [
    (1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (12, 2.179),
    (17, 2.110), (30, 2.042)])
def test_students_t_is_that_of_the_tables(freedom, t):
    """critical_t gives the two-sided 95 % values of textbook tables.

    At these values of t, two_sided_p is 0.05 and upper_p is 0.025.
    """
    assert critical_t(freedom) == pytest.approx(t, abs=6e-4)
    assert two_sided_p(t, freedom) == pytest.approx(0.05, abs=1e-4)
    assert upper_p(t, freedom) == pytest.approx(0.025, abs=1e-4)
    assert upper_p(-t, freedom) == pytest.approx(0.975, abs=1e-4)


def test_p_values_have_the_closed_forms_of_one_and_two_degrees_of_freedom():
    """With one degree of freedom, p is that of the Cauchy distribution.

    With two degrees of freedom, p is 1 - t / sqrt(2 + t^2).
    """
    for t in (0.0, 0.7, 3.0, 50.0):
        assert two_sided_p(-t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi)
        assert two_sided_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_a_comparison_by_hand():
    """The differences 1 to 5 have mean 3 and standard error sqrt(0.5), so t = 4.243.

    For a margin of 4, the test of equivalence has t = (4 - 3) / sqrt(0.5) = 1.414.
    """
    result = compare([1, 2, 3, 4, 5], margin=4)
    assert result.mean == 3 and result.count == 5
    assert (result.low, result.high) == pytest.approx((3 - 1.9629, 3 + 1.9629), abs=1e-3)
    assert result.p == pytest.approx(0.01324, abs=1e-5)             # t tables: 0.01 to 0.02
    assert result.p_equivalent == pytest.approx((1 - 4 / 27 ** 0.5) / 2)    # one-sided
    assert compare([-1, -2, -3, -4, -5], margin=4).p_equivalent == result.p_equivalent
    same = compare([0.0, 0.0, 0.0], margin=0.5)
    assert same.p == 1 and same.p_equivalent < 1e-9


def test_holms_correction():
    """Holm multiplies four sorted p-values by 4, 3, 2, 1, and never lets the products decrease."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.3, 0.6]) == pytest.approx([0.6, 0.6])
    assert holm([0.9]) == [0.9]


@pytest.mark.parametrize("mean, p, p_equivalent, answer", [
    (0.4, 0.01, 0.2, "holds"), (0.4, 0.01, None, "holds"),
    (0.2, 0.01, 0.01, "holds, but within 0.5 points"), (-0.4, 0.01, 0.2, "does not hold"),
    (0.2, 0.06, 0.01, "equivalent"), (0.2, 0.06, 0.06, "undecided"),
    (0.2, 0.06, None, "undecided")])
def test_verdicts(mean, p, p_equivalent, answer):
    """The adjusted p-value decides whether a claim holds.

    Only a test of equivalence can lead to the answer "equivalent".
    """
    assert verdict(mean, p, p_equivalent, margin=0.5) == answer


def test_rank_correlation():
    """Spearman's rho is -1 for the reverse order and 0.9 after one swap of neighbours.

    Equal values share the mean of their ranks.
    """
    a = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert rank_correlation(a, [5, 4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation(a, [1, 2, 3, 5, 4]) == pytest.approx(0.9)
    ranks = [2, 1, 4, 4, 4], [1, 2.5, 2.5, 4, 5]
    assert rank_correlation([2, 1, 7, 7, 7], [1, 2, 2, 3, 5]) == pytest.approx(
        np.corrcoef(*ranks)[0, 1])


def test_reliability_tells_signal_from_noise():
    """With six seeds, the reliability is 1 without noise and 0 without signal.

    It is 6/7 if noise and signal have the same variance.
    """
    rng = np.random.default_rng(0)
    signal, noise = rng.normal(size=2000), rng.normal(size=(6, 2000))
    assert split_half_reliability(signal + 0 * noise) == pytest.approx(1)
    assert split_half_reliability(signal + noise) == pytest.approx(6 / 7, abs=0.02)
    assert split_half_reliability(noise) == pytest.approx(0, abs=0.1)


def test_the_bootstrap_of_a_mean_is_as_wide_as_theory_says():
    """The interval of a mean of 400 values reaches 1.96 standard errors to each side."""
    values = np.random.default_rng(1).normal(5, 2, size=400)
    low, high = bootstrap_interval(np.mean, values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
