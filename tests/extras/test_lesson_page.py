"""Tests of extras/lesson_page.py: docs/LESSON.md has the prose and the code of lesson.py."""

import re

from extras.lesson_page import PAGE, ROOT, make_page, printed_by_cell, to_markdown


def test_the_page_is_up_to_date():
    """Made again with the output that it shows, the page is the same."""
    page = PAGE.read_text(encoding="utf-8")
    outputs = re.findall(r"^This prints:\n\n```\n(.*?)\n```", page, re.M | re.S)
    source = (ROOT / "lesson.py").read_text(encoding="utf-8")
    expected = make_page(source, printed_by_cell("\n".join(outputs)))
    assert page == expected, "run: python -m extras.lesson_page"
    assert len(outputs) == 9 and page.count("](../assets/lesson_") == 3


def test_comments_become_prose_and_the_rest_becomes_code():
    """Only comments at the start of a line are prose."""
    text = "# One\n# two.\n\nx = 1  # three\nif x:\n    # four\n    y = 2\n# Five.\n"
    assert to_markdown(text) == (
        "One\ntwo.\n\n```python\nx = 1  # three\nif x:\n    # four\n    y = 2\n```\n\nFive.")
