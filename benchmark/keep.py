"""Copies what is worth keeping of finished runs: args.json, eval.csv, tables of embedding transfer, last statistics.
Names the others.

python benchmark/keep.py runs/laptop-* --out benchmark/results/laptop/runs
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from launch import Job, diverged, exit_with, fail, last_step

TABLES = ("args.json", "eval.csv", "embedding.csv", "heatmap.csv")


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run directories"""
    out: Path
    """directory that gets one small directory per run"""


def finished(run: Path) -> bool:
    """Whether a run reached its end, or diverged before."""
    if diverged(run) or Job.adapted(run):
        return True
    try:
        args = json.loads((run / "args.json").read_text())
        return last_step(run) >= args["total_updates" if "total_updates" in args else "total_timesteps"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def keep(run: Path, out: Path) -> None:
    directory = out / run.resolve().name
    for old in (*(directory / name for name in TABLES), *directory.glob("statistics/*.npz")):  # of when it was shorter
        old.unlink(missing_ok=True)
    files = [run / name for name in TABLES if (run / name).exists()]
    steps = [path for path in run.glob("statistics/*.npz") if path.stem.isdecimal()]  # others are not the script's
    statistics = sorted(steps, key=lambda path: int(path.stem))
    for file in files + statistics[-1:]:
        target = directory / file.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def main(args: Args) -> int:
    if missing := [run for run in args.runs if not run.is_dir()]:
        return fail(f"{missing[0]} is no run directory")
    whole = [run for run in args.runs if finished(run)]
    if not whole:
        names = ", ".join(run.name for run in args.runs)
        return fail(f"none of the runs is finished: {names}; the command that made them continues them")
    names = [run.resolve().name for run in whole]
    if twice := [name for name in names if names.count(name) > 1]:
        return fail(f"two runs are called {twice[0]}: keep them in two folders")
    if args.out.resolve() in {run.resolve().parent for run in whole}:
        return fail(f"--out {args.out} is where the runs are; choose another")
    try:
        for run in whole:
            keep(run, args.out)
    except OSError as error:
        where, why = error.filename or args.out, error.strerror or error
        return fail(f"cannot write {where}: {why}; choose another --out")
    print(f"kept {len(whole)} runs in {args.out}")
    if others := [run.name for run in args.runs if run not in whole]:
        print(f"not finished, left out: {', '.join(others)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    exit_with(lambda: main(tyro.cli(Args, description=__doc__)))
