"""Tests of extras/claims.py: its statistics equal their formulas, with SciPy's distributions, and
its figure shows them."""

import math

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from extras.claims import compare, draw_rows, format_p, holm, spread_of_trees, verdict


# --- differences between two arms -----------------------------------------------------------------
@pytest.mark.parametrize("seeds, by, margin", [(2, 0, 0.5), (5, 0.2, 0.3), (9, -1, 2)])
def test_a_comparison_equals_its_formulas(seeds, by, margin):
    """Both intervals and the p-values of both tests follow from the distribution of Student's t."""
    d = np.random.default_rng(seeds).normal(0.2, 0.4, size=seeds)
    result = compare(d, by, margin, level=0.01)
    error = d.std(ddof=1) / math.sqrt(seeds)
    t = stats.t(seeds - 1)
    assert result.mean == pytest.approx(d.mean())
    for low, high, level in ((result.low, result.high, 0.95), (result.low90, result.high90, 0.9)):
        half = error * t.ppf((1 + level) / 2)
        assert (low, high) == pytest.approx((d.mean() - half, d.mean() + half))
    assert result.detectable == pytest.approx(error * (t.ppf(0.995) + t.ppf(0.8)))
    assert result.p == pytest.approx(2 * t.sf(abs(d.mean() - by) / error))
    nearer = (margin - abs(d.mean())) / error           # in standard errors, to the nearer margin
    assert result.p_equivalent == pytest.approx(t.sf(nearer))


def test_comparisons_as_text_and_their_defaults():
    """A comparison without a margin has no p-value of equivalence. No p-value is shown as zero."""
    assert str(compare([1, 2, 3, 4, 5])) == "+3.00 (+1.04 to +4.96)"
    assert str(compare([-1.0, -2.0])) == "-1.50 (-7.85 to +4.85)"
    from_tables = (2.776 + 0.941) * math.sqrt(0.5)      # t for 4 degrees of freedom: 95 %, 80 %
    assert compare([1, 2, 3, 4, 5]).detectable == pytest.approx(from_tables, abs=1e-3)
    p_values = compare([1, 2, 3]).p_equivalent, 0.5, 0.0001, 0.00009
    assert [format_p(p) for p in p_values] == ["nan", "0.5000", "0.0001", "<0.0001"]


def test_holms_correction():
    """Holm's adjusted p is the largest q * (number of p-values that are at least q), over all
    p-values q up to p."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9]) == [0.9] and holm([0.3, 0.6]) == [0.6, 0.6]
    values = np.random.default_rng(0).uniform(size=(20, 5)) ** 3
    for p_values in values:
        expected = []
        for p in p_values:
            products = [q * sum(p_values >= q) for q in p_values if q <= p]
            expected.append(min(1, max(products)))
        assert holm(p_values) == pytest.approx(expected)


@pytest.mark.parametrize("mean, p_holm, p_equivalent, answer", [
    (1.4, 0.04, 0.06, "holds"), (0.9, 0.04, 0.06, "does not hold"),
    (-1.4, 0.04, 0.06, "does not hold"), (1.4, 0.04, 0.04, "holds, within the margin"),
    (0.9, 0.04, 0.04, "does not hold, within the margin"), (1.4, 0.06, 0.04, "equivalent"),
    (1.4, 0.06, 0.06, "undecided"), (1.4, 0.06, math.nan, "undecided")])
def test_verdicts(mean, p_holm, p_equivalent, answer):
    """The adjusted p-value decides whether a claim of more than 1 point holds.

    Without a test of equivalence, the verdict never mentions it.
    """
    comparison = compare([1, 2, 3])._replace(mean=mean, p_equivalent=p_equivalent)
    assert verdict(comparison, 1, p_holm, True) == answer
    untested = {"equivalent": "undecided"}.get(answer, answer.partition(",")[0])
    assert verdict(comparison, 1, p_holm, False) == untested


# --- differences between all trees ----------------------------------------------------------------
def squares_left(gains, effects):
    """The sum of squares that a least-squares fit of these effects ("s" seeds, "t" trees) leaves.
    """
    s, t = np.indices(gains.shape).reshape(2, -1)
    columns = [np.ones(gains.size)]
    if "s" in effects:
        columns += [s == i for i in range(1, gains.shape[0])]
    if "t" in effects:
        columns += [t == i for i in range(1, gains.shape[1])]
    design = np.array(columns, float).T
    fit = design @ np.linalg.lstsq(design, gains.ravel())[0]
    return ((gains.ravel() - fit) ** 2).sum()


@pytest.mark.parametrize("seeds, trees, true", [(9, 7, 0.2), (9, 7, 0.5), (4, 3, 0.6), (6, 5, 0)])
def test_the_spread_of_trees_equals_an_analysis_of_variance(seeds, trees, true):
    """The noise and F come from nested least-squares fits.

    At either end of the interval, a variance up to the observed one has probability 0.975 or 0.025.
    """
    rng = np.random.default_rng(seeds * trees)
    gains = (rng.normal(size=(seeds, trees)) * 0.5 + rng.normal(size=(seeds, 1)) * 2
             + rng.normal(size=trees) * true)
    result = spread_of_trees(gains)
    freedom = trees - 1, (seeds - 1) * (trees - 1)
    noise = squares_left(gains, "st") / freedom[1]
    explained = (squares_left(gains, "s") - squares_left(gains, "st")) / freedom[0]
    F = explained / noise
    assert result.rest == pytest.approx(math.sqrt(noise))
    assert result.seeds == pytest.approx(np.std([row.sum() / trees for row in gains], ddof=1))
    assert result.trees == pytest.approx(math.sqrt(max(0, explained - noise) / seeds))
    assert result.p == pytest.approx(stats.f.sf(F, *freedom))
    for end, probability in ((result.low, 0.975), (result.high, 0.025)):
        noncentrality = end ** 2 * seeds * freedom[0] / noise
        if end > 0:
            found = stats.ncx2.cdf(F * freedom[0], freedom[0], noncentrality)
            assert found == pytest.approx(probability)
        else:
            assert stats.chi2.cdf(F * freedom[0], freedom[0]) <= probability
    shifted = spread_of_trees(gains + 100 * np.arange(seeds)[:, None])      # other seeds' effects
    assert shifted.trees == pytest.approx(result.trees) and shifted.p == pytest.approx(result.p)


# --- the figure -----------------------------------------------------------------------------------
def test_bars_are_at_the_right_place(tmp_path):
    """A row's bar reaches from one end of its interval to the other, its dot is at the mean.

    Only the marked row is orange. Positions are measured from the lines at whole numbers.
    """
    rows = {"a": [1.2, 1.4, 1.9], "b": [-2.0, -1.4, -1.2], "c": [0.1, 0.3, 0.2]}
    draw_rows(tmp_path / "rows.png", "a title", rows, marked="b")
    picture = np.array(Image.open(tmp_path / "rows.png")).astype(int)
    lines = (picture == 220).all(-1).mean(0) > 0.4                  # gainsboro
    zero = (picture == 0).all(-1).mean(0) > 0.4                     # black
    ticks = sorted([*np.flatnonzero(lines), *np.flatnonzero(zero)])
    assert len(np.flatnonzero(zero)) == 1
    origin, unit = np.flatnonzero(zero)[0], (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    ends = [end for values in rows.values() for end in compare(values)[1:3]]
    assert len(ticks) == math.ceil(max(ends)) - math.floor(min(ends)) + 1

    heights = []
    for colour, names in (((65, 105, 225), ["a", "c"]), ((255, 140, 0), ["b"])):
        drawn = (picture == colour).all(-1)
        bars = np.flatnonzero(drawn.sum(1) > 15)                    # rows of pixels
        groups = np.split(bars, np.flatnonzero(np.diff(bars) > 1) + 1)
        assert len(groups) == len(names)
        for name, bar in zip(names, groups):
            y = bar[len(bar) // 2]
            heights.append((y, name))
            result = compare(rows[name])
            x = np.flatnonzero(drawn[y])
            expected = origin + unit * np.array([result.low, result.high])
            assert (x[0], x[-1]) == pytest.approx(tuple(expected), abs=2)
            dot = np.flatnonzero(drawn[y - 4])                      # above the bar: only the dot
            assert len(dot) > 3
            assert dot.mean() == pytest.approx(origin + unit * result.mean, abs=2)
    assert [name for _, name in sorted(heights)] == ["a", "b", "c"]
