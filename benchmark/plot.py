"""Figures and tables of the paper from run directories, and learning curves of any runs.

  python benchmark/plot.py figure4 --runs runs/                          # plots/figure4-laptop.{png,pdf,csv,md}
  python benchmark/plot.py figure16 figure17 --runs runs/ --scale paper --reference brc_curves.csv.gz
  python benchmark/plot.py runs/A runs/B runs/C --out curve.png          # curves of these runs, a panel per task
  python benchmark/plot.py runs/A --reference brc_curves.csv.gz          # beside published curves

A figure takes the runs that benchmark/launch.py makes for it from --runs. It reads args.json and eval.csv, for the
diagnostics of Figures 3, 5 and 7 statistics/*.npz, and for embedding transfer embedding.csv and heatmap.csv. What is
missing, unfinished or damaged is named, and the rest is plotted. Scores are normalized as in E.3; intervals are 95%
stratified bootstrap intervals over seeds (rliable). The scale, laptop or paper, is in every title, table and file name.

--reference takes CSV files of published curves (agent,task,seed,step,value, optionally suite or metric) and the results
folder of the authors' repository; the paper's Tables 2 and 5 are in benchmark/paper/.

Of run directories, those that trained on the same tasks with the same arguments but the seed form one group.
"""

import json
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import matplotlib
import numpy as np
import pandas as pd
import scores
import tyro
from experiments import EXPERIMENTS, OFFLINE, SCALES, Run, Scale
from launch import exit_with, fail

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

PAPER_TABLES = Path(__file__).resolve().parent / "paper"
NOT_PART_OF_GROUP = (
    "seed", "run_name", "run_root", "resume", "play", "versions", "device", "git_commit", "diverged_at",
    "total_timesteps", "total_updates", "eval_every", "checkpoint_every", "keep_checkpoints", "save_replay", "track",
    "wandb_project", "capture_video", "log_task_statistics", "env_workers", "env_timeout",
)  # fmt: skip
STATISTIC_COLUMNS = [f"{name}{end}" for name in scores.STATISTICS for end in ("", "_low", "_high")]


@dataclass
class Args:
    what: Annotated[tuple[str, ...], tyro.conf.Positional]
    """experiments such as figure4, or run directories"""
    runs: Path = Path("runs")
    """experiments: directory that holds the run directories"""
    scale: Literal["laptop", "paper"] | None = None
    """experiments: the scale to plot (default: every scale that has runs)"""
    reference: tuple[Path, ...] = ()
    """published curves to put beside ours: CSV files, or the authors' results folder"""
    reps: int = 2000
    """experiments: draws of the bootstrap"""
    out: Path | None = None
    """experiments: directory to write to (default: plots); run directories: picture to write (default: curves.png)"""
    labels: tuple[str, ...] = ()
    """run directories: a name for each group, in the order in which the groups' first runs are given"""


def published_on(reference: pd.DataFrame, tasks: list[str]) -> dict[str, pd.DataFrame]:
    """Reference curves of every agent that was published on all these tasks."""
    rows = reference[reference["task"].isin(tasks)]
    return {a: r for a, r in rows.groupby("agent", sort=False) if r["task"].nunique() == len(tasks)}


@dataclass
class Data:
    """What the drawing functions get: the runs of an experiment at one scale and what they scored."""

    runs: list[Run]
    scale: Scale
    root: Path
    table: pd.DataFrame
    """evaluations, see scores.collect"""
    reference: pd.DataFrame
    """published curves, see scores.read_reference"""
    reps: int
    notes: list[str]
    """what is missing, for the user"""

    @property
    def final(self) -> pd.DataFrame:
        """The last evaluation of every finished run."""
        return self.table[self.table["step"] == self.table["length"]]

    def planned(self, panel: str, label: str | None = None, x=None) -> list[str]:
        """Tasks of a panel, of one label, at one place of the x axis."""
        tasks = {}
        for run in self.runs:
            if run.panel == panel and (label is None or run.label == label) and (x is None or run.x == x):
                tasks |= dict.fromkeys(run.tasks(self.scale))
        return list(tasks)

    def panels(self) -> list[str]:
        return list(dict.fromkeys(run.panel for run in self.runs))

    def labels(self, panel: str | None = None) -> list[str]:
        return list(dict.fromkeys(run.label for run in self.runs if panel is None or run.panel == panel))

    def color(self, label: str) -> str:
        """The same in every panel; published agents come after ours."""
        names = [*(name for name in self.labels() if name != "pretraining"), *self.reference["agent"].unique()]
        return f"C{names.index(label) % 10}"

    def statistics(self) -> list[tuple[Run, dict[str, np.ndarray]]]:
        """Of the last step of runs that log them."""
        found = []
        for run in self.runs:
            if "--log-task-statistics" not in run.argv or not (self.root / run.name).is_dir():
                continue
            arrays, problem = scores.read_statistics(self.root / run.name / "statistics" / f"{run.length}.npz")
            if problem:
                self.notes.append(f"{run.name}: {problem}")
            else:
                found.append((run, arrays))
        return found


# ------------------------------------------------------------------------------------------------------- summaries


def summarize(data: Data, rows: pd.DataFrame, by=("panel", "label", "x"), planned: list[str] | None = None):
    """Mean, IQM and median score of every group of runs, as a table. A mean over fewer tasks could not stand beside the
    others, so a group that lacks some is left out."""
    out = []
    for key in dict.fromkeys(tuple(getattr(run, name) for name in by) for run in data.runs):
        named, group = dict(zip(by, key, strict=True)), rows
        for name, value in named.items():
            group = group[group[name].isna() if value is None else group[name] == value]
        matrix, tasks = scores.score_matrix(group)
        if not tasks:
            continue
        wanted = [task for task in planned or data.planned(**named) if scores.has_score(task)]
        if len(tasks) < len(wanted):
            where = " ".join(str(value) for value in key if value not in ("", None))
            data.notes.append(f"{where}: no mean, {len(tasks)} of {len(wanted)} tasks have a finished run")
            continue
        out.append({**named, "parameters": group["parameters"].mean(), **scores.summary(matrix, data.reps)})
    return pd.DataFrame(out, columns=[*by, "parameters", "tasks", "seeds", *STATISTIC_COLUMNS])


def incomplete(rows: pd.DataFrame, planned: int) -> str:
    """'', or how many of the planned tasks rows have, as a mean over these could not stand beside the others."""
    found = rows["task"].nunique()
    return f"{found} of {planned} tasks have a run" if found < planned else ""


def published_summary(data: Data, panel: str, tasks: list[str]) -> pd.DataFrame:
    """The same for published agents, at the end of their curves or, at the paper's scale, where our runs end."""
    out = []
    ours = [run.length for run in data.runs if run.panel == panel and run.script != OFFLINE]
    limit = max(ours) if data.scale.name == "paper" else np.inf
    for agent, rows in published_on(data.reference, tasks).items():
        rows = rows[rows["step"] <= limit]
        last = rows.groupby(["task", "seed"], as_index=False)["step"].transform("max")
        rows = rows[rows["step"] == last]
        matrix, found = scores.score_matrix(rows)
        if len(found) == len(tasks):
            ends = dict.fromkeys(f"{int(step):,}" for step in (rows["step"].min(), rows["step"].max()))
            label = f"{agent}, {' to '.join(ends)} steps"
            out.append({"panel": panel, "label": label, "source": "published", **scores.summary(matrix, data.reps)})
    return pd.DataFrame(out)


def with_published(data: Data, table: pd.DataFrame, panels: list[str] | None = None) -> pd.DataFrame:
    """The table with a row for every published agent that has all tasks of a panel."""
    if data.reference.empty or table.empty:
        return table
    panels = table["panel"].unique() if panels is None else panels
    more = [published_summary(data, panel, data.planned(panel)) for panel in panels]
    return pd.concat([table, *(rows for rows in more if len(rows))], ignore_index=True)


# --------------------------------------------------------------------------------------------------------- drawing


def new_figure(rows: int, columns: int, width: float = 4.0, height: float = 3.4, sharey: bool = False):
    size = width * columns, height * rows
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", sharey=sharey)


def error_bars(table: pd.DataFrame, name: str = "mean") -> np.ndarray:
    """[2, rows] below and above; nothing where there is one seed."""
    return np.nan_to_num(np.stack([table[name] - table[f"{name}_low"], table[f"{name}_high"] - table[name]])).clip(0)


def draw_bars(axis, table: pd.DataFrame, title: str = "", ylabel: str = "score", labels: list[str] = ()) -> None:
    """A bar a row. labels: all of the figure's, where one has to have the same color in every panel."""
    labels = list(labels) or list(table["label"])
    places, colors = np.arange(len(table)), [f"C{labels.index(label) % 10}" for label in table["label"]]
    bounds = error_bars(table)
    axis.bar(places, table["mean"], yerr=bounds, color=colors, capsize=3, width=0.7)
    middle, half = (len(table) - 1) / 2, max(len(table), 3) / 2  # a bar alone is as wide as one of three
    axis.set_xlim(middle - half, middle + half)
    for place, value, above in zip(places, table["mean"], bounds[1], strict=True):
        axis.annotate(f"{value:.2f}", (place, max(value + above, 0)), xytext=(0, 3), textcoords="offset points",
                      ha="center", fontsize=7)  # fmt: skip
    axis.margins(y=0.12)
    axis.set_xticks(places, [textwrap.fill(label, 22) for label in table["label"]], rotation=35, ha="right", fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.set_ylabel(ylabel)
    axis.grid(axis="y", alpha=0.3)


def draw_line(axis, x, curve: pd.DataFrame, label: str, color: str, **style) -> None:
    axis.plot(x, curve["mean"].astype(float), color=color, label=label, **style)
    low, high = curve["low"].astype(float), curve["high"].astype(float)
    axis.fill_between(x.astype(float), low, high, color=color, alpha=0.2, linewidth=0)


def curve_axes(data: Data, axis, panel: str, ours: dict[str, pd.DataFrame], tasks: list[str], column: str) -> None:
    """Ours as lines, published curves dashed; the steps are logarithmic where the published ones go much further."""
    end = max([int(curve["step"].max()) for curve in ours.values() if len(curve)], default=0)
    for label, curve in ours.items():
        if len(curve):
            draw_line(axis, curve["step"], curve, label, data.color(label), marker=".")
    column = {"return": "value", "success": "value"}.get(column, column)
    for agent, rows in published_on(data.reference, tasks).items():
        if data.scale.name == "paper":
            rows = rows[rows["step"] <= max(run.length for run in data.runs if run.panel == panel)]
        curve = scores.mean_curve(rows, data.reps, column)
        if len(curve):
            draw_line(axis, curve["step"], curve, agent, data.color(agent), linestyle="--", linewidth=1)
            if 0 < 4 * end < curve["step"].max():
                axis.set_xscale("symlog", linthresh=end / 4)
    axis.set_xlabel("environment steps per task", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)


def bars(data: Data):
    """Figure 1: final scores, a panel per benchmark and one over all tasks with continuous actions."""
    table = summarize(data, data.final, ("panel", "label"))
    continuous = [panel for panel in data.panels() if not data.planned(panel)[0].startswith("atari/")]
    if len(continuous) > 1:
        rows = data.final[data.final["panel"].isin(continuous)]
        rows = rows.assign(task=rows["panel"] + " " + rows["task"])
        out = []
        for label in data.labels():  # only what has every panel: other means would be over other tasks
            if set(continuous) <= set(table[table["label"] == label]["panel"]):
                matrix, _ = scores.score_matrix(rows[rows["label"] == label])
                out.append({"panel": "all continuous", "label": label, **scores.summary(matrix, data.reps)})
        if out:
            table = pd.concat([pd.DataFrame(out), table], ignore_index=True)
    table = with_published(data, table, [panel for panel in data.panels() if panel in set(table["panel"])])
    panels = list(dict.fromkeys(table["panel"]))
    figure, axes = new_figure(1, max(len(panels), 1))
    for axis, panel in zip(axes.flat, panels, strict=False):
        draw_bars(axis, table[table["panel"] == panel], panel)
    return figure, table


def halfway(data: Data):
    """Figure 2: transfer after half of the steps and at the end."""
    rows = data.table[data.table["label"] != "pretraining"]
    out = []
    for name, at in (("half", rows["length"] // 2), ("end", rows["length"])):
        out.append(summarize(data, rows[rows["step"] == at], ("panel", "label")).assign(at=name))
    table = pd.concat(out, ignore_index=True)
    panels = [panel for panel in data.panels() if panel in set(table["panel"])]
    figure, axes = new_figure(1, max(len(panels), 1))
    for axis, panel in zip(axes.flat, panels, strict=False):
        shown = table[table["panel"] == panel].sort_values(["label", "at"], ascending=[True, False])
        draw_bars(axis, shown.assign(label=shown["label"] + ", " + shown["at"]), panel)
    return figure, table


def stability(data: Data):
    """Figure 3: sigma / mu over tasks of TD loss, gradient norm and entropy of multi-task runs; final scores."""
    found = defaultdict(list)
    for run, arrays in data.statistics():
        for name in ("td_loss", "gradient_norm", "entropy"):
            found[run.panel, run.label, name].append(scores.spread(arrays[name]))
    table = summarize(data, data.final, ("panel", "label"))
    logged = list(dict.fromkeys(panel for panel, _, _ in found)) or ["multi-task"]
    panels = [panel for panel in data.panels() if panel in set(table["panel"])]
    figure, axes = new_figure(1, len(logged) + max(len(panels), 1))
    for axis, panel in zip(axes.flat, logged, strict=False):
        for index, label in enumerate(data.labels()):
            values = [found.get((panel, label, name), [np.nan]) for name in ("td_loss", "gradient_norm", "entropy")]
            axis.bar(np.arange(3) + 0.25 * index, [np.mean(v) for v in values], 0.25, label=label)
            for place, seeds in enumerate(values):
                axis.plot([place + 0.25 * index] * len(seeds), seeds, "k.", markersize=3)
        axis.set_xticks(np.arange(3) + 0.25, ["TD loss", "gradient norm", "entropy"])
        axis.set_title(textwrap.fill(f"{panel}: sigma / mu over tasks (dots: seeds)", 36), fontsize=10)
    for axis, panel in zip(axes.flat[len(logged) :], panels, strict=False):
        draw_bars(axis, table[table["panel"] == panel], panel, labels=data.labels())
    spread = [{"panel": panel, "label": f"{label}: sigma/mu of {name}", "seeds": len(seeds), "mean": np.mean(seeds)}
              for (panel, label, name), seeds in found.items()]  # fmt: skip
    return figure, pd.concat([table, pd.DataFrame(spread)], ignore_index=True)


def logarithmic(axis) -> None:
    """A logarithmic axis of counts: 20k, 50k, 100k."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(EngFormatter(places=0, sep=""))
    axis.set_minor_formatter(NullFormatter())


def draw_scaling(axis, table: pd.DataFrame, title: str, ylabel: str = "final score", labels: list[str] = ()) -> None:
    """Lines over parameters; `table` has label, parameters, mean and bounds. labels: as of draw_bars."""
    labels = list(labels) or list(table["label"].unique())
    for label, rows in table.groupby("label", sort=False):
        rows = rows.sort_values("x")
        axis.errorbar(rows["parameters"], rows["mean"], error_bars(rows), label=label, marker="o", capsize=3,
                      color=f"C{labels.index(label)}")  # fmt: skip
    axis.set_xscale("log")
    logarithmic(axis.xaxis)
    axis.set_xlabel("parameters of critics and targets")
    axis.set_ylabel(ylabel)
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)


def scaling(data: Data):
    """Figure 4: final score over model size."""
    table = with_published(data, summarize(data, data.final))
    panels = [panel for panel in data.panels() if panel in set(table["panel"])]
    figure, axes = new_figure(1, max(len(panels), 1), 4.6, sharey=True)
    for axis, panel in zip(axes.flat, panels, strict=False):
        shown = table[table["panel"] == panel]
        for row in shown[shown["x"].isna()].itertuples():
            axis.axhline(row.mean, linestyle="--", color="gray", linewidth=1)
            axis.annotate(row.label, (0.02, row.mean), xycoords=("axes fraction", "data"), fontsize=6, va="bottom")
        draw_scaling(axis, shown[shown["x"].notna()], panel, labels=data.labels())
    return figure, table


def conflicts(data: Data):
    """Figure 5: final score over model size, and how often the critic gradients of two tasks conflict."""
    table = summarize(data, data.final)
    rates = defaultdict(list)
    for run, arrays in data.statistics():
        if np.isfinite(rate := scores.conflicts(arrays)):
            rates[run.label, run.x].append(rate)
    sizes = {(row.label, row.x): row.parameters for row in table.itertuples()}
    rows = []
    for (label, x), values in rates.items():
        mean, low, high = scores.interval(np.array(values)[:, None], lambda v: v.mean((0, 1))[None], data.reps)
        rows.append({"panel": "conflicting gradients", "label": label, "x": x, "parameters": sizes.get((label, x)),
                     "seeds": len(values), "mean": mean[0], "mean_low": low[0], "mean_high": high[0]})  # fmt: skip
    rate_table = pd.DataFrame(rows, columns=["panel", "label", "x", "parameters", "seeds", *STATISTIC_COLUMNS[:3]])
    figure, axes = new_figure(1, 2, 4.6)
    draw_scaling(axes[0, 0], table, "performance", labels=data.labels())
    axis, title = axes[0, 1], "gradient conflicts (multi-task)"
    draw_scaling(axis, rate_table, title, "task pairs with negative cosine", data.labels())
    tables = [part for part in (table.assign(panel="final score"), rate_table) if len(part)]
    return figure, pd.concat(tables, ignore_index=True) if tables else table


def shapley(data: Data):
    """Figure 6: all combinations of components, and what each contributes (exact Shapley values)."""
    table = summarize(data, data.final, ("panel", "label"))
    players = ["SQ", "CE", "TE"]
    figure, axes = new_figure(1, 2, 4.6)
    draw_bars(axes[0, 0], table, "combinations")
    matrices = {
        frozenset(label.split(" + ")) - {"none"}: scores.score_matrix(data.final[data.final["label"] == label])[0]
        for label in table["label"]
    }
    if len(matrices) < 2 ** len(players):
        data.notes.append(f"no Shapley values: {2 ** len(players) - len(matrices)} of 8 combinations are missing")
        return figure, table
    seeds, tasks = (min(matrix.shape[axis] for matrix in matrices.values()) for axis in (0, 1))
    stacked = np.concatenate([matrix[:seeds, :tasks] for matrix in matrices.values()], axis=1)  # strata: all of them

    def values(sample: np.ndarray) -> np.ndarray:
        means = sample.reshape(len(sample), len(matrices), tasks).mean((0, 2))
        return np.array(list(scores.shapley_values(dict(zip(matrices, means, strict=True)), players).values()))

    point, low, high = scores.interval(stacked, values, data.reps)
    share = point / point.sum() if (point >= 0).all() and point.any() else np.full(len(players), np.nan)
    rows = pd.DataFrame({"panel": "Shapley value", "label": players, "tasks": tasks, "seeds": seeds, "mean": point,
                         "mean_low": low, "mean_high": high, "share": share})  # fmt: skip
    labels = [p if np.isnan(s) else f"{p} ({s:.0%})" for p, s in zip(players, share, strict=True)]
    draw_bars(axes[0, 1], rows.assign(label=labels), "Shapley values (share of the improvement)")
    axes[0, 1].axhline(0, color="black", linewidth=0.8)
    return figure, pd.concat([table, rows], ignore_index=True)


def principal_components(data: Data):
    """Figure 7: first two principal components of the task embeddings [tasks, 32], a panel per seed."""
    found = [(run, arrays) for run, arrays in data.statistics() if "embedding" in arrays]
    figure, axes = new_figure(1, max(len(found), 1), 4.8, 4.2)
    tables = []
    for axis, (run, arrays) in zip(axes.flat, found, strict=False):
        centered = arrays["embedding"] - arrays["embedding"].mean(0)
        left, singular, _ = np.linalg.svd(centered, full_matrices=False)
        points, explained = left[:, :2] * singular[:2], singular**2 / max((singular**2).sum(), 1e-30)
        tasks = [str(task) for task in arrays["task"]]
        groups = ["metaworld" if t.startswith("metaworld") else t.split("-")[0] for t in tasks]  # one robot or body
        for index, group in enumerate(dict.fromkeys(groups)):
            chosen = np.array([g == group for g in groups])
            axis.scatter(*points[chosen].T, label=group, color=plt.get_cmap("tab20")(index % 20), s=30)
        if len(tasks) <= 20:
            for task, point in zip(tasks, points, strict=True):
                axis.annotate(task.partition("/")[2], point, fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.margins(0.25)
        axis.set_xlabel(f"component 1 ({explained[0]:.0%} of the variance)")
        axis.set_ylabel(f"component 2 ({explained[1]:.0%})")
        axis.set_title(f"seed {run.seed}", fontsize=10)
        tables.append(pd.DataFrame({"seed": run.seed, "task": tasks, "component_1": points[:, 0],
                                    "component_2": points[:, 1]}))  # fmt: skip
    return figure, pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def curves(data: Data, updates: bool = False):
    """Figures 16 and 9: mean score over steps, a panel per benchmark; Figure 9 also over gradient steps."""
    rows = data.table[data.table["label"] != "pretraining"]
    panels = [panel for panel in data.panels() if panel in set(rows["panel"])]
    figure, axes = new_figure(1, max(len(panels), 1) * (1 + updates), 4.4, sharey=updates)
    for axis, panel in zip(axes.flat, panels, strict=False):
        here = rows[rows["panel"] == panel]
        ours = {}
        for label in data.labels(panel):
            rows_of_label = here[here["label"] == label]
            lacks = incomplete(rows_of_label, len(data.planned(panel, label)))
            if lacks and len(rows_of_label):
                data.notes.append(f"{panel} {label}: no mean curve, {lacks}")
            elif not lacks:
                ours[label] = scores.mean_curve(rows_of_label, data.reps)
        curve_axes(data, axis, panel, ours, data.planned(panel), "score")
        axis.set_title(panel, fontsize=10)
        axis.set_ylabel("score")
        if updates:
            axis = axes[0, -1]
            for label, curve in ours.items():
                # all agents of a seed together: single-task ones update once per task
                per_seed = here[here["label"] == label].drop_duplicates(["run", "step"]).groupby(["step", "seed"])
                total = per_seed["updates"].sum().groupby("step").max()
                curve = curve[curve["step"].map(total) > 0]
                if len(curve):
                    draw_line(axis, curve["step"].map(total), curve, label, data.color(label), marker=".")
            axis.set_xlabel("gradient steps for all tasks together", fontsize=8)
            axis.set_xscale("log")
            logarithmic(axis.xaxis)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
    table = summarize(data, data.final[data.final["label"] != "pretraining"], ("panel", "label"))
    return figure, with_published(data, table)


def per_task(data: Data):
    """Figures 17-23: unnormalized curves of every task, success rate or return."""
    rows = data.table[data.table["label"] != "pretraining"]
    tasks = list(dict.fromkeys(t for r in data.runs if r.label != "pretraining" for t in r.tasks(data.scale)))
    columns = min(len(tasks), 5)
    figure, axes = new_figure(-(-len(tasks) // columns), columns, 2.8, 2.3)
    out = []
    for axis, task in zip(axes.flat, tasks, strict=False):
        here = rows[rows["task"] == task]
        value = "success" if task.startswith(("metaworld/", "shadowhand/")) else "return"
        labels = [label for label in data.labels() if label != "pretraining"]
        ours = {label: scores.mean_curve(here[here["label"] == label], data.reps, value) for label in labels}
        panel = next(run.panel for run in data.runs if task in run.tasks(data.scale))
        curve_axes(data, axis, panel, ours, [task], value)
        axis.set_title(task, fontsize=8)
        for label, curve in ours.items():
            if len(curve):
                last = curve.iloc[-1]
                out.append({"task": task, "label": label, "step": int(last["step"]), "seeds": int(last["seeds"]),
                            "value": value, "mean": last["mean"], "mean_low": last["low"],
                            "mean_high": last["high"]})  # fmt: skip
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    return figure, pd.DataFrame(out)


def task_scaling(data: Data):
    """Figure 10: score on the three shared tasks and in transfer over size, for agents of 3, 6 and 9 tasks."""
    shared = list(data.scale.suites["hb-medium-3"].tasks)
    rows = data.final[(data.final["panel"] != "pretraining") | data.final["task"].isin(shared)]
    parts = [summarize(data, rows[rows["panel"] == "pretraining"], planned=shared),
             summarize(data, rows[rows["panel"] == "transfer"])]  # fmt: skip
    table = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    sizes = table.groupby("x")["parameters"].transform("mean")  # of a transfer run: those of its width
    table["parameters"] = table["parameters"].fillna(sizes)
    figure, axes = new_figure(1, 2, 4.6, sharey=True)
    for axis, panel, title in zip(axes.flat, ("pretraining", "transfer"), (f"{len(shared)} shared tasks", "transfer"),
                                  strict=True):  # fmt: skip
        draw_scaling(axis, table[table["panel"] == panel], title, labels=data.labels())
    return figure, table


def read_embedding_runs(data: Data, file: str) -> pd.DataFrame:
    """embedding.csv or heatmap.csv of all runs of embedding transfer, with their seeds."""
    tables = []
    for run in data.runs:
        if "embedding" not in run.argv or not (data.root / run.name).is_dir():
            continue
        table, problem = scores.read_table(data.root / run.name / file, scores.EMBEDDING_COLUMNS)
        if problem:
            data.notes.append(f"{run.name}: {problem}")
        if len(table):
            tables.append(table.assign(seed=run.seed))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def protocols(data: Data):
    """Figure 11: curves of model and data transfer over all tasks, and embedding transfer."""
    rows = data.table[~data.table["label"].isin(["pretraining", "embedding transfer"])]
    rows = rows[rows["step"] <= data.scale.data_transfer_steps]
    figure, axes = new_figure(1, 2, 4.6)
    out = []
    for label in (label for label in data.labels() if label in set(rows["label"])):
        here = rows[rows["label"] == label]
        here = here.assign(task=here["panel"] + " " + here["task"])
        planned = sum(len(data.planned(panel, label)) for panel in data.panels())
        if lacks := incomplete(here, planned):
            data.notes.append(f"{label}: no mean curve, {lacks}")
            continue
        curve = scores.mean_curve(here, data.reps)
        if len(curve):
            draw_line(axes[0, 0], curve["step"], curve, label, data.color(label), marker=".")
            last = curve.iloc[-1]
            out.append({"panel": "curves", "label": label, "step": int(last["step"]), "seeds": int(last["seeds"]),
                        "mean": last["mean"], "mean_low": last["low"], "mean_high": last["high"]})  # fmt: skip
    axes[0, 0].set_xlabel("environment steps per task")
    axes[0, 0].set_ylabel("score")
    axes[0, 0].grid(alpha=0.3)
    embeddings = read_embedding_runs(data, "embedding.csv")
    for method, found in embeddings.groupby("method", sort=False) if len(embeddings) else ():
        found = found.rename(columns={"target": "task"})
        matrix, tasks = scores.score_matrix(found)
        if lacks := incomplete(found, len(data.planned("embedding", "embedding transfer"))):
            data.notes.append(f"embedding transfer, {method}: no mean, {lacks}")
        elif tasks:
            out.append({"panel": "embedding transfer", "label": method, **scores.summary(matrix, data.reps)})
    table = pd.DataFrame(out)
    if out:
        shown = table[table["panel"] == "embedding transfer"]
        if len(shown):
            draw_bars(axes[0, 1], shown, "embedding transfer, nothing else learned")
    return figure, table


def heatmap(data: Data):
    """Figure 24: score of every pretrained embedding on every new task, mean over seeds."""
    table = read_embedding_runs(data, "heatmap.csv")
    figure, axes = new_figure(1, 1, 6, 5)
    if not len(table):
        return figure, table
    table["score"] = table["score"].fillna(table["return"])
    matrix = table.groupby(["embedding", "target"], sort=False)["score"].mean().unstack("target")
    figure.set_size_inches(3 + 0.5 * matrix.shape[1], 2 + 0.3 * matrix.shape[0])
    image = axes[0, 0].imshow(matrix, cmap="viridis", aspect="auto")
    axes[0, 0].set_xticks(range(matrix.shape[1]), matrix.columns, rotation=40, ha="right", fontsize=8)
    axes[0, 0].set_yticks(range(matrix.shape[0]), matrix.index, fontsize=8)
    if matrix.size <= 200:
        for (i, j), value in np.ndenumerate(matrix.to_numpy()):
            axes[0, 0].text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white")
    axes[0, 0].set_xlabel("new task")
    axes[0, 0].set_ylabel("pretrained embedding")
    figure.colorbar(image, label=f"score ({table['seed'].nunique()} seeds)")
    return figure, matrix.reset_index()


def offline(data: Data):
    """Figure 12: offline against online; steps until a share of TD-MPC2's final score (without --reference: of our best
    final score) over parameters, with a line fitted in logarithms."""
    final = data.final
    table = summarize(data, final)
    hours = final.drop_duplicates(["label", "x", "run"]).groupby(["label", "x"])["wall_time"].mean() / 3600
    table["hours"] = [hours.get((row.label, row.x), np.nan) for row in table.itertuples()]
    figure, axes = new_figure(1, 2, 4.6)
    labels = [f"{row.label} {row.x:.0f}, {row.hours:.2g}\u00a0h" for row in table.itertuples()]
    draw_bars(axes[0, 0], table.assign(label=labels), "final score, critic width, hours")
    published = published_summary(data, "", data.planned(""))
    goals = {row.label: row.mean for row in published.itertuples() if "tdmpc2" in row.label}
    if not goals and len(table):
        goals = {"our best final score": table["mean"].max()}
    rows = []
    for goal, score in goals.items():
        for share in (0.5, 0.75, 1.0):
            for x, here in data.table[data.table["label"].str.contains("online")].groupby("x"):
                curve = scores.mean_curve(here, 1)
                reached = curve[(curve["mean"] >= share * score) & (curve["step"] > 0)]  # the axes are logarithmic
                rows.append({"panel": f"steps to {share:.0%} of {goal}", "label": "BRC* (online)", "x": x,
                             "parameters": here["parameters"].mean(),
                             "step": reached["step"].min() if len(reached) else np.nan})  # fmt: skip
    steps = pd.DataFrame(rows, columns=["panel", "label", "x", "parameters", "step"]).dropna(subset=["step"])
    for index, (panel, here) in enumerate(steps.groupby("panel", sort=False)):
        axes[0, 1].loglog(here["parameters"], here["step"], "o", color=f"C{index}", label=panel)
        if len(here) > 1:
            slope, offset = np.polyfit(np.log(here["parameters"]), np.log(here["step"].astype(float)), 1)
            ends = here["parameters"].agg(["min", "max"]).to_numpy()
            axes[0, 1].loglog(ends, np.exp(offset) * ends**slope, color=f"C{index}", linewidth=1)
    logarithmic(axes[0, 1].xaxis)
    axes[0, 1].set_xlabel("parameters of critics and targets")
    axes[0, 1].set_ylabel("environment steps per task")
    return figure, pd.concat([part for part in (table, steps) if len(part)] or [table], ignore_index=True)


def model_sizes(data: Data):
    """Table 1: parameters of critics and targets at each width."""
    rows = []
    for run in data.runs:
        information, problem = scores.read_information(data.root / run.name)
        if problem:
            data.notes.append(f"{run.name}: {problem}")
            continue
        rows.append({"width": int(run.x), "blocks": information["critic_depth"],
                     "parameters": int(scores.critic_parameters(information))})  # fmt: skip
    return None, pd.DataFrame(rows)


def humanoid_scores(data: Data):
    """Table 2, as printed, with the script's own constants and whether the task was built here."""
    table = pd.read_csv(PAPER_TABLES / "table2.csv")
    built = set()
    for run in data.runs:
        information, problem = scores.read_information(data.root / run.name)
        if problem:
            data.notes.append(f"{run.name}: {problem}")
        built |= set(information.get("env_info", {}).get("task_names", ()))
    ours = [scores.sac.HUMANOIDBENCH.get(task.partition("/")[2], (np.nan, np.nan)) for task in table["task"]]
    table["script_random"], table["script_optimal"] = zip(*ours, strict=True)
    table["built"] = table["task"].isin(built)
    return None, table if built else table[:0]


def atari_table() -> pd.DataFrame:
    """Table 5 with its games as tasks (index), without the line of means."""
    table = pd.read_csv(PAPER_TABLES / "table5.csv")
    names = {name.lower(): f"atari/{task}" for task, (name, _, _) in scores.drq.ATARI.items()}
    table.index = [names.get(game.lower(), "mean") for game in table["game"]]
    return table.drop(index="mean").drop(columns="game")


def atari(data: Data):
    """Table 5: returns of every game, and mean human-normalized scores over the games that our runs finished."""
    table = atari_table()
    games = [task for task in table.index if task in set(data.final["task"])]
    table = table.loc[games]
    paper = {c: np.mean([scores.normalized_score(g, v) for g, v in table[c].items()]) for c in table if games}
    printed = [{"panel": "Table 5", "label": f"{name} (paper)", "mean": mean} for name, mean in paper.items()]
    for label in data.labels():
        here = data.final[data.final["label"] == label]
        table[f"{label} (ours, {data.scale.name})"] = here.groupby("task")["return"].mean().reindex(games)
    ours = summarize(data, data.final, ("panel", "label")).assign(panel="Table 5")
    shown = pd.concat([part for part in (pd.DataFrame(printed), ours) if len(part)] or [ours], ignore_index=True)
    figure, axes = new_figure(1, 1, 6)
    if len(shown):
        shown = shown.reindex(columns=[*shown.columns, *(c for c in STATISTIC_COLUMNS[:3] if c not in shown)])
        shown["label"] = [f"{row.label} {data.scale.name}" if "(paper)" not in row.label else row.label
                          for row in shown.itertuples()]  # fmt: skip
        draw_bars(axes[0, 0], shown, f"{len(games)} games", "human-normalized score")
    means = {c: paper.get(c, np.nan) for c in table}
    means |= {f"{row.label} (ours, {data.scale.name})": row.mean for row in ours.itertuples()}
    table.loc[f"mean human-normalized score, {len(games)} games"] = means
    return figure, table.reset_index(names="game") if games else pd.DataFrame()


DRAW = {
    "figure1": bars, "figure2": halfway, "figure3": stability, "figure4": scaling, "figure5": conflicts,
    "figure6": shapley, "figure7": principal_components, "figure9": partial(curves, updates=True),
    "figure10": task_scaling, "figure11": protocols, "figure12": offline, "figure16": curves,
    **{f"figure{number}": per_task for number in range(17, 24)}, "figure24": heatmap,
    "table1": model_sizes, "table2": humanoid_scores, "table5": atari,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- writing


def markdown(table: pd.DataFrame) -> str:
    """A table in GitHub's Markdown; empty cells for missing numbers."""

    def cell(value) -> str:
        if not isinstance(value, float | np.floating):
            return str(value)
        if np.isnan(value):
            return ""
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    lines = ["| " + " | ".join(table.columns) + " |", "| " + " | ".join("---" for _ in table.columns) + " |"]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines) + "\n"


def save_picture(figure, path: Path, **options) -> None:
    """Whole or not at all: a full disk leaves the one before."""
    partial_path = path.with_name(f".partial-{path.name}")
    try:
        figure.savefig(partial_path, dpi=130, **options)
        partial_path.replace(path)
    except OSError:
        partial_path.unlink(missing_ok=True)
        raise


def plot_experiment(name: str, scale: Scale, args: Args, reference: pd.DataFrame) -> bool:
    """Writes one figure or table at one scale; says what is missing. False if there was nothing to plot."""
    runs = EXPERIMENTS[name].runs(scale)
    table, notes = scores.collect(runs, args.runs)
    data = Data(runs, scale, args.runs, table, reference, args.reps, notes)
    figure, table = DRAW[name](data)
    for note in dict.fromkeys(data.notes):
        print(f"{name} ({scale.name} scale): {note}", file=sys.stderr)
    if not len(table):
        command = f"python benchmark/launch.py {name} --scale {scale.name} --run-root {args.runs}"
        print(f"{name} ({scale.name} scale): nothing to plot in {args.runs}; to make its runs: {command}",
              file=sys.stderr)  # fmt: skip
        plt.close("all")
        return False
    directory = args.out or Path("plots")
    directory.mkdir(parents=True, exist_ok=True)
    stem, written = directory / f"{name}-{scale.name}", []
    title = f"{EXPERIMENTS[name].title}: {scale.name} scale"
    ours = table[table["source"] != "published"] if "source" in table else table
    if "seeds" in ours and ours["seeds"].notna().any():
        least, most = int(ours["seeds"].min()), int(ours["seeds"].max())
        title += f", {least if least == most else f'{least}-{most}'} seeds"
    for unit in ("steps", "updates"):
        if lengths := {run.length for run in runs if run.length and run.length_unit == unit}:
            title += f", {' / '.join(f'{length:,}' for length in sorted(lengths))} {unit}"
    if figure:
        figure.suptitle(textwrap.fill(title, int(figure.get_figwidth() * 13)), fontsize=10)
        entries = [axis.get_legend_handles_labels() for axis in figure.axes]
        handles = {label: handle for entry in entries for handle, label in zip(*entry, strict=True)}
        if handles:  # one legend for all panels, under them, where it covers nothing
            columns = max(1, int(figure.get_figwidth() / 2))
            figure.legend(handles.values(), handles.keys(), fontsize=7, loc="outside lower center", ncols=columns)
        for suffix in (".png", ".pdf"):
            save_picture(figure, Path(f"{stem}{suffix}"))
            written.append(f"{stem}{suffix}")
        plt.close("all")
    table = table.drop(columns=[c for c in table if table[c].isna().all() or (table[c] == "").all()])
    table.insert(0, "scale", scale.name)
    table.to_csv(f"{stem}.csv", index=False, float_format="%.6g", lineterminator="\n")
    missing = "".join(f"\n- {note}" for note in dict.fromkeys(data.notes))
    Path(f"{stem}.md").write_text(f"{title}\n\n{markdown(table)}" + (f"\nMissing:\n{missing}\n" if missing else ""))
    print(f"wrote {', '.join([*written, f'{stem}.csv', f'{stem}.md'])}")
    return True


# ----------------------------------------------------------------------------------------- curves of any runs


def score_name(tasks: list[str]) -> str:
    """What their score is (E.3)."""
    names = {"dmc": "return / 1000", "metaworld": "success", "shadowhand": "success",
             "atari": "human-normalized score", "humanoidbench": "normalized score"}  # fmt: skip
    found = {names.get(task.partition("/")[0], "score") for task in tasks}
    return found.pop() if len(found) == 1 else "score"


def read_run(directory: Path) -> tuple[str, int, dict[str, list[tuple[int, float]]], str, set[str]]:
    """A run's group, its seed, per task its (step, score) points (where a task has no score, its return), what its
    steps are, and which tasks have a score."""
    args, damage = scores.read_information(directory)
    if damage:
        raise ValueError(damage)
    table, problem = scores.read_evaluations(directory)
    if table.empty:
        raise ValueError(problem or "eval.csv has no rows")
    if problem:
        print(f"{directory}: {problem}", file=sys.stderr)
    group = json.dumps({k: v for k, v in args.items() if k not in NOT_PART_OF_GROUP}, sort_keys=True)
    values = table["score"].fillna(table["return"])
    curves = defaultdict(list)
    for task, step, value in zip(table["task"], table["step"], values, strict=True):
        curves[task].append((step, value))
    unit, scored = "updates" if "total_updates" in args else "steps", set(table["task"][table["score"].notna()])
    return group, args.get("seed"), dict(curves), unit, scored


def plot_runs(directories: list[Path], out: Path, labels: tuple[str, ...], references: tuple[Path, ...]) -> int:
    """A panel per task and one of the mean over the tasks that have a score (if none has: of the returns), seeds as
    thin lines, their mean as a thick one.

    Groups of the same label are one: what single-task runs of a seed learned, each a task, counts as one run. Agents
    that were published on all tasks of the runs are groups, too, as far as the longest run goes.
    """
    names, groups, units, with_score = {}, defaultdict(list), set(), set()
    for directory in directories:
        try:
            group, seed, curves, unit, found = read_run(directory)
        except (OSError, ValueError) as error:
            print(f"left out {directory}: {error}", file=sys.stderr)
            continue
        units.add(unit)
        with_score |= found
        names.setdefault(group, labels[len(names)] if len(names) < len(labels) else f"group {len(names) + 1}")
        for other_seed, others in groups[names[group]]:
            if other_seed == seed and not set(others) & set(curves):
                others |= curves
                break
        else:
            if any(other_seed == seed for other_seed, _ in groups[names[group]]):
                print(f"{directory}: {names[group]} has another run of seed {seed}; both count", file=sys.stderr)
            groups[names[group]].append((seed, curves))
    if not groups:
        return fail("no run could be read")
    unit = "updates" if units == {"updates"} else "steps"
    tasks = list(dict.fromkeys(task for runs in groups.values() for _, curves in runs for task in curves))
    ours = [curves for runs in groups.values() for _, curves in runs]
    end = max(step for curves in ours for points in curves.values() for step, _ in points)
    reference = read_references(references, tasks)
    published = published_on(reference[reference["step"] <= end], tasks)
    if references and not published:
        print("--reference: no agent was published on all tasks of these runs, so there is no curve", file=sys.stderr)
    for agent, rows in published.items():
        for seed, part in rows.groupby("seed"):
            part = part.assign(score=part["score"].fillna(part["value"]))
            curves = {task: list(zip(r["step"], r["score"], strict=True)) for task, r in part.groupby("task")}
            groups[agent].append((seed, curves))
    scored = [task for task in tasks if task in with_score]
    averaged = scored or tasks
    others = [task for task in tasks if task not in averaged]  # a return in the hundreds would drown every score
    panels = [*tasks, "mean"] if len(averaged) > 1 else tasks
    if others and panels != tasks:
        print(f"mean: tasks without a score are left out: {', '.join(others)}", file=sys.stderr)
    columns = min(len(panels), 5)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.3 * rows), squeeze=False, sharey=not others)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for index, (label, runs) in enumerate(groups.items()):
            lines = []
            for seed, curves in runs:
                wanted = averaged if panel == "mean" else [panel]
                found = [dict(curves[task]) for task in wanted if task in curves]
                if len(found) < len(wanted):
                    if panel == "mean":
                        lacks = f"it has {len(found)} of {len(averaged)} tasks"
                        print(f"mean: {label}, seed {seed} is left out: {lacks}", file=sys.stderr)
                    continue
                steps = sorted(set.intersection(*map(set, found)))  # where all of its tasks were evaluated
                lines.append({step: np.mean([points[step] for points in found]) for step in steps})
                axis.plot(np.array(steps) / 1e3, list(lines[-1].values()), color=f"C{index}", linewidth=0.7, alpha=0.5)
            if not lines:
                continue
            shared = sorted(set.intersection(*map(set, lines)))
            beyond = max(max(line, default=0) for line in lines)
            if len(shared) < max(map(len, lines)):
                until = f"to step {shared[-1]:,} of {beyond:,}" if shared else "no step in common"
                print(f"{panel}: {label}, mean of steps that all {len(lines)} seeds have, {until}", file=sys.stderr)
            mean = [np.mean([line[step] for line in lines]) for step in shared]
            style = {"color": f"C{index}", "linewidth": 2.2, "linestyle": "--" if label in published else "-"}
            style["marker"] = "D" if len(shared) == 1 else "." if len(shared) < 10 else None
            label = f"{label} ({len(lines)} seed{'s' * (len(lines) > 1)})"
            axis.plot(np.array(shared) / 1e3, mean, label=label, **style)
        of_some = panel == "mean" and others
        axis.set_title(f"mean of {len(averaged)} scores" if of_some else panel, fontsize=9)
        if others:
            axis.set_ylabel("return" if panel in others else score_name(scored), fontsize=8)
        axis.set_xlabel(f"thousand {unit}", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    if not others:
        axes[0, 0].set_ylabel(score_name(tasks) if scored else "return", fontsize=8)
    legend = {}  # by color: what has no mean over all tasks is named by its own panel, the rest by the last one
    for axis in axes.flat:
        legend |= {line.get_color(): (line, name) for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    lines, names = zip(*(legend[color] for color in sorted(legend, key=lambda color: int(color[1:]))), strict=True)
    figure.legend(lines, names, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    save_picture(figure, out, bbox_inches="tight")
    print(f"wrote {out}")
    return 0


# ------------------------------------------------------------------------------------------------------------ main


def read_references(paths: tuple[Path, ...], tasks: list[str]) -> pd.DataFrame:
    """All published curves as one table; says what is wrong with them. Raises BadReference, also for a file that has
    none of the tasks that are plotted."""
    references = [scores.read_reference(path) for path in paths]
    for path, (table, problem) in zip(paths, references, strict=True):
        if not table["task"].isin(tasks).any():
            found = ", ".join(map(str, table["task"].unique()[:3])) or "none"
            raise scores.BadReference(f"--reference {path}: no task to plot, such as {tasks[0]}; it has {found}")
        if problem:
            print(problem, file=sys.stderr)
    nothing = pd.DataFrame(columns=["agent", "task", "seed", "step", "value", "score"])
    return pd.concat([table for table, _ in references] or [nothing], ignore_index=True)


def main(args: Args) -> int:
    try:
        return plot(args)
    except scores.BadReference as error:
        return fail(str(error))
    except OSError as error:  # of writing: what reading meets is told where it is read
        where = error.filename or args.out or "plots"
        return fail(f"cannot write {where}: {error.strerror}; choose another --out")


def plot(args: Args) -> int:
    experiments = [name for name in args.what if name in EXPERIMENTS]
    if not args.what:
        return fail(f"nothing to plot: give run directories or experiments: {', '.join(EXPERIMENTS)}")
    if not experiments:
        if unknown := [name for name in args.what if not Path(name).exists()]:
            return fail(f"'{unknown[0]}' is neither a run directory nor an experiment: {', '.join(EXPERIMENTS)}")
        out = args.out or Path("curves.png")
        if out.suffix[1:] not in plt.figure().canvas.get_supported_filetypes():
            return fail(f"--out {out}: for run directories give a picture, such as curves.png")
        return plot_runs([Path(name) for name in args.what], out, args.labels, args.reference)
    if rest := [name for name in args.what if name not in EXPERIMENTS]:
        return fail(f"'{rest[0]}' is no experiment: {', '.join(EXPERIMENTS)}; experiments read --runs DIRECTORY")
    if not args.runs.is_dir():
        return fail(f"--runs {args.runs}: no such directory")
    if args.reps < 1:
        return fail("--reps: must be at least 1")
    if args.out and args.out.exists() and not args.out.is_dir():
        return fail(f"--out {args.out}: for experiments give a directory")
    found = [name for name in SCALES if any(args.runs.glob(f"{name}-*"))] or ["laptop"]
    scales = [SCALES[name] for name in ([args.scale] if args.scale else found)]
    runs = [(run, scale) for name in experiments for scale in scales for run in EXPERIMENTS[name].runs(scale)]
    reference = read_references(args.reference, list(dict.fromkeys(t for run, scale in runs for t in run.tasks(scale))))
    plotted = [plot_experiment(name, scale, args, reference) for name in experiments for scale in scales]
    return 0 if any(plotted) else 1


if __name__ == "__main__":
    exit_with(lambda: main(tyro.cli(Args, description=__doc__)))
