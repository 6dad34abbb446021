"""Rewrites every copy in the scripts from its source: `python tests/fix_copies.py`; test_repository.py checks.

Two kinds of copies: parts 2 and 3, from banner to banner, of which brc_sac_continuous.py is the source; and what stands
under a line `# Copied from FILE`: a function, a class, a constant, or a function inside a function (by its full name).
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "brc_sac_continuous.py"
PARTS = {  # part: the scripts that hold a copy of SOURCE's
    2: ("brc_offline_bc.py", "brc_embedding_transfer.py"),
    3: ("brc_offline_bc.py", "brc_embedding_transfer.py", "brc_drq_atari.py"),
}
BANNER = re.compile(r"^# =+\n# Part (\d) of 3", re.MULTILINE)
MARK = re.compile(r"^ *# Copied from (\S+)$")


def parts(text: str) -> dict[int, tuple[int, int]]:
    """Where each part begins and ends."""
    starts = [(int(match[1]), match.start()) for match in BANNER.finditer(text)]
    ends = [start for _, start in starts[1:]] + [len(text)]
    return {number: (start, end) for (number, start), end in zip(starts, ends, strict=True)}


def definitions(text: str) -> dict[str, tuple[int, int]]:
    """First and last line, counted from 0 and without the last, of everything that has a name: `make_agent.update`."""
    found = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in getattr(node, "body", []):
            name = getattr(child, "name", None)
            if isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name):
                name = child.targets[0].id
            if name:
                first = min([child.lineno, *(d.lineno for d in getattr(child, "decorator_list", []))])
                found.setdefault(prefix + name, (first - 1, child.end_lineno))
                visit(child, f"{prefix}{name}.")

    visit(ast.parse(text), "")
    return found


def rewritten(name: str, texts: dict[str, str]) -> str:
    """A script with its copies as their sources have them. Raises KeyError for a source that is gone."""
    text = texts[name]
    for part, copies in PARTS.items():
        if name in copies:
            (start, end), (first, last) = parts(text)[part], parts(texts[SOURCE])[part]
            text = text[:start] + texts[SOURCE][first:last] + text[end:]
    lines = text.splitlines(keepends=True)
    marked = [(place, key) for key, place in definitions(text).items() if MARK.match(lines[place[0] - 1].rstrip("\n"))]
    for (first, last), key in sorted(marked, reverse=True):
        source = texts[MARK.match(lines[first - 1].rstrip("\n"))[1]]
        lines[first:last] = source.splitlines(keepends=True)[slice(*definitions(source)[key])]
    return "".join(lines)


def drifted(write: bool = False) -> list[str]:
    """Names of the scripts that hold a copy unlike its source; rewrites them if asked to."""
    files = [*sorted(ROOT.glob("brc_*.py")), *sorted(ROOT.glob("benchmark/*.py"))]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in files}
    changed = [name for name in texts if rewritten(name, texts) != texts[name]]
    for name in changed if write else ():
        (ROOT / name).write_text(rewritten(name, texts))
    return changed


if __name__ == "__main__":
    print("\n".join(f"rewrote {name}" for name in drifted(write=True)) or "all copies are as their sources")
    sys.exit(0)
