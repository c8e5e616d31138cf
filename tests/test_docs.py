"""Every block of code in the README and in the documentation: Python is run, commands name what exists, diffs parse."""

import ast
import importlib.util
import pathlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from itertools import dropwhile, groupby, pairwise
from typing import Any, NamedTuple

import pytest
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from tests import vocabulary

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
        *(ROOT / "docs").rglob("*.md"),
    )
    if "_build" not in path.parts
)
# Packages without which the Python of a page cannot run
NEEDS = {"docs/guide/deploy.md": "onnxruntime", "docs/guide/figures.md": "matplotlib", "docs/guide/rl_zoo.md": "rl_zoo3"}
# The first line of a block that is shown but not run, with the reason for the reader
NOT_RUN = "# Not run: "
# What learn() of a page is cut to: one episode of Pendulum-v1 and some updates
MAX_TIMESTEPS = 260
# Programs of others
PROGRAMS = "apt-get cd createdb createuser echo export git hf mypy psql ruff su systemctl .".split()
LANGUAGES = ("python", "bash", "diff", "text")


class Block(NamedTuple):
    """A fenced block of code of a page."""

    page: str
    line: int
    """Of its first line of code in the page"""
    language: str
    code: str


def blocks(page: str) -> Iterator[Block]:
    """:return: the fenced blocks of a page, in order, without MyST's directives"""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = re.fullmatch(r"(\s*)(`{3,}|~{3,})(.*)", lines[number])
        if fence:
            indent, marks, language = fence.groups()
            start = number = number + 1
            while lines[number].strip() != marks:
                number += 1
            if not re.match(r"\s*\{(?!code)", language):
                code = "\n".join(line.removeprefix(indent) for line in lines[start:number])
                yield Block(page, start + 1, language.strip(), code)
        number += 1


def code_blocks(language: str) -> list[Any]:
    """:return: parameters of a test: every block in a language"""
    found = [block for page in PAGES for block in blocks(page) if block.language == language]
    return [pytest.param(block, id=f"{block.page}:{block.line}") for block in found]


def commands(script: str) -> Iterator[list[str]]:
    """:return: the words of each simple command of a script, without comments and leading variables"""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        for is_operator, group in groupby(lexer, key=lambda word: set(word) <= set("&|;")):
            words = [] if is_operator else list(dropwhile(lambda word: re.match(r"\w+=", word), group))
            if words:
                yield words


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_its_language(page: str) -> None:
    assert [block for block in blocks(page) if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.language == "python" for block in blocks(page))])
# SB3's progress bar says so at each use
@pytest.mark.filterwarnings("ignore:rich is experimental:tqdm.TqdmExperimentalWarning")
def test_python(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """The Python blocks of a page run one after the other, as a reader would enter them, but with short trainings."""
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], reason=f"{NEEDS[page]} is not installed", exc_type=ImportError)
    learn = OffPolicyAlgorithm.learn

    def short_learn(model: OffPolicyAlgorithm, total_timesteps: int, *args: Any, **kwargs: Any) -> OffPolicyAlgorithm:
        return learn(model, min(total_timesteps, MAX_TIMESTEPS), *args, **kwargs)

    monkeypatch.setattr(OffPolicyAlgorithm, "learn", short_learn)
    monkeypatch.chdir(tmp_path)
    threads = th.get_num_threads()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        for block in blocks(page):
            if block.language == "python" and not block.code.startswith(NOT_RUN):
                # The lines of a traceback are those of the page
                source = "\n" * (block.line - 1) + block.code
                exec(compile(source, str(ROOT / page), "exec"), namespace)
    finally:
        th.set_num_threads(threads)
        for value in namespace.values():
            if isinstance(value, BaseAlgorithm):
                if hasattr(value, "_logger"):
                    value.logger.close()
                if value.env is not None:
                    value.env.close()


@pytest.mark.parametrize("block", code_blocks("bash"))
def test_bash(block: Block) -> None:
    """What a command calls is there."""
    subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
    for words in commands(block.code):
        check_command(words)


def check_command(words: list[str]) -> None:
    """
    :raises AssertionError: if the command names a target, file, module or extra that does not exist
    """
    program, *arguments = words[0].removeprefix(".venv/bin/"), *words[1:]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        variables = [argument.partition("=")[0] for argument in arguments if "=" in argument]
        assert all(f"$({name})" in makefile for name in variables), words
        targets = re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE)
        assert {argument for argument in arguments if "=" not in argument} <= set(targets), words
    elif program in ("python", "python3"):
        if arguments[0] == "-m":
            if arguments[1].startswith("benchmarks."):
                check_benchmark(*arguments[1:])
            assert importlib.util.find_spec(arguments[1].split(".")[0]) is not None, words
        else:
            assert (ROOT / arguments[0]).is_file(), words
            known = (ROOT / arguments[0]).read_text(encoding="utf-8")
            options = [option.split("=")[0] for option in arguments[1:] if option.startswith("--")]
            assert all(option in known for option in options), words
    elif program == "pip":
        asked = {extra for argument in arguments for extra in re.findall(r"\[(.+)\]", argument) for extra in extra.split(",")}
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        if not any("gymnasium" in argument for argument in arguments):
            assert all(re.search(rf"^{extra} = \[", project, flags=re.MULTILINE) for extra in asked), words
        for flag, path in pairwise(arguments):
            assert flag not in ("-c", "-r") or (ROOT / path).is_file(), words
    elif program == "sb3-softvalue":
        front_end = next(argument for argument in arguments if not argument.startswith("-") or argument == "--help")
        assert (
            front_end == "--help"
            or front_end in pytest.importorskip("sb3_softvalue.zoo.launcher", reason="RL Zoo is not installed").FRONT_ENDS
        ), words
    else:
        assert program in PROGRAMS, f"{words}: is {program} a program that readers have? Then name it in PROGRAMS."


def check_benchmark(module: str, *arguments: str) -> None:
    """
    :raises AssertionError: if there is no such program, or it does not have the options
    """
    path = ROOT.joinpath(*module.split("."))
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    assert all(f'"{argument}"' in source for argument in arguments if argument.startswith("--")), (module, arguments)


@pytest.mark.parametrize("block", code_blocks("diff"))
def test_diff(block: Block) -> None:
    """Both sides are Python."""
    lines = block.code.splitlines()
    assert all(line[:1] in ("", " ", "+", "-") for line in lines), "a line of a diff starts with a blank, + or -"
    for side in "-+":
        ast.parse("\n".join(line[1:] for line in lines if line[:1] in ("", " ", side)))


def anchors(page: pathlib.Path) -> set[str]:
    """:return: what GitHub and MyST make of the headings of a page"""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page: str) -> None:
    """Those inside the repository; they work on GitHub and, under docs/, in the rendered pages."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "{doc}`" not in text and "{py:" not in text
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text) + [(path, "") for path in re.findall(r'src="([^"]+)"', text)]
    for path, anchor in links:
        if path.startswith(("http://", "https://")) or "/tutorials/" in f"/{path}":
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"
    assert all(alt for alt in re.findall(r"!\[(.*?)\]", text)), "every picture has a text for those who cannot see it"


def test_vocabulary_finds_phrases_across_lines(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("It comes\nto nothing, in the\n    # place of a sum.\nThe goal is met.\n", encoding="utf-8")
    assert [line.partition(": ")[2].partition(",")[0] for line in vocabulary.findings([page])] == [
        "'comes to'",
        "'in the # place of'",
    ]
