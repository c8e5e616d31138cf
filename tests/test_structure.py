"""The structure that docs/misc/design.md draws, held against the code: who may know whom."""

import ast
import pathlib
import subprocess
import sys

import pytest

import sb3_softvalue

ROOT = pathlib.Path(sb3_softvalue.__file__).parent
# From the ground up: each knows only what stands before it
FLOORS = (
    "equations",
    "networks",
    "policies",
    "update",
    "schedules",
    "execution",
    "checks",
    "guard",
    "checkpoint",
    "transfer",
    "reading",
    "saving",
    "sacv",
    "",  # the package's own face
    "diagnostics",
    "figures",
    "zoo",
    "cli",
)
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path: pathlib.Path) -> tuple[str, ...]:
    """Dotted name of a file inside the package, without the package's own."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: pathlib.Path) -> list[tuple[tuple[str, ...], str]]:
    """What a file imports from the package, anywhere in it: module and name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sb3_softvalue":
            found += [(tuple(node.module.split(".")[1:]), alias.name) for alias in node.names]
        if isinstance(node, ast.Import):
            found += [(tuple(alias.name.split(".")[1:]), "") for alias in node.names if alias.name.startswith("sb3_softvalue")]
    return found


def resolved(module: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The module that is imported: ``from package import module`` names it last."""
    is_module = (ROOT.joinpath(*module, name) / "__init__.py").is_file() or ROOT.joinpath(*module, f"{name}.py").is_file()
    return (*module, name) if name and is_module else module


def floor(module: tuple[str, ...]) -> int:
    return FLOORS.index(module[0] if module else "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.relative_to(ROOT).parts))
def test_arrows_go_down(path):
    own = module_of(path)
    for module, name in imports(path):
        target = resolved(module, name)
        assert floor(target) <= floor(own), f"{'.'.join(own)} knows {'.'.join(target)}, which stands above it"
        same_room = target[:1] == own[:1]
        assert same_room or not name.startswith("_") or name.startswith("__"), f"{'.'.join(own)} takes the private {name}"


def test_no_circles():
    knows = {module_of(path): {resolved(*imported) for imported in imports(path)} - {module_of(path)} for path in FILES}
    # A room's face is known to those outside; inside it nobody goes through the door
    left = dict(knows)
    while left:
        leaves = [module for module, known in left.items() if not any(other in left for other in known)]
        assert leaves, f"a circle among {sorted('.'.join(module) for module in left)}"
        left = {module: known for module, known in left.items() if module not in leaves}


def test_every_room_says_what_it_is_for():
    for path in FILES:
        if path.name == "__init__.py":
            assert (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").endswith("."), path


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("matplotlib", "optuna", "rl_zoo3", "torch._inductor")
    code = f"import sys, sb3_softvalue; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
