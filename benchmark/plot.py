"""Learning curves of runs: a panel per task and one of the mean score, seeds as thin lines, their mean as a thick one.

  python benchmark/plot.py runs/A runs/B runs/C --out curve.png

Runs that trained on the same tasks with the same arguments but the seed form one group. Only eval.csv and args.json are
read. A run that is unfinished is drawn as far as it went; one that is empty or damaged is named and left out.
"""

import csv
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOT_PART_OF_GROUP = ("seed", "run_name", "run_root", "resume", "versions", "device", "git_commit", "wandb_project")


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run directories"""
    out: Path = Path("curves.png")
    """picture to write"""
    labels: tuple[str, ...] = ()
    """a name for each group, in the order in which the groups' first runs are given"""


def read_run(directory: Path) -> tuple[str, dict[str, list[tuple[int, float]]]]:
    """A run's group and, per task, its (step, score) points; the return stands in where a task has no score."""
    args = json.loads((directory / "args.json").read_text())
    group = json.dumps({k: v for k, v in args.items() if k not in NOT_PART_OF_GROUP}, sort_keys=True)
    curves = defaultdict(list)
    with (directory / "eval.csv").open() as file:
        for row in csv.DictReader(file):
            curves[row["task"]].append((int(row["step"]), float(row["score"] or row["return"])))
    if not curves:
        raise ValueError("eval.csv has no rows")
    return group, dict(curves)


def main(args: Args) -> None:
    groups = defaultdict(list)
    for directory in args.runs:
        try:
            group, curves = read_run(directory)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"left out {directory}: {error}", file=sys.stderr)
            continue
        groups[group].append(curves)
    if not groups:
        sys.exit("error: no run could be read")
    tasks = list(dict.fromkeys(task for runs in groups.values() for curves in runs for task in curves))
    panels = [*tasks, "mean"] if len(tasks) > 1 else tasks
    columns = min(len(panels), 5)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.3 * rows), squeeze=False, sharey=True)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for index, runs in enumerate(groups.values()):
            lines = []
            for curves in runs:
                points = list(curves.values()) if panel == "mean" else [curves.get(panel)]
                if points[0] is None or (panel == "mean" and len(points) < len(tasks)):
                    continue
                steps = np.array([step for step, _ in points[0]])
                values = np.mean([[value for _, value in curve][: len(steps)] for curve in points], axis=0)
                lines.append(dict(zip(steps, values, strict=True)))
                axis.plot(steps / 1e3, values, color=f"C{index}", linewidth=0.7, alpha=0.5)
            if not lines:
                continue
            shared = sorted(set.intersection(*(set(line) for line in lines)))
            label = args.labels[index] if index < len(args.labels) else f"group {index + 1}"
            mean = [np.mean([line[step] for line in lines]) for step in shared]
            label += f" ({len(lines)} seed{'s' * (len(lines) > 1)})"
            axis.plot(np.array(shared) / 1e3, mean, color=f"C{index}", linewidth=2.2, label=label)
        axis.set_title(panel, fontsize=9)
        axis.set_xlabel("thousand steps per task", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    axes[0, 0].set_ylabel("score", fontsize=8)
    axes.flat[len(panels) - 1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(args.out, dpi=130)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
