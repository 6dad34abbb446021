"""The paper's claims against the runs at laptop scale, a row each, as benchmark/results/laptop/README.md defines them.

  python benchmark/claims.py runs/laptop               # Markdown

The number of a run is its mean score over tasks and over the evaluations in its last third, where a row does not say
another; a seed of single-task agents is all their runs. A claim is seen if Welch's 95% interval of the difference lies
above zero, contradicted if below. With fewer finished seeds than planned the verdict says how many each side has.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import scores
import tyro
from experiments import ARCHITECTURES, EXPERIMENTS, SCALES, Run
from launch import exit_with, fail
from scipy.stats import ttest_1samp, ttest_ind

LAPTOP = SCALES["laptop"]
NARROW, WIDE = LAPTOP.widths
FIGURES = ("figure1", "figure3", "figure4", "figure5", "figure6", "figure9", "figure10", "figure12")


@dataclass
class Args:
    runs: Annotated[Path, tyro.conf.Positional]
    """directory of the run directories"""


@cache  # several rows read the same run
def warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def runs_of(figure: str, label: str, panel: str | None = None, x: int | None = None) -> list[Run]:
    """Runs of one curve or bar of a figure. Raises KeyError if there are none: a claim names what is not planned."""
    runs = [run for run in EXPERIMENTS[figure].runs(LAPTOP)
            if run.label == label and panel in (None, run.panel) and x in (None, run.x)]  # fmt: skip
    if not runs:
        raise KeyError((figure, label, panel, x))
    return runs


def per_seed(runs: list[Run], root: Path, number: Callable[[Run, Path], float]) -> dict[int, float]:
    """Seed: the mean of a number over its runs, of the seeds whose runs all have one."""
    values = {}
    for run in runs:
        values.setdefault(run.seed, []).append(number(run, root / run.name))
    return {seed: float(np.mean(found)) for seed, found in sorted(values.items()) if np.isfinite(found).all()}


def difference(more: dict[int, float], less: dict[int, float]) -> dict[int, float]:
    """By seed, of those that both have."""
    return {seed: more[seed] - less[seed] for seed in more if seed in less}


def mean_score(first: float, last: float, tasks: tuple[str, ...] = ()) -> Callable[[Run, Path], float]:
    """Mean score over (the given) tasks and the planned evaluations between two shares of the run; NaN of an unfinished
    one, and of one that lacks any of them."""

    def number(run: Run, directory: Path) -> float:
        evaluations, problem = scores.read_evaluations(directory)
        if problem and directory.is_dir():
            warn(f"{directory}: {problem}")
        if not len(evaluations) or evaluations["step"].max() < run.length:
            return np.nan
        wanted = [task for task in tasks or run.tasks(LAPTOP) if scores.has_score(task)]
        planned = {*range(0, run.length, int(run.flag("--eval-every"))), run.length}
        steps = [step for step in planned if first - 1e-9 <= step / run.length <= last + 1e-9]
        values = evaluations[evaluations["step"].isin(steps) & evaluations["task"].isin(wanted)]["score"].dropna()
        if len(values) < len(steps) * len(wanted):
            counts = f"{len(values)} of {len(steps) * len(wanted)} scores"
            warn(f"{directory}: counts as not run, as it has {counts} from step {min(steps):,} to {max(steps):,}")
            return np.nan
        return float(values.mean())

    return number


def statistic(compute: Callable[[dict], float]) -> Callable[[Run, Path], float]:
    """What compute makes of the last statistics/<step>.npz; NaN where there is none (of a run that diverged), or none
    that can be read (yet)."""

    def number(run: Run, directory: Path) -> float:
        arrays, problem = scores.read_statistics(directory / "statistics" / f"{run.length}.npz")
        if problem.startswith("damaged"):
            warn(f"{directory}: {problem}")
        return compute(arrays) if arrays else np.nan

    return number


def spread(name: str) -> Callable[[Run, Path], float]:
    return statistic(lambda arrays: scores.spread(arrays[name]))


def cell(values: dict[int, float]) -> str:
    return " ".join(f"{value:.2f}" for value in values.values()) or "-"


def claim_row(figure: int, claim: str, more: dict[int, float], less: dict[int, float] | None = None) -> list[str]:
    """A claim that the first numbers (seed: number) are higher than the second ones, by Welch's interval, or without
    second ones than zero, by Student's."""
    sides = [more] if less is None else [more, less]
    row = [str(figure), claim, cell(more), "0" if less is None else cell(less)]
    counts = list(dict.fromkeys(len(side) for side in sides))
    if min(counts) < 2:
        return [*row, "", "1 seed" if min(counts) else "not run"]
    values = [list(side.values()) for side in sides]
    test = ttest_1samp(values[0], 0) if less is None else ttest_ind(*values, equal_var=False)
    difference = np.mean(values[0]) - (0 if less is None else np.mean(values[1]))
    low, high = np.where(np.isnan(bounds := test.confidence_interval()), difference, bounds)  # of what never varies
    verdict = "seen" if low > 0 else "contradicted" if high < 0 else "not seen"
    if counts != [LAPTOP.seeds]:
        verdict += f" ({' and '.join(map(str, counts))} of {LAPTOP.seeds} seeds)"
    return [*row, f"{difference:+.3f} ({low:+.3f} to {high:+.3f})", verdict]


def shapley_rows(root: Path) -> list[list[str]]:
    """Figure 6: exact Shapley values of each seed."""
    players, by_set = ["SQ", "CE", "TE"], {}
    for size in range(len(players) + 1):
        for group in itertools.combinations(players, size):
            runs = runs_of("figure6", " + ".join(group) or "none")
            by_set[frozenset(group)] = per_seed(runs, root, mean_score(2 / 3, 1))
    seeds = set.intersection(*(set(found) for found in by_set.values()))
    values = {seed: scores.shapley_values({group: found[seed] for group, found in by_set.items()}, players)
              for seed in sorted(seeds)}  # fmt: skip
    rows = []
    for player, name in zip(players, ("width", "cross-entropy with normalization", "embeddings"), strict=True):
        claim = f"{name} ({player}) adds: its Shapley value is above 0"
        rows.append(claim_row(6, claim, {seed: value[player] for seed, value in values.items()}))
    lead = {seed: value["SQ"] - max(value["CE"], value["TE"]) for seed, value in values.items()}
    return [*rows, claim_row(6, "width adds most: SQ less the larger of CE and TE", lead)]


def claims_table(root: Path) -> list[list[str]]:
    """Figure, claim, numbers of both sides by seed, difference with its 95% interval, verdict."""

    def score(*key, tasks=(), between=(2 / 3, 1), **options) -> dict[int, float]:
        return per_seed(runs_of(*key, **options), root, mean_score(*between, tasks))

    brc, brc_multi, sac = score("figure1", "BRC"), score("figure1", "BRC*"), score("figure1", "SAC")
    sac_multi = score("figure1", "MH-SAC*")
    rows = [
        claim_row(1, "multi-task BRC beats single-task BRC", brc_multi, brc),
        claim_row(1, "naive multi-task SAC loses against single-task SAC", sac, sac_multi),
        claim_row(1, "BRC beats SAC, one task each", brc, sac),
        claim_row(1, "BRC beats multi-head SAC, all tasks", brc_multi, sac_multi),
    ]
    mse = {"MSE": "MSE without normalization", "MSE + normalization": "MSE with normalization"}
    for panel, where in (("multi-task", "six tasks"), ("multi-task, mixed rewards", "mixed rewards")):
        entropy = score("figure3", "CE + normalization", panel=panel)
        for label, name in mse.items():
            other = score("figure3", label, panel=panel)
            rows.append(claim_row(3, f"{where}: cross-entropy with normalization beats {name}", entropy, other))
        for quantity, what in (("td_loss", "the TD loss"), ("gradient_norm", "the gradient's norm")):
            even = per_seed(runs_of("figure3", "CE + normalization", panel=panel), root, spread(quantity))
            for label, name in mse.items():
                uneven = per_seed(runs_of("figure3", label, panel=panel), root, spread(quantity))
                rows.append(claim_row(3, f"{where}: sigma / mu of {what} is larger by {name}", uneven, even))
    for panel in ("single-task", "multi-task"):
        at = {width: score("figure4", "BroNet (CE)", panel=panel, x=width) for width in LAPTOP.widths}
        rows.append(claim_row(4, f"{panel}: BroNet (CE) gains by width", at[WIDE], at[NARROW]))
    for name in ARCHITECTURES:
        if name != "BroNet (CE)":
            other = score("figure4", name, panel="multi-task", x=WIDE)
            rows.append(claim_row(4, f"multi-task: BroNet (CE) beats {name}", at[WIDE], other))
    for width in LAPTOP.widths:
        sides = [score("figure5", label, x=width) for label in ("task embeddings", "separate heads")]
        rows.append(claim_row(5, f"embeddings beat heads at width {width}", *sides))
    for label in ("task embeddings", "separate heads"):
        sides = [
            per_seed(runs_of("figure5", label, x=width), root, statistic(scores.conflicts)) for width in (NARROW, WIDE)
        ]
        rows.append(claim_row(5, f"{label}: the narrow critic has more conflicting gradients", *sides))
    rows += shapley_rows(root)
    # after 12,500 steps of all six tasks at once, or 2,500 of each alone
    sides = score("figure9", "BRC*", between=(5 / 6, 5 / 6)), score("figure9", "BRC", between=(1 / 6, 1 / 6))
    rows.append(claim_row(9, "at 24,000 gradient steps in all, multi-task BRC beats single-task BRC", *sides))
    shared, gains = LAPTOP.suites["hb-medium-3"].tasks, {}
    for width in LAPTOP.widths:
        nine, three = (score("figure10", f"{n} tasks", panel="pretraining", x=width, tasks=shared) for n in (9, 3))
        rows.append(claim_row(10, f"nine tasks help the three shared ones, width {width}", nine, three))
        gains[width] = difference(nine, three)
    rows.append(claim_row(10, "they help more at the larger width", gains[WIDE], gains[NARROW]))
    moved = {(n, width): score("figure10", f"{n} tasks", panel="transfer", x=width)
             for n in (3, 6) for width in LAPTOP.widths}  # fmt: skip
    rows.append(claim_row(10, "transfer gains by pretraining on six tasks, not three", moved[6, WIDE], moved[3, WIDE]))
    rows.append(claim_row(10, "transfer from six tasks gains by width", moved[6, WIDE], moved[6, NARROW]))
    online, offline = score("figure12", "BRC* (online)", x=WIDE), score("figure12", "BRC+BC* (offline)", x=WIDE)
    return [*rows, claim_row(12, "online beats offline, mixed rewards", online, offline)]


def main(args: Args) -> int:
    if not args.runs.is_dir():
        return fail(f"{args.runs} is no directory; launch.py writes to its --run-root")
    planned = [run.name for figure in FIGURES for run in EXPERIMENTS[figure].runs(LAPTOP)]
    if not any((args.runs / name).is_dir() for name in planned):
        make = f"python benchmark/launch.py {' '.join(FIGURES)} --run-root {args.runs}"
        return fail(f"{args.runs} has none of the runs that the claims are about; to make them: {make}")
    header = ["figure", "claim", "claimed higher, by seed", "claimed lower", "difference, 95% interval", "verdict"]
    for cells in (header, ["---"] * len(header), *claims_table(args.runs)):
        print("| " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    exit_with(lambda: main(tyro.cli(Args, description=__doc__)))
