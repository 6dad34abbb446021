"""Copies what is worth keeping of finished runs: args.json, eval.csv, tables of embedding transfer, last statistics.
Names the others.

python benchmark/keep.py runs/laptop-* --out benchmark/results/laptop/runs
"""

import csv
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from launch import Job, exit_with

TABLES = ("args.json", "eval.csv", "embedding.csv", "heatmap.csv")


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run directories"""
    out: Path
    """directory that gets one small directory per run"""


def finished(run: Path) -> bool:
    """Whether a run reached its end, or diverged before."""
    try:
        args = json.loads((run / "args.json").read_text())
        if "diverged_at" in args or Job.adapted(run):
            return True
        with (run / "eval.csv").open() as file:
            last = int([row["step"] for row in csv.DictReader(file)][-1])
        return last >= args["total_updates" if "total_updates" in args else "total_timesteps"]
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return False


def keep(run: Path, out: Path) -> None:
    directory = out / run.name
    files = [run / name for name in TABLES if (run / name).exists()]
    statistics = sorted(run.glob("statistics/*.npz"), key=lambda path: int(path.stem))
    for file in files + statistics[-1:]:
        target = directory / file.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def main(args: Args) -> int:
    if missing := [run for run in args.runs if not run.is_dir()]:
        print(f"error: {missing[0]} is no run directory", file=sys.stderr)
        return 2
    whole = [run for run in args.runs if finished(run)]
    try:
        for run in whole:
            keep(run, args.out)
    except OSError as error:
        where, why = error.filename or args.out, error.strerror or error
        print(f"error: cannot write {where}: {why}; choose another --out", file=sys.stderr)
        return 2
    print(f"kept {len(whole)} runs in {args.out}")
    if others := [run.name for run in args.runs if run not in whole]:
        print(f"not finished, left out: {', '.join(others)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    exit_with(lambda: main(tyro.cli(Args, description=__doc__)))
