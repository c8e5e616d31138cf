"""
Turns of phrase that are not standard technical English, and what to write instead:

    python tests/vocabulary.py
"""

import pathlib
import re
import sys
from collections.abc import Iterable, Iterator

ROOT = pathlib.Path(__file__).parent.parent
# Regular expression, any letter case: what to write
WORDS = {
    r"\b(come|comes|came|coming) to\b": "is, reaches, takes",
    r"\bin the place of\b": "instead of",
    r"\btak(e|es|ing) the place of\b|\btook the place of\b": "replaces",
    r"\b(go|goes|going|went|gone) on\b(?! to\b)": "continues",
    r"\bfor want of\b": "without, for lack of",
    r"\bproducts' own speed\b": "matmul peak",
    r"\b(was|were) asked for\b|\basked for (was|were)\b": "the goal was",
    r"\ball of its \w+ (is|are|was|were)\b": "all its … are",
    r"\b(be told|told|tell) from\b": "is (not) significant, distinguish from",
    r"\bbeyond chance\b": "significant",
    r"\bminutes of processor\b": "minutes of CPU time",
    r"\bto be had\b": "available",
    r"\bas (it|they) (was|were) before\b": "unchanged",
}


def texts() -> Iterator[pathlib.Path]:
    """:return: pages, and code with its docstrings and messages"""
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        yield ROOT / name
    for folder, kinds in {
        "docs": ("md", "py"),
        "sb3_softvalue": ("py", "yml"),
        "examples": ("py", "ipynb"),
        "benchmarks": ("py", "md"),
    }.items():
        for kind in kinds:
            yield from (
                path for path in sorted((ROOT / folder).rglob(f"*.{kind}")) if not {"_build", "tutorials"} & set(path.parts)
            )


def findings(paths: Iterable[pathlib.Path]) -> Iterator[str]:
    """:return: a line for each phrase found, also where a line break divides it"""
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for pattern, instead in WORDS.items():
            for match in re.finditer(pattern.replace(" ", r"[\s#*]+"), text, flags=re.IGNORECASE):
                line = text.count("\n", 0, match.start()) + 1
                yield f"{path}:{line}: {' '.join(match[0].split())!r}, better: {instead}"


if __name__ == "__main__":
    found = list(findings(texts()))
    sys.exit("\n".join(found) or 0)
