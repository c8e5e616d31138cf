"""The version stands in one place; what has to repeat it agrees."""

import re
from pathlib import Path

import sb3_softvalue

ROOT = Path(__file__).parents[1]


def test_citation_and_changelog_agree() -> None:
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)
    released = re.search(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert citation is not None and released is not None
    assert citation[1] == released[1] == sb3_softvalue.__version__
