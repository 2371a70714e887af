"""The statistics of the study: verdicts on its claims, the spread between trees, and a figure.

    result = compare([0.4, 0.1, 0.5, 0.3], by=0.0, margin=0.5)  # differences, paired by seed
    result.mean, result.low, result.high                        # with its 95 % interval
    result.p, result.p_equivalent                               # two tests of these differences

A small `p` says that the mean differs from `by` (two-sided t-test). A small `p_equivalent` says
that the mean lies within +-margin (two one-sided t-tests, which belong to a 90 % interval). If
neither p-value is small, nothing is decided: a large `p` does not show that the mean is `by`.

References: Holm, Scandinavian Journal of Statistics 1979 (many tests); Schuirmann, Journal of
Pharmacokinetics and Biopharmaceutics 1987 (equivalence); Smithson, Educational and Psychological
Measurement 2001 (intervals from noncentral distributions).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont         # Pillow comes with torchvision
from scipy import stats
from scipy.optimize import brentq

LEVEL = 0.05


# --- differences between two arms -----------------------------------------------------------------
class Comparison(NamedTuple):
    """The mean of paired differences, its intervals, and the p-values of two tests."""

    mean: float
    low: float              # both ends of the 95 % interval
    high: float
    low90: float            # both ends of the 90 % interval
    high90: float
    p: float                # small if the mean differs from `by`
    p_equivalent: float     # small if the mean lies within +-margin
    detectable: float       # the distance from `by` that such a test finds in 80 % of all studies

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def compare(differences: Sequence[float], by: float = 0.0, margin: float = math.nan,
            level: float = LEVEL) -> Comparison:
    """The mean of two or more differences, its intervals, and both tests.

    level: level of the test for which `detectable` is computed.
    """
    test = stats.ttest_1samp(differences, by)
    interval = test.confidence_interval(0.95)
    interval90 = test.confidence_interval(0.90)
    above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    freedom = len(differences) - 1
    error = stats.sem(differences)
    detectable = (stats.t.ppf(1 - level / 2, freedom) + stats.t.ppf(0.8, freedom)) * error
    return Comparison(float(np.mean(differences)), *map(float, (*interval, *interval90)),
                      float(test.pvalue), float(max(above, below)), float(detectable))


def format_p(p: float) -> str:
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


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


def verdict(comparison: Comparison, by: float, p_holm: float, test_equivalence: bool) -> str:
    """The verdict on the claim that a mean difference is above `by`.

    "holds" or "does not hold" if p_holm is below LEVEL, "equivalent" if only the test of
    equivalence succeeds, and otherwise "undecided".
    """
    equivalent = test_equivalence and comparison.p_equivalent < LEVEL
    if p_holm < LEVEL:
        answer = "holds" if comparison.mean > by else "does not hold"
        return f"{answer}, within the margin" if equivalent else answer
    return "equivalent" if equivalent else "undecided"


# --- differences between all trees ----------------------------------------------------------------
class Spread(NamedTuple):
    """How much delta-m differs between trees, and between seeds, in points."""

    trees: float            # standard deviation of the trees' true means, 0 or more
    low: float              # both ends of its 95 % interval
    high: float
    seeds: float            # standard deviation of the seeds' means over all trees
    rest: float             # standard deviation of a run, without its tree's and its seed's means
    p: float                # F-test: small if the trees differ


def spread_of_trees(gains: np.ndarray) -> Spread:
    """Two-way analysis of variance without repetition. gains: (seeds, trees), delta-m of each run.

    The variance of the trees' observed means contains noise, which is subtracted. The interval
    consists of all true variances for which the trees' observed variance is not surprising, with
    the estimated noise of a run taken as known.
    """
    S, T = gains.shape
    tree_means = gains.mean(0)
    seed_means = gains.mean(1, keepdims=True)
    rest = gains - tree_means - seed_means + gains.mean()
    freedom = T - 1, (S - 1) * (T - 1)
    noise = (rest ** 2).sum() / freedom[1]                      # variance of one run
    F = S * tree_means.var(ddof=1) / noise

    def spread(noncentrality: float) -> float:
        return math.sqrt(max(0.0, noncentrality) * noise / (S * (T - 1)))

    def noncentrality(probability: float) -> float:
        """The noncentrality for which a variance up to the observed one has this probability, or 0.
        """
        def excess(x: float) -> float:
            return stats.ncx2.cdf(F * (T - 1), T - 1, x) - probability

        if excess(1e-9) < 0:
            return 0.0
        high = 1.0
        while excess(high) > 0:
            high *= 2
        return brentq(excess, 1e-9, high)

    return Spread(spread((F - 1) * (T - 1)), spread(noncentrality(0.975)),
                  spread(noncentrality(0.025)), float(seed_means.std(ddof=1)), math.sqrt(noise),
                  float(stats.f.sf(F, *freedom)))


# --- the figure -----------------------------------------------------------------------------------
def draw_rows(path: Path, title: str, rows: dict[str, Sequence[float]], marked: str) -> None:
    """Write a PNG with one row per name: the mean of the values and its 95 % interval.

    Each value is one seed's. marked: the name of the row that is drawn in another colour.
    """
    left, top, width, right, height = 330, 40, 440, 170, 26         # pixels; height of a row
    font = ImageFont.load_default(13)
    intervals = {name: compare(values) for name, values in rows.items()}
    low = math.floor(min(c.low for c in intervals.values()))
    high = math.ceil(max(c.high for c in intervals.values()))
    bottom = top + height * len(rows)
    picture = Image.new("RGB", (left + width + right, bottom + 30), "white")
    pen = ImageDraw.Draw(picture)

    def position(value: float) -> float:
        return left + width * (value - low) / (high - low)

    pen.text((left, 10), title, "black", font)
    for tick in range(low, high + 1):
        x = position(tick)
        pen.line((x, top, x, bottom), "black" if tick == 0 else "gainsboro")
        pen.text((x, bottom + 6), f"{tick:+d}" if tick else "0", "black", font, anchor="ma")
    for i, (name, c) in enumerate(intervals.items()):
        y = top + height * (i + 0.5)
        colour = "darkorange" if name == marked else "royalblue"
        pen.text((left - 12, y), name, "black", font, anchor="rm")
        pen.line((position(c.low), y, position(c.high), y), colour, 3)
        x = position(c.mean)
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour)
        pen.text((left + width + 12, y), str(c), "black", font, anchor="lm")
    picture.save(path)
