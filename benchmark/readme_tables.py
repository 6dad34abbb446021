"""Prints the result tables of README and benchmark/results/README.md from its small files, as Markdown.

  python benchmark/readme_tables.py > benchmark/results/tables.md

A test compares every row with these pages, so that a number there cannot differ from its runs.
"""

import csv
import json
from functools import partial
from pathlib import Path

import claims
import numpy as np
from launch import exit_with
from scipy.stats import ttest_ind, ttest_rel

RESULTS = Path(__file__).resolve().parent / "results"


def evaluations(run: Path) -> list[dict]:
    with (run / "eval.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def mean_of(run: Path, column: str, steps=None, task: str = "") -> float:
    """Mean of a column over tasks and the given steps (default: the run's planned end); task: those whose name ends so.
    Raises ValueError unless every task was evaluated at each of them, with a finite value."""
    rows = [row for row in evaluations(run) if row["task"].endswith(task)]
    wanted = {json.loads((run / "args.json").read_text())["total_timesteps"]} if steps is None else set(steps)
    values = [float(row[column]) for row in rows if int(row["step"]) in wanted]
    if len(values) < len(wanted) * len({row["task"] for row in rows}) or not np.isfinite(values).all():
        raise ValueError(f"{run}: no finite {column} of every task at steps {sorted(wanted)}")
    return float(np.mean(values))


def short(value: float) -> str:
    """.57 of 0.5723."""
    return f"{value:.2f}".removeprefix("0")


def with_interval(more, less, paired: bool, digits: int = 3) -> str:
    """Mean difference and its 95% interval: paired t or Welch's."""
    test = ttest_rel(more, less) if paired else ttest_ind(more, less, equal_var=False)
    numbers = np.mean(more) - np.mean(less), *test.confidence_interval()
    return "{} ({} to {})".format(*(f"{number:+.{digits}f}" for number in numbers))


def first_command(folder: str, seeds: tuple[int, ...], steps: tuple[int, ...]) -> list[list[str]]:
    """Success of README's first command, a row per seed."""
    runs = {seed: RESULTS / folder / f"seed-{seed}" for seed in seeds}
    return [[str(seed), *(f"{mean_of(run, 'score', [step]):.3f}" for step in steps)] for seed, run in runs.items()]


def dmc4() -> list[list[str]]:
    """Returns of one agent on four DMC tasks at 100k steps."""
    run, tasks = RESULTS / "dmc4/seed-1", ("cartpole-swingup", "finger-spin", "reacher-easy", "walker-walk")
    values = [mean_of(run, "return", task=task) for task in tasks]
    return [["BRC, one agent for all four", *(f"{value:.0f}" for value in [*values, np.mean(values)])]]


def offline() -> list[list[str]]:
    """Success and return over the evaluations at 18k and 24k updates, mean of 3 seeds."""
    tasks, steps, rows = ("reach", "handle-press", "coffee-button"), (18000, 24000), []
    data = json.loads((RESULTS / "offline/bc-only__1/args.json").read_text())["data_mean_return"]
    per_task = [data[f"metaworld/{task}"] for task in tasks]
    rows.append(["the data", "", "", *(f"{value:.0f}" for value in [np.mean(per_task), *per_task])])
    labels = {
        "bc-only": "BC only",
        "no-bc": "offline BRC without BC (c = 0)",
        "mse-0.03": "BRC+BC, c = 0.03 (the default)",
        "mse-0.1": "BRC+BC, c = 0.1",
        "mse-0.3": "BRC+BC, c = 0.3",
        "mse-1": "BRC+BC, c = 1",
    }
    for name, label in labels.items():
        runs = [RESULTS / f"offline/{name}__{seed}" for seed in (1, 2, 3)]
        success = [mean_of(run, "success", steps) for run in runs]
        returns = [np.mean([mean_of(run, "return", steps, task) for run in runs]) for task in ("", *tasks)]
        cells = [" ".join(map(short, success)), short(np.mean(success)), *(f"{value:.0f}" for value in returns)]
        rows.append([label, *cells])
    run = RESULTS / "offline/online/pretrain6"
    for step, label in ((25000, "the online agent when the data end (25k steps, 10 episodes)"),
                        (50000, "the online agent at 50k steps")):  # fmt: skip
        success, returns = (
            [mean_of(run, column, [step], f"/{task}") for task in tasks] for column in ("success", "return")
        )
        rows.append([label, short(np.mean(success)), "",
                     *(f"{value:.0f}" for value in [np.mean(returns), *returns])])  # fmt: skip
    return rows


def success_from(path: Path, first_step: int) -> float:
    """Mean success over tasks and the evaluations from a step on, of an eval.csv or of a table with its columns."""
    with path.open(newline="") as file:
        return float(np.mean([float(row["success"]) for row in csv.DictReader(file) if int(row["step"]) >= first_step]))


def offline_fresh() -> list[list[str]]:
    """offline/fresh/README.md: mean success over the last 4k updates, by the averaged actor and by the actor itself."""
    rows = []
    for name, label in (("bc-only", "BC only"), ("no-bc", "c = 0"), ("mse-0.03", "c = 0.03 (the default)"),
                        ("mse-0.3", "c = 0.3")):  # fmt: skip
        runs = [RESULTS / f"offline/fresh/{name}__{seed}" for seed in range(11, 16)]
        cells = []
        for table in ("eval.csv", "actor.csv"):
            found = [success_from(run / table, 8500) for run in runs]
            cells += [" ".join(map(short, found)), f"{short(np.mean(found))} (sd {short(np.std(found, ddof=1))})"]
        rows.append([label, *cells])
    return rows


def averaged_actor() -> list[list[str]]:
    """Success of the averaged actor less that of the actor itself, with its 95% interval (paired t)."""
    rows = []
    for label, pattern, tables, first_step in (
        ("offline", "*__1[1-5]", ("eval.csv", "actor.csv"), 8500),
        ("online, 15k to 30k steps", "online-*", ("average.csv", "eval.csv"), 15000),
    ):
        runs = sorted((RESULTS / "offline/fresh").glob(pattern))
        by_average, by_actor = (np.array([success_from(run / table, first_step) for run in runs]) for table in tables)
        difference = with_interval(by_average, by_actor, paired=True)
        rows.append([label, str(len(runs)), short(np.mean(by_average)), short(np.mean(by_actor)), difference])
    return rows


def bfloat16() -> list[list[str]]:
    """README's first command in both formats, seeds 1 to 3: mean success over the evaluations from 15k steps on."""
    rows = []
    for label, folder in (("float32", "readme"), ("bfloat16", "bfloat16")):
        runs = [RESULTS / folder / f"seed-{seed}" for seed in (1, 2, 3)]
        found = [success_from(run / "eval.csv", 15000) for run in runs]
        at = [short(np.mean([mean_of(run, "success", [step]) for run in runs])) for step in (5000, 10000, 20000, 30000)]
        rows.append([label, *at, " ".join(map(short, found)), short(np.mean(found))])
    return rows


def selection() -> list[list[str]]:
    """transfer/selection.csv: value of the chosen embedding as a share of the best one's; by rule, family, budget."""
    with (RESULTS / "transfer/selection.csv").open(newline="") as file:
        trials = list(csv.DictReader(file))
    rows = []
    for experiment, rule, label in (
        ("1", "return", "success, then mean reward"),
        ("1", "halving", "successive halving"),
        ("1", "td", "TD(e) alone"),
        ("2", "return", "mean reward, real tasks anew"),
        ("2", "success, then return", "success, then mean reward, real tasks anew"),
        ("2", "td", "TD(e) alone, real tasks anew"),
        ("2", "success, then td", "success, then TD(e), real tasks anew"),
    ):
        cells = []
        for family in ("point8", "point85", "real"):
            for budget in ("75", "100", "300"):
                found = [t for t in trials if (t["experiment"], t["family"], t["budget"], t["rule"])
                         == (experiment, family, budget, rule)]  # fmt: skip
                chosen, best = (sum(float(t[column]) for t in found) for column in ("its_value", "best_value"))
                cells.append(short(chosen / best) if found else "")
        rows.append([label, *cells])
    return rows


NEW_TASKS = "reach-wall", "button-press-topdown-wall"


def embeddings(folder: str, seeds: tuple[int, ...]) -> dict[str, list[str]]:
    """Success with five embeddings on each new task, mean over seeds."""
    rows = {}
    for task in NEW_TASKS:
        found = {method: [] for method in ("selected", "tuned", "random", "mean", "oracle")}
        for seed in seeds:
            with (RESULTS / f"transfer/{folder}/embedding__{seed}/embedding.csv").open(newline="") as file:
                for row in csv.DictReader(file):
                    if row["target"] == f"metaworld/{task}":
                        found[row["method"]].append(float(row["success"]))
        rows[task] = [short(np.mean(values)) for values in found.values()]
    return rows


def transfer_before() -> list[list[str]]:
    """Success on two new tasks, mean of seeds 11 to 13: five embeddings, and the last evaluation of three learners."""
    rows, runs = [], RESULTS / "transfer/runs"
    for task, cells in embeddings("runs", (11, 12, 13)).items():
        for protocol in ("model", "data", "scratch"):
            learners = [runs / f"{task}-{protocol}__{seed}" for seed in (11, 12, 13)]
            found = [mean_of(run, "success") for run in learners if run.exists()]
            cells.append(short(np.mean(found)) if found else "")
        rows.append([f"`{task}`", *cells])
    return rows


def transfer() -> list[list[str]]:
    """transfer/README.md, seeds 21 to 23: success with five embeddings; of learners that of the last evaluation and the
    mean of all from step 1,000 on."""
    rows = [[f"`{task}`", *cells] for task, cells in embeddings("fresh", (21, 22, 23)).items()]
    labels = {
        "model": "`model`", "long-row": "`model`, longer embedding", "data": "`data`", "scratch": "`scratch`",
    }  # fmt: skip
    for task in NEW_TASKS:
        for protocol, label in labels.items():
            name = f"long-row-{task}-model" if protocol == "long-row" else f"{task}-{protocol}"
            runs = [RESULTS / f"transfer/fresh/{name}__{seed}" for seed in (21, 22, 23)]
            last = [mean_of(run, "success") for run in runs]
            all_of_them = [success_from(run / "eval.csv", 1000) for run in runs]
            cells = [[" ".join(map(short, found)), short(np.mean(found))] for found in (last, all_of_them)]
            rows.append([f"`{task}`", label, *cells[0], *cells[1]])
    return rows


def cloning_by_likelihood() -> list[list[str]]:
    """transfer/README.md, seeds 21 to 25: mean success over the last 4k updates, by the averaged actor."""
    rows, means = [], {}
    for name, label in (("mse", "`mse` (the default)"), ("nll", "`nll`")):
        runs = [RESULTS / f"offline/nll/{name}-0.03__{seed}" for seed in range(21, 26)]
        means[name] = found = [success_from(run / "eval.csv", 8500) for run in runs]
        mean = f"{short(np.mean(found))} (sd {short(np.std(found, ddof=1))})"
        rows.append([label, " ".join(map(short, found)), mean])
    difference = with_interval(means["nll"], means["mse"], paired=True, digits=2)
    return [*rows, ["`nll` less `mse`, paired", "", difference]]


VARIANTS = {  # set: seeds, last evaluations
    "mw4": (5, (6000, 8000, 10000)), "dmc4": (5, (8000, 12000, 16000)), "dogs": (3, (4000, 6000, 8000)),
}  # fmt: skip


def variants() -> list[list[str]]:
    """benchmark/results/variants/README.md: mean score of every run, and Welch's 95% interval of the difference."""
    rows = []
    for name, (seeds, steps) in VARIANTS.items():
        scores = [
            [mean_of(RESULTS / f"variants/runs/{name}-{variant}-{seed + 1}", "score", steps) for seed in range(seeds)]
            for variant in ("paper", "released-code")
        ]
        cells = [f"{np.mean(s):.3f} ({' '.join(map(short, s))})" for s in scores]
        rows.append([f"`{name}`", *cells, with_interval(*scores, paired=False)])
    return rows


def dmc4_beside_the_released_code() -> list[list[str]]:
    """Returns of one agent on four DMC tasks at 16k steps, beside the released code's, seeds 1 to 3."""
    rows, tasks = [], ("cartpole-swingup", "finger-spin", "reacher-easy", "walker-walk")
    for run, label in (("paper", "BRC, `--variant paper`"), ("released-code", "BRC, `--variant released-code`"),
                       ("theirs", "the released code")):  # fmt: skip
        runs = [RESULTS / f"variants/runs/dmc4-{run}-{seed}" for seed in (1, 2, 3)]
        found = [[mean_of(path, "return", [16000], task) for path in runs] for task in tasks]
        cells = [" ".join(f"{value:.0f}" for value in values) for values in found]
        rows.append([label, *cells, f"{np.mean(found):.0f}"])
    return rows


def finger_spin() -> list[list[str]]:
    """Return of a single-task agent on finger-spin, seeds 1 to 3, beside the released code's."""
    rows = []
    for run, label in (("paper", "BRC"), ("theirs", "the released code")):
        paths = [RESULTS / f"variants/runs/finger-{run}-{seed}" for seed in (1, 2, 3)]
        steps = (5000, 10000, 15000, 20000, 25000, 30000)
        found = [[mean_of(path, "return", [step], "finger-spin") for path in paths] for step in steps]
        rows.append([label, *(" ".join(f"{value:.0f}" for value in values) for values in found)])
    return rows


def laptop_beside_the_released_code() -> list[list[str]]:
    """laptop/README.md, seeds 1 to 5: mean score over the last three evaluations, and 95% intervals of the difference
    from the released code's, Welch's and paired by seed."""
    rows, steps = [], (10_000, 12_500, 15_000)
    labels = {"released": "the released code", "ours-variant": "ours, `--variant released-code`", "ours": "ours"}
    padded = {"padded": "ours, `--variant released-code`, padding counted as theirs"}
    for tasks, name, more in (("six", "six of Meta-World", {}), ("dmc", "four of DMC", padded)):
        theirs = None
        for agent, label in (labels | more).items():
            runs = f"laptop/beside/{tasks}-{agent}-"
            if (tasks, agent) == ("six", "ours"):
                runs = "laptop/runs/laptop-6-tasks-brc-128__19d68b__"
            values = [mean_of(RESULTS / f"{runs}{seed}", "score", steps) for seed in range(1, 6)]
            cells = [with_interval(values, theirs, paired, 2) if theirs else "" for paired in (False, True)]
            theirs = theirs or values
            rows.append([name, label, " ".join(map(short, values)), short(np.mean(values)), *cells])
    return rows


def laptop_claims() -> list[list[str]]:
    return claims.claims_table(RESULTS / "laptop/runs")


def fresh_seeds(runs: str) -> dict[int, float]:
    """Seeds 6 to 10 of a follow-up at laptop scale: mean score over tasks and the last three evaluations."""
    steps = (10_000, 12_500, 15_000)
    return {seed: mean_of(RESULTS / f"laptop/{runs}__{seed}", "score", steps) for seed in range(6, 11)}


def laptop_batch() -> list[list[str]]:
    """laptop/README.md: multi-task agents with batch 512, seeds 6 to 10, beside Figure 1's, seeds 1 to 5."""

    def score(label: str) -> dict[int, float]:
        return claims.per_seed(claims.runs_of("figure1", label), RESULTS / "laptop/runs", claims.mean_score(2 / 3, 1))

    brc, heads = fresh_seeds("batch/brc-512"), fresh_seeds("batch/mh-sac-512")
    comparisons = [
        ("BRC* with batch 512 beats BRC, one task each", brc, score("BRC")),
        ("BRC* with batch 512 beats BRC* with batch 128", brc, score("BRC*")),
        ("BRC* with batch 512 beats MH-SAC* with batch 512", brc, heads),
        ("MH-SAC* with batch 512 loses against SAC, one task each", score("SAC"), heads),
    ]
    return [claims.claim_row(1, *comparison) for comparison in comparisons]


def laptop_simba() -> list[list[str]]:
    """laptop/README.md: SimBa's lead over BroNet taken apart, width 128 but where said, seeds 6 to 10."""
    comparisons = [
        ("SimBa beats BroNet", "simba", "bronet"),
        ("BroNet gains by normalized observations", "bronet-normalized", "bronet"),
        ("SimBa gains by normalized observations", "simba", "simba-plain"),
        ("SimBa beats BroNet, both with normalized observations", "simba", "bronet-normalized"),
        ("SimBa beats BroNet, both without", "simba-plain", "bronet"),
        ("SimBa beats BroNet of width 256", "simba", "bronet-256"),
    ]
    return [claims.claim_row(4, claim, fresh_seeds(f"simba/{higher}"), fresh_seeds(f"simba/{lower}"))
            for claim, higher, lower in comparisons]  # fmt: skip


def atari_cpu() -> list[list[str]]:
    """Return of the last evaluation of two Atari games, seeds 1 to 3, its mean, and the mean human-normalized score."""
    rows = []
    for game in ("updown", "mspacman"):
        for agent, label in ((game, "alone"), ("both", "one agent of both")):
            runs = [RESULTS / f"atari/cpu/{agent}-{seed}" for seed in (1, 2, 3)]
            returns = [mean_of(run, "return", task=f"/{game}") for run in runs]
            score = np.mean([mean_of(run, "score", task=f"/{game}") for run in runs])
            cells = [" ".join(f"{value:.0f}" for value in returns), f"{np.mean(returns):.0f}", f"{score:.3f}"]
            rows.append([f"`{game}`, {label}", *cells])
    return rows


TABLES = {
    "first command": partial(first_command, "readme", (1, 2, 3, 4, 5), (0, 5000, 10000, 15000, 20000, 30000)),
    "first command, before": partial(
        first_command, "readme/before", (1, 2, 3), (0, 15000, 30000, 40000)
    ),
    "four DMC tasks": dmc4, "offline": offline, "transfer": transfer, "transfer, before": transfer_before,
    "variants": variants,
    "selection": selection, "bfloat16": bfloat16,
    "offline, fresh seeds": offline_fresh, "cloning by likelihood": cloning_by_likelihood,
    "averaged actor": averaged_actor, "Atari on a CPU": atari_cpu,
    "four DMC tasks beside the released code": dmc4_beside_the_released_code, "finger-spin": finger_spin,
    "laptop scale beside the released code": laptop_beside_the_released_code,
    "laptop scale, the paper's claims": laptop_claims, "laptop scale, batch 512": laptop_batch,
    "laptop scale, SimBa's lead": laptop_simba,
}  # fmt: skip


def row_text(cells: list[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def main() -> None:
    for name, table in TABLES.items():
        print(f"{name}\n")
        for cells in table():
            print(row_text(cells))
        print()


if __name__ == "__main__":
    exit_with(main)
