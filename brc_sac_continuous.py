# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.2", "flax==0.12.8", "optax==0.2.8", "orbax-checkpoint==0.12.8", "numpy==2.4.6", "tyro==1.0.17",
#   "gymnasium==1.4.0", "envpool==1.2.5", "mujoco==3.2.0", "dm_control==1.0.21.post1", "metaworld==3.0.0",
#   "tensorboardX==2.6.5", "wandb==0.31.0", "tqdm==4.70.1", "imageio[ffmpeg]==2.38.1",
# ]
# ///
"""SAC+BRC: one soft actor-critic agent for one or many continuous-control tasks, in one file.

"Bigger, Regularized, Categorical: High-Capacity Value Functions are Efficient Multi-Task Learners"
(Nauman et al., 2025, arXiv:2505.23150). What this file computes, in the paper's notation, for task i:

  support          z_j = V_min + (j - 1) (V_max - V_min) / (N_atoms - 1)                                (Eq. 1)
  normalization    G_i <- max(max_t |G_i(s_t)|, G_i) over the returns of every finished episode         (Eq. 2)
                   r_i <- r_i V_max / (G_i + lambda_i),  lambda_i = alpha H_i / (1 - gamma)             (Eq. 3, 4)
  critic target    p = mean over both target critics of p_k(s', a'),  a' ~ pi(s')                       (C.1)
                   y = projection onto z of  r + gamma (1 - terminated) (z - alpha log pi(a'|s'))       (C.2)
  critic loss      sum over critics k of the cross-entropy of p_k(s, a) with y                          (Section 3)
  actor loss       alpha log pi(a|s) - mean over critics of E_{z ~ p_k(s, a)}[z],  a ~ pi(s)            (B)
  temperature      alpha (H(pi) - H_target),  H_target = -|A| / 2                                       (Table 3)
  task embedding   e_i / |e_i|_1, appended to the state; learned from the critic loss only              (C.4)
  target critic    theta_target <- (1 - tau) theta_target + tau theta, after every update               (Table 3)

Critic: BroNet (C.3, Figure 13), 2 blocks of width 4096, about 256M parameters with targets (Table 1).

  python brc_sac_continuous.py --env-ids dmc/cartpole-swingup --critic-width 256        # one task
  python brc_sac_continuous.py --env-ids metaworld/reach dmc/walker-walk gym/Pendulum-v1  # any mix, one agent
  python brc_sac_continuous.py --suite hb-hard --seed 1                                  # the paper's experiment
  python brc_sac_continuous.py --resume runs/RUN                                         # continue a stopped run
"""

import atexit
import contextlib
import csv
import errno
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from tensorboardX import SummaryWriter
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend: printed as one line, exit status 2."""


# ---------------------------------------------------------------------------------------------------- arguments


@dataclass
class Args:
    """SAC+BRC (Nauman et al., 2025). Defaults are the paper's, Table 3."""

    env_ids: tuple[str, ...] = ()
    """tasks of one agent, as family/task: dmc/dog-run metaworld/assembly humanoidbench/h1-walk gym/Pendulum-v1"""
    suite: str | None = None
    """a set of tasks by name: dmc-dogs, dmc-humanoids, metaworld, hb-medium, hb-hard, shadowhand, mw-dmc, or a part of
    one, such as metaworld-pretrain and metaworld-transfer; see --list-tasks"""
    list_tasks: bool = False
    """print all tasks and suites and the packages that they lack, and exit"""
    seed: int = 1
    """seed of networks, exploration, replay sampling and environments"""
    exp_name: str = "brc_sac_continuous"
    """name of the experiment, part of the run's name"""
    run_name: str | None = None
    """name of the run directory (default: {suite or first task}__{exp_name}__{seed}__{unix time})"""
    run_root: str = "runs"
    """directory that holds the run directories"""
    resume: str | None = None
    """run directory to continue from its newest good checkpoint, with the saved arguments; those of length, evaluation,
    checkpoints and logging may be given anew"""
    env_backend: Literal["auto", "envpool", "gymnasium"] = "auto"
    """envpool steps dmc/ and metaworld/ tasks fastest; gymnasium is the reference and runs every family"""
    total_timesteps: int | None = None
    """environment steps per task (default: the suite's in Section 4, else 1,000,000); 0 builds everything and exits"""
    learning_starts: int = 5_000
    """uniformly random steps per task before the first update"""
    eval_every: int = 25_000
    """environment steps per task between evaluations"""
    eval_episodes: int = 10
    """evaluation episodes per task, actions at the policy's mean"""
    checkpoint_every: int = 100_000
    """environment steps per task between checkpoints; one more is written at the end and when stopped"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep"""
    save_replay: bool = False
    """write all transitions to RUN_DIR/replay/, one .npy file per task, when the run ends or is stopped"""
    capture_video: bool = False
    """write an mp4 of one evaluation episode per task to RUN_DIR/videos/ (headless: MUJOCO_GL=egl)"""
    log_task_statistics: bool = False
    """at evaluation, per-task losses, gradients, their conflicts, entropies and embeddings (Figures 3, 5, 7)"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline is respected)"""
    wandb_project: str = "brc"
    """Weights & Biases project"""

    discount: float = 0.99
    """gamma (Table 3)"""
    batch_size: int | None = None
    """transitions per update, over all tasks (default: 1024 with several tasks, Table 3; 256 with one: Section 4
    multiplies the backbone's batch by 4 for multi-task learning)"""
    utd: int = 2
    """updates per vector step, one step of every task (Table 3)"""
    buffer_size: int = 1_000_000
    """replay capacity per task (Table 3)"""
    polyak_tau: float = 5e-3
    """rate of the target critic's moving average, after every update (Table 3)"""
    actor_lr: float = 3e-4
    """AdamW learning rate of the actor (Table 3)"""
    critic_lr: float = 3e-4
    """AdamW learning rate of the critic and the task embeddings (Table 3)"""
    temperature_lr: float = 3e-4
    """Adam (b1 = 0.5) learning rate of the temperature (Table 3)"""
    weight_decay: float = 1e-4
    """AdamW weight decay (Table 3)"""
    initial_temperature: float = 0.1
    """alpha at the start (Table 3)"""
    target_entropy: float | None = None
    """the policy entropy that the temperature aims at (default: -|A|/2 with the task's own |A|, Table 3)"""
    num_atoms: int = 101
    """atoms of the categorical critic (Table 3)"""
    v_min: float = -10.0
    """lowest atom (Table 3)"""
    v_max: float = 10.0
    """highest atom (Table 3), and the bound of normalized returns (Eq. 3)"""
    critic_arch: Literal["bronet", "simba", "mlp"] = "bronet"
    """critic architecture: BroNet (C.3), SimBa (running statistics, pre-norm blocks) or a ReLU MLP (Figure 4)"""
    critic_width: int = 4096
    """hidden units (Table 3; the sizes of Table 1 are 256 ... 8192)"""
    critic_depth: int = 2
    """residual blocks (bronet, simba) or hidden layers (mlp) (Table 3)"""
    num_critics: int = 2
    """critics in the ensemble; targets average them, no clipped double Q (C.1)"""
    actor_width: int = 256
    """hidden units of the BroNet actor (Table 3)"""
    actor_depth: int = 1
    """residual blocks of the BroNet actor (Table 3)"""
    critic_loss: Literal["ce", "mse"] = "ce"
    """categorical cross-entropy (C.2) or mean squared error on a scalar critic (Figure 3)"""
    normalize_returns: bool = True
    """divide rewards by the largest return seen in their task (Eq. 2-4)"""
    task_conditioning: Literal["embedding", "heads"] = "embedding"
    """with several tasks: learned embeddings (C.4) or one output head per task in actor and critic (Figure 5)"""
    embedding_size: int = 32
    """task embedding size (Table 3)"""
    variant: Literal["paper", "released-code"] = "paper"
    """where the paper and the authors' released code differ: released-code
    stands for --embedding-norm l2 --truncation-bootstrap mean-reward --entropy-correction constant;
    one of these given by hand wins"""
    embedding_norm: Literal["l1", "l2"] = "l1"
    """the norm that is 1 for every embedding: l1 in the paper (C.4), l2 in the released code"""
    truncation_bootstrap: Literal["critic", "mean-reward"] = "critic"
    """tail of a truncated return in Eq. 2: critic output in the paper (C.2), mean reward / (1 - gamma) in the code"""
    entropy_correction: Literal["empirical", "constant"] = "empirical"
    """lambda of Eq. 3: alpha |H_i| / (1 - gamma) (Eq. 4 has H_i), or alpha (|A|/4) / (1 - gamma) as in the code"""


RELEASED_CODE = {  # --variant released-code
    "variant": "released-code", "embedding_norm": "l2", "truncation_bootstrap": "mean-reward",
    "entropy_correction": "constant",
}  # fmt: skip
POSITIVE = {  # smallest allowed value of every number, checked before anything is built
    "total_timesteps": 0, "learning_starts": 1, "eval_every": 1, "eval_episodes": 1, "checkpoint_every": 1,
    "keep_checkpoints": 1, "batch_size": 1, "utd": 1, "buffer_size": 9, "num_atoms": 2, "critic_width": 1,
    "critic_depth": 0, "num_critics": 1, "actor_width": 1, "actor_depth": 0, "embedding_size": 1, "seed": 0,
    "actor_lr": 0.0, "critic_lr": 0.0, "temperature_lr": 0.0, "weight_decay": 0.0, "polyak_tau": 0.0,
    "initial_temperature": 1e-12,
}  # fmt: skip


def check_args(args: Args) -> None:
    """Raises UserError for a number outside its range."""
    for name, smallest in POSITIVE.items():
        value = getattr(args, name)
        if value is not None and not (smallest <= value < math.inf):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a finite number, at least {smallest}")
    if not 0 <= args.discount < 1:
        raise UserError(f"--discount {args.discount}: must be in [0, 1)")
    if args.polyak_tau > 1:
        raise UserError(f"--polyak-tau {args.polyak_tau}: must be in [0, 1]")
    if not -math.inf < args.v_min < args.v_max < math.inf or args.v_max <= 0:
        raise UserError(f"--v-min {args.v_min} --v-max {args.v_max}: need v_min < v_max and v_max > 0")
    if args.target_entropy is not None and not math.isfinite(args.target_entropy):
        raise UserError(f"--target-entropy {args.target_entropy}: must be a finite number")
    if args.seed >= 2**31:
        raise UserError(f"--seed {args.seed}: must be below 2^31")


# ---------------------------------------------------------------------------------------------- tasks and suites

DMC = """acrobot-swingup acrobot-swingup-sparse ball-in-cup-catch cartpole-balance cartpole-balance-sparse
cartpole-swingup cartpole-swingup-sparse cheetah-run dog-run dog-stand dog-trot dog-walk finger-spin finger-turn-easy
finger-turn-hard fish-swim fish-upright hopper-hop hopper-stand humanoid-run humanoid-stand humanoid-walk
manipulator-bring-ball pendulum-swingup point-mass-easy quadruped-run quadruped-walk reacher-easy reacher-hard
swimmer-swimmer6 swimmer-swimmer15 walker-run walker-stand walker-walk""".split()
DMC_EXTRA = """cheetah-run-backwards cheetah-run-front cheetah-run-back cheetah-jump walker-walk-backwards
walker-run-backwards hopper-hop-backwards reacher-three-easy reacher-three-hard ball-in-cup-spin
pendulum-spin""".split()  # TD-MPC2's, in benchmark/dmc_extra_tasks.py
METAWORLD = """assembly basketball bin-picking box-close button-press-topdown button-press-topdown-wall button-press
button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-close door-lock door-open
door-unlock hand-insert drawer-close drawer-open faucet-open faucet-close hammer handle-press-side handle-press
handle-pull-side handle-pull lever-pull pick-place-wall pick-out-of-hole pick-place plate-slide plate-slide-side
plate-slide-back plate-slide-back-side peg-insert-side peg-unplug-side soccer stick-push stick-pull push push-wall
push-back reach reach-wall shelf-place sweep-into sweep window-open window-close""".split()
HUMANOIDBENCH = {  # task: (random score, success score), Table 2; cabinet is missing there: the released code's
    "h1-crawl": (272.658, 700), "h1-hurdle": (2.214, 700), "h1-maze": (106.441, 1200), "h1-pole": (20.090, 700),
    "h1-run": (2.020, 700), "h1-slide": (3.191, 700), "h1-stair": (3.112, 700), "h1-stand": (10.545, 800),
    "h1-walk": (2.377, 700), "h1hand-balance-hard": (10.032, 800), "h1hand-balance-simple": (10.170, 800),
    "h1hand-basketball": (8.979, 1200), "h1hand-cabinet": (37.733, 2500), "h1hand-bookshelf-hard": (14.848, 2000),
    "h1hand-bookshelf-simple": (16.777, 2000), "h1hand-crawl": (278.868, 800), "h1hand-door": (2.771, 600),
    "h1hand-hurdle": (2.371, 700), "h1hand-insert-normal": (1.673, 350), "h1hand-insert-small": (1.653, 350),
    "h1hand-maze": (106.233, 1200), "h1hand-package": (-10040.932, 1500), "h1hand-pole": (19.721, 700),
    "h1hand-powerlift": (17.638, 800), "h1hand-push": (-526.800, 700), "h1hand-reach": (-50.024, 12000),
    "h1hand-room": (3.018, 400), "h1hand-run": (1.927, 700), "h1hand-sit-hard": (2.477, 750),
    "h1hand-sit-simple": (10.768, 750), "h1hand-slide": (3.142, 700), "h1hand-spoon": (4.661, 650),
    "h1hand-stair": (3.161, 700), "h1hand-stand": (11.973, 800), "h1hand-truck": (562.419, 3000),
    "h1hand-walk": (2.505, 700), "h1hand-window": (2.713, 650),
}  # fmt: skip
SHADOWHAND = """e-toy-airplane knife flat-screwdriver elephant apple scissors i-cups cup foam-brick pudding-box
wristwatch padlock power-drill binoculars b-lego-duplo ps-controller mouse hammer f-lego-duplo piggy-bank can
extra-large-clamp peach a-lego-duplo racquetball tuna-fish-can a-cups pan strawberry d-toy-airplane wood-block
small-marker sugar-box ball torus i-toy-airplane chain j-cups c-toy-airplane airplane nine-hole-peg-test water-bottle
c-cups medium-clamp large-marker h-cups b-colored-wood-blocks j-lego-duplo f-toy-airplane toothbrush tennis-ball mug
sponge k-lego-duplo phillips-screwdriver f-cups c-lego-duplo d-marbles d-cups camera d-lego-duplo golf-ball
k-toy-airplane b-cups softball wine-glass chips-can cube master-chef-can alarm-clock gelatin-box h-lego-duplo baseball
light-bulb banana rubber-duck headphones i-lego-duplo b-toy-airplane pitcher-base j-toy-airplane g-lego-duplo
cracker-box orange e-cups""".split()
SHADOWHAND_TRANSFER = """rubiks-cube dice bleach-cleanser pear e-lego-duplo pyramid stapler flashlight large-clamp
a-toy-airplane tomato-soup-can fork cell-phone m-lego-duplo toothpaste flute stanford-bunny a-marbles potted-meat-can
timer lemon utah-teapot train g-cups l-lego-duplo bowl door-knob mustard-bottle plum""".split()
SHADOWHAND_ENVPOOL = {  # Gymnasium-Robotics' own objects need no extra package; task: the id there and in envpool
    "block": "HandManipulateBlockRotateZ-v1", "egg": "HandManipulateEggRotate-v1", "pen": "HandManipulatePenRotate-v1",
}  # fmt: skip
FAMILIES = {
    "dmc": DMC + DMC_EXTRA, "metaworld": METAWORLD, "humanoidbench": list(HUMANOIDBENCH),
    "shadowhand": SHADOWHAND + SHADOWHAND_TRANSFER + list(SHADOWHAND_ENVPOOL),
}  # fmt: skip
INSTALL = {  # what a family needs besides requirements.txt, or without it
    "dmc": "pip install dm_control==1.0.21.post1 mujoco==3.2.0",
    "metaworld": "pip install metaworld==3.0.0 mujoco==3.2.0",
    "humanoidbench": "pip install torch && pip install --no-deps -e "
    "git+https://github.com/carlosferrazza/humanoid-bench#egg=humanoid_bench",
    "shadowhand": "pip install gymnasium-robotics && git clone "
    "https://github.com/naumix/BiggerRegularizedCategorical && export PYTHONPATH=$PWD/BiggerRegularizedCategorical",
}
LOCOMOTION = "walk stand run stair crawl pole slide hurdle maze".split()
HB_MANIPULATION = """sit-simple sit-hard balance-simple balance-hard reach spoon window insert-small insert-normal
bookshelf-simple bookshelf-hard""".split()
MW_DMC = """walker-stand walker-walk walker-run cheetah-run reacher-easy reacher-hard acrobot-swingup pendulum-swingup
cartpole-balance cartpole-balance-sparse cartpole-swingup cartpole-swingup-sparse ball-in-cup-catch finger-spin
finger-turn-easy finger-turn-hard fish-swim hopper-stand hopper-hop""".split()
HB_MEDIUM_TRANSFER = "run hurdle maze".split()
HB_HARD_TRANSFER = "truck powerlift room door basketball push cabinet".split()
METAWORLD_TRANSFER = "assembly disassemble dial-turn lever-pull push-back".split()
SUITES = {  # name: (tasks, environment steps per task): E.1, the splits of E.2, and Figure 10's three tasks
    "dmc-dogs": ([f"dmc/dog-{t}" for t in ("stand", "walk", "trot", "run")], 500_000),
    "dmc-humanoids": ([f"dmc/humanoid-{t}" for t in ("stand", "walk", "run")], 500_000),
    "metaworld": ([f"metaworld/{t}" for t in METAWORLD], 500_000),
    "hb-medium": ([f"humanoidbench/h1-{t}" for t in LOCOMOTION], 1_000_000),
    "hb-hard": ([f"humanoidbench/h1hand-{t}" for t in LOCOMOTION + HB_MANIPULATION], 2_000_000),
    "shadowhand": ([f"shadowhand/{t}" for t in SHADOWHAND], 1_000_000),
    "mw-dmc": ([f"metaworld/{t}" for t in METAWORLD] + [f"dmc/{t}" for t in MW_DMC + DMC_EXTRA], 500_000),
    "metaworld-pretrain": ([f"metaworld/{t}" for t in METAWORLD if t not in METAWORLD_TRANSFER], 500_000),
    "metaworld-transfer": ([f"metaworld/{t}" for t in METAWORLD_TRANSFER], 500_000),
    "hb-medium-3": ([f"humanoidbench/h1-{t}" for t in ("walk", "stair", "slide")], 1_000_000),
    "hb-medium-pretrain": ([f"humanoidbench/h1-{t}" for t in LOCOMOTION if t not in HB_MEDIUM_TRANSFER], 1_000_000),
    "hb-medium-transfer": ([f"humanoidbench/h1-{t}" for t in HB_MEDIUM_TRANSFER], 1_000_000),
    "hb-hard-transfer": ([f"humanoidbench/h1hand-{t}" for t in HB_HARD_TRANSFER], 2_000_000),
    "shadowhand-transfer": ([f"shadowhand/{t}" for t in SHADOWHAND_TRANSFER], 1_000_000),
}  # fmt: skip
SUITES |= {  # other names of the same sets
    "hb-medium-6": SUITES["hb-medium-pretrain"], "hb-medium-9": SUITES["hb-medium"],
    "hb-hard-pretrain": SUITES["hb-hard"], "shadowhand-pretrain": SUITES["shadowhand"],
}  # fmt: skip


def check_tasks(tasks: list[str]) -> None:
    """Raises UserError for an unknown family or task, naming the valid ones, and for a task named twice."""
    for task in tasks:
        family, _, name = task.partition("/")
        if family == "gym" and name:
            continue
        if family not in FAMILIES:
            raise UserError(f"unknown task '{task}'; tasks are family/task with a family of {', '.join(FAMILIES)}, gym")
        if name not in FAMILIES[family]:
            raise UserError(f"unknown task '{task}'; {family}/ has: {', '.join(FAMILIES[family])}")
    if len(set(tasks)) < len(tasks):
        raise UserError("a task is named twice in --env-ids")


def resolve_tasks(args: Args) -> tuple[list[str], int]:
    """Task names and environment steps per task of a run.

    Raises UserError for an unknown suite, family or task, naming the valid ones.
    """
    if args.suite and args.env_ids:
        raise UserError("--suite and --env-ids exclude each other: give one of them")
    if args.suite:
        if args.suite not in SUITES:
            raise UserError(f"unknown suite '{args.suite}'; suites: {', '.join(SUITES)}")
        tasks, steps = SUITES[args.suite]
    else:
        tasks, steps = list(args.env_ids), 1_000_000
    if not tasks:
        raise UserError(f"no tasks: give --env-ids, such as --env-ids dmc/walker-walk, or --suite: {', '.join(SUITES)}")
    check_tasks(tasks)
    return tasks, steps if args.total_timesteps is None else args.total_timesteps


def list_tasks() -> None:
    """Prints families with their tasks, the packages that they lack, and suites."""
    modules = {"dmc": ["dm_control"], "metaworld": ["metaworld"], "humanoidbench": ["humanoid_bench", "torch"],
               "shadowhand": ["dex_envs", "gymnasium_robotics"]}  # fmt: skip
    for family, tasks in FAMILIES.items():
        missing = [module for module in modules[family] if importlib.util.find_spec(module) is None]
        print(f"{family}/ ({len(tasks)} tasks){': missing ' + ', '.join(missing) if missing else ''}")
        if missing and family == "shadowhand":
            print(f"  {', '.join(SHADOWHAND_ENVPOOL)} run without; for the others: {INSTALL[family]}")
        elif missing:
            print(f"  {INSTALL[family]}")
        print(f"  {' '.join(tasks)}")
    print("gym/ (any registered Gymnasium id, or module:Id-v0, with 1-D Box observations and actions)")
    print("suites:")
    for suite, (tasks, steps) in SUITES.items():
        print(f"  {suite} ({len(tasks)} tasks, {steps:,} steps each): {' '.join(tasks)}")


def normalized_score(task: str, episode_return: float, success: float) -> float:
    """Score of an episode (E.3): success for metaworld and shadowhand, return / 1000 for dmc, Eq. 5 with Table 2 for
    humanoidbench, NaN where the paper defines none (gym)."""
    family, _, name = task.partition("/")
    if family == "dmc":
        return episode_return / 1000
    if family == "humanoidbench":
        random_return, success_return = HUMANOIDBENCH[name]
        return (episode_return - random_return) / (success_return - random_return)
    return success if family in ("metaworld", "shadowhand") else math.nan


# -------------------------------------------------------------------------------------------------- environments

ENVPOOL_KEYS = {  # dm_control's observations in its order, where envpool has more of them or another order; and the
    # hand's, whose achieved goal is part of the observation
    "dmc/dog-": "joint_angles joint_velocites torso_pelvis_height z_projection torso_com_velocity inertial_sensors "
    "foot_forces touch_sensors actuator_state",
    "dmc/humanoid-": "joint_angles head_height extremities torso_vertical com_velocity velocity",
    "dmc/quadruped-": "egocentric_state torso_velocity torso_upright imu force_torque",
    "dmc/finger-spin": "position velocity touch",
    "dmc/fish-swim": "joint_angles upright target velocity",
    "dmc/fish-upright": "joint_angles upright velocity",
    "shadowhand/": "observation desired_goal",
}
ROTATE_Z = {  # what dex_envs asks of its objects, for all three hand tasks
    "target_rotation": "z", "ignore_z_target_rotation": False, "randomize_initial_rotation": True,
}  # fmt: skip
ENVPOOL_BROKEN = {  # in envpool 1.2.5 these are other tasks than dm_control's and Meta-World's, which step them instead
    "metaworld/hammer", "metaworld/shelf-place",  # the goal moves on at every reset, out of reach
    "metaworld/dial-turn",  # its MuJoCo is 3.6, with which not even Meta-World's expert turns the dial
    "dmc/ball-in-cup-catch",  # the ball counts as caught too early
}  # fmt: skip


class DMControlEnv(gym.Env):
    """A dm_control task as a Gymnasium environment: flat float32 observation, actions rescaled by dm_control's own
    wrapper to [-1, 1], truncation at dm_control's time limit (1,000 steps).

    load: makes the dm_control environment from a seed or None.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, load: Callable[[int | None], Any], render_mode: str | None = None):
        from dm_control.suite.wrappers import action_scale

        self.load = lambda seed: action_scale.Wrapper(load(seed), minimum=-1, maximum=1)
        self.env, self.render_mode = self.load(None), render_mode
        size = sum(int(np.prod(spec.shape)) for spec in self.env.observation_spec().values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, self.env.action_spec().shape, np.float32)

    def flatten(self, observation: dict) -> np.ndarray:
        return np.concatenate([np.ravel(value) for value in observation.values()]).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.env = self.load(seed)
        return self.flatten(self.env.reset().observation), {}

    def step(self, action: np.ndarray):
        step = self.env.step(action.astype(np.float64))
        terminated = step.last() and step.discount == 0
        return self.flatten(step.observation), step.reward, terminated, step.last() and not terminated, {}

    def render(self) -> np.ndarray:
        return self.env.physics.render(height=240, width=320, camera_id=0)


def extra_task_id(name: str) -> str:
    """Gymnasium's id of a task in DMC_EXTRA, after importing the file that registers them: the one thing that a script
    takes from benchmark/, found beside the script whatever the current directory is."""
    gym_id, path = f"brc/{name}-v0", Path(__file__).resolve().parent / "benchmark" / "dmc_extra_tasks.py"
    if gym_id not in gym.registry:
        if not path.exists():
            source = f"benchmark/{path.name} of the repository that {Path(__file__).name} comes from"
            raise UserError(f"dmc/{name} is not in dm_control but in {source}: copy it to {path}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return gym_id


def make_env(task: str, render_mode: str | None = None, seed: int | None = None) -> gym.Env:
    """One Gymnasium environment with a flat Box observation, actions in [-1, 1] and the paper's episode length (E.1).

    Raises UserError when a package is missing or the spaces do not fit.
    """
    if seed is not None:
        np.random.seed(seed)  # noqa: NPY002 (several HumanoidBench tasks draw from NumPy's global generator)
    family, _, name = task.partition("/")
    try:
        if family == "dmc" and name in DMC_EXTRA:
            env = gym.make(extra_task_id(name), render_mode=render_mode)
        elif family == "dmc":
            from dm_control import suite

            vars(np).setdefault("in1d", np.isin)  # dm_control's quadruped calls it; NumPy 2.4 dropped it
            domain, task_name = next((d, t) for d, t in suite.ALL_TASKS if f"{d}-{t}".replace("_", "-") == name)
            env = DMControlEnv(lambda seed: suite.load(domain, task_name, {"random": seed}), render_mode)
        elif family == "metaworld":
            import metaworld

            env = metaworld.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{name}-v3-goal-observable"](render_mode=render_mode)
            env._freeze_rand_vec = False  # a new goal at every reset, as in envpool
            env = gym.wrappers.TimeLimit(env, 200)
        elif family == "humanoidbench":
            import humanoid_bench  # noqa: F401 (registers the tasks)

            robot, _, task_name = name.partition("-")
            env = gym.make(f"{robot}-{task_name.replace('-', '_')}-v0", render_mode=None)  # drawn by frame_renderer
        elif family == "shadowhand" and name in SHADOWHAND_ENVPOOL:
            import gymnasium_robotics

            gym.register_envs(gymnasium_robotics)
            env = gym.make(SHADOWHAND_ENVPOOL[name], render_mode=render_mode)
            for name_, value in ROTATE_Z.items():  # the constructors do not take them all
                setattr(env.unwrapped, name_, value)
        elif family == "shadowhand":
            import dex_envs  # noqa: F401 (registers the tasks)

            env = gym.make(f"{name.replace('-', '_')}-rotate-v1", reward_type="sparse", render_mode=render_mode)
        else:
            env = gym.make(name, **({"render_mode": render_mode} if render_mode else {}))
    except ImportError as error:
        hint = INSTALL.get(family, f"pip install the package that registers {name}")
        raise UserError(f"{task} needs a package that is missing ({error}); install: {hint}") from error
    except (gym.error.Error, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"cannot make {task}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if isinstance(env.observation_space, gym.spaces.Dict):
        spaces = env.observation_space.spaces
        goal_keys = ["observation", "desired_goal"]  # the achieved goal is part of the observation
        keys = goal_keys if set(goal_keys) <= set(spaces) else list(spaces)
        flat = gym.spaces.Box(-np.inf, np.inf, (sum(math.prod(spaces[key].shape) for key in keys),), np.float32)
        env = gym.wrappers.TransformObservation(env, lambda o: np.concatenate([np.ravel(o[k]) for k in keys]), flat)
    for space, what in ((env.observation_space, "observation"), (env.action_space, "action")):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise UserError(f"{task}: this script needs a flat continuous (1-D Box) {what} space, not {space}")
    if not np.all(np.isfinite(env.action_space.low) & np.isfinite(env.action_space.high)):
        raise UserError(f"{task}: the action space needs finite bounds, not {env.action_space}")
    return gym.wrappers.RescaleAction(env, np.float32(-1.0), np.float32(1.0))


def make_worker_env(task: str, seed: int) -> gym.Env:
    """make_env for a worker process, which leaves it to the main process to handle Ctrl-C and SIGTERM."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return make_env(task, seed=seed)


def envpool_id(task: str) -> str | None:
    """envpool's name of a dmc/, metaworld/ or shadowhand/ task, or None if it has none that works."""
    import envpool

    family, _, name = task.partition("/")
    camel = "".join(part.capitalize() for part in name.split("-"))
    hand = SHADOWHAND_ENVPOOL.get(name)
    found = {"dmc": f"{camel}-v1", "metaworld": f"MetaWorld/{camel}-v3", "shadowhand": hand}.get(family)
    return found if found in envpool.list_all_envs() and task not in ENVPOOL_BROKEN else None


class EnvPoolTask:
    """num_envs copies of one task in one envpool pool; send and recv overlap with other work."""

    def __init__(self, task: str, num_envs: int, seed: int):
        import envpool

        kwargs = {
            "metaworld": {"max_episode_steps": 200, "partially_observable": False},
            "shadowhand": ROTATE_Z,
        }.get(task.partition("/")[0], {})
        self.pool = envpool.make(envpool_id(task), env_type="gymnasium", num_envs=num_envs, seed=seed, **kwargs)
        space = self.pool.observation_space
        self.keys = list(space.spaces) if isinstance(space, gym.spaces.Dict) else None
        for prefix, keys in ENVPOOL_KEYS.items():
            if task.startswith(prefix):
                self.keys = keys.split()
        self.action_dim, self.num_envs, self.env_ids = self.pool.action_space.shape[0], num_envs, np.arange(num_envs)
        self.low, self.high = np.float64(self.pool.action_space.low), np.float64(self.pool.action_space.high)
        self.observation_dim = self.reset().shape[1]

    def flatten(self, observation) -> np.ndarray:
        if self.keys is None:
            return observation
        return np.concatenate([observation[key].reshape(self.num_envs, -1) for key in self.keys], axis=1)

    def reset(self) -> np.ndarray:
        return self.flatten(self.pool.reset()[0])

    def send(self, actions: np.ndarray) -> None:
        actions = self.low + (np.float64(actions) + 1) / 2 * (self.high - self.low)  # quadruped's are not [-1, 1]
        self.pool.send(actions.astype(self.pool.action_space.dtype), self.env_ids)

    def recv(self):
        observation, reward, terminated, truncated, info = self.pool.recv()
        return self.flatten(observation), reward, terminated, truncated, info

    def close(self) -> None:
        self.pool.close()


class GymnasiumTask:
    """One task in a worker process, a Gymnasium AsyncVectorEnv of one environment.

    The worker comes from a fork server that imported the heavy modules once: never a fork of this process, whose JAX
    threads would not survive it. Like envpool, it resets on the step after done, ignoring that step's action.
    """

    num_envs = 1

    def __init__(self, task: str, seed: int):
        heavy_modules = ["jax", "flax.linen", "optax", "orbax.checkpoint", "tyro", "gymnasium"]
        multiprocessing.get_context("forkserver").set_forkserver_preload(heavy_modules)
        self.task, self.seed, self.envs = task, seed, None
        make = partial(make_worker_env, task, seed)
        self.envs = self.call(gym.vector.AsyncVectorEnv, [make], context="forkserver")
        self.observation_dim = self.envs.single_observation_space.shape[0]
        self.action_dim = gym.spaces.flatdim(self.envs.single_action_space)
        atexit.register(self.close)

    def call(self, function, *args, **kwargs):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Gymnasium shows the worker's traceback as a warning
                return function(*args, **kwargs)
        except UserError:
            raise
        except (EOFError, ConnectionError) as error:
            self.close()
            raise UserError(f"the worker process of {self.task} died, perhaps for lack of memory") from error
        except Exception as error:  # whatever the environment itself raised in its process
            self.close()
            raise UserError(f"{self.task} failed in its worker process: {type(error).__name__}: {error}") from error

    def reset(self) -> np.ndarray:
        seed, self.seed = self.seed, None  # later resets continue the environments' own random streams
        return self.call(self.envs.reset, seed=seed)[0]

    def send(self, actions: np.ndarray) -> None:
        self.call(self.envs.step_async, actions.astype(self.envs.single_action_space.dtype))

    def recv(self):
        return self.call(self.envs.step_wait)

    def close(self) -> None:
        if self.envs is None:  # it died while it started
            return
        for process in self.envs.processes:  # they ignore signals but this one, and have nothing to save
            process.kill()  # without asking is_alive(): it says no once a signal has ended the fork server
        self.envs.closed = True
        atexit.unregister(self.close)


class ParallelEnvs:
    """num_envs copies of every task that envpool steps, and one of every other, stepped all at once.

    Row r is a copy of task task_ids[r]. Observations are zero-padded to the widest task, actions cut to the task's own
    size (E.1's mixes). After terminated or truncated, the next step resets that row: it returns the first observation
    and ignores the action.
    """

    def __init__(self, tasks: list[str], num_envs: int, seed: int, backend: str):
        self.tasks, seeds = tasks, np.random.SeedSequence(seed).generate_state(len(tasks)) % 2**30
        self.pools = [self.make_pool(t, num_envs, int(s), backend) for t, s in zip(tasks, seeds, strict=True)]
        self.task_ids = np.repeat(np.arange(len(tasks)), [pool.num_envs for pool in self.pools])
        starts = np.cumsum([0] + [pool.num_envs for pool in self.pools])
        self.rows = [(slice(*ends), pool) for ends, pool in zip(itertools.pairwise(starts), self.pools, strict=True)]
        self.size = len(self.task_ids)
        self.observation_dims = [pool.observation_dim for pool in self.pools]
        self.action_dims = [pool.action_dim for pool in self.pools]
        self.observation_dim, self.action_dim = max(self.observation_dims), max(self.action_dims)
        self.action_mask = np.arange(self.action_dim) < np.array(self.action_dims)[:, None]

    def make_pool(self, task: str, num_envs: int, seed: int, backend: str):
        if backend != "gymnasium" and task.startswith(("dmc/", "metaworld/", "shadowhand/")):
            try:
                if envpool_id(task):
                    return EnvPoolTask(task, num_envs, seed)
                problem = f"envpool has no {task} that works"
            except ImportError:
                problem = "envpool is missing: pip install envpool==1.2.5"
            if backend == "envpool":
                raise UserError(f"{problem}; or take --env-backend auto")
        elif backend == "envpool":
            raise UserError(f"envpool has no {task}; take --env-backend auto")
        return GymnasiumTask(task, seed)

    def reset(self) -> np.ndarray:
        observations = np.zeros((self.size, self.observation_dim), np.float32)
        for rows, pool in self.rows:
            observations[rows, : pool.observation_dim] = pool.reset()
        return observations

    def send(self, actions: np.ndarray, resting: np.ndarray | None = None) -> None:
        """actions: [size, action_dim] in [-1, 1]. Tasks whose rows of `resting` [size] are all True are not stepped."""
        self.stepping = [(rows, pool) for rows, pool in self.rows if resting is None or not resting[rows].all()]
        for rows, pool in self.stepping:
            pool.send(actions[rows, : pool.action_dim])

    def recv(self):
        """Returns observations [size, observation_dim] and rewards, terminated, truncated, success, each [size].

        success is NaN where the environment reports none; all is zero where a task was not stepped.
        """
        observations = np.zeros((self.size, self.observation_dim), np.float32)
        rewards, success = np.zeros(self.size, np.float32), np.full(self.size, np.nan, np.float32)
        terminated, truncated = np.zeros(self.size, bool), np.zeros(self.size, bool)
        for rows, pool in self.stepping:
            observation, rewards[rows], terminated[rows], truncated[rows], info = pool.recv()
            observations[rows, : pool.observation_dim] = observation
            success[rows] = info.get("success", info.get("is_success", np.nan))
        return observations, rewards, terminated, truncated & ~terminated, success

    def close(self) -> None:
        for pool in self.pools:
            pool.close()


# -------------------------------------------------------------------------------------------------------- replay


class Batch(NamedTuple):
    """Transitions; leading axes [utd, batch_size] when sampled from replay."""

    observations: np.ndarray  # [..., |S|]
    actions: np.ndarray  # [..., |A|]
    rewards: np.ndarray  # [...], as the environment gave them: Eq. 3 is applied when they are used
    terminated: np.ndarray  # [...], 1.0 if the episode terminated here; truncation does not cut the bootstrap
    next_observations: np.ndarray  # [..., |S|]
    task_ids: np.ndarray  # [...]


class Replay:
    """A ring of transitions per task, all tasks in step, that stores every observation once.

    Slot t holds observation t and what was done there; its next observation is slot t + 1's. The slot of an
    episode's final observation is the step that the environment used to reset: it is invalid and never sampled. The
    slot at `head` waits for its action.
    """

    def __init__(self, num_tasks: int, capacity: int, observation_dim: int, action_dim: int):
        shape = (num_tasks, capacity + 1)
        self.observations = np.zeros((*shape, observation_dim), np.float32)
        self.actions = np.zeros((*shape, action_dim), np.float32)
        self.rewards = np.zeros(shape, np.float32)
        self.terminated = np.zeros(shape, np.float32)
        self.valid = np.zeros(shape, bool)
        self.inserted, self.slots = 0, capacity + 1

    def start(self, observations: np.ndarray) -> None:
        """First observations [num_tasks, |S|]; after a resume, the interrupted episodes end unlearned at `head`."""
        if self.inserted:
            self.advance()
        self.observations[:, self.head] = observations

    @property
    def head(self) -> int:
        return self.inserted % self.slots

    @property
    def size(self) -> int:
        return min(self.inserted, self.slots - 1)

    def advance(self) -> None:
        self.inserted += 1
        self.valid[:, self.head] = False

    def insert(self, actions, rewards, terminated, valid, next_observations) -> None:
        """One step of every task, [num_tasks, ...]; valid is False where this step was a reset."""
        self.actions[:, self.head] = actions
        self.rewards[:, self.head] = rewards
        self.terminated[:, self.head] = terminated
        self.valid[:, self.head] = valid
        self.advance()
        self.observations[:, self.head] = next_observations

    def sample(self, rng: np.random.Generator, utd: int, batch_size: int) -> Batch:
        """Uniform over the stored transitions of all tasks."""
        shape = (utd, batch_size)
        task_ids = rng.integers(len(self.valid), size=shape, dtype=np.int32)
        slots = (self.head - rng.integers(1, self.size + 1, size=shape)) % self.slots
        while not (valid := self.valid[task_ids, slots]).all():
            redrawn = int((~valid).sum())
            task_ids[~valid] = rng.integers(len(self.valid), size=redrawn)
            slots[~valid] = (self.head - rng.integers(1, self.size + 1, size=redrawn)) % self.slots
        return self.gather(task_ids, slots)

    def sample_task(self, rng: np.random.Generator, task: int, batch_size: int) -> Batch:
        """Uniform over the stored transitions of one task, [batch_size, ...]."""
        slots = (self.head - np.arange(1, self.size + 1)) % self.slots
        slots = rng.choice(slots[self.valid[task, slots]], batch_size)
        return self.gather(np.full(batch_size, task, np.int32), slots)

    def gather(self, task_ids: np.ndarray, slots: np.ndarray) -> Batch:
        now, following = task_ids * self.slots + slots, task_ids * self.slots + (slots + 1) % self.slots
        # take() of flat arrays: twice as fast as indexing with two arrays
        take = lambda array, rows: array.reshape(-1, *array.shape[2:]).take(rows, axis=0)  # noqa: E731
        return Batch(
            take(self.observations, now), take(self.actions, now), take(self.rewards, now),
            take(self.terminated, now), take(self.observations, following), task_ids,
        )  # fmt: skip

    def records(self, task: int, slots: np.ndarray, observation_dim=None, action_dim=None) -> np.ndarray:
        """Slots of one task as a structured array, cut to the given sizes: what is written to disk."""
        observation_dim = observation_dim or self.observations.shape[-1]
        action_dim = action_dim or self.actions.shape[-1]
        dtype = [("observation", "f4", (observation_dim,)), ("action", "f4", (action_dim,)), ("reward", "f4"),
                 ("terminated", "?"), ("valid", "?")]  # fmt: skip
        records = np.zeros(len(slots), dtype)
        records["observation"] = self.observations[task, slots, :observation_dim]
        records["action"] = self.actions[task, slots, :action_dim]
        records["reward"], records["terminated"] = self.rewards[task, slots], self.terminated[task, slots]
        records["valid"] = self.valid[task, slots]
        return records

    def load_records(self, task: int, slots: np.ndarray, records: np.ndarray) -> None:
        """Inverse of `records`, uncut."""
        self.observations[task, slots], self.actions[task, slots] = records["observation"], records["action"]
        self.rewards[task, slots], self.terminated[task, slots] = records["reward"], records["terminated"]
        self.valid[task, slots] = records["valid"]


# ------------------------------------------------------------------------------------------------------ networks

orthogonal = nn.initializers.orthogonal(math.sqrt(2))


class BroNet(nn.Module):
    """BroNet (C.3, Figure 13): dense, layer norm, ReLU, then residual blocks of two normalized dense layers."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.LayerNorm()(nn.Dense(self.width, kernel_init=orthogonal)(x)))
        for _ in range(self.depth):
            y = nn.relu(nn.LayerNorm()(nn.Dense(self.width, kernel_init=orthogonal)(x)))
            x = x + nn.LayerNorm()(nn.Dense(self.width, kernel_init=orthogonal)(y))
        return x


class SimBa(nn.Module):
    """SimBa (Lee et al., 2024): pre-norm residual blocks with a 4x bottleneck; its input is normalized by running
    statistics, which the agent keeps."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.width, kernel_init=nn.initializers.orthogonal(1.0))(x)
        for _ in range(self.depth):
            y = nn.Dense(4 * self.width, kernel_init=nn.initializers.he_normal())(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width, kernel_init=nn.initializers.he_normal())(nn.relu(y))
        return nn.LayerNorm()(x)


class MLP(nn.Module):
    """The vanilla SAC network: `depth` ReLU layers."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width, kernel_init=orthogonal)(x))
        return x


class Heads(nn.Module):
    """A linear output; with num_heads > 1, one per task, of which each row takes its own (Yu et al., 2020)."""

    features: int
    num_heads: int
    gain: float = math.sqrt(2)

    @nn.compact
    def __call__(self, x: jax.Array, task_ids: jax.Array) -> jax.Array:
        def head_by_head(key, shape, dtype):  # one orthogonal matrix over all heads would shrink each head's outputs
            keys, init = jax.random.split(key, self.num_heads), nn.initializers.orthogonal(self.gain)
            return jnp.concatenate([init(k, (shape[0], self.features), dtype) for k in keys], axis=1)

        x = nn.Dense(self.num_heads * self.features, kernel_init=head_by_head)(x)
        if self.num_heads == 1:
            return x
        x = x.reshape(*x.shape[:-1], self.num_heads, self.features)
        return jnp.take_along_axis(x, task_ids[:, None, None], axis=-2).squeeze(-2)


class Critic(nn.Module):
    """One Q-network: [batch, |S| + |A| (+ embedding)] to [batch, num_atoms] logits, or [batch, 1] values with MSE."""

    backbone: type[nn.Module]
    width: int
    depth: int
    features: int
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array, task_ids: jax.Array) -> jax.Array:
        return Heads(self.features, self.num_heads)(self.backbone(self.width, self.depth)(x), task_ids)


class Actor(nn.Module):
    """Tanh-Gaussian policy: mean and log standard deviation in [-10, 2] before the tanh, each [batch, |A|]."""

    width: int
    depth: int
    action_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array, task_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = BroNet(self.width, self.depth)(x)
        mean = Heads(self.action_dim, self.num_heads)(x, task_ids)
        log_std = Heads(self.action_dim, self.num_heads, gain=1.0)(x, task_ids)  # as in BRO and the released code
        return mean, -10.0 + 6.0 * (1.0 + jnp.tanh(log_std))


def sample_action(key: jax.Array, mean: jax.Array, log_std: jax.Array, mask=1.0) -> tuple[jax.Array, jax.Array]:
    """Reparameterized tanh-Gaussian sample [batch, |A|] and its log-density [batch].

    mask [batch, |A|] is 0 in the dimensions that a task does not have: no action there, and no entropy.
    """
    noise = jax.random.normal(key, mean.shape)
    x = mean + jnp.exp(log_std) * noise
    log_density = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_det_tanh = 2 * (math.log(2) - x - nn.softplus(-2 * x))  # log(1 - tanh(x)^2), stable for large |x|
    return jnp.tanh(x) * mask, ((log_density - log_det_tanh) * mask).sum(-1)


# --------------------------------------------------------------------------------------- categorical projection


def categorical_projection(probs: jax.Array, target_atoms: jax.Array, v_min: float, v_max: float) -> jax.Array:
    """Projects a distribution onto the fixed support (C.2; Bellemare et al., 2017, Algorithm 1).

    Args: probs [batch, N], mass at target_atoms [batch, N]; atoms outside [v_min, v_max] go to the nearest end.
    Returns [batch, N]: mass on N evenly spaced atoms, each atom's mass shared by its two neighbours. Two scatter-adds;
    a [batch, N, N] tensor is never built.
    """
    num_atoms = probs.shape[-1]
    position = (jnp.clip(target_atoms, v_min, v_max) - v_min) * ((num_atoms - 1) / (v_max - v_min))
    lower = jnp.clip(jnp.floor(position), 0, num_atoms - 2)
    upper_share = position - lower
    rows, lower = jnp.arange(len(probs))[:, None], lower.astype(jnp.int32)
    projected = jnp.zeros_like(probs).at[rows, lower].add(probs * (1 - upper_share))
    return projected.at[rows, lower + 1].add(probs * upper_share)


# ------------------------------------------------------------------------------------------ return normalization


class ReturnNormalizer:
    """Largest absolute return G_i seen in each task (C.2, Eq. 2).

    A reward enters the replay before its episode ends, so G_i covers |r| at once; it covers returns when the episode
    ends: zero after the end if it terminated, the given bootstrap value if it was truncated. With a bootstrap of at
    most G_i in magnitude, G_i <= max |r| / (1 - discount) by induction: |r| + discount G_i keeps the bound.
    """

    def __init__(self, num_tasks: int, discount: float):
        self.max_return = np.zeros(num_tasks, np.float32)
        self.discount = discount
        self.episodes: list[list[float]] = [[] for _ in range(num_tasks)]

    def update(self, rewards, terminated, truncated, valid, bootstrap=None) -> None:
        """One step of every task, each [num_tasks]. bootstrap: value of the final observation in units of reward, used
        where truncated; None takes the episode's mean reward / (1 - discount), as the released code does."""
        self.max_return = np.where(valid, np.maximum(self.max_return, np.abs(rewards)), self.max_return)
        for task in np.flatnonzero(valid):
            self.episodes[task].append(float(rewards[task]))
            if not (terminated[task] or truncated[task]):
                continue
            episode, self.episodes[task] = self.episodes[task], []
            value = 0.0
            if truncated[task]:
                value = np.mean(episode) / (1 - self.discount) if bootstrap is None else float(bootstrap[task])
            for reward in reversed(episode):
                value = reward + self.discount * value
                self.max_return[task] = max(self.max_return[task], abs(value))


# ----------------------------------------------------------------------------------------- agent state and update

ENTROPY_RATE = 0.05  # of the running mean that estimates H_i of Eq. 4 from each batch's rows of task i
MIN_SCALE = 1e-8  # of Eq. 3's divisor; reached only by a task whose rewards were all zero


class RunningStatistics(NamedTuple):
    """Mean and variance of observations [|S|], for SimBa's input normalization."""

    count: jax.Array
    mean: jax.Array
    variance: jax.Array


class AgentState(NamedTuple):
    """Everything that learning changes, on the device."""

    actor: Any
    actor_optimizer: Any
    critic: Any  # {"embedding": [num_tasks, embedding_size] or absent, "ensemble": leaves [num_critics, ...]}
    critic_optimizer: Any
    target_critic: Any
    log_temperature: jax.Array
    temperature_optimizer: Any
    entropy: jax.Array  # [num_tasks], H_i of Eq. 4
    statistics: RunningStatistics
    key: jax.Array


class Agent(NamedTuple):
    """The compiled functions of one agent; see make_agent."""

    init: Any
    act: Any
    act_deterministic: Any
    value: Any
    update: Any
    task_statistics: Any
    embeddings: Any
    parameter_norm: Any


def make_agent(args: Args, num_tasks: int, observation_dim: int, action_dim: int, action_dims=None) -> Agent:
    """The agent as pure functions of AgentState. One task takes the same path, without embedding or extra heads.

    action_dims: the tasks' own action sizes (default: action_dim for all). Entropy counts, and its target is set by,
    the dimensions that a task has; those added by padding would otherwise hold entropy that its real actions lack.
    """
    use_embedding = num_tasks > 1 and args.task_conditioning == "embedding"
    num_heads = num_tasks if num_tasks > 1 and args.task_conditioning == "heads" else 1
    categorical = args.critic_loss == "ce"
    own_dims = jnp.array(action_dims or [action_dim] * num_tasks)
    action_mask = (jnp.arange(action_dim) < own_dims[:, None]).astype(jnp.float32)  # [num_tasks, |A|]
    target_entropy = -own_dims / 2 if args.target_entropy is None else jnp.full(num_tasks, args.target_entropy)
    atoms = jnp.linspace(args.v_min, args.v_max, args.num_atoms)  # Eq. 1
    actor_network = Actor(args.actor_width, args.actor_depth, action_dim, num_heads)
    critic_outputs_dim = args.num_atoms if categorical else 1
    backbone = {"bronet": BroNet, "simba": SimBa, "mlp": MLP}[args.critic_arch]
    critic_network = Critic(backbone, args.critic_width, args.critic_depth, critic_outputs_dim, num_heads)
    embedding_network = nn.Embed(num_tasks, args.embedding_size)
    actor_optimizer = optax.adamw(args.actor_lr, weight_decay=args.weight_decay)
    critic_optimizer = optax.adamw(args.critic_lr, weight_decay=args.weight_decay)
    temperature_optimizer = optax.adam(args.temperature_lr, b1=0.5)

    def init(seed: int) -> AgentState:
        key, actor_key, embedding_key, *critic_keys = jax.random.split(jax.random.PRNGKey(seed), 3 + args.num_critics)
        task_ids = jnp.zeros(1, jnp.int32)
        conditioned_dim = observation_dim + args.embedding_size * use_embedding
        actor = jax.jit(actor_network.init)(actor_key, jnp.zeros((1, conditioned_dim)), task_ids)
        # One critic at a time: vmapped orthogonal initializers inside one jit deadlock on jaxlib 0.10.2 with 2 cores.
        critic_init = jax.jit(critic_network.init)
        members = [critic_init(k, jnp.zeros((1, conditioned_dim + action_dim)), task_ids) for k in critic_keys]
        critic = {"ensemble": jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)}
        if use_embedding:
            critic["embedding"] = embedding_network.init(embedding_key, task_ids)
        log_temperature = jnp.log(jnp.float32(args.initial_temperature))
        return AgentState(
            actor, actor_optimizer.init(actor), critic, critic_optimizer.init(critic), jax.tree.map(jnp.copy, critic),
            log_temperature, temperature_optimizer.init(log_temperature), jnp.zeros(num_tasks),
            RunningStatistics(jnp.zeros(()), jnp.zeros(observation_dim), jnp.ones(observation_dim)), key,
        )  # fmt: skip

    def embed(critic, task_ids):
        """Unit-norm task embeddings (C.4), [..., embedding_size]."""
        embedding = embedding_network.apply(critic["embedding"], task_ids)
        order = 1 if args.embedding_norm == "l1" else 2
        return embedding / jnp.linalg.norm(embedding, ord=order, axis=-1, keepdims=True)

    def policy(actor, critic, observations, task_ids):
        """Arguments of sample_action; the embedding is the critic's and gets no gradient from here (C.4)."""
        if use_embedding:
            observations = jnp.concatenate([observations, jax.lax.stop_gradient(embed(critic, task_ids))], axis=-1)
        return *actor_network.apply(actor, observations, task_ids), action_mask[task_ids]

    def critic_outputs(critic, statistics, observations, actions, task_ids):
        """Outputs of every critic, [num_critics, batch, num_atoms or 1]."""
        if args.critic_arch == "simba":
            observations = (observations - statistics.mean) / jnp.sqrt(statistics.variance + 1e-8)
        inputs = [observations, actions] + ([embed(critic, task_ids)] if use_embedding else [])
        apply = jax.vmap(critic_network.apply, in_axes=(0, None, None))
        return apply(critic["ensemble"], jnp.concatenate(inputs, axis=-1), task_ids)

    def q_values(outputs):
        """Expected return, mean over critics (C.1): [num_critics, batch, ...] to [batch]."""
        values = (nn.softmax(outputs) * atoms).sum(-1) if categorical else outputs.squeeze(-1)
        return values.mean(0)

    def reward_scale(state, max_return):
        """V_max / (G_i + lambda_i) for each task (Eq. 3, 4).

        The entropy of a sharp policy is negative, and Eq. 4 as printed could flip the sign of Eq. 3; its magnitude
        bounds what entropy adds to or takes from a return. As G_i >= |r|, a normalized reward never exceeds V_max, and
        the divisor's floor only acts where every reward was zero.
        """
        if not args.normalize_returns:
            return jnp.ones(num_tasks)
        temperature = jnp.exp(state.log_temperature)
        entropy = jnp.abs(state.entropy) if args.entropy_correction == "empirical" else own_dims / 4
        return args.v_max / jnp.maximum(max_return + temperature * entropy / (1 - args.discount), MIN_SCALE)

    def critic_target(state, batch, max_return, key):
        """Target distribution [batch, num_atoms] (C.2), or target value [batch] with MSE, and normalized rewards."""
        next_observations, task_ids = batch.next_observations, batch.task_ids
        rewards = batch.rewards * reward_scale(state, max_return)[task_ids]
        discounts = args.discount * (1 - batch.terminated)
        next_policy = policy(state.actor, state.critic, next_observations, task_ids)
        next_actions, next_log_probs = sample_action(key, *next_policy)
        outputs = critic_outputs(state.target_critic, state.statistics, next_observations, next_actions, task_ids)
        entropy_bonus = -jnp.exp(state.log_temperature) * next_log_probs
        if not categorical:
            return rewards + discounts * (q_values(outputs) + entropy_bonus), rewards
        target_atoms = rewards[:, None] + discounts[:, None] * (atoms + entropy_bonus[:, None])
        return categorical_projection(nn.softmax(outputs).mean(0), target_atoms, args.v_min, args.v_max), rewards

    def critic_loss(critic, state, batch, target):
        """Cross-entropy with the target distribution, or squared error; mean over the batch, sum over critics."""
        outputs = critic_outputs(critic, state.statistics, batch.observations, batch.actions, batch.task_ids)
        if categorical:
            return -(target * nn.log_softmax(outputs)).sum(-1).mean(-1).sum()
        return ((outputs.squeeze(-1) - target) ** 2).mean(-1).sum()

    def actor_loss(actor, state, batch, key):
        """Soft policy improvement, alpha log pi - Q, and the log-densities [batch]."""
        actions, log_probs = sample_action(key, *policy(actor, state.critic, batch.observations, batch.task_ids))
        q = q_values(critic_outputs(state.critic, state.statistics, batch.observations, actions, batch.task_ids))
        return (jnp.exp(state.log_temperature) * log_probs - q).mean(), log_probs

    def update_statistics(statistics, observations):
        """Chan et al.'s parallel mean and variance."""
        count = statistics.count + len(observations)
        delta = observations.mean(0) - statistics.mean
        mean = statistics.mean + delta * len(observations) / count
        squares = statistics.variance * statistics.count + observations.var(0) * len(observations)
        squares += delta**2 * statistics.count * len(observations) / count
        return RunningStatistics(count, mean, squares / count)

    def update_once(state: AgentState, batch: Batch, max_return: jax.Array):
        """Critic, target critic, actor, temperature, in this order."""
        key, critic_key, actor_key = jax.random.split(state.key, 3)
        state = state._replace(key=key)
        if args.critic_arch == "simba":
            state = state._replace(statistics=update_statistics(state.statistics, batch.observations))

        target, rewards = critic_target(state, batch, max_return, critic_key)
        critic_value, gradient = jax.value_and_grad(critic_loss)(state.critic, state, batch, target)
        critic_norm = optax.tree.norm(gradient)
        step, optimizer = critic_optimizer.update(gradient, state.critic_optimizer, state.critic)
        critic = optax.apply_updates(state.critic, step)
        target_critic = optax.incremental_update(critic, state.target_critic, args.polyak_tau)
        state = state._replace(critic=critic, critic_optimizer=optimizer, target_critic=target_critic)

        actor_value_and_grad = jax.value_and_grad(actor_loss, has_aux=True)
        (actor_value, log_probs), gradient = actor_value_and_grad(state.actor, state, batch, actor_key)
        actor_norm = optax.tree.norm(gradient)
        step, optimizer = actor_optimizer.update(gradient, state.actor_optimizer, state.actor)
        state = state._replace(actor=optax.apply_updates(state.actor, step), actor_optimizer=optimizer)

        entropy = -log_probs.mean()
        rows = jnp.zeros(num_tasks).at[batch.task_ids].add(1.0)
        task_entropy = jnp.zeros(num_tasks).at[batch.task_ids].add(-log_probs) / jnp.maximum(rows, 1)
        task_entropy = jnp.where(rows > 0, state.entropy + ENTROPY_RATE * (task_entropy - state.entropy), state.entropy)

        surplus = entropy - target_entropy[batch.task_ids].mean()
        temperature_loss = lambda log_temperature: jnp.exp(log_temperature) * surplus  # noqa: E731
        temperature_value, gradient = jax.value_and_grad(temperature_loss)(state.log_temperature)
        step, optimizer = temperature_optimizer.update(gradient, state.temperature_optimizer)
        state = state._replace(
            log_temperature=state.log_temperature + step, temperature_optimizer=optimizer, entropy=task_entropy
        )
        q = (target * atoms).sum(-1) if categorical else target
        metrics = {
            "losses/critic": critic_value, "losses/actor": actor_value, "losses/temperature": temperature_value,
            "gradient_norms/critic": critic_norm, "gradient_norms/actor": actor_norm, "policy/entropy": entropy,
            "policy/temperature": jnp.exp(state.log_temperature), "q/target_mean": q.mean(), "q/target_min": q.min(),
            "q/target_max": q.max(), "rewards/normalized_mean": rewards.mean(),
            "rewards/normalized_max_abs": jnp.abs(rewards).max(),
        }  # fmt: skip
        return state, metrics

    def update(state: AgentState, batches: Batch, max_return: jax.Array):
        """The utd updates of one vector step, one compiled call. batches: [utd, batch_size, ...]; max_return: G_i."""
        for i in range(args.utd):  # unrolled: XLA's CPU backend runs the body of a loop on one thread
            state, metrics = update_once(state, jax.tree.map(lambda x: x[i], batches), max_return)  # noqa: B023
        return state, metrics

    def act(actor, critic, key, step, observations, task_ids):
        """Sampled actions [batch, |A|]."""
        return sample_action(jax.random.fold_in(key, step), *policy(actor, critic, observations, task_ids))[0]

    def act_deterministic(actor, critic, observations, task_ids):
        mean, _, mask = policy(actor, critic, observations, task_ids)
        return jnp.tanh(mean) * mask

    def value(state: AgentState, observations, max_return):
        """Critic's value of one observation per task at the policy's mean action, in units of reward, [num_tasks].

        Undoes Eq. 3 by G_i / V_max, not by (G_i + lambda_i) / V_max: the tail then never exceeds G_i, whatever the
        critic says. With lambda_i it could exceed G_i, which never falls, at every truncation again.
        """
        task_ids = jnp.arange(num_tasks)
        actions = act_deterministic(state.actor, state.critic, observations, task_ids)
        q = q_values(critic_outputs(state.critic, state.statistics, observations, actions, task_ids))
        return jnp.clip(q / args.v_max, -1, 1) * max_return if args.normalize_returns else q

    def task_statistics(state: AgentState, batches: Batch, max_return):
        """Per-task diagnostics (Figures 3 and 5). batches: [num_tasks, batch, ...], row t from task t.

        Returns TD loss, critic gradient norm and policy entropy, each [num_tasks], and the cosine between task
        gradients, [num_tasks, num_tasks]. Gradients are recomputed pair by pair, so that only two are in memory.
        """

        def loss_and_gradient(task):
            batch = jax.tree.map(lambda x: x[task], batches)
            target, _ = critic_target(state, batch, max_return, jax.random.PRNGKey(0))
            return jax.value_and_grad(critic_loss)(state.critic, state, batch, target)

        def row(task):
            loss, gradient = loss_and_gradient(task)
            dot = lambda other: optax.tree.vdot(gradient, loss_and_gradient(other)[1])  # noqa: E731
            dots = jax.lax.map(dot, jnp.arange(num_tasks))
            batch = jax.tree.map(lambda x: x[task], batches)
            return loss, dots, -actor_loss(state.actor, state, batch, jax.random.PRNGKey(1))[1].mean()

        losses, dots, entropies = jax.lax.map(row, jnp.arange(num_tasks))
        norms = jnp.sqrt(jnp.diagonal(dots))
        return losses, norms, entropies, dots / jnp.maximum(norms[:, None] * norms[None, :], 1e-30)

    def embeddings(critic):
        return embed(critic, jnp.arange(num_tasks)) if use_embedding else None

    def parameter_norm(state: AgentState):
        """Norm of all network parameters, finite if they all are."""
        return optax.tree.norm((state.actor, state.critic, state.target_critic))

    return Agent(init, jax.jit(act), jax.jit(act_deterministic), jax.jit(value), jax.jit(update, donate_argnums=0),
                 jax.jit(task_statistics), jax.jit(embeddings), jax.jit(parameter_norm))  # fmt: skip


def parameter_count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# ---------------------------------------------------------------------------------------------------- evaluation


EVAL_ENVS = 40  # at most, for several tasks: one of Meta-World's takes 25 MB, a dog 86 MB
MAX_EPISODE_STEPS = 30_000  # a gym/ task registered without max_episode_steps may never end


def eval_copies(num_tasks: int, episodes: int) -> int:
    """Copies of each task that evaluation steps at once: a divisor of `episodes`, so that none is played in vain."""
    return max(n for n in range(1, episodes + 1) if episodes % n == 0 and (n == 1 or n * num_tasks <= EVAL_ENVS))


def evaluate(agent: Agent, state: AgentState, envs: ParallelEnvs, episodes: int, stop: list):
    """Returns and successes of deterministic episodes, a list of [episodes] per task; None if `stop` fills meanwhile.

    Every copy of a task plays the same number of whole episodes, so that short episodes are not counted more often.
    """
    returns, successes = [[[] for _ in range(envs.size)] for _ in range(2)]
    episode_return, episode_success = np.zeros(envs.size), np.full(envs.size, np.nan)
    quota = np.ceil(episodes / np.bincount(envs.task_ids))[envs.task_ids]
    length, done, observations = np.zeros(envs.size, int), np.zeros(envs.size, bool), envs.reset()
    while not (finished := np.array([len(r) for r in returns]) >= quota).all():
        if stop:
            return None
        actions = np.asarray(agent.act_deterministic(state.actor, state.critic, observations, envs.task_ids))
        envs.send(actions, resting=finished)
        observations, rewards, terminated, truncated, success = envs.recv()
        episode_return += np.where(done, 0, rewards)  # the step after done was a reset
        episode_success = np.where(done, np.nan, np.fmax(episode_success, success))  # success at any step counts
        length = np.where(done | finished, 0, length + 1)
        if length.max() > MAX_EPISODE_STEPS:
            task = envs.tasks[envs.task_ids[length.argmax()]]
            raise UserError(f"an episode of {task} had no end within {MAX_EPISODE_STEPS:,} steps: give it a time limit")
        done = ~done & (terminated | truncated)
        for row in np.flatnonzero(done):
            if len(returns[row]) < quota[row]:
                returns[row].append(episode_return[row])
                successes[row].append(episode_success[row])
        episode_return[done] = 0
    return tuple([np.concatenate(values[rows]) for rows, _ in envs.rows] for values in (returns, successes))


def frame_renderer(env: gym.Env):
    """A function that returns an RGB frame [height, width, 3]; HumanoidBench's own fails on current Gymnasium."""
    if not hasattr(env.unwrapped, "robot"):
        return env.render
    import mujoco

    renderer = mujoco.Renderer(env.unwrapped.model, 256, 256)

    def render() -> np.ndarray:
        renderer.update_scene(env.unwrapped.data, camera=env.unwrapped.task.camera_name)
        return renderer.render()

    return render


def record_video(agent: Agent, state: AgentState, task: str, task_id: int, observation_dim: int, path: Path, stop):
    """One deterministic episode as mp4, every second frame; none if `stop` fills meanwhile."""
    import imageio

    env = make_env(task, render_mode="rgb_array")
    render, frames = frame_renderer(env), []
    observation, done = env.reset()[0], False
    for time_step in itertools.count():
        if time_step % 2 == 0:
            frames.append(render())
        if done or stop:
            break
        padded = np.zeros((1, observation_dim), np.float32)
        padded[0, : len(observation)] = observation
        action = np.asarray(agent.act_deterministic(state.actor, state.critic, padded, np.array([task_id])))[0]
        observation, _, terminated, truncated, _ = env.step(action[: env.action_space.shape[0]])
        done = terminated or truncated
    env.close()
    if stop:
        return
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # JAX's, about the fork that starts ffmpeg: it execs at once
        imageio.mimsave(path, frames, fps=30)


def log_task_statistics(agent, state, replay, normalizer, tasks, run_dir: Path, logger, step: int, batch_size=256):
    """Per-task diagnostics to TensorBoard and RUN_DIR/statistics/<step>.npz.

    Relative variance is sigma / mu over tasks (Figure 3); a conflict is a negative cosine between the critic gradients
    of two tasks (Figure 5; Yu et al., 2020); embeddings are those of Figure 7.
    """
    rng = np.random.default_rng(step)  # its own, so that logging does not change what is learned
    batches = [replay.sample_task(rng, task, batch_size) for task in range(len(tasks))]
    batches = Batch(*(np.stack(leaves) for leaves in zip(*batches, strict=True)))
    losses, norms, entropies, cosines = map(np.asarray, agent.task_statistics(state, batches, normalizer.max_return))
    values, arrays = {}, {"gradient_cosine": cosines}
    for name, array in (("td_loss", losses), ("gradient_norm", norms), ("entropy", entropies)):
        arrays[name] = array
        values |= {f"tasks/{name}/{task}": value for task, value in zip(tasks, array, strict=True)}
        values[f"relative_variance/{name}"] = array.std() / max(abs(array.mean()), 1e-12)
    if len(tasks) > 1:
        values["gradient_conflict_rate"] = (cosines[np.triu_indices(len(tasks), 1)] < 0).mean()
        if (embeddings := agent.embeddings(state.critic)) is not None:
            arrays["embedding"] = np.asarray(embeddings)
    logger.scalars(values, step)
    (run_dir / "statistics").mkdir(exist_ok=True)
    np.savez(run_dir / "statistics" / f"{step}.npz", task=np.array(tasks), **arrays)


# --------------------------------------------------------------------------------------- logging and checkpoints

SCRIPT = "brc_sac_continuous"
PACKAGES = ("jax", "flax", "optax", "envpool", "mujoco", "dm_control", "metaworld", "gymnasium")
EVAL_COLUMNS = ("step", "updates", "wall_time", "task", "episodes", "return", "success", "score")
RESUMABLE = {  # arguments that a resumed run may change
    "total_timesteps", "eval_every", "eval_episodes", "checkpoint_every", "keep_checkpoints", "save_replay",
    "capture_video", "log_task_statistics", "track", "wandb_project", "env_backend", "resume",
}  # fmt: skip
LOG_EVERY = 500  # vector steps between TensorBoard points and checks for non-finite losses


def file_name(task: str) -> str:
    return task.replace("/", "-").replace(":", "-")


def replace_file(path: Path, text: str) -> None:
    """Writes a file so that a crash or a full disk leaves the old one."""
    partial_path = path.with_name(f".partial-{path.name}")
    partial_path.write_text(text, newline="")
    partial_path.replace(path)


def parse_args(argv: list[str] | None = None) -> Args:
    """Arguments of the command line; with --resume, those of the saved run, overridden by the command line's."""
    args = tyro.cli(Args, args=argv, config=(tyro.conf.AvoidSubcommands,))
    if not args.resume:
        released = getattr(args, "variant", "paper") == "released-code"
        return tyro.cli(Args, args=argv, default=Args(**RELEASED_CODE)) if released else args
    path = Path(args.resume) / "args.json"
    try:
        saved = json.loads(path.read_text())
        if saved.get("script", SCRIPT) != SCRIPT:
            raise UserError(f"--resume {args.resume}: that run was made by {saved['script']}, not by this script")
        saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        known = {field.name: saved[field.name] for field in fields(Args) if field.name in saved}  # older runs lack some
        default = Args(**{**known, "env_ids": tuple(saved["env_ids"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--resume {args.resume}: no run of this script there ({path}: {error})") from error
    args = tyro.cli(Args, args=argv, default=default)
    changed = [k for k, v in asdict(args).items() if v != getattr(default, k) and k not in RESUMABLE]
    if changed:
        names = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise UserError(f"a resumed run cannot change {names}; start a new run instead")
    return args


def run_information(tasks: list[str], envs: ParallelEnvs) -> dict:
    """What args.json holds besides the arguments."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except ImportError:
            versions[package] = None
    env_info = {
        "num_tasks": len(tasks), "task_names": tasks, "observation_dim": envs.observation_dim,
        "action_dim": envs.action_dim, "observation_dims": envs.observation_dims, "action_dims": envs.action_dims,
    }  # fmt: skip
    device = jax.devices()[0].device_kind
    return {"script": SCRIPT, "env_info": env_info, "versions": versions, "device": device, "git_commit": commit}


class Logger:
    """eval.csv, TensorBoard and, with --track, Weights & Biases. What came after a resume's checkpoint is dropped."""

    def __init__(self, args: Args, run_dir: Path, step: int, last_evaluation: int):
        self.csv = run_dir / "eval.csv"
        rows = []
        if self.csv.exists():
            whole_rows = [row for row in csv.DictReader(self.csv.open()) if None not in row.values()]
            rows = [row for row in whole_rows if int(row["step"]) <= last_evaluation]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, EVAL_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        replace_file(self.csv, text.getvalue())
        self.tensorboard = SummaryWriter(str(run_dir), purge_step=step + 1 if step else None)
        self.wandb = None
        if args.track:
            about = {"project": args.wandb_project, "name": run_dir.name, "id": run_dir.name, "config": asdict(args)}
            try:
                import wandb

                self.wandb = wandb.init(resume="allow", dir=str(run_dir), **about)
            except Exception as error:  # not installed, not logged in, no network
                ways = "pip install wandb, wandb login, or set WANDB_MODE=offline"
                raise UserError(f"--track: {' '.join(str(error).split())}; {ways}") from error

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.tensorboard.add_scalar(name, float(value), step)
        if self.wandb:
            self.wandb.log({**values, "step": step})

    def evaluation(self, rows: list[dict]) -> None:
        with self.csv.open("a", newline="") as file:
            csv.DictWriter(file, EVAL_COLUMNS).writerows(rows)

    def close(self) -> None:
        self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def save_checkpoint(run_dir: Path, step: int, state: AgentState, replay: Replay, counters: dict, keep: int) -> None:
    """Writes checkpoints/<step>/: learner state (Orbax), replay, counters, and a checksum of every file.

    The directory is renamed into place when complete. Replay is written once: a checkpoint holds the slots since the
    previous one and hard links to the older pieces.
    """
    root = run_dir / "checkpoints"
    path, partial_path = root / str(step), root / f".partial-{step}"
    for unfinished in root.glob(".partial-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    if sum(leaf.nbytes for leaf in jax.tree.leaves(state)) > shutil.disk_usage(run_dir).free:
        raise OSError(errno.ENOSPC, "No space left on device")  # before Orbax's threads meet it
    (partial_path / "replay").mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((partial_path / "state").absolute(), state._asdict())
    first, files = 0, {}
    if found := [s for s in checkpoint_steps(run_dir) if s < step]:
        previous = root / str(found[0])
        try:
            known = read_counters(previous)["files"]
        except (OSError, ValueError, KeyError):  # damaged since: the whole replay is written again
            known = {}
        for name in sorted(name for name in known if name.startswith("replay/")):
            end = int(Path(name).stem.split("-")[1])
            first = max(first, end)
            if end > replay.inserted - replay.slots:  # older pieces were overwritten in the ring
                files[name] = known[name]  # its checksum when it was written: a new one would hide damage
                try:
                    os.link(previous / name, partial_path / name)
                except OSError:  # a file system without hard links
                    shutil.copy2(previous / name, partial_path / name)
    first = max(first, replay.inserted - replay.slots + 1)
    slots = np.arange(first, replay.inserted + 1) % replay.slots  # with the waiting slot: it holds the last observation
    with (partial_path / f"replay/{first:012d}-{replay.inserted:012d}.npy").open("wb") as piece:
        header = {"fortran_order": False, "shape": (len(replay.valid), len(slots))}
        for task in range(len(replay.valid)):  # one at a time: a copy of the whole replay may not fit in memory
            records = replay.records(task, slots)
            if task == 0:
                np.lib.format.write_array_header_1_0(piece, {**header, "descr": records.dtype.descr})
            piece.write(records)
    for file in sorted(partial_path.rglob("*")):
        name = str(file.relative_to(partial_path))
        if file.is_file() and name not in files:
            files[name] = checksum(file)
    contents = {**counters, "replay_inserted": replay.inserted, "files": files}
    contents["crc32"] = zlib.crc32(json.dumps(contents).encode())
    (partial_path / "checkpoint.json").write_text(json.dumps(contents))
    shutil.rmtree(path, ignore_errors=True)
    partial_path.rename(path)
    for old in checkpoint_steps(run_dir)[keep:]:
        shutil.rmtree(root / str(old))


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    return sorted((int(p.name) for p in (run_dir / "checkpoints").glob("[0-9]*") if p.name.isdigit()), reverse=True)


def read_counters(path: Path) -> dict:
    """checkpoint.json of one checkpoint. Raises ValueError if it is damaged."""
    counters = json.loads((path / "checkpoint.json").read_text())
    if counters.pop("crc32") != zlib.crc32(json.dumps(counters).encode()):
        raise ValueError("checkpoint.json does not match its checksum")
    return counters


def load_checkpoint(run_dir: Path, state: AgentState, replay: Replay) -> tuple[AgentState, dict]:
    """Newest undamaged checkpoint: learner state like `state`, and counters; fills `replay`. Executes no file."""
    damaged_paths = []
    for step in checkpoint_steps(run_dir):
        path = run_dir / "checkpoints" / str(step)
        try:
            counters = read_counters(path)
            damaged = [name for name, crc in counters["files"].items() if checksum(path / name) != crc]
            if damaged:
                raise ValueError(f"{damaged[0]} does not match its checksum")
            with ocp.StandardCheckpointer() as checkpointer:
                state = AgentState(**checkpointer.restore((path / "state").absolute(), state._asdict()))
            for piece in sorted((path / "replay").iterdir()):
                first, last = map(int, piece.stem.split("-"))
                keep = slice(max(first, counters["replay_inserted"] - replay.slots + 1) - first, None)
                records = np.load(piece, mmap_mode="r", allow_pickle=False)[:, keep]
                slots = np.arange(last + 1 - records.shape[1], last + 1) % replay.slots
                for task in range(len(records)):
                    replay.load_records(task, slots, records[task])
            replay.inserted = counters["replay_inserted"]
            for damaged_path in damaged_paths:  # so that no later checkpoint builds on them
                with contextlib.suppress(OSError):  # where nothing may be written, there are no later ones
                    damaged_path.rename(damaged_path.with_name(f"damaged-{damaged_path.name}-{time.time_ns()}"))
            return state, counters
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"warning: checkpoint {path} is damaged ({error}); trying the one before", file=sys.stderr)
            damaged_paths.append(path)
    raise UserError(f"--resume {run_dir}: no undamaged checkpoint in {run_dir / 'checkpoints'}; start a new run")


def save_replay(directory: Path, replay: Replay, tasks: list[str], envs: ParallelEnvs) -> None:
    """One structured .npy per task, oldest slot first; invalid slots hold the final observation of their episode."""
    directory.mkdir(exist_ok=True)
    slots = np.arange(replay.inserted - replay.size, replay.inserted + 1) % replay.slots
    for task, name in enumerate(tasks):
        records = replay.records(task, slots, envs.observation_dims[task], envs.action_dims[task])
        np.save(directory / f"{file_name(name)}.npy", records)


# ---------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    """Trains one agent on the tasks of `args`; everything it writes is in its run directory."""
    if args.list_tasks:
        return list_tasks()
    check_args(args)
    tasks, total_timesteps = resolve_tasks(args)
    args.batch_size = args.batch_size or (1024 if len(tasks) > 1 else 256)
    if "DISPLAY" not in os.environ:  # training needs no graphics library, videos need a headless one
        os.environ.setdefault("MUJOCO_GL", "egl" if args.capture_video else "disable")
    run_name = args.run_name or f"{args.suite or file_name(tasks[0])}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume) if args.resume else Path(args.run_root) / run_name
    if not args.resume and (run_dir / "checkpoints").exists():
        raise UserError(f"{run_dir} holds a run: continue it with --resume {run_dir}, or choose another --run-name")

    resumed_at = (checkpoint_steps(run_dir) or [0])[0]
    env_seed, eval_seed = np.random.SeedSequence([args.seed, resumed_at]).generate_state(2)
    envs = ParallelEnvs(tasks, 1, int(env_seed), args.env_backend)
    num_tasks, observation_dim, action_dim = len(tasks), envs.observation_dim, envs.action_dim
    agent = make_agent(args, num_tasks, observation_dim, action_dim, envs.action_dims)
    state = agent.init(args.seed)
    replay = Replay(num_tasks, min(args.buffer_size, max(total_timesteps, 1) + 1000), observation_dim, action_dim)
    normalizer = ReturnNormalizer(num_tasks, args.discount)
    rng = np.random.default_rng(args.seed)
    step, updates, wall_time, last_evaluation = 0, 0, 0.0, -1
    if args.resume:
        state, counters = load_checkpoint(run_dir, state, replay)
        step, updates = counters["step"], counters["updates"]
        wall_time, last_evaluation = counters["wall_time"], counters["last_evaluation"]
        normalizer.max_return = np.array(counters["max_return"], np.float32)
        rng.bit_generator.state = counters["rng"]
        if step > total_timesteps or last_evaluation >= total_timesteps:  # else its last evaluation is missing
            raise UserError(f"{run_dir} is finished (step {step:,}); to go on, give a larger --total-timesteps")
        print(f"resumed {run_dir} at step {step:,}")

    run_dir.mkdir(parents=True, exist_ok=True)
    information = {**asdict(args), "total_timesteps": total_timesteps, **run_information(tasks, envs)}
    replace_file(run_dir / "args.json", json.dumps(information, indent=2))
    critic_size, actor_size = parameter_count([state.critic, state.target_critic]), parameter_count(state.actor)
    print(f"tasks: {num_tasks}, |S| = {observation_dim}, |A| = {action_dim}; device: {information['device']}")
    print(f"parameters: {critic_size:,} in critics and targets, {actor_size:,} in the actor; run directory: {run_dir}")
    if total_timesteps == 0:
        envs.close()
        return

    stop: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM):  # a second signal ends the process at once
        signal.signal(signum, lambda s, frame: (stop.append(s), signal.signal(s, signal.SIG_DFL)))
    logger = Logger(args, run_dir, step, last_evaluation)
    eval_envs = ParallelEnvs(tasks, eval_copies(num_tasks, args.eval_episodes), int(eval_seed), args.env_backend)
    task_ids = jnp.arange(num_tasks)
    act_key = jax.random.PRNGKey(args.seed + 1)
    started, saved, last_log = time.time() - wall_time, (step, last_evaluation), (time.time(), step)
    episode_return, train_returns, rows, metrics = np.zeros(num_tasks), {}, [], None
    done = np.zeros(num_tasks, bool)
    observations = envs.reset()
    replay.start(observations)
    bar = tqdm(total=total_timesteps, initial=step, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30)

    with bar as progress:
        while True:
            if (step % args.eval_every == 0 or step == total_timesteps) and last_evaluation < step and not stop:
                results = evaluate(agent, state, eval_envs, args.eval_episodes, stop)
                if results is not None:
                    last_evaluation, wall_time = step, time.time() - started
                    rows = evaluation_rows(tasks, results, step, updates, wall_time)
                    logger.evaluation(rows)
                    values = {}
                    for column in ("return", "success", "score"):
                        found = {f"eval/{column}/{row['task']}": row[column] for row in rows if row[column] != ""}
                        if found:
                            values |= {**found, f"eval/mean_{column}": np.mean(list(found.values()))}
                            progress.set_postfix({column: f"{values[f'eval/mean_{column}']:.3f}"}, refresh=False)
                    logger.scalars(values, step)
                    if args.log_task_statistics and step > args.learning_starts and not stop:
                        log_task_statistics(agent, state, replay, normalizer, tasks, run_dir, logger, step)
                    for task_id, task in enumerate(tasks if args.capture_video and not stop else []):
                        path = run_dir / "videos" / f"{file_name(task)}-{step}.mp4"
                        try:
                            record_video(agent, state, task, task_id, observation_dim, path, stop)
                        except Exception as error:  # a graphics library or a package for drawing may be missing
                            progress.write(f"warning: no video of {task}: {error}", file=sys.stderr)
            due = step % args.checkpoint_every == 0 or step == total_timesteps or stop
            if due and step > 0 and (step, last_evaluation) != saved:
                check_finite({**(metrics or {}), "parameters": agent.parameter_norm(state)}, run_dir, step)
                counters = {
                    "step": step, "updates": updates, "wall_time": time.time() - started,
                    "last_evaluation": last_evaluation, "max_return": normalizer.max_return.tolist(),
                    "rng": rng.bit_generator.state,
                }  # fmt: skip
                try:
                    save_checkpoint(run_dir, step, state, replay, counters, args.keep_checkpoints)
                except Exception as error:  # Orbax reports a full disk in exceptions of its own
                    if "No space left" not in str(error):
                        raise
                    shutil.rmtree(run_dir / "checkpoints" / f".partial-{step}", ignore_errors=True)
                    raise UserError(
                        f"disk full while writing the checkpoint of step {step:,}; earlier ones are whole: free space, "
                        f"then continue with --resume {run_dir}"
                    ) from error
                saved = step, last_evaluation
            if step == total_timesteps or stop:
                break

            # 1. act with the newest policy
            if step < args.learning_starts:
                actions = rng.uniform(-1, 1, (num_tasks, action_dim)).astype(np.float32) * envs.action_mask
            else:
                actions = np.asarray(agent.act(state.actor, state.critic, act_key, step, observations, task_ids))
            envs.send(actions)
            # 2. while the environments step, the device updates
            if step >= args.learning_starts:
                batches = replay.sample(rng, args.utd, args.batch_size)
                state, metrics = agent.update(state, batches, normalizer.max_return)
                updates += args.utd
            # 3. receive and store; the step after done was a reset, not a transition
            observations, rewards, terminated, truncated, _ = envs.recv()
            for task in np.flatnonzero(~(np.isfinite(rewards) & np.isfinite(observations).all(axis=1))):
                check_finite({f"observation or reward of {tasks[task]}": np.nan}, run_dir, step)
            valid, done = ~done, ~done & (terminated | truncated)
            replay.insert(actions, rewards, terminated, valid, observations)
            bootstrap = None
            if args.truncation_bootstrap == "critic" and (truncated & valid).any():
                bootstrap = np.asarray(agent.value(state, observations, normalizer.max_return))
            normalizer.update(rewards, terminated, truncated, valid, bootstrap)
            step += 1
            progress.update()

            episode_return += np.where(valid, rewards, 0)
            for task in np.flatnonzero(done):
                train_returns[f"train/return/{tasks[task]}"] = episode_return[task]
                episode_return[task] = 0
            if step % LOG_EVERY == 0:
                check_finite(metrics, run_dir, step)
                now = time.time()
                values = {f"normalizer/{task}": g for task, g in zip(tasks, normalizer.max_return, strict=True)}
                values["speed/steps_per_second"] = (step - last_log[1]) / (now - last_log[0])
                logger.scalars({**(metrics or {}), **train_returns, **values, "updates": updates}, step)
                train_returns, last_log = {}, (now, step)

    if args.save_replay:
        save_replay(run_dir / "replay", replay, tasks, envs)
    logger.close()
    envs.close()
    eval_envs.close()
    if stop and last_evaluation < total_timesteps:
        print(f"stopped at step {step:,}" + f"; continue with --resume {run_dir}" * bool(checkpoint_steps(run_dir)))
    else:
        print_table(rows)


def evaluation_rows(tasks: list[str], results, step: int, updates: int, wall_time: float) -> list[dict]:
    """Rows of eval.csv, one per task; empty where a column has no meaning."""
    rows = []
    for task, returns, successes in zip(tasks, *results, strict=True):
        score = normalized_score(task, returns.mean(), successes.mean())  # linear in both
        rows.append({
            "step": step, "updates": updates, "wall_time": round(wall_time, 2), "task": task, "episodes": len(returns),
            "return": round(float(returns.mean()), 4),
            "success": "" if np.isnan(successes.mean()) else round(float(successes.mean()), 5),
            "score": "" if np.isnan(score) else round(float(score), 5),
        })  # fmt: skip
    return rows


def print_table(rows: list[dict]) -> None:
    """Last evaluation of every task."""
    width = max([len(row["task"]) for row in rows], default=4)
    print(f"{'task':<{width}} {'return':>10} {'success':>8} {'score':>7}")
    for row in rows:
        print(f"{row['task']:<{width}} {row['return']:>10.1f} {row['success']:>8} {row['score']:>7}")
    scores = [row["score"] for row in rows if row["score"] != ""]
    if scores:
        print(f"{'mean':<{width}} {'':>10} {'':>8} {np.mean(scores):>7.3f}")


def check_finite(metrics: dict | None, run_dir: Path, step: int) -> None:
    """Stops the run when a loss or gradient is not finite, before it could reach a checkpoint."""
    bad = [name for name, value in (metrics or {}).items() if not np.isfinite(value)]
    if bad:
        last = checkpoint_steps(run_dir)[:1]
        good = f"the last good checkpoint is {run_dir}/checkpoints/{last[0]}" if last else "there is no checkpoint yet"
        raise UserError(f"not finite at step {step:,}: {', '.join(bad)}; {good}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (UserError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            message = f"disk full ({error.filename or 'run directory'}): free space, then --resume the run directory"
        elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in message:
            message = "out of memory: lower --critic-width, --batch-size or --buffer-size"
        elif isinstance(error, jax.errors.JaxRuntimeError):
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
