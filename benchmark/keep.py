"""Copies what is worth keeping of finished runs: args.json, eval.csv, tables of embedding transfer, last statistics.

python benchmark/keep.py runs/laptop-* --out benchmark/results/laptop/runs
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

TABLES = ("args.json", "eval.csv", "embedding.csv", "heatmap.csv")


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run directories"""
    out: Path
    """directory that gets one small directory per run"""


def keep(run: Path, out: Path) -> None:
    directory = out / run.name
    files = [run / name for name in TABLES if (run / name).exists()]
    statistics = sorted(run.glob("statistics/*.npz"), key=lambda path: int(path.stem))
    for file in files + statistics[-1:]:
        target = directory / file.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def main(args: Args) -> int:
    if missing := [run for run in args.runs if not (run / "args.json").exists()]:
        print(f"error: {missing[0]} is no run directory: it has no args.json", file=sys.stderr)
        return 2
    try:
        for run in args.runs:
            keep(run, args.out)
    except OSError as error:
        print(f"error: cannot write {error.filename}: {error.strerror}; choose another --out", file=sys.stderr)
        return 2
    print(f"kept {len(args.runs)} runs in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
