"""docs/tutorial.md: its code is the source's, its links and tests exist; the README stays short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.S)
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_code_block_of_the_tutorial_stands_in_the_source(number):
    """Line by line as it is there; a block that drifts from its file fails here."""
    file, code = BLOCKS[number]
    assert code in (ROOT / file).read_text(encoding="utf-8"), f"{file}:\n{code}"


def test_the_tutorial_shows_the_code_of_every_core_idea():
    assert len(BLOCKS) >= 10
    assert {"model.py", "vladva.py", "lora.py", "data.py", "train.py"} <= {
        file for file, _ in BLOCKS
    }


def test_the_tests_that_the_tutorial_names_exist():
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    sources = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")
    )
    assert len(named) > 10
    assert sorted(name for name in named if f"def {name}(" not in sources) == []


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_links_to_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http", "#")):
            assert ((ROOT / page).parent / link.split("#")[0]).exists(), link


def test_the_readme_has_at_most_1300_words():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1300
