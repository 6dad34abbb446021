"""Rules of the repository: scripts stand alone, their inline dependencies agree with requirements.txt."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(ROOT.glob("brc_*.py"))
scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


def requirements() -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


@scripts
def test_inline_dependencies_agree_with_requirements(script):
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", script.read_text(), re.MULTILINE).group(1)
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    inline = dict(dependency.split("==") for dependency in metadata["dependencies"])
    assert inline.items() <= requirements().items()


@scripts
def test_script_stands_alone(script):
    """No import from this repository, none of pickle and its relatives, and every third-party import is declared."""
    forbidden = {path.stem for path in SCRIPTS} | {"benchmark", "tests", "pickle", "dill", "joblib", "cloudpickle"}
    for node in ast.walk(ast.parse(script.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not forbidden & {name.split(".")[0] for name in names}, f"line {node.lineno}"


def blocks(script: Path) -> dict[str, tuple[str | None, str]]:
    """Top-level functions and classes: name -> (source script of a '# Copied from' mark or None, text)."""
    lines, found = script.read_text().splitlines(), {}
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            mark = re.match(r"# Copied from (\S+)", lines[first - 1])
            found[node.name] = (mark.group(1) if mark else None, "\n".join(lines[first : node.end_lineno]))
    return found


@pytest.mark.parametrize("script", [*SCRIPTS, *sorted(ROOT.glob("benchmark/*.py"))], ids=lambda path: path.name)
def test_copied_blocks_have_not_drifted(script):
    for name, (source, text) in blocks(script).items():
        if source:
            assert text == blocks(ROOT / source)[name][1], f"{name} differs from the one in {source}"
