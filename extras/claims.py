"""Verdicts on claims, computed from paired differences, and shown as a table and as a picture.

    judged = judge({("tglora", "random"): [0.4, 0.1, 0.5]}, claims)
    print(format_claims(judged))
    draw_claims("claims.png", judged, claims["margin"])

A claim (better, worse) says that the arm `better` of the study has a higher delta-m than the arm
`worse`. It is judged by the differences in delta-m, one per seed. There are four verdicts:

    holds           the mean is above 0, and its p-value after Holm's correction is below the level
    does not hold   the mean is below 0, and its p-value after Holm's correction is below the level
    equivalent      the test of equivalence says that the mean lies within the margin
    undecided       none of these; more seeds might decide it

If one of the first two is true and the test of equivalence also succeeds, the verdict says both, as
in "holds, but within 0.5 points". `claims` has the keys level, margin, better and equivalent, like
CLAIMS in study.py.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont         # Pillow comes with torchvision

from extras.intervals import Comparison, compare, holm, verdict
from extras.table import aligned


class Judged(NamedTuple):
    """A claim, its differences by seed, and the results of its tests."""

    better: str
    worse: str
    differences: list[float]
    comparison: Comparison
    p_holm: float
    p_equivalent: float | None          # None if equivalence is not tested
    verdict: str


def judge(differences: dict[tuple[str, str], list[float]], claims: dict) -> list[Judged]:
    """Test each claim that has at least two differences.

    differences: {(better, worse): one difference per seed} for all of claims["better"].
    """
    names = [tuple(claim) for claim in claims["better"] if len(differences[tuple(claim)]) > 1]
    comparisons = [compare(differences[name], claims["margin"]) for name in names]
    # Holm's correction also counts the claims that are not tested, with p = 1. Otherwise, leaving
    # out arms would make the other p-values smaller.
    left_out = [1.0] * (len(claims["better"]) - len(names))
    adjusted = holm([comparison.p for comparison in comparisons] + left_out)

    judged = []
    for name, comparison, p_holm in zip(names, comparisons, adjusted):
        p_equivalent = None
        if list(name) in claims["equivalent"]:
            p_equivalent = comparison.p_equivalent
        answer = verdict(comparison.mean, p_holm, p_equivalent, claims["margin"], claims["level"])
        judged.append(Judged(*name, differences[name], comparison, p_holm, p_equivalent, answer))
    return judged


def format_p(p: float | None) -> str:
    if p is None:
        return "-"
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def format_claims(judged: Sequence[Judged]) -> str:
    """The verdicts as a table of text, with one row per claim."""
    rows = [["claim", "mean", "95 % interval", "pairs", "p", "p, Holm", "p, equivalence",
             "verdict"]]
    for claim in judged:
        c = claim.comparison
        rows.append([f"{claim.better} > {claim.worse}", f"{c.mean:+.2f}",
                     f"{c.low:+.2f} to {c.high:+.2f}", str(c.count), format_p(c.p),
                     format_p(claim.p_holm), format_p(claim.p_equivalent), claim.verdict])
    return aligned(rows)


def draw_claims(path: Path, judged: Sequence[Judged], margin: float) -> None:
    """Write a PNG with one row per claim: a dot per seed, the mean, its interval, and the verdict.
    """
    left, top, width, right, height = 180, 40, 520, 380, 34         # pixels; height of a row
    font = ImageFont.load_default(13)
    values = [-1.0, 1.0]
    for claim in judged:
        values += [*claim.differences, claim.comparison.low, claim.comparison.high]
    low, high = math.floor(min(values)), math.ceil(max(values))
    bottom = top + height * len(judged)
    picture = Image.new("RGB", (left + width + right, bottom + 34), "white")
    pen = ImageDraw.Draw(picture)

    def position(value: float) -> float:
        return left + width * (value - low) / (high - low)

    pen.text((left, 12), "difference in delta-m, points (dot: one seed; bar: mean and 95 % "
             f"interval; shaded: within {margin:g})", "black", font)
    pen.rectangle((position(-margin), top, position(margin), bottom), fill="gainsboro")
    step = max(1, (high - low) // 10)
    for tick in range(low + -low % step, high + 1, step):           # multiples of the step
        x = position(tick)
        pen.line((x, top, x, bottom), "silver")
        pen.text((x, bottom + 6), f"{tick:+d}" if tick else "0", "black", font, anchor="ma")
    pen.line((position(0), top, position(0), bottom), "black")

    y = top + height / 2
    for claim in judged:
        c = claim.comparison
        pen.text((left - 12, y), f"{claim.better} - {claim.worse}", "black", font, anchor="rm")
        for difference in claim.differences:
            x = position(difference)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), outline="black", fill="orange")
        pen.line((position(c.low), y + 9, position(c.high), y + 9), "royalblue", 3)
        pen.line((position(c.mean), y + 4, position(c.mean), y + 14), "royalblue", 3)
        pen.text((left + width + 12, y), f"{c}  {claim.verdict}", "black", font, anchor="lm")
        y += height
    picture.save(path)
