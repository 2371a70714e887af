"""Draw the figure of the method in README.md.

    python -m extras.figure         # writes assets/method.svg

Left: the tree of adapters that `python train.py` builds with seed 0, and how its groups divide the
combined rank of 20. Right: one adapted linear layer of stage 3, with the groups in one batch.
"""

from collections.abc import Sequence
from pathlib import Path

from tglora import split_rank

PATH = Path(__file__).parent.parent / "assets/method.svg"
TASKS = ["human_parts", "sal", "depth", "normals"]
TREE = [[TASKS], [TASKS[:2], TASKS[2:]], [TASKS[:2], ["depth"], ["normals"]],
        [[task] for task in TASKS]]
RANK = 20
WIDTH, HEIGHT = 1000, 430
FROZEN = "#e4e4e4"
# The first task of a group chooses its colour: people and salient objects warm, geometry cold.
COLOURS = {"human_parts": "#ffd9a8", "sal": "#ffeeb0", "depth": "#bfe3c0", "normals": "#bcdcf5"}


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle") -> str:
    return (f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" '
            f'dominant-baseline="central">{words}</text>')


def box(x: float, y: float, width: float, height: float, colour: str, words: str = "") -> str:
    rectangle = (f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" '
                 f'fill="{colour}" stroke="#555"/>')
    return rectangle + text(x + width / 2, y + height / 2, words)


def line(x: float, top: float, bottom: float, to: float | None = None) -> str:
    """A line from (x, top) down to (to, bottom); vertical without `to`."""
    return f'<path d="M{x} {top} L{x if to is None else to} {bottom}" stroke="#555"/>'


def draw_tree(left: float, top: float) -> list[str]:
    """The four stages from top to bottom, each with one box per group, then the decoders."""
    column, row, height = 108, 74, 44
    parts = [text(left, top - 32, "The tree: tasks in one box share their adapters", 16, "start")]
    for i, partition in enumerate(TREE):
        y = top + i * row
        parts.append(text(left, y + height / 2, f"stage {i + 1}", anchor="start"))
        parts.append(box(left + 76, y - 7, 4 * column, height + 14, FROZEN))
        ranks = split_rank(RANK, [len(group) for group in partition])
        for group, rank in zip(partition, ranks):
            first = left + 76 + column * TASKS.index(group[0])
            width = column * len(group)
            colour = COLOURS[group[0]] if len(group) < len(TASKS) else "#f3e3f7"
            parts.append(box(first + 6, y, width - 12, height, colour))
            parts.append(text(first + width / 2, y + 14, ", ".join(group), 13))
            parts.append(text(first + width / 2, y + 32, f"A, B of rank {rank}", 12))
            below = TREE[i + 1] if i < 3 else [[task] for task in TASKS]
            for child in below:
                if child[0] in group:
                    x = left + 76 + column * (TASKS.index(child[0]) + len(child) / 2)
                    parts.append(line(first + width / 2, y + height, y + row, x))
    y = top + 4 * row
    parts.append(text(left, y + 14, "decoders", anchor="start"))
    for i, task in enumerate(TASKS):
        parts.append(box(left + 82 + column * i, y, column - 12, 28, COLOURS[task], task))
    return parts


def draw_layer(left: float, top: float, groups: Sequence[Sequence[str]]) -> list[str]:
    """One linear layer: the groups' inputs in one batch, W, the adapters and the outputs."""
    column = 120
    title = "A linear layer of stage 3: its groups in one batch"
    parts = [text(left, top - 32, title, 16, "start")]
    for g, group in enumerate(groups):
        x, colour = left + g * column, COLOURS[group[0]]
        middle = x + column / 2
        sub = f'<tspan dy="4" font-size="10">{g + 1}</tspan><tspan dy="-4"> </tspan>'
        parts += [line(middle, top, top + 300),
                  box(x, top, column, 50, colour),
                  text(middle, top + 16, f"x{sub}"),
                  text(middle, top + 35, ", ".join(group), 11),
                  box(x + 8, top + 170, column - 16, 50, colour, f"+ γ B{sub}A{sub}x{sub}"),
                  box(x, top + 270, column, 50, colour, f"y{sub}")]
    parts.append(box(left - 10, top + 86, column * len(groups) + 20, 50, FROZEN,
                     "W x: frozen, one product for the whole batch"))
    parts.append(text(left, top + 342, "Grey is frozen. Each group has a colour, and its own A and "
                      "B.", anchor="start"))
    return parts


def main() -> None:
    """Write the figure."""
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
             f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
             *draw_tree(20, 70), *draw_layer(600, 70, TREE[2]), "</svg>"]
    PATH.write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
