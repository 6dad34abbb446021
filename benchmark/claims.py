"""The paper's claims against the runs at laptop scale, a row each, as benchmark/results/laptop/README.md defines them.

  python benchmark/claims.py runs/laptop               # Markdown

The number of a run is its mean score over tasks and over the evaluations in its last third; a seed of single-task
agents is all their runs. A claim is seen if Welch's 95% interval of the difference lies above zero, contradicted if
below. With fewer finished seeds than planned the verdict says so.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import scores
import tyro
from experiments import ARCHITECTURES, EXPERIMENTS, SCALES, Run
from launch import tasks_of
from scipy.stats import ttest_1samp, ttest_ind

LAPTOP = SCALES["laptop"]
NARROW, WIDE = LAPTOP.widths


@dataclass
class Args:
    runs: Annotated[Path, tyro.conf.Positional]
    """directory of the run directories"""


def chosen(figure: str, label: str, panel: str | None = None, x: int | None = None) -> list[Run]:
    """Runs of one curve or bar of a figure. Raises KeyError if there are none: a claim names what is not planned."""
    runs = [run for run in EXPERIMENTS[figure].runs(LAPTOP)
            if run.label == label and panel in (None, run.panel) and x in (None, run.x)]  # fmt: skip
    if not runs:
        raise KeyError((figure, label, panel, x))
    return runs


def per_seed(runs: list[Run], root: Path, number: Callable[[Run, Path], float]) -> list[float]:
    """The mean of a number over the runs of each seed, of the seeds whose runs are all finished."""
    values = {}
    for run in runs:
        values.setdefault(run.seed, []).append(number(run, root / run.name))
    return [float(np.mean(found)) for _, found in sorted(values.items()) if np.isfinite(found).all()]


def score_between(first: float, last: float, tasks: tuple[str, ...] = ()) -> Callable[[Run, Path], float]:
    """Mean score over (the given) tasks and the evaluations between two shares of the run; NaN of an unfinished one."""

    def number(run: Run, directory: Path) -> float:
        table, _ = scores.read_evaluations(directory)
        if not len(table) or table["step"].max() < run.length:
            return np.nan
        wanted = [task for task in tasks or tasks_of(run, LAPTOP) if scores.has_score(task)]
        share = table["step"] / run.length
        rows = table[(share >= first - 1e-9) & (share <= last + 1e-9) & table["task"].isin(wanted)]
        return float(rows["score"].mean())

    return number


def statistic(compute: Callable[[dict], float]) -> Callable[[Run, Path], float]:
    """What compute makes of the last statistics/<step>.npz; NaN where there is none."""

    def number(run: Run, directory: Path) -> float:
        path = directory / "statistics" / f"{run.length}.npz"
        if not path.exists():
            return np.nan
        with np.load(path, allow_pickle=False) as arrays:
            return float(compute(arrays))

    return number


def spread(name: str) -> Callable[[Run, Path], float]:
    """sigma / mu over tasks (Figure 3, left)."""
    return statistic(lambda arrays: arrays[name].std() / max(abs(arrays[name].mean()), 1e-12))


def conflicts(arrays: dict) -> float:
    """Share of task pairs whose critic gradients have a negative cosine (Figure 5, right)."""
    return float((arrays["gradient_cosine"][np.triu_indices(len(arrays["task"]), 1)] < 0).mean())


def verdict(low: float, high: float, seeds: int) -> str:
    word = "seen" if low > 0 else "contradicted" if high < 0 else "not seen"
    return word if seeds == LAPTOP.seeds else f"{word} ({seeds} of {LAPTOP.seeds} seeds)"


def row(figure: int, claim: str, more: list[float], less: list[float]) -> list[str]:
    """A claim that the first numbers are higher than the second ones."""
    seeds = min(len(more), len(less))
    cells = [" ".join(f"{value:.2f}" for value in values) or "-" for values in (more, less)]
    if seeds < 2:
        return [str(figure), claim, *cells, "", "not run"]
    bounds = ttest_ind(more, less, equal_var=False).confidence_interval()
    difference = f"{np.mean(more) - np.mean(less):+.3f} ({bounds.low:+.3f} to {bounds.high:+.3f})"
    return [str(figure), claim, *cells, difference, verdict(bounds.low, bounds.high, seeds)]


def shapley_rows(root: Path) -> list[list[str]]:
    """Figure 6: exact Shapley values of each seed, against zero."""
    players, by_set = ["SQ", "CE", "TE"], {}
    for size in range(len(players) + 1):
        for group in itertools.combinations(players, size):
            runs = chosen("figure6", " + ".join(group) or "none")
            by_set[frozenset(group)] = per_seed(runs, root, score_between(2 / 3, 1))
    seeds = min(map(len, by_set.values()))
    values = [scores.shapley_values({group: v[seed] for group, v in by_set.items()}, players) for seed in range(seeds)]
    rows = []
    for player, name in zip(players, ("width", "cross-entropy with normalization", "embeddings"), strict=True):
        found, claim = [value[player] for value in values], f"{name} ({player}) adds: its Shapley value is above 0"
        if seeds < 2:
            rows.append(["6", claim, "-", "", "", "not run"])
            continue
        bounds = ttest_1samp(found, 0).confidence_interval()
        difference = f"{np.mean(found):+.3f} ({bounds.low:+.3f} to {bounds.high:+.3f})"
        rows.append(["6", claim, " ".join(f"{value:.2f}" for value in found), "", difference,
                     verdict(bounds.low, bounds.high, seeds)])  # fmt: skip
    return rows


def table(root: Path) -> list[list[str]]:
    """Figure, claim, numbers of both sides by seed, difference with its 95% interval, verdict."""

    def score(*key, tasks=(), between=(2 / 3, 1), **options) -> list[float]:
        return per_seed(chosen(*key, **options), root, score_between(*between, tasks))

    brc, brc_multi, sac = score("figure1", "BRC"), score("figure1", "BRC*"), score("figure1", "SAC")
    sac_multi = score("figure1", "MH-SAC*")
    rows = [
        row(1, "multi-task BRC beats single-task BRC", brc_multi, brc),
        row(1, "naive multi-task SAC loses against single-task SAC", sac, sac_multi),
        row(1, "BRC beats SAC, one task each", brc, sac),
        row(1, "BRC beats multi-head SAC, all tasks", brc_multi, sac_multi),
    ]
    for panel, where in (("multi-task", "six tasks"), ("multi-task, mixed rewards", "mixed rewards")):
        entropy = score("figure3", "CE + normalization", panel=panel)
        for label in ("MSE + normalization", "MSE"):
            rows.append(row(3, f"{where}: cross-entropy beats {label}", entropy, score("figure3", label, panel=panel)))
        for name in ("td_loss", "gradient_norm"):
            sides = [per_seed(chosen("figure3", label, panel=panel), root, spread(name))
                     for label in ("MSE", "CE + normalization")]  # fmt: skip
            rows.append(row(3, f"{where}: sigma / mu of {name} is larger with MSE", *sides))
    for panel in ("single-task", "multi-task"):
        at = {width: score("figure4", "BroNet (CE)", panel=panel, x=width) for width in LAPTOP.widths}
        rows.append(row(4, f"{panel}: BroNet (CE) gains by width", at[WIDE], at[NARROW]))
    names = [name for name in ARCHITECTURES if name != "BroNet (CE)"]
    others = {name: score("figure4", name, panel="multi-task", x=WIDE) for name in names}
    best = max(others, key=lambda name: np.mean(others[name] or [-np.inf]))
    rows.append(row(4, f"multi-task: BroNet (CE) beats the best of the others ({best})", at[WIDE], others[best]))
    for width in LAPTOP.widths:
        sides = [score("figure5", label, x=width) for label in ("task embeddings", "separate heads")]
        rows.append(row(5, f"embeddings beat heads at width {width}", *sides))
    for label in ("task embeddings", "separate heads"):
        sides = [per_seed(chosen("figure5", label, x=width), root, statistic(conflicts)) for width in (NARROW, WIDE)]
        rows.append(row(5, f"{label}: the narrow critic has more conflicting gradients", *sides))
    rows += shapley_rows(root)
    sides = score("figure9", "BRC*", between=(1, 1)), score("figure9", "BRC", between=(1 / 6, 1 / 6))
    rows.append(row(9, "at equal gradient steps multi-task BRC beats single-task BRC", *sides))
    shared = LAPTOP.suites["hb-medium-3"].tasks
    for width in LAPTOP.widths:
        sides = [score("figure10", f"{n} tasks", panel="pretraining", x=width, tasks=shared) for n in (9, 3)]
        rows.append(row(10, f"nine tasks help the three shared ones, width {width}", *sides))
    moved = {(n, width): score("figure10", f"{n} tasks", panel="transfer", x=width)
             for n in (3, 6) for width in LAPTOP.widths}  # fmt: skip
    rows.append(row(10, "transfer gains by pretraining on six tasks, not three", moved[6, WIDE], moved[3, WIDE]))
    rows.append(row(10, "transfer from six tasks gains by width", moved[6, WIDE], moved[6, NARROW]))
    online = score("figure12", "BRC* (online)", x=WIDE)
    rows.append(row(12, "online beats offline, mixed rewards", online, score("figure12", "BRC+BC* (offline)", x=WIDE)))
    return rows


def main(args: Args) -> int:
    if not args.runs.is_dir():
        print(f"error: {args.runs} is no directory; launch.py writes to its --run-root", file=sys.stderr)
        return 2
    header = ["figure", "claim", "higher, by seed", "lower, by seed", "difference, 95% interval", "verdict"]
    for cells in (header, ["---"] * len(header), *table(args.runs)):
        print("| " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
