"""Rules of the repository: scripts stand alone, their inline dependencies agree with requirements.txt."""

import ast
import importlib
import re
import shlex
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import fix_copies
import pytest
import tyro
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(ROOT.glob("brc_*.py"))
scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


def requirements() -> set[Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return {Requirement(line) for line in lines if line}


@scripts
def test_inline_dependencies_agree_with_requirements(script):
    """Markers included: a package has all of its lines, or none."""
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", script.read_text(), re.MULTILINE).group(1)
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    inline = {Requirement(dependency) for dependency in metadata["dependencies"]}
    names = {requirement.name for requirement in inline}
    assert inline == {requirement for requirement in requirements() if requirement.name in names}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_every_python_has_one_version_of_each_package(python):
    """And of MuJoCo one with wheels: 3.2 up to Python 3.12, at least 3.3 for 3.13, 3.8.1 for 3.14."""
    chosen = [r for r in requirements() if not r.marker or r.marker.evaluate({"python_version": python})]
    names = Counter(requirement.name for requirement in chosen)
    assert set(names.values()) == {1} and {"mujoco", "envpool", "metaworld"} <= set(names)
    assert ("dm_control" in names) == (python in ("3.11", "3.12"))
    (mujoco,) = (requirement.specifier for requirement in chosen if requirement.name == "mujoco")
    assert str(mujoco) == ("==3.2.0" if "dm_control" in names else "==3.8.1")


def test_gpu_line():
    """README and requirements.txt install the same jax for a GPU, the pinned one."""
    (pinned,) = (str(requirement.specifier) for requirement in requirements() if requirement.name == "jax")
    for page in ("README.md", "requirements.txt"):
        assert re.findall(r'"jax\[.*', (ROOT / page).read_text())[0].startswith(f'"jax[cuda12]{pinned}"'), page


@scripts
def test_script_stands_alone(script):
    """No import from this repository, none of pickle and its relatives, and every third-party import is declared."""
    forbidden = {path.stem for path in SCRIPTS} | {"benchmark", "tests", "pickle", "dill", "joblib", "cloudpickle"}
    for node in ast.walk(ast.parse(script.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not forbidden & {name.split(".")[0] for name in names}, f"line {node.lineno}"


def test_copies_are_as_their_sources():
    """Parts 2 and 3 and everything under `# Copied from`."""
    assert fix_copies.drifted() == [], "a copy differs from its source; to rewrite all: python tests/fix_copies.py"


@scripts
def test_three_parts_the_algorithm_first(script):
    """Parts 1, 2 and 3 in this order; networks early, and a `main` that fits on a screen or two."""
    text = script.read_text()
    assert list(fix_copies.parts(text)) == [1, 2, 3]
    (_, end), (start, _) = fix_copies.parts(text)[1], fix_copies.parts(text)[2]
    assert end == start
    found = fix_copies.definitions(text)
    first, last = found["main"]
    assert last - first <= 90 and last < text[:end].count("\n"), "main belongs to part 1"
    assert min(found[name][0] for name in ("BroNet", "ImpalaEncoder") if name in found) < 360


def printed_commands() -> list[str]:
    """Command lines of this project's programs, from README, CONTRIBUTING and docstrings, without their comments."""
    found = {}
    pages = [*ROOT.glob("*.md"), *SCRIPTS, *ROOT.glob("benchmark/*.py"), *ROOT.glob("benchmark/results/**/*.md")]
    for page in pages:
        for line in re.sub(r"\\\n\s*", "", page.read_text()).splitlines():  # one that goes on is one
            for part in line.strip().strip("`").split("&&"):
                command = re.match(r"(?:python|uv run) ((?:brc_\w+|benchmark/\w+)\.py .*)", part.strip())
                if command and "..." not in command[1]:
                    found.setdefault(re.split(r"\s#|`|\s{3,}| > ", command[1])[0].strip())
    return sorted(found)


@pytest.mark.parametrize("command", printed_commands())
def test_printed_commands_parse(command, monkeypatch):
    """Every flag that a page names is there, with values that it takes."""
    file, *words = shlex.split(command)
    words = [re.sub(r"\{(\w[\w-]*)[,|].*\}", r"\1", word) for word in words]  # {a,b}: either
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    if file == "benchmark/convert_tdmpc2.py":
        pytest.importorskip("tensordict", reason="it has dependencies of its own: pip install tensordict")
    if file == "benchmark/released_code.py":  # the words after the first are this script's
        file, words = "brc_sac_continuous.py", words[1:]
    if file in ("benchmark/plot.py", "benchmark/claims.py"):
        pytest.importorskip("rliable", reason="rliable's arch has no wheels for Python 3.14")
    module = importlib.import_module(Path(file).stem)
    if hasattr(module, "Args"):
        tyro.cli(module.Args, args=words)
    elif words:  # speed.py's subcommands
        assert hasattr(module, words[0].capitalize())
        tyro.cli(getattr(module, words[0].capitalize()), args=words[1:])


def test_no_test_is_skipped_for_want_of_our_own_modules():
    """importorskip hid that benchmark/compare_backends.py could not be imported: all of its tests were skipped."""
    asked = {name for path in (ROOT / "tests").glob("*.py")
             for name in re.findall(r'importorskip\(\s*"(\w+)', path.read_text())}  # fmt: skip
    own = {path.stem for folder in (ROOT, ROOT / "benchmark", ROOT / "tests") for path in folder.glob("*.py")}
    assert asked and not asked & (own | {"benchmark"})


def test_ruff():
    """The rules of pyproject.toml: `ruff check` (pip install ruff)."""
    ruff = pytest.importorskip("ruff", reason="pip install ruff")
    result = subprocess.run([ruff.find_ruff_bin(), "check", ROOT], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
