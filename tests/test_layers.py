"""The house has one import direction: cli → commands → engines → artifacts → core → errors, config."""

import ast
from pathlib import Path

import pytest

import saetool

PACKAGE = Path(saetool.__file__).parent
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "core": {"core", "errors", "config"},
    "artifacts": {"artifacts", "core", "errors", "config"},
    "llm": {"llm", "errors", "config"},
    "report": {"report", "artifacts", "core", "errors", "config"},
    "console": {"artifacts", "errors"},
    "options": {"errors"},
    "engines": {"engines", "artifacts", "core", "llm", "errors", "config"},
    "commands": {
        "commands", "engines", "artifacts", "core", "llm", "report", "console", "options", "errors", "config"
    },
    "cli": {"commands", "options", "errors"},
    "__main__": {"cli", "options", "errors"},
}  # fmt: skip
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imports(source: str) -> set[str]:
    """The parts of saetool that a module's source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            names = [node.module or ""]
            if node.module == "saetool":
                names = [f"saetool.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("saetool.")}
    return found - {"__version__"}


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(file: Path) -> None:
    layer = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imports(file.read_text()) <= ALLOWED[layer]


def test_an_upward_import_would_be_found() -> None:
    assert imports("def f():\n    from saetool.commands.train import train\n") == {"commands"}
    assert not imports("from saetool.commands.train import train") <= ALLOWED["core"]


def test_core_prints_nothing_and_knows_no_paths() -> None:
    for file in (PACKAGE / "core").rglob("*.py"):
        tree = ast.parse(file.read_text())
        called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        modules |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not called & {"print", "open"}, file
        if file == PACKAGE / "core" / "ops" / "__init__.py":
            modules -= {"os"}  # SAETOOL_KERNELS chooses between implementations of one definition
        assert not modules & {"pathlib", "os", "sys", "time", "random"}, file
