# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.2", "flax==0.12.8", "optax==0.2.8", "orbax-checkpoint==0.12.8", "numpy==2.4.6", "tyro==1.0.17",
#   "gymnasium==1.4.0", "envpool==1.2.5", "ale-py==0.12.1", "opencv-python-headless==4.13.0.92",
#   "tensorboardX==2.6.5", "wandb==0.31.0", "tqdm==4.70.1", "imageio[ffmpeg]==2.38.1",
# ]
# ///
"""DrQ(eps)+BRC: one value-based agent for one or many Atari games, from pixels, in one file.

"Bigger, Regularized, Categorical: High-Capacity Value Functions are Efficient Multi-Task Learners"
(Nauman et al., 2025, arXiv:2505.23150). What this file computes, in the paper's notation, for game i:

  support          z_j = V_min + (j - 1) (V_max - V_min) / (N_atoms - 1)                                (Eq. 1)
  normalization    G_i <- max(max_t |G_i(s_t)|, G_i) over the returns of every finished game            (Eq. 2)
                   r_i <- r_i V_max / G_i   (Eq. 3; no entropy, so lambda_i = 0)
  n-step return    R = sum over k < n of gamma^k r_{t+k}, n = 3, cut at a lost life or the end          (Table 4)
  greedy action    a* = argmax_a E[z ~ p_theta(s_{t+n}, a)], by the online network (double Q, DrQ(eps)) (C.1)
  critic target    y = projection onto z of  R + gamma^n (1 - terminated) z,  z ~ p_target(s_{t+n}, a*) (C.2)
  critic loss      cross-entropy of p_theta(s_t, a_t) with y                                            (Section 3)
  task embedding   e_i / |e_i|_1, appended to the encoder's output: the encoder is task-agnostic        (C.4)
  target critic    theta_target <- (1 - tau) theta_target + tau theta, after every update               (C.1)

Network (Figure 14): scaled Impala encoder, layer norm, task embedding, two dense layers, |A| x N_atoms logits.

What the paper leaves open is as in DrQ(eps) of google/dopamine (labs/atari_100k): 1,600 random steps first, epsilon
decays after them, 0.001 in evaluation; random shift by up to 4 pixels and intensity noise of 5% on both observations;
a lost life ends the episode for learning and clears the frame stack; Adam's epsilon 1.5e-4; Xavier initialization. Not
taken over: its dueling heads, as the paper names a dense critic, and its clipped rewards (--clip-rewards), since return
normalization takes care of their scale. Returns of Eq. 2 end at a lost life, as the critic's episodes do.

  python brc_drq_atari.py --seed 1                                          # the paper's experiment: 26 games
  python brc_drq_atari.py --env-ids atari/pong                              # one game
  python brc_drq_atari.py --env-ids atari/pong atari/boxing --encoder-channels 16 32 32
  python brc_drq_atari.py --resume runs/RUN                                 # continue a stopped run
"""

import atexit
import contextlib
import csv
import errno
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


# Copied from brc_sac_continuous.py
class UserError(Exception):
    """Something the user can mend: printed as one line, exit status 2."""


# ---------------------------------------------------------------------------------------------------- arguments


@dataclass
class Args:
    """DrQ(eps)+BRC (Nauman et al., 2025). Defaults are the paper's, Table 4."""

    env_ids: tuple[str, ...] = ()
    """games of one agent, as family/task: atari/alien atari/pong gym/module:Pixels-v0 (default: the suite atari)"""
    suite: str | None = None
    """a set of games by name: atari (the 26 of Atari 100k) or atari-transfer (20 others, E.2)"""
    seed: int = 1
    """seed of networks, exploration, replay sampling and environments"""
    exp_name: str = "brc_drq_atari"
    """name of the experiment, part of the run's name"""
    run_name: str | None = None
    """name of the run directory (default: {suite or first task}__{exp_name}__{seed}__{unix time})"""
    run_root: str = "runs"
    """directory that holds the run directories"""
    resume: str | None = None
    """run directory to continue from its newest good checkpoint, with the saved arguments; those of length, evaluation,
    checkpoints and logging may be given anew"""
    env_backend: Literal["auto", "envpool", "gymnasium"] = "auto"
    """envpool steps atari/ fastest; gymnasium (ale-py) is the reference and runs gym/ too"""
    total_timesteps: int | None = None
    """steps per game, of four frames each (default: 100,000, Atari 100k); 0 builds everything and exits"""
    learning_starts: int = 1_600
    """uniformly random steps per game before the first update (dopamine's min_replay_history)"""
    eval_every: int = 25_000
    """steps per game between evaluations"""
    eval_episodes: int = 10
    """whole games per evaluation and game, epsilon 0.001"""
    checkpoint_every: int = 25_000
    """steps per game between checkpoints; one more is written at the end and when stopped"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep"""
    save_replay: bool = False
    """write all transitions to RUN_DIR/replay/, one .npy file per game, when the run ends or is stopped"""
    capture_video: bool = False
    """write an mp4 of one evaluation game each to RUN_DIR/videos/"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline is respected)"""
    wandb_project: str = "brc"
    """Weights & Biases project"""

    discount: float = 0.99
    """gamma (Table 4)"""
    batch_size: int = 256
    """transitions per update, over all games (Table 4)"""
    utd: int = 2
    """updates per vector step, one step of every game (Table 4)"""
    buffer_size: int = 100_000
    """replay capacity per game (Table 4)"""
    polyak_tau: float = 5e-3
    """rate of the target critic's moving average, after every update (Table 4)"""
    learning_rate: float = 1e-4
    """AdamW learning rate (Table 4)"""
    weight_decay: float = 1e-4
    """AdamW weight decay (Table 4)"""
    num_atoms: int = 101
    """atoms of the categorical critic (Table 4)"""
    v_min: float = -10.0
    """lowest atom (Table 4)"""
    v_max: float = 10.0
    """highest atom (Table 4), and the bound of normalized returns (Eq. 3)"""
    encoder_channels: tuple[int, ...] = (128, 256, 256)
    """channels of the Impala encoder's sections, each of which halves the image (Table 4)"""
    critic_width: int = 512
    """hidden units of the dense critic (Table 4)"""
    critic_depth: int = 2
    """hidden layers of the dense critic (Table 4)"""
    n_step: int = 3
    """rewards summed before the bootstrap (Table 4)"""
    start_epsilon: float = 1.0
    """exploration at the first update (Table 4)"""
    end_epsilon: float = 0.01
    """exploration after the decay (Table 4)"""
    epsilon_decay_steps: int = 5_000
    """steps of the linear decay, from the first update on (Table 4)"""
    augmentation: bool = True
    """random shift and intensity noise on the images of every update (Table 4)"""
    normalize_returns: bool = True
    """divide rewards by the largest return seen in their game (Eq. 2, 3)"""
    embedding_size: int = 32
    """task embedding size (Table 4)"""
    clip_rewards: bool = False
    """learn from rewards clipped to [-1, 1], as Dopamine's agents do; the paper does not say"""
    variant: Literal["paper", "released-code"] = "paper"
    """where the paper and the authors' released code differ: released-code
    stands for --embedding-norm l2 --truncation-bootstrap mean-reward;
    one of these given by hand wins"""
    embedding_norm: Literal["l1", "l2"] = "l1"
    """the norm that is 1 for every embedding: l1 in the paper (C.4), l2 in the released SAC code"""
    truncation_bootstrap: Literal["critic", "mean-reward"] = "critic"
    """tail of a truncated return in Eq. 2: critic output in the paper (C.2), mean reward / (1 - gamma) in the code"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """number format in which the encoder computes; its parameters are float32 in any case"""


RELEASED_CODE = {"variant": "released-code", "embedding_norm": "l2", "truncation_bootstrap": "mean-reward"}
POSITIVE = {  # smallest allowed value of every number, checked before anything is built
    "total_timesteps": 0, "learning_starts": 1, "eval_every": 1, "eval_episodes": 1, "checkpoint_every": 1,
    "keep_checkpoints": 1, "batch_size": 1, "utd": 1, "num_atoms": 2, "critic_width": 1, "critic_depth": 0, "n_step": 1,
    "epsilon_decay_steps": 1, "embedding_size": 1, "seed": 0, "learning_rate": 0.0, "weight_decay": 0.0,
}  # fmt: skip


def check_args(args: Args) -> None:
    """Raises UserError for a number outside its range."""
    for name, smallest in {**POSITIVE, "buffer_size": 9 + args.n_step}.items():
        value = getattr(args, name)
        if value is not None and not (smallest <= value < math.inf):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a finite number, at least {smallest}")
    if not 0 <= args.discount < 1:
        raise UserError(f"--discount {args.discount}: must be in [0, 1)")
    for name in ("polyak_tau", "start_epsilon", "end_epsilon"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be in [0, 1]")
    if not -math.inf < args.v_min < args.v_max < math.inf or args.v_max <= 0:
        raise UserError(f"--v-min {args.v_min} --v-max {args.v_max}: need v_min < v_max and v_max > 0")
    if not args.encoder_channels or min(args.encoder_channels) < 1:
        raise UserError(f"--encoder-channels {args.encoder_channels}: needs a positive number for each section")
    if args.seed >= 2**31:
        raise UserError(f"--seed {args.seed}: must be below 2^31")


# ---------------------------------------------------------------------------------------------- tasks and suites

ATARI = {  # task: (the emulator's name, random score, human score), Agarwal et al. (2021); the 26 of Atari 100k first
    "alien": ("Alien", 227.8, 7127.7), "amidar": ("Amidar", 5.8, 1719.5), "assault": ("Assault", 222.4, 742.0),
    "asterix": ("Asterix", 210.0, 8503.3), "bankheist": ("BankHeist", 14.2, 753.1),
    "battlezone": ("BattleZone", 2360.0, 37187.5), "boxing": ("Boxing", 0.1, 12.1),
    "breakout": ("Breakout", 1.7, 30.5), "choppercommand": ("ChopperCommand", 811.0, 7387.8),
    "crazyclimber": ("CrazyClimber", 10780.5, 35829.4), "demonattack": ("DemonAttack", 152.1, 1971.0),
    "freeway": ("Freeway", 0.0, 29.6), "frostbite": ("Frostbite", 65.2, 4334.7), "gopher": ("Gopher", 257.6, 2412.5),
    "hero": ("Hero", 1027.0, 30826.4), "jamesbond": ("Jamesbond", 29.0, 302.8), "kangaroo": ("Kangaroo", 52.0, 3035.0),
    "krull": ("Krull", 1598.0, 2665.5), "kungfumaster": ("KungFuMaster", 258.5, 22736.3),
    "mspacman": ("MsPacman", 307.3, 6951.6), "pong": ("Pong", -20.7, 14.6),
    "privateeye": ("PrivateEye", 24.9, 69571.3), "qbert": ("Qbert", 163.9, 13455.0),
    "roadrunner": ("RoadRunner", 11.5, 7845.0), "seaquest": ("Seaquest", 68.4, 42054.7),
    "updown": ("UpNDown", 533.4, 11693.2),
    "asteroids": ("Asteroids", 719.1, 47388.7), "atlantis": ("Atlantis", 12850.0, 29028.1),
    "beamrider": ("BeamRider", 363.9, 16926.5), "berzerk": ("Berzerk", 123.7, 2630.4),
    "bowling": ("Bowling", 23.1, 160.7), "centipede": ("Centipede", 2090.9, 12017.0),
    "double-dunk": ("DoubleDunk", -18.6, -16.4), "fishingderby": ("FishingDerby", -91.7, -38.7),
    "gravitar": ("Gravitar", 173.0, 3351.4), "icehockey": ("IceHockey", -11.2, 0.9),
    "namethisgame": ("NameThisGame", 2292.3, 8049.0), "pitfall": ("Pitfall", -229.4, 6463.7),
    "riverraid": ("Riverraid", 1338.5, 17118.0), "stargunner": ("StarGunner", 664.0, 10250.0),
    "timepilot": ("TimePilot", 3568.0, 5229.2), "tutankham": ("Tutankham", 11.4, 167.6),
    "venture": ("Venture", 0.0, 1187.5), "videopinball": ("VideoPinball", 16256.9, 17667.9),
    "wizardofwor": ("WizardOfWor", 563.5, 4756.5), "yarsrevenge": ("YarsRevenge", 3092.9, 54576.9),
}  # fmt: skip
INSTALL = {"atari": "pip install ale-py==0.12.1 opencv-python-headless==4.13.0.92"}
SUITES = {  # name: (games, steps per game), E.1 and E.2
    "atari": ([f"atari/{game}" for game in list(ATARI)[:26]], 100_000),
    "atari-transfer": ([f"atari/{game}" for game in list(ATARI)[26:]], 100_000),
}


def resolve_tasks(args: Args) -> tuple[list[str], int]:
    """Task names and steps per task of a run.

    Raises UserError for an unknown suite, family or game, naming the valid ones.
    """
    if args.suite and args.env_ids:
        raise UserError("--suite and --env-ids exclude each other: give one of them")
    if (args.suite or "atari") not in SUITES:
        raise UserError(f"unknown suite '{args.suite}'; suites: {', '.join(SUITES)}")
    tasks, steps = (list(args.env_ids), 100_000) if args.env_ids else SUITES[args.suite or "atari"]
    for task in tasks:
        family, _, name = task.partition("/")
        if family not in ("atari", "gym") or not name:
            raise UserError(f"unknown task '{task}'; tasks are atari/GAME or gym/ID, such as atari/pong")
        if family == "atari" and name not in ATARI:
            raise UserError(f"unknown task '{task}'; atari/ has: {', '.join(ATARI)}")
    if len(set(tasks)) < len(tasks):
        raise UserError("a task is named twice in --env-ids")
    return tasks, steps if args.total_timesteps is None else args.total_timesteps


def normalized_score(task: str, episode_return: float, success: float) -> float:
    """Human-normalized score of a game (Eq. 5 with Agarwal et al.'s scores), NaN where there is none (gym)."""
    family, _, name = task.partition("/")
    if family != "atari":
        return math.nan
    _, random_score, human_score = ATARI[name]
    return (episode_return - random_score) / (human_score - random_score)


def interquartile_mean(scores) -> float:
    """Mean of the middle half of the scores (IQM, Agarwal et al., 2021)."""
    scores = np.sort(scores)
    cut = len(scores) // 4
    return float(np.mean(scores[cut : len(scores) - cut]))


# -------------------------------------------------------------------------------------------------- environments

FRAME = (84, 84)
STACK = 4
MAX_GAME_STEPS = 27_000  # 108,000 frames, half an hour of play (Machado et al., 2018)


def make_env(task: str, render_mode: str | None = None, seed: int | None = None) -> gym.Env:
    """One Gymnasium environment with grayscale frames [84, 84] uint8 and discrete actions.

    Atari: the 18 actions of the full set, no sticky actions, four frames a step with the last two pooled, up to 30
    no-ops first, rewards as they are, info["lives"]; a lost life does not end the game. Raises UserError when a
    package is missing or the spaces do not fit. Its own random generator is seeded by reset(seed).
    """
    family, _, name = task.partition("/")
    try:
        if family == "atari":
            import ale_py

            gym.register_envs(ale_py)
            ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
            env = gym.make(
                f"ALE/{ATARI[name][0]}-v5", frameskip=1, repeat_action_probability=0.0, full_action_space=True,
                max_num_frames_per_episode=4 * MAX_GAME_STEPS + 1000, render_mode=render_mode,
            )  # fmt: skip
            env = gym.wrappers.AtariPreprocessing(env, noop_max=30, frame_skip=4, screen_size=FRAME[0])
            env = gym.wrappers.TimeLimit(env, MAX_GAME_STEPS)
        else:
            env = gym.make(name, **({"render_mode": render_mode} if render_mode else {}))
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        hint = INSTALL.get(family, f"pip install the package that registers {name}")
        raise UserError(f"{task} needs a package that is missing ({error}); install: {hint}") from error
    except (gym.error.Error, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"cannot make {task}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    space = env.observation_space
    shape = tuple(side for side in space.shape if side > 1) if isinstance(space, gym.spaces.Box) else None
    if shape != FRAME or space.dtype != np.uint8:
        raise UserError(f"{task}: this script needs uint8 observations of 84 x 84, one channel, not {space}")
    if not isinstance(env.action_space, gym.spaces.Discrete) or env.action_space.start != 0:
        raise UserError(f"{task}: this script needs discrete actions 0 ... n - 1, not {env.action_space}")
    if space.shape != FRAME:
        env = gym.wrappers.ReshapeObservation(env, FRAME)
    return env


# Copied from brc_sac_continuous.py
def make_worker_env(task: str, seed: int) -> gym.Env:
    """make_env for a worker process, which leaves it to the main process to handle Ctrl-C and SIGTERM."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return make_env(task, seed=seed)


class EnvPoolTask:
    """num_envs copies of one game in one envpool pool; send and recv overlap with other work."""

    def __init__(self, task: str, num_envs: int, seed: int):
        import envpool

        self.pool = envpool.make(
            f"{ATARI[task.partition('/')[2]][0]}-v5", env_type="gymnasium", num_envs=num_envs, seed=seed,
            stack_num=1, frame_skip=4, noop_max=30, full_action_space=True, repeat_action_probability=0.0,
            episodic_life=False, use_fire_reset=False, reward_clip=False, max_episode_steps=MAX_GAME_STEPS,
        )  # fmt: skip
        self.action_dim, self.num_envs, self.env_ids = int(self.pool.action_space.n), num_envs, np.arange(num_envs)

    def reset(self) -> np.ndarray:
        return self.pool.reset()[0][:, 0]

    def send(self, actions: np.ndarray) -> None:
        self.pool.send(actions.astype(np.int32), self.env_ids)

    def recv(self):
        frames, reward, terminated, truncated, info = self.pool.recv()
        return frames[:, 0], reward, terminated, truncated, info

    def close(self) -> None:
        self.pool.close()


# Copied from brc_sac_continuous.py
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
    """num_envs copies of every game that envpool steps, and one of every other, stepped all at once.

    Row r is a copy of task task_ids[r]. After terminated or truncated, the next step resets that row: it returns the
    first frame and ignores the action.
    """

    observation_dim = (*FRAME, STACK)

    def __init__(self, tasks: list[str], num_envs: int, seed: int, backend: str):
        seeds = np.random.SeedSequence(seed).generate_state(len(tasks)) % 2**30
        self.tasks = tasks
        self.pools = [self.make_pool(t, num_envs, int(s), backend) for t, s in zip(tasks, seeds, strict=True)]
        self.task_ids = np.repeat(np.arange(len(tasks)), [pool.num_envs for pool in self.pools])
        starts = np.cumsum([0] + [pool.num_envs for pool in self.pools])
        self.rows = [(slice(*ends), pool) for ends, pool in zip(itertools.pairwise(starts), self.pools, strict=True)]
        self.size = len(self.task_ids)
        self.observation_dims = [self.observation_dim] * len(tasks)
        self.action_dims = [pool.action_dim for pool in self.pools]
        self.action_dim = max(self.action_dims)

    def make_pool(self, task: str, num_envs: int, seed: int, backend: str):
        if backend != "gymnasium" and task.startswith("atari/"):
            try:
                return EnvPoolTask(task, num_envs, seed)
            except ImportError as error:
                if backend == "envpool":
                    raise UserError("envpool is missing: pip install envpool==1.2.5") from error
        elif backend == "envpool":
            raise UserError(f"envpool has no {task}; take --env-backend auto")
        return GymnasiumTask(task, seed)

    def reset(self) -> np.ndarray:
        """First frames [size, 84, 84]."""
        self.lives = np.zeros(self.size, int)
        frames = np.zeros((self.size, *FRAME), np.uint8)
        for rows, pool in self.rows:
            frames[rows] = pool.reset()
        return frames

    def send(self, actions: np.ndarray) -> None:
        """actions: [size], each below its task's number of actions."""
        for rows, pool in self.rows:
            pool.send(actions[rows])

    def recv(self):
        """Returns frames [size, 84, 84] and rewards, terminated, truncated, life_lost, each [size]."""
        frames, rewards = np.zeros((self.size, *FRAME), np.uint8), np.zeros(self.size, np.float32)
        terminated, truncated = np.zeros(self.size, bool), np.zeros(self.size, bool)
        lives = np.zeros(self.size, int)
        for rows, pool in self.rows:
            frames[rows], rewards[rows], terminated[rows], truncated[rows], info = pool.recv()
            lives[rows] = info.get("lives", 0)
        life_lost, self.lives = lives < self.lives, lives
        return frames, rewards, terminated, truncated & ~terminated, life_lost

    def close(self) -> None:
        for pool in self.pools:
            pool.close()


class FrameStack:
    """What the agent sees: the newest frames of every row, [rows, 4, 84, 84] uint8, oldest first, and zeros for those
    before an episode's first."""

    def __init__(self, frames: np.ndarray):
        self.frames = np.zeros((len(frames), STACK, *FRAME), np.uint8)
        self.frames[:, -1] = frames

    def push(self, frames: np.ndarray, first: np.ndarray) -> None:
        """frames: [rows, 84, 84]; first [rows]: this frame begins an episode (a game, or the next life)."""
        self.frames = np.concatenate([self.frames[:, 1:], frames[:, None]], axis=1)  # a new array: JAX may read the old
        self.frames[first, :-1] = 0


# -------------------------------------------------------------------------------------------------------- replay


class Batch(NamedTuple):
    """n-step transitions; leading axes [utd, batch_size] when sampled from replay."""

    frames: np.ndarray  # [..., 4, 84, 84] uint8
    actions: np.ndarray  # [...]
    returns: np.ndarray  # [...], sum of gamma^k r_{t+k}, as the game gave them: Eq. 3 is applied when they are used
    discounts: np.ndarray  # [...], gamma^m of the bootstrap after m rewards, 0 if the episode terminated among them
    next_frames: np.ndarray  # [..., 4, 84, 84] uint8
    task_ids: np.ndarray  # [...]


class Replay:
    """A ring of frames per game, all games in step, that stores every frame once.

    Slot t holds frame t and what was done there. The slot of a game's final frame is the step that the environment
    used to reset: it is invalid, never sampled, and ends every n-step return. The slot at `head` waits for its action.
    """

    def __init__(self, num_tasks: int, capacity: int, n_step: int, discount: float):
        shape = (num_tasks, capacity + 1)
        self.frames = np.zeros((*shape, *FRAME), np.uint8)
        self.actions = np.zeros(shape, np.int32)
        self.rewards = np.zeros(shape, np.float32)
        self.terminated = np.zeros(shape, bool)  # game over or a life lost
        self.first = np.zeros(shape, bool)  # this frame begins an episode
        self.valid = np.zeros(shape, bool)
        self.inserted, self.slots = 0, capacity + 1
        self.n_step, self.discount = n_step, discount

    def start(self, frames: np.ndarray) -> None:
        """First frames [num_tasks, 84, 84]; after a resume, the interrupted episodes end unlearned at `head`."""
        if self.inserted:
            self.advance()
        self.frames[:, self.head], self.first[:, self.head] = frames, True

    @property
    def head(self) -> int:
        return self.inserted % self.slots

    @property
    def size(self) -> int:
        return min(self.inserted, self.slots - 1)

    def advance(self) -> None:
        self.inserted += 1
        self.valid[:, self.head] = False

    def insert(self, actions, rewards, terminated, valid, next_frames, next_first) -> None:
        """One step of every game, [num_tasks, ...]; valid is False where this step was a reset."""
        self.actions[:, self.head] = actions
        self.rewards[:, self.head] = rewards
        self.terminated[:, self.head] = terminated
        self.valid[:, self.head] = valid
        self.advance()
        self.frames[:, self.head], self.first[:, self.head] = next_frames, next_first

    def sample(self, rng: np.random.Generator, utd: int, batch_size: int) -> Batch:
        """Uniform over the stored transitions of all games."""
        shape = (utd, batch_size)
        # In a full ring the oldest slots have lost frames of their stack.
        oldest = self.size if self.inserted < self.slots else self.size - (STACK - 1)
        task_ids = rng.integers(len(self.valid), size=shape, dtype=np.int32)
        slots = (self.head - rng.integers(1, oldest + 1, size=shape)) % self.slots
        while not (valid := self.valid[task_ids, slots]).all():
            redrawn = int((~valid).sum())
            task_ids[~valid] = rng.integers(len(self.valid), size=redrawn)
            slots[~valid] = (self.head - rng.integers(1, oldest + 1, size=redrawn)) % self.slots
        return self.gather(task_ids, slots)

    def gather(self, task_ids: np.ndarray, slots: np.ndarray) -> Batch:
        """Transitions that begin in the given slots."""
        returns, steps = np.zeros(slots.shape, np.float32), np.zeros(slots.shape, int)
        terminated, going_on = np.zeros(slots.shape, bool), np.ones(slots.shape, bool)
        for k in range(self.n_step):
            slot = (slots + k) % self.slots
            going_on &= self.valid[task_ids, slot] & ~terminated
            returns += np.where(going_on, self.discount**k * self.rewards[task_ids, slot], 0)
            terminated |= going_on & self.terminated[task_ids, slot]
            steps += going_on
        discounts = np.where(terminated, 0, self.discount**steps).astype(np.float32)
        return Batch(
            self.stacks(task_ids, slots), self.actions[task_ids, slots], returns, discounts,
            self.stacks(task_ids, (slots + steps) % self.slots), task_ids,
        )  # fmt: skip

    def stacks(self, task_ids: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """What the agent saw at the given slots, [..., 4, 84, 84]: see FrameStack."""
        slots = (slots[..., None] + np.arange(1 - STACK, 1)) % self.slots
        frames, first = self.frames[task_ids[..., None], slots], self.first[task_ids[..., None], slots]
        for age in range(STACK - 1):  # whatever is older than an episode's first frame
            frames[..., : STACK - 1 - age, :, :][first[..., STACK - 1 - age]] = 0
        return frames

    def records(self, task: int, slots: np.ndarray) -> np.ndarray:
        """Slots of one game as a structured array: what is written to disk."""
        dtype = [("frame", "u1", FRAME), ("action", "i4"), ("reward", "f4"), ("terminated", "?"), ("first", "?"),
                 ("valid", "?")]  # fmt: skip
        records = np.zeros(len(slots), dtype)
        records["frame"], records["action"] = self.frames[task, slots], self.actions[task, slots]
        records["reward"], records["terminated"] = self.rewards[task, slots], self.terminated[task, slots]
        records["first"], records["valid"] = self.first[task, slots], self.valid[task, slots]
        return records

    def load_records(self, task: int, slots: np.ndarray, records: np.ndarray) -> None:
        """Inverse of `records`."""
        self.frames[task, slots], self.actions[task, slots] = records["frame"], records["action"]
        self.rewards[task, slots], self.terminated[task, slots] = records["reward"], records["terminated"]
        self.first[task, slots], self.valid[task, slots] = records["first"], records["valid"]

    @property
    def nbytes(self) -> int:
        arrays = (self.frames, self.actions, self.rewards, self.terminated, self.first, self.valid)
        return sum(array.nbytes for array in arrays)


# ------------------------------------------------------------------------------------------------------ networks

xavier = nn.initializers.xavier_uniform()


def augment(key: jax.Array, images: jax.Array, pad: int = 4, intensity: float = 0.05) -> jax.Array:
    """DrQ's augmentation of images [batch, height, width, channels] in [0, 1] (Kostrikov et al., 2020).

    Each image is shifted by up to `pad` pixels in both directions, its border repeated, and multiplied with
    1 + intensity * noise, noise a standard normal cut at +-2 (Schwarzer et al., 2021).
    """
    shift_key, intensity_key = jax.random.split(key)
    corners = jax.random.randint(shift_key, (len(images), 2), 0, 2 * pad + 1)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    crop = lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])  # noqa: E731
    noise = jnp.clip(jax.random.normal(intensity_key, (len(images), 1, 1, 1)), -2, 2)
    return jax.vmap(crop)(padded, corners) * (1 + intensity * noise)


class ImpalaEncoder(nn.Module):
    """Impala's residual network (Espeholt et al., 2018; scaled as in Schwarzer et al., 2023), [batch, features].

    Each section: 3x3 convolution, 3x3 max pooling of stride 2, two residual blocks of two 3x3 convolutions.
    """

    channels: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def convolution(channels, x):
            return nn.Conv(channels, (3, 3), dtype=self.dtype, kernel_init=xavier)(x)

        for channels in self.channels:
            x = nn.max_pool(convolution(channels, x), (3, 3), (2, 2), padding="SAME")
            for _ in range(2):
                y = convolution(channels, nn.relu(x))
                x = x + convolution(channels, nn.relu(y))
        x = nn.relu(x)
        return x.reshape(len(x), -1).astype(jnp.float32)


class Critic(nn.Module):
    """Images [batch, 84, 84, 4] and task embeddings [batch, size], or None, to logits [batch, |A|, num_atoms].

    Figures 14 and 15: encoder, layer norm, then the embedding joins, so that the encoder is task-agnostic.
    """

    encoder_channels: tuple[int, ...]
    width: int
    depth: int
    num_actions: int
    num_atoms: int
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array, embeddings: jax.Array | None) -> jax.Array:
        x = nn.LayerNorm()(ImpalaEncoder(self.encoder_channels, self.dtype)(images))
        if embeddings is not None:
            x = jnp.concatenate([x, embeddings], axis=-1)
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width, kernel_init=xavier)(x))
        x = nn.Dense(self.num_actions * self.num_atoms, kernel_init=xavier)(x)
        return x.reshape(len(x), self.num_actions, self.num_atoms)


# --------------------------------------------------------------------------------------- categorical projection


# Copied from brc_sac_continuous.py
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


# Copied from brc_sac_continuous.py
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

MIN_SCALE = 1e-8  # of Eq. 3's divisor; reached only by a game whose rewards were all zero


class AgentState(NamedTuple):
    """Everything that learning changes, on the device."""

    critic: Any  # {"network": ..., "embedding": [num_tasks, embedding_size] or absent}
    critic_optimizer: Any
    target_critic: Any
    key: jax.Array


class Agent(NamedTuple):
    """The compiled functions of one agent; see make_agent."""

    init: Any
    act: Any
    value: Any
    update: Any
    embeddings: Any
    parameter_norm: Any


def make_agent(args: Args, num_tasks: int, num_actions: int, action_dims=None) -> Agent:
    """The agent as pure functions of AgentState. One task takes the same path, without embedding.

    action_dims: the tasks' own numbers of actions (default: num_actions for all); others are never chosen.
    """
    use_embedding = num_tasks > 1
    own_actions = jnp.array(action_dims or [num_actions] * num_tasks)
    atoms = jnp.linspace(args.v_min, args.v_max, args.num_atoms)  # Eq. 1
    network = Critic(
        args.encoder_channels, args.critic_width, args.critic_depth, num_actions, args.num_atoms, jnp.dtype(args.dtype)
    )
    embedding_network = nn.Embed(num_tasks, args.embedding_size)
    optimizer = optax.adamw(args.learning_rate, eps=1.5e-4, weight_decay=args.weight_decay)

    def init(seed: int) -> AgentState:
        key, network_key, embedding_key = jax.random.split(jax.random.PRNGKey(seed), 3)
        embeddings = jnp.zeros((1, args.embedding_size)) if use_embedding else None
        critic = {"network": jax.jit(network.init)(network_key, jnp.zeros((1, *FRAME, STACK)), embeddings)}
        if use_embedding:
            critic["embedding"] = embedding_network.init(embedding_key, jnp.zeros(1, jnp.int32))
        return AgentState(critic, optimizer.init(critic), jax.tree.map(jnp.copy, critic), key)

    def embed(critic, task_ids):
        """Unit-norm task embeddings (C.4), [..., embedding_size]."""
        embedding = embedding_network.apply(critic["embedding"], task_ids)
        order = 1 if args.embedding_norm == "l1" else 2
        return embedding / jnp.linalg.norm(embedding, ord=order, axis=-1, keepdims=True)

    def images(frames):
        """Stored frames [batch, 4, 84, 84] as images [batch, 84, 84, 4] in [0, 1]."""
        return jnp.moveaxis(frames, 1, -1).astype(jnp.float32) / 255

    def logits(critic, images, task_ids):
        """[batch, |A|, num_atoms]"""
        return network.apply(critic["network"], images, embed(critic, task_ids) if use_embedding else None)

    def q_values(outputs, task_ids):
        """Expected return of every action, [batch, |A|]; -inf for actions that the task does not have."""
        values = (nn.softmax(outputs) * atoms).sum(-1)
        return jnp.where(jnp.arange(num_actions) < own_actions[task_ids][:, None], values, -jnp.inf)

    def reward_scale(max_return):
        """V_max / G_i for each task (Eq. 3 without entropy)."""
        return args.v_max / jnp.maximum(max_return, MIN_SCALE) if args.normalize_returns else jnp.ones(num_tasks)

    def critic_target(state, batch, next_images, max_return):
        """Target distribution [batch, num_atoms] (C.2): online network chooses the action, target network rates it."""
        greedy = q_values(logits(state.critic, next_images, batch.task_ids), batch.task_ids).argmax(-1)
        outputs = logits(state.target_critic, next_images, batch.task_ids)
        probs = nn.softmax(jnp.take_along_axis(outputs, greedy[:, None, None], axis=1).squeeze(1))
        returns = batch.returns * reward_scale(max_return)[batch.task_ids]
        target_atoms = returns[:, None] + batch.discounts[:, None] * atoms
        return categorical_projection(probs, target_atoms, args.v_min, args.v_max), returns

    def critic_loss(critic, batch, images, target):
        """Cross-entropy with the target distribution, mean over the batch."""
        outputs = logits(critic, images, batch.task_ids)
        outputs = jnp.take_along_axis(outputs, batch.actions[:, None, None], axis=1).squeeze(1)
        return -(target * nn.log_softmax(outputs)).sum(-1).mean()

    def update_once(state: AgentState, batch: Batch, max_return: jax.Array):
        """Critic, then target critic."""
        key, image_key, next_key = jax.random.split(state.key, 3)
        now, later = images(batch.frames), images(batch.next_frames)
        if args.augmentation:
            now, later = augment(image_key, now), augment(next_key, later)
        target, returns = critic_target(state, batch, later, max_return)
        value, gradient = jax.value_and_grad(critic_loss)(state.critic, batch, now, target)
        step, critic_optimizer = optimizer.update(gradient, state.critic_optimizer, state.critic)
        critic = optax.apply_updates(state.critic, step)
        target_critic = optax.incremental_update(critic, state.target_critic, args.polyak_tau)
        q = (target * atoms).sum(-1)
        metrics = {
            "losses/critic": value, "gradient_norms/critic": optax.tree.norm(gradient), "q/target_mean": q.mean(),
            "q/target_min": q.min(), "q/target_max": q.max(), "returns/normalized_mean": returns.mean(),
            "returns/normalized_max_abs": jnp.abs(returns).max(),
        }  # fmt: skip
        return AgentState(critic, critic_optimizer, target_critic, key), metrics

    def update(state: AgentState, batches: Batch, max_return: jax.Array):
        """The utd updates of one vector step, one compiled call. batches: [utd, batch_size, ...]; max_return: G_i."""
        for i in range(args.utd):  # unrolled: XLA's CPU backend runs the body of a loop on one thread
            state, metrics = update_once(state, jax.tree.map(lambda x: x[i], batches), max_return)  # noqa: B023
        return state, metrics

    def act(critic, key, step, frames, task_ids, epsilon):
        """Epsilon-greedy actions [batch]. frames: [batch, 4, 84, 84]."""
        explore_key, action_key = jax.random.split(jax.random.fold_in(key, step))
        greedy = q_values(logits(critic, images(frames), task_ids), task_ids).argmax(-1)
        uniform = jax.random.randint(action_key, greedy.shape, 0, own_actions[task_ids])
        return jnp.where(jax.random.uniform(explore_key, greedy.shape) < epsilon, uniform, greedy)

    def value(state: AgentState, frames, max_return):
        """Critic's value of one observation per task at its greedy action, in units of reward, [num_tasks]."""
        task_ids = jnp.arange(num_tasks)
        q = q_values(logits(state.critic, images(frames), task_ids), task_ids).max(-1)
        return jnp.clip(q / args.v_max, -1, 1) * max_return if args.normalize_returns else q

    def embeddings(critic):
        return embed(critic, jnp.arange(num_tasks)) if use_embedding else None

    def parameter_norm(state: AgentState):
        """Norm of all network parameters, finite if they all are."""
        return optax.tree.norm((state.critic, state.target_critic))

    return Agent(init, jax.jit(act), jax.jit(value), jax.jit(update, donate_argnums=0), jax.jit(embeddings),
                 jax.jit(parameter_norm))  # fmt: skip


def exploration_epsilon(args: Args, step: int) -> float:
    """Linear from start_epsilon at the first update to end_epsilon, epsilon_decay_steps later (Table 4)."""
    share = np.clip((step - args.learning_starts) / args.epsilon_decay_steps, 0, 1)
    return float(args.start_epsilon + share * (args.end_epsilon - args.start_epsilon))


# Copied from brc_sac_continuous.py
def parameter_count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# ---------------------------------------------------------------------------------------------------- evaluation

EVAL_EPSILON = 0.001  # as in DrQ(eps)
EVAL_ENVS = 260  # at most, for several games: 26 games with ten copies each


# Copied from brc_sac_continuous.py
def eval_copies(num_tasks: int, episodes: int) -> int:
    """Copies of each task that evaluation steps at once: a divisor of `episodes`, so that none is played in vain."""
    return max(n for n in range(1, episodes + 1) if episodes % n == 0 and (n == 1 or n * num_tasks <= EVAL_ENVS))


def evaluate(agent: Agent, state: AgentState, envs: ParallelEnvs, episodes: int, stop: list, seed: int = 0):
    """Returns and successes (NaN) of whole games, a list of [episodes] per task; None if `stop` fills meanwhile.

    Every copy of a game plays the same number of whole games, so that short ones are not counted more often.
    """
    returns = [[] for _ in range(envs.size)]
    quota = np.ceil(episodes / np.bincount(envs.task_ids))[envs.task_ids]
    episode_return, done, key = np.zeros(envs.size), np.zeros(envs.size, bool), jax.random.PRNGKey(seed)
    length, stack = np.zeros(envs.size, int), FrameStack(envs.reset())
    for time_step in itertools.count():
        if all(len(returns[row]) >= quota[row] for row in range(envs.size)):
            break
        if stop:
            return None
        actions = agent.act(state.critic, key, time_step, stack.frames, envs.task_ids, EVAL_EPSILON)
        envs.send(np.asarray(actions))
        frames, rewards, terminated, truncated, life_lost = envs.recv()
        stack.push(frames, life_lost | done)
        episode_return += np.where(done, 0, rewards)  # the step after done was a reset
        length = np.where(done, 0, length + 1)
        if length.max() > 2 * MAX_GAME_STEPS:  # only a gym/ task registered without max_episode_steps
            task = envs.tasks[envs.task_ids[length.argmax()]]
            raise UserError(f"an episode of {task} had no end within {length.max():,} steps: give it a time limit")
        done = ~done & (terminated | truncated)
        for row in np.flatnonzero(done):
            if len(returns[row]) < quota[row]:
                returns[row].append(episode_return[row])
        episode_return[done] = 0
    returns = [np.concatenate(returns[rows]) for rows, _ in envs.rows]
    return returns, [np.full(len(games), np.nan) for games in returns]


def record_video(agent: Agent, state: AgentState, task: str, task_id: int, path: Path, stop: list):
    """One evaluation game as mp4, a frame per step, up to where `stop` fills."""
    import imageio

    env = make_env(task, render_mode="rgb_array")
    key, lives, done = jax.random.PRNGKey(0), 0, False
    stack = FrameStack(env.reset()[0][None])
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings(), imageio.get_writer(path, fps=15, macro_block_size=2) as video:
        warnings.simplefilter("ignore", RuntimeWarning)  # JAX's, about the fork that starts ffmpeg: it execs at once
        for time_step in itertools.count():
            video.append_data(env.render())
            if done or stop:
                break
            action = agent.act(state.critic, key, time_step, stack.frames, np.array([task_id]), EVAL_EPSILON)
            frame, _, terminated, truncated, info = env.step(int(action[0]))
            stack.push(frame[None], np.array([info.get("lives", 0) < lives]))
            lives, done = info.get("lives", 0), terminated or truncated
    env.close()


# --------------------------------------------------------------------------------------- logging and checkpoints

SCRIPT = "brc_drq_atari"
PACKAGES = ("jax", "flax", "optax", "envpool", "ale_py", "gymnasium")
EVAL_COLUMNS = ("step", "updates", "wall_time", "task", "episodes", "return", "success", "score")
RESUMABLE = {  # arguments that a resumed run may change
    "total_timesteps", "eval_every", "eval_episodes", "checkpoint_every", "keep_checkpoints", "save_replay",
    "capture_video", "track", "wandb_project", "env_backend", "resume",
}  # fmt: skip
LOG_EVERY = 500  # vector steps between TensorBoard points and checks for non-finite losses


# Copied from brc_sac_continuous.py
def file_name(task: str) -> str:
    return task.replace("/", "-").replace(":", "-")


# Copied from brc_sac_continuous.py
def replace_file(path: Path, text: str) -> None:
    """Writes a file so that a crash or a full disk leaves the old one."""
    partial_path = path.with_name(f".partial-{path.name}")
    partial_path.write_text(text, newline="")
    partial_path.replace(path)


# Copied from brc_sac_continuous.py
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


# Copied from brc_sac_continuous.py
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


# Copied from brc_sac_continuous.py
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


# Copied from brc_sac_continuous.py
def checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


# Copied from brc_sac_continuous.py
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


# Copied from brc_sac_continuous.py
def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    return sorted((int(p.name) for p in (run_dir / "checkpoints").glob("[0-9]*") if p.name.isdigit()), reverse=True)


# Copied from brc_sac_continuous.py
def read_counters(path: Path) -> dict:
    """checkpoint.json of one checkpoint. Raises ValueError if it is damaged."""
    counters = json.loads((path / "checkpoint.json").read_text())
    if counters.pop("crc32") != zlib.crc32(json.dumps(counters).encode()):
        raise ValueError("checkpoint.json does not match its checksum")
    return counters


# Copied from brc_sac_continuous.py
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


def save_replay(directory: Path, replay: Replay, tasks: list[str]) -> None:
    """One structured .npy per game, oldest slot first; invalid slots hold the final frame of their game."""
    directory.mkdir(exist_ok=True)
    slots = np.arange(replay.inserted - replay.size, replay.inserted + 1) % replay.slots
    for task, name in enumerate(tasks):
        np.save(directory / f"{file_name(name)}.npy", replay.records(task, slots))


# ---------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    """Trains one agent on the games of `args`; everything it writes is in its run directory."""
    check_args(args)
    tasks, total_timesteps = resolve_tasks(args)
    suite = args.suite or (None if args.env_ids else "atari")
    run_name = args.run_name or f"{suite or file_name(tasks[0])}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume) if args.resume else Path(args.run_root) / run_name
    if not args.resume and (run_dir / "checkpoints").exists():
        raise UserError(f"{run_dir} holds a run: continue it with --resume {run_dir}, or choose another --run-name")

    resumed_at = (checkpoint_steps(run_dir) or [0])[0]
    env_seed, eval_seed = np.random.SeedSequence([args.seed, resumed_at]).generate_state(2)
    envs = ParallelEnvs(tasks, 1, int(env_seed), args.env_backend)
    num_tasks, num_actions = len(tasks), envs.action_dim
    agent = make_agent(args, num_tasks, num_actions, envs.action_dims)
    state = agent.init(args.seed)
    capacity = min(args.buffer_size, max(total_timesteps, 1) + 1000)
    replay = Replay(num_tasks, capacity, args.n_step, args.discount)
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
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"tasks: {num_tasks}, |S| = 84 x 84 x {STACK}, |A| = {num_actions}; device: {information['device']}")
    size = parameter_count(state.critic)
    print(f"parameters: {size:,} in the critic, as many in its target; run directory: {run_dir}")
    full = replay.nbytes / replay.slots * ((capacity if total_timesteps else args.buffer_size) + 1)
    print(f"memory: {full / 1e9:.2f} GB replay when full (host), {state_bytes / 1e9:.2f} GB learner (device)")
    if total_timesteps == 0:
        envs.close()
        return

    stop: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM):  # a second signal ends the process at once
        signal.signal(signum, lambda s, frame: (stop.append(s), signal.signal(s, signal.SIG_DFL)))
    logger = Logger(args, run_dir, step, last_evaluation)
    eval_envs = ParallelEnvs(tasks, eval_copies(num_tasks, args.eval_episodes), int(eval_seed), args.env_backend)
    task_ids = np.arange(num_tasks)
    act_key = jax.random.PRNGKey(args.seed + 1)
    started, saved, last_log = time.time() - wall_time, (step, last_evaluation), (time.time(), step)
    episode_return, train_returns, rows, metrics = np.zeros(num_tasks), {}, [], None
    done = np.zeros(num_tasks, bool)
    frames = envs.reset()
    stack = FrameStack(frames)
    replay.start(frames)
    bar = tqdm(total=total_timesteps, initial=step, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30)

    with bar as progress:
        while True:
            if (step % args.eval_every == 0 or step == total_timesteps) and last_evaluation < step and not stop:
                results = evaluate(agent, state, eval_envs, args.eval_episodes, stop, args.seed + step)
                if results is not None:
                    last_evaluation, wall_time = step, time.time() - started
                    rows = evaluation_rows(tasks, results, step, updates, wall_time)
                    logger.evaluation(rows)
                    values = {f"eval/return/{row['task']}": row["return"] for row in rows}
                    progress.set_postfix({"return": f"{np.mean(list(values.values())):.1f}"}, refresh=False)
                    if scores := {f"eval/score/{row['task']}": row["score"] for row in rows if row["score"] != ""}:
                        totals = aggregate(list(scores.values()))
                        progress.set_postfix(totals, refresh=False)
                        values |= {**scores, **{f"eval/{name}_score": score for name, score in totals.items()}}
                    logger.scalars(values, step)
                    for task_id, task in enumerate(tasks if args.capture_video and not stop else []):
                        path = run_dir / "videos" / f"{file_name(task)}-{step}.mp4"
                        try:
                            record_video(agent, state, task, task_id, path, stop)
                        except Exception as error:  # a package for drawing may be missing
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

            # 1. act with the newest critic
            epsilon = exploration_epsilon(args, step)
            if step < args.learning_starts:
                actions = rng.integers(envs.action_dims)
            else:
                actions = np.asarray(agent.act(state.critic, act_key, step, stack.frames, task_ids, epsilon))
            envs.send(actions)
            # 2. while the environments step, the device updates
            if step >= args.learning_starts:
                batches = replay.sample(rng, args.utd, args.batch_size)
                state, metrics = agent.update(state, batches, normalizer.max_return)
                updates += args.utd
            # 3. receive and store; the step after done was a reset, not a transition
            frames, rewards, terminated, truncated, life_lost = envs.recv()
            for task in np.flatnonzero(~np.isfinite(rewards)):
                check_finite({f"reward of {tasks[task]}": np.nan}, run_dir, step)
            first = life_lost | done
            valid, done = ~done, ~done & (terminated | truncated)
            stack.push(frames, first)
            learned = np.clip(rewards, -1, 1) if args.clip_rewards else rewards
            replay.insert(actions, learned, terminated | life_lost, valid, frames, first)
            bootstrap = None
            if args.truncation_bootstrap == "critic" and (truncated & valid).any():
                bootstrap = np.asarray(agent.value(state, stack.frames, normalizer.max_return))
            # a life is the episode that the critic models: Eq. 2 is applied at its end, with nothing after it
            normalizer.update(learned, terminated | life_lost, truncated & ~life_lost, valid, bootstrap)
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
                values |= {"policy/epsilon": epsilon, "updates": updates}
                values["speed/steps_per_second"] = (step - last_log[1]) / (now - last_log[0])
                logger.scalars({**(metrics or {}), **train_returns, **values}, step)
                train_returns, last_log = {}, (now, step)

    if args.save_replay:
        save_replay(run_dir / "replay", replay, tasks)
    logger.close()
    envs.close()
    eval_envs.close()
    if stop and last_evaluation < total_timesteps:
        print(f"stopped at step {step:,}" + f"; continue with --resume {run_dir}" * bool(checkpoint_steps(run_dir)))
    else:
        print_table(rows)


# Copied from brc_sac_continuous.py
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


def aggregate(scores: list[float]) -> dict[str, float]:
    """Mean, median and interquartile mean over games."""
    return {"mean": np.mean(scores), "median": np.median(scores), "iqm": interquartile_mean(scores)}


def print_table(rows: list[dict]) -> None:
    """Last evaluation of every game."""
    width = max([len(row["task"]) for row in rows], default=6)
    print(f"{'task':<{width}} {'return':>10} {'score':>7}")
    for row in rows:
        print(f"{row['task']:<{width}} {row['return']:>10.1f} {row['score']:>7}")
    if scores := [row["score"] for row in rows if row["score"] != ""]:
        for name, score in aggregate(scores).items():
            print(f"{name:<{width}} {'':>10} {score:>7.3f}")


# Copied from brc_sac_continuous.py
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
            message = "out of memory: lower --encoder-channels, --batch-size, --buffer-size or --eval-episodes"
        elif isinstance(error, jax.errors.JaxRuntimeError):
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
