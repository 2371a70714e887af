"""Make docs/LESSON.md from lesson.py: its prose, code, output and pictures in reading order.

    python -m extras.lesson_page        # runs lesson.py, which takes less than a minute

Comments that begin at the start of a line become prose, and each cell becomes a section. What a
cell prints follows its code, and the pictures that it draws come last. They are copied to assets/.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/LESSON.md"
TITLE = """# TGLoRA in one lesson

*This page is made from [lesson.py](../lesson.py) by `python -m extras.lesson_page`: run that file,
or its cells, to repeat it. Numbers differ a little from processor to processor.*

"""


def split_cells(source: str) -> list[tuple[str, str]]:
    """(title, text) of each cell of lesson.py, without the docstring at the top."""
    _, *cells = source.split("\n# %% ")
    parts = []
    for cell in cells:
        title, _, text = cell.partition("\n")
        parts.append((title, text))
    return parts


def to_markdown(text: str) -> str:
    """A cell's comments as paragraphs, and everything between them as blocks of code."""
    parts = []
    for block in re.split(r"^((?:# .*\n)+)", text, flags=re.M):
        if block.startswith("# "):
            parts.append(re.sub("^# ", "", block, flags=re.M).strip())
        elif block.strip():
            parts.append(f"```python\n{block.strip()}\n```")
    return "\n\n".join(parts)


def make_page(source: str, outputs: dict[str, str]) -> str:
    """The whole page. outputs: what each numbered cell prints, by its number."""
    docstring = source.split('"""')[1]
    introduction = docstring[docstring.index("The method:"):].strip()
    sections = [TITLE + introduction]
    for title, text in split_cells(source):
        number = title.partition(".")[0]
        sections.append(f"## {title}\n{to_markdown(text)}")
        if number in outputs:
            sections.append(f"This prints:\n\n```\n{outputs[number].strip()}\n```")
        for name in re.findall(r'PICTURES / "(\w+)\.png"', text):
            sections.append(f"![{name}, drawn by this cell](../assets/lesson_{name}.png)")
    return "\n\n".join(sections) + "\n"


def printed_by_cell(text: str) -> dict[str, str]:
    """Split what lesson.py prints at the numbers of its cells."""
    return {block[0]: block for block in re.split(r"^(?=\d\. )", text, flags=re.M) if block}


def main() -> None:
    """Run lesson.py in a temporary folder, then write the page and its pictures."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, ROOT / "lesson.py"], cwd=folder, check=True,
                              stdout=subprocess.PIPE, text=True)
        for picture in Path(folder, "runs/lesson").glob("*.png"):
            shutil.copy(picture, ROOT / f"assets/lesson_{picture.name}")
    source = (ROOT / "lesson.py").read_text(encoding="utf-8")
    PAGE.write_text(make_page(source, printed_by_cell(done.stdout)), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
