"""The paper's experiments as data: every figure and table is a list of runs, and a run is a command line of one script.

  EXPERIMENTS["figure4"].runs(SCALES["paper"])  ->  [Run, ...]

A scale says which tasks, widths, steps, seeds and flags stand for the paper's: `paper` has the paper's own (Sections 4,
D and E), `laptop` the same structure with tasks that two cores learn in minutes (why these: results/laptop/README.md).
A run is named after what it computes, so that figures which need the same run (the multi-task BRC of Figures 1, 4, 5,
6, 16, ...) share it.

Ablations and baselines are flags of brc_sac_continuous.py:

  MSE, or BroNet (MSE) (Figures 3, 4)            --critic-loss mse --no-normalize-returns
  MSE + normalization (Figure 3)                 --critic-loss mse
  SimBa (Figure 4)                               --critic-arch simba --critic-loss mse --no-normalize-returns
  SAC, or vanilla MLP (Figures 1, 4)             --critic-arch mlp --critic-loss mse --no-normalize-returns
  MH-SAC (Figure 1)                              SAC's and --task-conditioning heads
  separate heads (Figure 5)                      --task-conditioning heads
  model sizes (Table 1)                          --critic-width 256 ... 8192
  diagnostics of Figures 3, 5, 7                 --log-task-statistics
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import brc_drq_atari as drq  # noqa: E402
import brc_sac_continuous as sac  # noqa: E402

SAC, DRQ = "brc_sac_continuous.py", "brc_drq_atari.py"
OFFLINE, TRANSFER = "brc_offline_bc.py", "brc_embedding_transfer.py"


@dataclass(frozen=True)
class Run:
    """One command line, and where its result stands in a figure."""

    panel: str
    """part of the figure, such as a benchmark"""
    label: str
    """curve or bar of the panel"""
    script: str
    argv: tuple[str, ...]
    """arguments without seed, run root and run name; {runs} stands for the run root, {data} for the data folder"""
    seed: int
    tag: str
    """start of the run's name: what a person looks for in a list of runs"""
    x: float | None = None
    """place on the x axis of a scaling curve: critic width, or number of tasks"""
    after: tuple[str, ...] = ()
    """names of runs whose directories this one reads"""
    width: int | None = None
    """critic width where the command line does not name it"""

    @property
    def name(self) -> str:
        """The same for the same script, arguments and seed, whatever figure asks."""
        digest = hashlib.sha1(json.dumps([self.script, *self.argv]).encode()).hexdigest()[:6]
        return f"{self.tag}__{digest}__{self.seed}"

    def command(self, run_root: str = "runs", data: str = "data", resume: bool = False) -> list[str]:
        """The script and its arguments, to run in the repository's root; with resume, to continue a stopped run."""
        filled = [word.replace("{runs}", run_root).replace("{data}", data) for word in self.argv]
        if resume:
            return [self.script, "--resume", f"{run_root}/{self.name}"]
        return [self.script, *filled, "--seed", str(self.seed), "--run-root", run_root, "--run-name", self.name]

    def flag(self, name: str, default: str | None = None) -> str | None:
        """The word after a flag."""
        return self.argv[self.argv.index(name) + 1] if name in self.argv else default

    @property
    def length_unit(self) -> str:
        return "updates" if self.script == OFFLINE else "steps"

    @property
    def length(self) -> int:
        """Environment steps per task, or updates of offline training."""
        return int(self.flag("--total-updates" if self.script == OFFLINE else "--total-timesteps", "0"))

    def tasks(self, scale: "Scale") -> tuple[str, ...]:
        """As its command line names them."""
        if "--suite" in self.argv:
            return scale.suites[self.flag("--suite")].tasks
        if "--env-ids" in self.argv:
            rest = self.argv[self.argv.index("--env-ids") + 1 :]
            return tuple(itertools.takewhile(lambda word: not word.startswith("--"), rest))
        return scale.suites["mw-dmc"].tasks  # offline: of the data


@dataclass(frozen=True)
class Suite:
    """Tasks of one agent."""

    tasks: tuple[str, ...]
    steps: int
    flags: tuple[str, ...]
    """how the command line names the tasks"""


@dataclass(frozen=True)
class Scale:
    """What stands for the paper's tasks, sizes and lengths."""

    name: str
    suites: dict[str, Suite]
    benchmarks: dict[str, tuple[str, ...]]
    """panels of Figures 1 and 16 and their suites"""
    transfers: dict[str, tuple[str, str]]
    """panels of Figures 2 and 11: suite of the pretraining and suite of the transfer"""
    widths: tuple[int, ...]
    """Table 1, for Figures 4, 5 and 12"""
    width: int
    """BRC's critic (Table 3)"""
    narrow: int
    """Figure 6 without the scaled Q-value model"""
    sac_width: int
    """the MLP critic of SAC and MH-SAC in Figure 1"""
    seeds: int
    transfer_seeds: int
    offline_updates: int
    data_transfer_steps: int
    """Figure 11 shows the first 500k steps"""
    flags: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """script: flags of every run at this scale"""
    mixed: str | None = None
    """suite of several reward scales that Figure 3 shows beside HB-Medium, as the laptop's tasks there share one"""
    offline_data: str | None = None
    """Figure 12's data set; none: the replay of the online run"""
    single_task_ablations: bool = True
    """Figures 3 and 4 show single-task agents of every loss and architecture, not of BRC alone"""


def words(*values) -> tuple[str, ...]:
    return tuple(str(value) for value in values)


def paper_suites() -> dict[str, Suite]:
    suites, canonical = {}, {}
    for name, (tasks, steps) in [*sac.SUITES.items(), *drq.SUITES.items()]:
        first = canonical.setdefault((*tasks, steps), name)  # other names of a set are the same runs
        suites[name] = Suite(tuple(tasks), steps, ("--suite", first))
    return suites


PAPER = Scale(
    name="paper", suites=paper_suites(),
    benchmarks={"DMC-Hard": ("dmc-dogs", "dmc-humanoids"), "MetaWorld": ("metaworld",), "HB-Medium": ("hb-medium",),
                "HB-Hard": ("hb-hard",), "ShadowHand": ("shadowhand",), "Atari": ("atari",)},
    transfers={"MetaWorld": ("metaworld-pretrain", "metaworld-transfer"),
               "HB-Medium": ("hb-medium-pretrain", "hb-medium-transfer"), "HB-Hard": ("hb-hard", "hb-hard-transfer"),
               "ShadowHand": ("shadowhand", "shadowhand-transfer")},
    widths=(256, 512, 1024, 2048, 4096, 8192), width=4096, narrow=512, sac_width=256,
    seeds=5, transfer_seeds=3, offline_updates=1_000_000, data_transfer_steps=500_000,
    offline_data="{data}/mt80",
)  # fmt: skip

LAPTOP_STEPS = 15_000
SIX = [f"metaworld/{t}" for t in ("reach", "door-close", "drawer-close", "handle-press", "button-press-topdown",
                                  "coffee-button")]  # fmt: skip
UNSEEN = ["metaworld/reach-wall", "metaworld/handle-press-side"]
CARTPOLE = ["dmc/cartpole-balance", "dmc/cartpole-swingup"]
LAPTOP_TASKS = {  # what stands for the paper's suites
    **dict.fromkeys(("hb-medium", "hb-hard", "metaworld", "hb-medium-6", "hb-medium-pretrain"), SIX),
    "hb-medium-3": SIX[:3], "hb-medium-9": [*SIX, *UNSEEN, "metaworld/window-close"],
    "hb-medium-transfer": UNSEEN,
    "mw-dmc": [*SIX[:4], *CARTPOLE, "dmc/walker-stand", "gym/Pendulum-v1"],  # rewards of 0 to 10, 0 to 1, -16 to 0
    "dmc-dogs": ["dmc/walker-stand", "dmc/walker-walk"], "dmc-humanoids": ["dmc/hopper-stand", "dmc/hopper-hop"],
    "shadowhand": ["shadowhand/block", "shadowhand/egg"], "shadowhand-transfer": ["shadowhand/pen"],
    "atari": ["atari/pong", "atari/boxing"],
}  # fmt: skip


def laptop_suite(name: str, tasks: list[str]) -> Suite:
    return Suite(tuple(tasks), 2_000 if name == "atari" else LAPTOP_STEPS, ("--env-ids", *tasks))


LAPTOP_RATES = words("--actor-lr", 8e-4, "--critic-lr", 8e-4, "--temperature-lr", 8e-4)
LAPTOP = Scale(
    name="laptop", suites={name: laptop_suite(name, tasks) for name, tasks in LAPTOP_TASKS.items()},
    benchmarks={"MetaWorld": ("hb-medium",)}, transfers={"MetaWorld": ("hb-medium-pretrain", "hb-medium-transfer")},
    widths=(32, 128), width=128, narrow=32, sac_width=128,
    seeds=5, transfer_seeds=5, offline_updates=2 * LAPTOP_STEPS,  # as many as online, two a step
    data_transfer_steps=LAPTOP_STEPS, mixed="mw-dmc", single_task_ablations=False,
    flags={
        SAC: words("--actor-width", 64, "--batch-size", 128, "--learning-starts", 500, "--initial-temperature", 0.01,
                   "--eval-every", 2500, *LAPTOP_RATES),
        DRQ: words("--batch-size", 32, "--encoder-channels", 8, 16, 16, "--critic-width", 128, "--eval-every", 1000,
                   "--eval-episodes", 2, "--learning-starts", 500),
        OFFLINE: words("--actor-width", 64, "--batch-size", 128, "--initial-temperature", 0.01, "--eval-every", 5000,
                       *LAPTOP_RATES),
        TRANSFER: words("--batch-size", 128, "--learning-starts", 500, "--initial-temperature", 0.01,
                        "--eval-every", 2500, *LAPTOP_RATES),
    },
)  # fmt: skip
SCALES = {scale.name: scale for scale in (PAPER, LAPTOP)}


# ------------------------------------------------------------------------------------------------- kinds of runs

NO_CE = ("--critic-loss", "mse", "--no-normalize-returns")  # D.1, Figure 6: CE is categorical RL and normalization
HEADS = ("--task-conditioning", "heads")
ARCHITECTURES = {  # Figure 4; SAC is paired with critics as their authors have them, without return normalization
    "vanilla MLP": ("--critic-arch", "mlp", *NO_CE), "SimBa": ("--critic-arch", "simba", *NO_CE),
    "BroNet (MSE)": NO_CE, "BroNet (CE)": (),
}  # fmt: skip


def script_of(task: str) -> str:
    return DRQ if task.startswith("atari/") else SAC


def variant_name(variant: tuple[str, ...]) -> str:
    """'mlp-mse-heads' of the flags, for a run's tag."""
    known = {"mlp", "simba", "mse", "heads"}
    return "-".join([word for word in variant if word in known]) or "brc"


def agent_flags(scale: Scale, script: str, width: int | None, variant: tuple[str, ...]) -> tuple[str, ...]:
    size = () if script == DRQ else words("--critic-width", scale.width if width is None else width)
    return (*size, *variant, *scale.flags.get(script, ()))


def multi(scale: Scale, suite: str, panel: str, label: str, *, width=None, variant=(), x=None, seeds=None) -> list[Run]:
    """One agent on all tasks of a suite, per seed."""
    tasks, steps, flags = scale.suites[suite].tasks, scale.suites[suite].steps, scale.suites[suite].flags
    script = script_of(tasks[0])
    argv = (*flags, "--total-timesteps", str(steps), *agent_flags(scale, script, width, variant))
    if script == SAC:
        argv += ("--log-task-statistics",)  # Figures 3, 5 and 7; it changes nothing of what is learned
    read_by_others = [scale.suites[source] for source, _ in scale.transfers.values()]
    if script == SAC and not variant and width in (None, scale.width):
        if scale.suites[suite] in read_by_others or (suite == "mw-dmc" and scale.offline_data is None):
            argv += ("--save-replay",)  # data transfer and offline training learn from it
    tag = f"{scale.name}-{suite}-{variant_name(variant)}" + f"-{width or scale.width}" * (script == SAC)
    tag = tag.replace(suite, flags[1]) if flags[0] == "--suite" else tag.replace(suite, f"{len(tasks)}-tasks")
    return [Run(panel, label, script, argv, seed, tag, x) for seed in range(1, (seeds or scale.seeds) + 1)]


def single(
    scale: Scale, suite: str, panel: str, label: str, *, width=None, variant=(), x=None, seeds=None
) -> list[Run]:
    """One agent per task of a suite, per seed."""
    runs = []
    for task in scale.suites[suite].tasks:
        script = script_of(task)
        argv = ("--env-ids", task, "--total-timesteps", str(scale.suites[suite].steps))
        argv += agent_flags(scale, script, width, variant)
        tag = f"{scale.name}-{task.partition('/')[2]}-{variant_name(variant)}"
        tag += f"-{width or scale.width}" * (script == SAC)
        runs += [Run(panel, label, script, argv, seed, tag, x) for seed in range(1, (seeds or scale.seeds) + 1)]
    return runs


def transfer(
    scale: Scale, source: list[Run], suite: str, protocol: str, panel: str, label: str, *, steps=None, x=None, flags=()
) -> list[Run]:
    """A pretrained agent, seed by seed, on every task of another suite: a run per task, or for `embedding` one for all
    tasks, as it learns nothing but embeddings."""
    runs, tasks = [], scale.suites[suite].tasks
    steps = scale.suites[suite].steps if steps is None else steps
    for pretrained in source:
        for targets in [tasks] if protocol == "embedding" else [(task,) for task in tasks]:
            argv = ("--pretrained", f"{{runs}}/{pretrained.name}", "--env-ids", *targets, "--protocol", protocol)
            argv += tuple(flags)
            if protocol != "embedding":
                argv += ("--total-timesteps", str(steps), *scale.flags.get(TRANSFER, ()))
            where = targets[0].partition("/")[2] if len(targets) == 1 else f"{len(targets)}-targets"
            tag = f"{scale.name}-{where}-{protocol}-transfer"
            width = int(pretrained.flag("--critic-width"))
            runs.append(Run(panel, label, TRANSFER, argv, pretrained.seed, tag, x, (pretrained.name,), width))
    return runs


# ----------------------------------------------------------------------------------------------------- experiments


def figure1(scale: Scale) -> list[Run]:
    runs = []
    for panel, suites in scale.benchmarks.items():
        for suite in suites:
            if script_of(scale.suites[suite].tasks[0]) == SAC:
                mlp = {"width": scale.sac_width, "variant": ARCHITECTURES["vanilla MLP"]}
                runs += single(scale, suite, panel, "SAC", **mlp)
                runs += multi(scale, suite, panel, "MH-SAC*", width=mlp["width"], variant=(*mlp["variant"], *HEADS))
            runs += single(scale, suite, panel, "BRC")
            runs += multi(scale, suite, panel, "BRC*")
    return runs


def figure2(scale: Scale) -> list[Run]:
    runs = []
    for panel, (source, target) in scale.transfers.items():
        pretrained = multi(scale, source, panel, "pretraining", seeds=scale.transfer_seeds)
        runs += pretrained + single(scale, target, panel, "from scratch", seeds=scale.transfer_seeds)
        runs += transfer(scale, pretrained, target, "model", panel, "model transfer")
    return runs


def figure3(scale: Scale) -> list[Run]:
    runs = []
    for label, variant in {
        "MSE": NO_CE, "MSE + normalization": ("--critic-loss", "mse"), "CE + normalization": ()
    }.items():  # fmt: skip
        if scale.single_task_ablations or not variant:
            runs += single(scale, "hb-medium", "single-task", label, variant=variant)
        runs += multi(scale, "hb-medium", "multi-task", label, variant=variant)
        if scale.mixed:
            runs += multi(scale, scale.mixed, "multi-task, mixed rewards", label, variant=variant)
    return runs


def figure4(scale: Scale) -> list[Run]:
    runs = []
    for width in scale.widths:
        for label, variant in ARCHITECTURES.items():
            if scale.single_task_ablations or not variant:
                runs += single(scale, "hb-medium", "single-task", label, width=width, variant=variant, x=width)
            runs += multi(scale, "hb-medium", "multi-task", label, width=width, variant=variant, x=width)
    return runs


def figure5(scale: Scale) -> list[Run]:
    runs = []
    for width in scale.widths:
        runs += single(scale, "hb-medium", "", "single-task", width=width, x=width)
        runs += multi(scale, "hb-medium", "", "separate heads", width=width, variant=HEADS, x=width)
        runs += multi(scale, "hb-medium", "", "task embeddings", width=width, x=width)
    return runs


def figure6(scale: Scale) -> list[Run]:
    runs = []
    for parts in range(8):
        sq, ce, te = parts & 4, parts & 2, parts & 1
        label = " + ".join(name for name, on in (("SQ", sq), ("CE", ce), ("TE", te)) if on) or "none"
        variant = (() if ce else NO_CE) + (() if te else HEADS)
        runs += multi(scale, "hb-medium", "", label, width=scale.width if sq else scale.narrow, variant=variant)
    return runs


def figure7(scale: Scale) -> list[Run]:
    return multi(scale, "mw-dmc", "", "BRC*")


def figure9(scale: Scale) -> list[Run]:
    return single(scale, "hb-hard", "", "BRC") + multi(scale, "hb-hard", "", "BRC*")


def figure10(scale: Scale) -> list[Run]:
    runs, seeds = [], scale.transfer_seeds
    for width in [width for width in scale.widths if width <= scale.width]:
        how = {"width": width, "x": width, "seeds": seeds}
        for suite in ("hb-medium-3", "hb-medium-6", "hb-medium-9"):
            label = f"{len(scale.suites[suite].tasks)} tasks"
            pretrained = multi(scale, suite, "pretraining", label, **how)
            runs += pretrained
            if suite != "hb-medium-9":
                runs += transfer(scale, pretrained, "hb-medium-transfer", "model", "transfer", label, x=width)
        runs += single(scale, "hb-medium-3", "pretraining", "single-task", **how)
        runs += single(scale, "hb-medium-transfer", "transfer", "single-task", **how)
    return runs


def figure11(scale: Scale) -> list[Run]:
    runs, seeds = [], scale.transfer_seeds
    for panel, (source, target) in scale.transfers.items():
        if panel == "ShadowHand":
            continue
        pretrained = multi(scale, source, panel, "pretraining", seeds=seeds)
        runs += pretrained + single(scale, target, panel, "from scratch", seeds=seeds)
        runs += transfer(scale, pretrained, target, "model", panel, "model transfer")
        runs += transfer(scale, pretrained, target, "data", panel, "data transfer", steps=scale.data_transfer_steps)
    return runs + figure24(scale)


def figure12(scale: Scale) -> list[Run]:
    widths = [width for width in scale.widths if width >= 1024] or scale.widths
    runs = []
    for width in widths:
        online = multi(scale, "mw-dmc", "", "BRC* (online)", width=width, x=width, seeds=3 if width > 4096 else None)
        runs += online
        if width != scale.width:
            continue
        for run in online:
            data = scale.offline_data or f"{{runs}}/{run.name}/replay"
            argv = ("--dataset", data, *words("--critic-width", width, "--total-updates", scale.offline_updates))
            argv += scale.flags.get(OFFLINE, ())
            after = () if scale.offline_data else (run.name,)
            tag = f"{scale.name}-mw-dmc-offline-{width}"
            runs.append(Run("", "BRC+BC* (offline)", OFFLINE, argv, run.seed, tag, width, after))
    return runs


def figure16(scale: Scale) -> list[Run]:
    runs = []
    for panel, suites in scale.benchmarks.items():
        for suite in suites:
            runs += single(scale, suite, panel, "BRC") + multi(scale, suite, panel, "BRC*")
    return runs + multi(scale, "mw-dmc", "MW+DMC", "BRC*")


def per_task(*suites: str) -> Callable[[Scale], list[Run]]:
    def runs(scale: Scale) -> list[Run]:
        return [r for s in suites for r in single(scale, s, "", "BRC") + multi(scale, s, "", "BRC*")]

    return runs


def figure24(scale: Scale) -> list[Run]:
    pretrained = multi(scale, "shadowhand", "embedding", "pretraining", seeds=scale.transfer_seeds)
    label, how = "embedding transfer", {"flags": ("--heatmap",)}
    return pretrained + transfer(scale, pretrained, "shadowhand-transfer", "embedding", "embedding", label, **how)


def table1(scale: Scale) -> list[Run]:
    """Builds every size and stops: the script prints the number of parameters."""
    suite = scale.suites["hb-medium"]
    return [
        Run("", "BRC*", SAC, (*suite.flags, *words("--critic-width", width, "--total-timesteps", 0)), 1,
            f"{scale.name}-size-{width}", width)
        for width in scale.widths
    ]  # fmt: skip


def table2(scale: Scale) -> list[Run]:
    """Builds every task of the table; its numbers are constants of the script."""
    names = ("hb-medium", "hb-hard", "hb-hard-transfer") if scale.name == "paper" else ("hb-medium",)
    return [
        Run("", name, SAC, (*scale.suites[name].flags, *words("--critic-width", scale.narrow, "--total-timesteps", 0)),
            1, f"{scale.name}-{name}-tasks")
        for name in names
    ]  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    title: str
    runs: Callable[[Scale], list[Run]]
    note: str = ""
    """what of the paper's figure these runs cannot show"""


BASELINES = "published baselines come with --reference"
EXPERIMENTS = {
    "figure1": Experiment("Multi-task against single-task learning", figure1, BASELINES),
    "figure2": Experiment("Model transfer to new tasks", figure2, "no Atari: the transfer script is SAC's"),
    "figure3": Experiment("Cross-entropy stabilizes multi-task learning", figure3),
    "figure4": Experiment("Architectures over critic width", figure4),
    "figure5": Experiment("Task embeddings against separate heads", figure5, "gradient conflicts need several tasks"),
    "figure6": Experiment("Components and their Shapley values", figure6),
    "figure7": Experiment("Principal components of the task embeddings", figure7),
    "figure9": Experiment("Sample and compute efficiency", figure9, BASELINES),
    "figure10": Experiment("Number of tasks, pretraining and transfer", figure10),
    "figure11": Experiment("Model, data and embedding transfer", figure11, BASELINES),
    "figure12": Experiment("Offline against online, and samples over size", figure12,
                           "the offline runs read TD-MPC2's mt80, see benchmark/convert_tdmpc2.py"),
    "figure16": Experiment("Aggregate training curves", figure16, BASELINES),
    "figure17": Experiment("HB-Medium, every task", per_task("hb-medium"), BASELINES),
    "figure18": Experiment("HB-Hard, every task", per_task("hb-hard"), BASELINES),
    "figure19": Experiment("DMC-Hard, every task", per_task("dmc-dogs", "dmc-humanoids"), BASELINES),
    "figure20": Experiment("MetaWorld, every task", per_task("metaworld"), BASELINES),
    "figure21": Experiment("ShadowHand, every task", per_task("shadowhand"), BASELINES),
    "figure22": Experiment("MW+DMC, every task", figure7, BASELINES),
    "figure23": Experiment("Transfer, every task", figure2, "no Atari: the transfer script is SAC's"),
    "figure24": Experiment("Every pretrained embedding on every new task", figure24),
    "table1": Experiment("Model sizes", table1),
    "table2": Experiment("HumanoidBench's random and success scores", table2),
    "table5": Experiment("Atari 100k", per_task("atari")),
}  # fmt: skip


def unique_runs(experiments: list[str], scale: Scale) -> list[Run]:
    """The runs of several experiments, each once, first seeds first, so that what is done by then is balanced when time
    runs out; what reads another run comes after it."""
    found = {run.name: run for name in experiments for run in EXPERIMENTS[name].runs(scale)}
    return sorted(found.values(), key=lambda run: (run.seed, len(run.after)))
