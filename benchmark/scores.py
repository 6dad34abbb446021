"""What runs scored: args.json and eval.csv of run directories, published curves, and the statistics of Agarwal et al.
(2021, "Deep RL at the edge of the statistical precipice") over them, computed by rliable.

Everything is a pandas table with one row per evaluation of one task. What is missing or damaged is left out and named
in a list of lines, never silently. A run that diverged is not left out: see count_divergence.
"""

import csv
import json
import sys
import zlib
from functools import cache
from itertools import permutations
from math import factorial
from pathlib import Path

import jax
import numpy as np
import pandas as pd

try:
    from rliable import library, metrics
except ImportError as error:
    way_out = "pip install rliable==1.2.0, for which Python 3.14 needs a compiler (no wheels of arch)"
    print(f"error: {error}; {way_out}", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import brc_drq_atari as drq  # noqa: E402
import brc_sac_continuous as sac  # noqa: E402

EVAL_COLUMNS = ("step", "updates", "wall_time", "task", "episodes", "return", "success", "score")
EMBEDDING_COLUMNS = ("target", "method", "embedding", "transitions", "episodes", "return", "success", "score")
TYPES = {"step": int, "updates": int, "task": str, "target": str, "method": str, "embedding": str}  # others: float


def normalized_score(task: str, value: float) -> float:
    """E.3's score of a published value, which is a success rate for metaworld and shadowhand and a return elsewhere."""
    try:
        if task.startswith("atari/"):
            return drq.normalized_score(task, value)
        return sac.normalized_score(task, value, value)
    except KeyError:  # a HumanoidBench task without a row in Table 2, a game without one in Table 5
        return np.nan


def has_score(task: str) -> bool:
    """Whether the paper defines a score of the task: it does not for gym/."""
    return bool(np.isfinite(normalized_score(task, 0.0)))


# -------------------------------------------------------------------------------------------------------- reading


def read_table(path: Path, columns: tuple[str, ...]) -> tuple[pd.DataFrame, str]:
    """A CSV file up to its first bad row, numbers as float (empty: NaN), and what is wrong with it ('': nothing).

    The scripts replace their files whole; a copy that was cut may end in a number that lost its last digits, and so a
    last line without a line end is bad, too.
    """
    rows, problem = [], ""
    try:
        with path.open(newline="", errors="replace") as file:
            lines = list(file)
            reader = csv.reader(lines)
            header = next(reader, None)
            if header != list(columns):
                return pd.DataFrame(columns=columns), f"damaged {path.name}: its first line is no header"
            for row in reader:
                try:
                    if not lines[reader.line_num - 1].endswith("\n"):
                        raise ValueError("cut")
                    cells = zip(columns, row, strict=True)
                    rows.append({k: TYPES[k](v) if k in TYPES else float(v or "nan") for k, v in cells})
                except ValueError:
                    problem = f"damaged {path.name}: line {reader.line_num} and what follows is left out"
                    break
    except FileNotFoundError:
        problem = f"no {path.name}"
    except (OSError, csv.Error) as error:
        problem = f"damaged {path.name}: {error}"
    return pd.DataFrame(rows, columns=columns), problem


def read_evaluations(directory: Path) -> tuple[pd.DataFrame, str]:
    """eval.csv of a run, each evaluation of a task once, and what is wrong with it. Tasks of an evaluation that is not
    there for all tasks are left out. Of a run that diverged, see count_divergence, it is continued to the planned end.
    """
    table, problem = read_table(directory / "eval.csv", EVAL_COLUMNS)
    table = table.drop_duplicates(["step", "task"], keep="last")
    table = table[table.groupby("step")["task"].transform("count") == table["task"].nunique()]
    last = table[table["step"] == table["step"].max()]
    information, _ = read_information(directory)
    diverged_at = information.get("diverged_at")
    if len(last) and (diverged_at is not None or not np.isfinite(last["return"]).all()):
        every, total = (information.get(name, 0) for name in ("eval_every", "total_timesteps"))
        total = information.get("total_updates", total)
        planned = [*range(0, total, every), total] if every else []
        missing = [last.assign(step=step, **{"return": np.nan}) for step in planned if step > last["step"].iloc[0]]
        table = pd.concat([table, *missing], ignore_index=True)
    table, lost = count_divergence(table, "return", ["task"])
    if lost.any() or diverged_at is not None:
        step = table["step"][lost].min() if diverged_at is None else diverged_at
        counts = "then counts as score 0, its lowest return" if len(table) else "has no evaluation to count"
        problem = "; ".join(filter(None, [problem, f"diverged at step {step:,}, {counts}"]))
    return table, problem


def count_divergence(table: pd.DataFrame, value: str, by: list[str]) -> tuple[pd.DataFrame, pd.Series]:
    """The table with the rows of a learner that diverged as what they are worth, and which rows these are.

    Leaving them out would show the mean of the seeds that survived. A row whose return (column `value`) is not finite
    has score and success 0, E.3's value of knowing nothing, and the lowest return that its group `by` ever had. A task
    for which the paper defines no score still has none.
    """
    lost = ~np.isfinite(table[value].astype(float))
    measured = table[value].where(~lost)
    table = table.assign(**{value: measured.fillna(measured.groupby([table[name] for name in by]).transform("min"))})
    for column in {"score", "success"} & set(table):
        has_one = table[column].where(~lost).groupby(table["task"]).transform("count") > 0
        table[column] = table[column].mask(lost, np.where(has_one, 0.0, np.nan))
    return table, lost


def read_information(directory: Path) -> tuple[dict, str]:
    """args.json of a run, and what is wrong with it."""
    try:
        information = json.loads((directory / "args.json").read_text())
        if not isinstance(information.get("env_info"), dict):
            return {}, "damaged args.json: it has no env_info"
        for name in ("eval_every", "total_timesteps", "total_updates", "diverged_at"):
            if not isinstance(information.get(name, 0), int):
                return {}, f"damaged args.json: {name} is {information[name]!r}, no whole number"
        return information, ""
    except FileNotFoundError:
        return {}, "no args.json"
    except (OSError, ValueError, AttributeError) as error:
        return {}, f"damaged args.json: {error}"


@cache
def _critic_parameters(arguments: str, num_tasks: int, observation_dim: int, action_dim: int) -> int:
    agent = sac.make_agent(sac.Args(**json.loads(arguments)), num_tasks, observation_dim, action_dim)
    state = jax.eval_shape(lambda: agent.init(0))  # shapes only: nothing is allocated
    return sac.parameter_count([state.critic, state.target_critic])


def critic_parameters(information: dict) -> float:
    """Parameters of the critics with their targets, as the script counts them; NaN for what is not a run of SAC+BRC."""
    if information.get("script") != "brc_sac_continuous":
        return np.nan
    names = ("critic_arch", "critic_width", "critic_depth", "num_critics", "critic_loss", "num_atoms",
             "task_conditioning", "embedding_size", "actor_width", "actor_depth")  # fmt: skip
    arguments = json.dumps({name: information[name] for name in names if name in information})
    sizes = [information["env_info"][name] for name in ("num_tasks", "observation_dim", "action_dim")]
    return float(_critic_parameters(arguments, *sizes))


def collect(runs: list, root: Path) -> tuple[pd.DataFrame, list[str]]:
    """Evaluations of an experiment's runs (experiments.Run), and a line for everything that is missing.

    Columns: those of eval.csv, and panel, label, x, seed, run, length (planned steps), parameters. Runs without a curve
    (embedding transfer, and those that only build something) are read where they are drawn.
    """
    tables, problems, read = [], {}, {}
    for run in runs:
        if run.name not in read:
            read[run.name] = (*read_evaluations(root / run.name), *read_information(root / run.name))
        table, problem, information, damage = read[run.name]
        if not (root / run.name).is_dir():
            problems[run.name] = "not started"
        if run.name in problems or not run.length:
            continue
        last = int(table["step"].max()) if len(table) else 0
        lines = [line for line in (damage, problem) if line]
        if len(table) and last < run.length:
            lines.append(f"unfinished: step {last:,} of {run.length:,}, in curves only")
        elif not len(table) and not problem:
            lines.append("no evaluation yet")
        if lines:
            problems[run.name] = "; ".join(lines)
        if not len(table):
            continue
        try:
            parameters = critic_parameters(information)
        except (KeyError, TypeError, ValueError) as error:
            parameters = np.nan
            problems.setdefault(run.name, f"damaged args.json: {error!r}")
        tables.append(table.assign(panel=run.panel, label=run.label, x=run.x, seed=run.seed, run=run.name,
                                   length=run.length, parameters=parameters))  # fmt: skip
    missing = [name for name, problem in problems.items() if problem == "not started"]
    lines = [f"{name}: {problem}" for name, problem in problems.items() if problem != "not started"]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        lines.append(f"{len(missing)} of {len(read)} runs not started: {shown}")
    columns = [*EVAL_COLUMNS, "panel", "label", "x", "seed", "run", "length", "parameters"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns), lines


# ------------------------------------------------------------------------------------------------ published curves

AUTHORS = {"multitask": "BRC* (authors)", "singletask": "BRC (authors)"}
TREE_STEPS = {"dmc": 500_000, "humanoidbench": 1_000_000, "humanoidbench_hard": 2_000_000, "metaworld": 500_000,
              "shadowhand": 1_000_000}  # fmt: skip


class BadReference(Exception):
    """A file that is none of the known layouts."""


def read_reference(path: Path) -> tuple[pd.DataFrame, str]:
    """Published curves: agent, task, seed, step, value (raw return or success) and score; and what is wrong with them.

    Three layouts: CSV with suite,agent,task,seed,step,value; CSV with agent,metric,task,seed,step,value; and the
    results folder of github.com/naumix/BiggerRegularizedCategorical, whose <suite>/BRC_<agent>/<task>.npy are arrays
    [seeds, evaluations], evenly spaced to the end of training.
    """
    if path.is_dir():
        table = read_npy_tree(path)
    else:
        try:
            table = pd.read_csv(path, dtype=dict.fromkeys(("agent", "task", "metric"), str))
        except (OSError, ValueError, EOFError, zlib.error) as error:  # ParserError, UnicodeDecodeError are ValueErrors
            raise BadReference(f"--reference {path}: {' '.join(str(error).split())}") from error
        columns = ["agent", "task", "seed", "step", "value"]
        if missing := [name for name in columns if name not in table]:
            raise BadReference(f"--reference {path}: a CSV file needs columns {', '.join(columns)}; it lacks "
                               f"{', '.join(missing)}")  # fmt: skip
        steps, values = (pd.to_numeric(table[name], errors="coerce") for name in ("step", "value"))
        bad = {name: table[name].isna() for name in ("agent", "task", "seed")}
        bad |= {"step": ~np.isfinite(steps), "value": values.isna() & table["value"].notna()}
        for name in (name for name in columns if bad[name].any()):
            row = int(np.argmax(bad[name]))
            cell = table[name].iloc[row]
            what = f"no {name}" if pd.isna(cell) else f"{name} '{cell}' is no number"
            raise BadReference(f"--reference {path}: row {row + 1} after the first line: {what}")
        if "metric" in table:  # of Meta-World some publish returns as well
            by_success = table["task"].str.startswith(("metaworld/", "shadowhand/"))
            table = table[(table["metric"] == "success") == by_success]
            table = table.assign(agent=table["agent"] + " (published)")
        table = table.assign(agent=table["agent"].replace(AUTHORS))[columns]
    scores = [normalized_score(task, value) for task, value in zip(table["task"], table["value"], strict=True)]
    table, lost = count_divergence(table.assign(score=scores), "value", ["agent", "task"])
    problem = f"--reference {path}: {lost.sum()} values are missing or not finite: they count as score 0"
    return table, problem * bool(lost.any())


def read_npy_tree(path: Path) -> pd.DataFrame:
    """The authors' folder as a table. Other arrays in it (losses, norms, an aggregate) are left alone."""
    tables = []
    for file in sorted(path.glob("*/BRC_*task/*.npy")):
        suite, agent, name = file.parent.parent.name, file.parent.name.removeprefix("BRC_"), file.stem
        if suite not in TREE_STEPS or agent not in AUTHORS or name == "aggregate":
            continue
        try:
            values = np.load(file, allow_pickle=False)
            seeds, evaluations = values.shape
        except (OSError, ValueError) as error:
            raise BadReference(f"--reference {file}: {error}") from error
        name = name.removesuffix("-v2-goal-observable").removesuffix("-v0").replace("_", "-")
        steps = np.round(TREE_STEPS[suite] * np.arange(1, evaluations + 1) / evaluations).astype(int)
        tables.append(pd.DataFrame({
            "agent": AUTHORS[agent], "task": f"{suite.removesuffix('_hard')}/{name}",
            "seed": np.repeat(np.arange(seeds), evaluations), "step": np.tile(steps, seeds), "value": values.ravel(),
        }))  # fmt: skip
    if not tables:
        raise BadReference(f"--reference {path}: no SUITE/BRC_multitask/TASK.npy in it")
    return pd.concat(tables, ignore_index=True)


# ------------------------------------------------------------------------------------------------------ statistics

STATISTICS = {"mean": metrics.aggregate_mean, "iqm": metrics.aggregate_iqm, "median": metrics.aggregate_median}


def score_matrix(table: pd.DataFrame, column: str = "score") -> tuple[np.ndarray, list[str]]:
    """[seeds, tasks] of one evaluation each, and the tasks. Tasks are strata: seeds of different tasks need not belong
    together, so where a task has more seeds than another, its first ones count. A task without any score is left out;
    a seed never is: where others have one, what is not finite counts as 0."""
    by_task = {task: rows.sort_values("seed")[column].to_numpy() for task, rows in table.groupby("task", sort=False)}
    finite = {task: np.isfinite(values) for task, values in by_task.items()}
    by_task = {task: np.where(finite[task], values, 0) for task, values in by_task.items() if finite[task].any()}
    if not by_task:
        return np.zeros((0, 0)), []
    seeds = min(map(len, by_task.values()))
    return np.stack([values[:seeds] for values in by_task.values()], axis=1), list(by_task)


def interval(scores: np.ndarray, statistic, reps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """statistic(scores) and its 95% stratified bootstrap interval: seeds are drawn anew within every task.

    scores: [seeds, tasks, ...]; statistic: to a vector. With a single seed there is nothing to draw: NaN bounds.
    """
    point = np.asarray(statistic(scores), float)
    if len(scores) < 2:
        return point, np.full(point.shape, np.nan), np.full(point.shape, np.nan)
    np.random.seed(0)  # noqa: NPY002 (rliable draws from NumPy's global state, whatever random_state it is given)
    _, bounds = library.get_interval_estimates({"": scores}, statistic, reps=reps)
    return point, *bounds[""]


def summary(scores: np.ndarray, reps: int) -> dict[str, float]:
    """Mean, IQM and median of scores [seeds, tasks] with their intervals, as columns of a table."""
    functions = list(STATISTICS.values())
    points, lows, highs = interval(scores, lambda x: np.array([function(x) for function in functions]), reps)
    row = {"tasks": scores.shape[1], "seeds": scores.shape[0]}
    for name, point, low, high in zip(STATISTICS, points, lows, highs, strict=True):
        row |= {name: point, f"{name}_low": low, f"{name}_high": high}
    return row


def mean_curve(table: pd.DataFrame, reps: int, column: str = "score") -> pd.DataFrame:
    """Mean over tasks and seeds at every step that all tasks reached: step, mean, low, high, seeds.

    The number of seeds may shrink towards the end, where runs are unfinished. A task without any score is left out, and
    so is a step that a run lacks which goes on after it: the curve would jump from one set of seeds to another.
    """
    table = table[table.groupby("task")[column].transform("count") > 0]
    ends = table.groupby(["task", "seed"])["step"].max()
    running = {step: (ends >= step).sum() for step in table["step"].unique()}
    table = table[table.groupby("step")["step"].transform("count") >= table["step"].map(running)]
    tasks, groups = table["task"].nunique(), {}
    for step, rows in table.groupby("step"):
        scores, found = score_matrix(rows, column)
        if len(found) == tasks:
            groups.setdefault(len(scores), {})[step] = scores
    curves = [pd.DataFrame(columns=["step", "mean", "low", "high", "seeds"])]
    for seeds, by_step in groups.items():
        stacked = np.stack(list(by_step.values()), axis=2)
        mean, low, high = interval(stacked, lambda x: x.mean((0, 1)), reps)
        curves.append(pd.DataFrame({"step": list(by_step), "mean": mean, "low": low, "high": high, "seeds": seeds}))
    return pd.concat([curve for curve in curves if len(curve)] or curves).sort_values("step")


def shapley_values(values: dict[frozenset, float], players: list[str]) -> dict[str, float]:
    """Exact Shapley values: a player's mean contribution over all orders in which the players could come (Shapley,
    1953). values: one for every set of players."""
    result = dict.fromkeys(players, 0.0)
    for order in permutations(players):
        for count, player in enumerate(order):
            before = frozenset(order[:count])
            result[player] += (values[before | {player}] - values[before]) / factorial(len(players))
    return result


def read_statistics(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """A run's statistics/<step>.npz and what is wrong with it ('': nothing)."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays), ""
    except FileNotFoundError:
        return {}, f"no statistics/{path.name}"
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged or half-written file
        return {}, f"damaged statistics/{path.name}: {error}"


def spread(values: np.ndarray) -> float:
    """sigma / mu over tasks (Figure 3, left)."""
    return float(values.std() / max(abs(values.mean()), 1e-12))


def conflicts(statistics: dict[str, np.ndarray]) -> float:
    """Share of task pairs whose critic gradients have a negative cosine (Figure 5, right); NaN if one is unknown."""
    cosines = statistics["gradient_cosine"][np.triu_indices(len(statistics["task"]), 1)]
    return float((cosines < 0).mean()) if np.isfinite(cosines).all() else np.nan
