"""The statistics of the study: does a mean differ from 0, is it small, or is this undecided?

    result = compare([0.4, 0.1, 0.5, 0.3], margin=0.5)      # differences, paired by seed
    result.mean, result.low, result.high                    # with Student's 95 % interval
    result.p, result.p_equivalent                           # two tests of the same differences

A small `p` says that the mean differs from 0 (two-sided t-test). A small `p_equivalent` says that
the mean lies within +-margin (two one-sided t-tests). If neither p-value is small, nothing is
decided. In particular, a large `p` does not show that the mean is 0.

References: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4 (Student's
t); Holm, Scandinavian Journal of Statistics 1979 (many tests); Schuirmann, Journal of
Pharmacokinetics and Biopharmaceutics 1987 (equivalence).
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np


# --- Student's t ----------------------------------------------------------------------------------
def two_sided_p(t: float, freedom: int) -> float:
    """Probability of a value at least as far from 0 as t, under Student's t distribution.

    freedom: the degrees of freedom, a whole number. For whole numbers, the probability is a finite
    sum (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    theta = math.atan(abs(t) / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= (2 * k - 1 + odd) / (2 * k + odd) * math.cos(theta) ** 2
    inside = math.sin(theta) * total
    if odd:
        inside = (theta + inside) * 2 / math.pi
    return max(0.0, 1 - inside)


def upper_p(t: float, freedom: int) -> float:
    """Probability of a value above t, under Student's t distribution."""
    half = two_sided_p(t, freedom) / 2
    return half if t > 0 else 1 - half


def critical_t(freedom: int, level: float = 0.05) -> float:
    """The t whose two-sided p-value is `level`, found by bisection."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        if two_sided_p(middle, freedom) > level:
            low = middle
        else:
            high = middle
    return high


# --- paired differences ---------------------------------------------------------------------------
class Comparison(NamedTuple):
    """The mean of paired differences, its interval, and the p-values of two tests."""

    mean: float
    low: float              # both ends of the 95 % interval
    high: float
    count: int              # number of pairs
    p: float                # small if the mean differs from 0
    p_equivalent: float     # small if the mean lies within +-margin

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def compare(differences: Sequence[float], margin: float) -> Comparison:
    """The mean, its interval and both tests, for two or more differences."""
    count = len(differences)
    freedom = count - 1
    mean = float(np.mean(differences))
    error = float(np.std(differences, ddof=1)) / math.sqrt(count)
    error = max(error, 1e-12)           # avoids dividing by 0 if all differences are equal
    half = critical_t(freedom) * error
    p = two_sided_p(mean / error, freedom)
    above = upper_p((mean + margin) / error, freedom)       # small if the mean is above -margin
    below = upper_p((margin - mean) / error, freedom)       # small if the mean is below +margin
    return Comparison(mean, mean - half, mean + half, count, p, max(above, below))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values.

    If you make only the claims whose adjusted p is below 0.05, the chance of making any false claim
    is at most 5 %.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        largest = max(largest, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, largest)
    return adjusted


def verdict(mean: float, p_adjusted: float, p_equivalent: float | None, margin: float,
            level: float = 0.05) -> str:
    """The verdict on the claim that a mean difference is above 0 (claims.py lists the verdicts).

    p_equivalent: None if equivalence is not tested.
    """
    equivalent = p_equivalent is not None and p_equivalent < level
    if p_adjusted < level:
        answer = "holds" if mean > 0 else "does not hold"
        return f"{answer}, but within {margin:g} points" if equivalent else answer
    return "equivalent" if equivalent else "undecided"


# --- columns of numbers ---------------------------------------------------------------------------
def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation. Equal values share the mean of their ranks."""
    ranks = []
    for column in (np.asarray(a), np.asarray(b)):
        ranks.append([(column < x).sum() + (column <= x).sum() for x in column])
    return float(np.corrcoef(*ranks)[0, 1])


def split_half_reliability(values: np.ndarray) -> float:
    """Estimated correlation of the columns' means with those from the same number of new seeds.

    values: (seeds, columns). The seeds are split into halves in every possible way; the correlation
    of the halves' means is averaged and then corrected for the halved number of seeds (Spearman
    and Brown).
    """
    seeds = range(len(values))
    correlations = []
    for half in combinations(seeds, len(seeds) // 2):
        others = [seed for seed in seeds if seed not in half]
        pair = np.corrcoef(values[list(half)].mean(0), values[others].mean(0))
        correlations.append(pair[0, 1])
    r = float(np.mean(correlations))
    return 2 * r / (1 + r)


def correlation_of_means(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation between the column means of a and of b, which are (seeds, columns)."""
    return rank_correlation(a.mean(0), b.mean(0))


def bootstrap_interval(statistic: Callable[..., float], *samples: np.ndarray,
                       resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of statistic(*samples), by drawing the seeds with replacement.

    samples: arrays (seeds, ...). Each draw takes the same seeds from all arrays.
    """
    rng = np.random.default_rng(0)
    count = len(samples[0])
    values = []
    for _ in range(resamples):
        drawn = rng.integers(count, size=count)
        values.append(statistic(*(sample[drawn] for sample in samples)))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
