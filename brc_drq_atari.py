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
(Nauman et al., 2025, arXiv:2505.23150), on DrQ(eps) (Kostrikov et al., 2020; Agarwal et al., 2021). What this file
computes, for game i:

  support          z_j = V_min + (j - 1) (V_max - V_min) / (N_atoms - 1)                                (Eq. 1)
  normalization    Gbar_i <- max(Gbar_i, max_t |G_i(s_t)|) when an episode ends                          (Eq. 2)
                   Gbar_i <- max(Gbar_i, |r_t|) at every step                                            (ours)
                   r_i <- r_i V_max / Gbar_i   (no entropy, so lambda_i = 0)                            (Eq. 3)
  n-step return    R = sum over k < m of gamma^k r_{t+k}, m = 3, or less if the game ends before        (Table 4)
  greedy action    a* = argmax_a E[z ~ p_theta(s_{t+m}, a)], by the online network (double Q, DrQ(eps)) (C.1)
  TD target        y = projection onto z of  R + gamma^m (1 - ended) z,  z ~ p_target(s_{t+m}, a*),     (C.2)
                   ended where it was lost or won, not truncated; to the learner each life is a game
  critic loss      cross-entropy of p_theta(s_t, a_t) with y                                            (Section 3)
  task embedding   e_i / |e_i|_1, appended to the encoder's output: the encoder is task-agnostic        (C.4)
  target critic    theta_target <- (1 - tau) theta_target + tau theta, after every update               (C.1)

Network (Figure 14): scaled Impala encoder, layer norm, task embedding, two dense layers, |A| x N_atoms logits.

What the paper leaves open is as in DrQ(eps) of google/dopamine (labs/atari_100k): each game begins with 1,600 random
steps; epsilon decays after them and is 0.001 in evaluation; 100 games at the end; the online network acts; random shift
by up to 4 pixels (a crop at 0 to 8 of the padded image, there 0 to 7) and intensity noise of 5% on both observations; a
lost life ends the episode for learning and clears the frame stack; Adam's epsilon 1.5e-4; Xavier initialization. Not
taken over: its dueling heads, as the paper names a dense critic; its clipped rewards (--clip-rewards), since return
normalization takes care of their scale; the end of a step's four frames at a lost life; and its no-ops at the start of
a game (0 to 29 steps there, 1 to 30 frames here). Open in the paper and chosen here: weight decay is on all parameters,
biases and norms too, and the batch is 256 (Table 4) for one game as for many; Table 4's action repeat of 1 is taken as
none beyond the emulator's usual four frames. Returns of Eq. 2 end at a lost life, as the critic's episodes do.

envpool plays the games; ale-py with Gymnasium's AtariPreprocessing is the reference (--env-backend gymnasium). Replay
holds one 84 x 84 frame a step, 18.4 GB for all 26 games. gym/ tasks with such frames and discrete actions run as well.

  python brc_drq_atari.py --seed 1                                          # the paper's experiment: 26 games
  python brc_drq_atari.py --env-ids atari/pong                              # one game
  python brc_drq_atari.py --env-ids atari/pong atari/boxing --encoder-channels 16 32 32
  python brc_drq_atari.py --resume runs/RUN                                 # continue a stopped run
  python brc_drq_atari.py --play runs/RUN --capture-video                   # watch what it learned
"""

import atexit
import contextlib
import csv
import ctypes
import errno
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ======================================================================================================================
# Part 1 of 3, the algorithm. Whoever stops reading at its end has read all of BRC: arguments, networks, projection,
# return normalization, agent, replay, main. Part 2: games and environments. Part 3: the run.
# ======================================================================================================================

# what part 3, the same in all scripts, has to know of this one


def interquartile_mean(scores) -> float:
    """Mean of the middle half of the scores (IQM, Agarwal et al., 2021)."""
    scores = np.sort(scores)
    cut = len(scores) // 4
    return float(np.mean(scores[cut : len(scores) - cut]))


SCRIPT = "brc_drq_atari"
PACKAGES = ("jax", "flax", "optax", "envpool", "ale_py", "gymnasium")
AGGREGATES = {"mean": np.mean, "median": np.median, "iqm": interquartile_mean}  # over games, of an evaluation
FRAME, STACK = (84, 84), 4  # height and width of a frame; how many of them the agent sees, the newest ones

PositiveInt = Annotated[int, "[1, inf)"]  # intervals are checked in part 3
NonNegativeInt = Annotated[int, "[0, inf)"]
NonNegativeFloat = Annotated[float, "[0, inf)"]
Probability = Annotated[float, "[0, 1]"]


@dataclass
class Args:
    """DrQ(eps)+BRC (Nauman et al., 2025). Defaults are Table 4's where it has the value."""

    env_ids: tuple[str, ...] = ()
    """games of one agent, as family/task: atari/alien atari/pong gym/module:Pixels-v0 (default: the suite atari)"""
    suite: str | None = None
    """a set of games by name: atari (the 26 of Atari 100k) or atari-transfer (20 others, E.2)"""
    seed: Annotated[int, "[0, 2147483648)"] = 1
    """seed of networks, exploration, replay sampling and environments"""
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's name (default: the file's, so that a renamed copy is its own)"""
    run_name: str | None = None
    """name of the run directory (default: {suite or first task}__{exp_name}__{seed}__{unix time})"""
    run_root: str = "runs"
    """directory that holds the run directories"""
    resume: str | None = None
    """run directory to continue from its newest good checkpoint, with the saved arguments; those of length, evaluation,
    checkpoints, logging, videos and environments may be given anew"""
    play: str | None = None
    """run directory whose newest good checkpoint is evaluated, with --capture-video filmed; nothing else is written"""
    env_backend: Literal["auto", "envpool", "gymnasium"] = "auto"
    """envpool steps atari/ fastest; gymnasium (ale-py) is the reference and runs gym/ too"""
    env_workers: Annotated[int | None, "[1, inf)"] = None
    """processes for the environments that envpool does not step (default: one per core, at most one per task)"""
    env_timeout: Annotated[float, "(0, inf)"] = 600.0
    """seconds after which such a process counts as hung: it is started again, and its episodes are dropped"""
    total_timesteps: Annotated[int | None, "[0, inf)"] = None
    """steps per game, each of four frames or a reset (default: 100,000, Atari 100k); 0 builds everything and exits"""
    learning_starts: PositiveInt = 1_600
    """uniformly random steps per game before the first update (dopamine's min_replay_history)"""
    eval_every: PositiveInt = 25_000
    """steps per game between evaluations"""
    eval_episodes: PositiveInt = 10
    """whole games per evaluation and game, epsilon 0.001"""
    final_eval_episodes: Annotated[int | None, "[1, inf)"] = None
    """games in the last evaluation (default: ten times --eval-episodes, so 100, as DrQ(eps) plays)"""
    checkpoint_every: PositiveInt = 25_000
    """steps per game between checkpoints; one more is written at the end and when stopped"""
    keep_checkpoints: PositiveInt = 2
    """newest checkpoints to keep"""
    save_replay: bool = False
    """write the replay to RUN_DIR/replay/, one .npy file per game, when the run ends or is stopped; with --resume of a
    finished run too"""
    capture_video: bool = False
    """at evaluation, write an mp4 of one more game of each task to RUN_DIR/videos/"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline is respected)"""
    wandb_project: str = "brc"
    """Weights & Biases project"""

    discount: Annotated[float, "[0, 1)"] = 0.99
    """gamma (Table 4)"""
    batch_size: PositiveInt = 256
    """transitions per update, over all games (Table 4)"""
    utd: PositiveInt = 2
    """updates per vector step, one step of every game (Table 4)"""
    buffer_size: Annotated[int, "[12, inf)"] = 100_000
    """replay capacity per game (Table 4); at least 12, as the oldest three of a full ring, whose stacks are lost, are
    never sampled, and a few others may all be resets"""
    polyak_tau: Annotated[float, "[0, 1]"] = 5e-3
    """rate of the target critic's moving average, after every update (Table 4)"""
    learning_rate: NonNegativeFloat = 1e-4
    """AdamW learning rate (Table 4)"""
    weight_decay: NonNegativeFloat = 1e-4
    """AdamW weight decay (Table 4)"""
    num_atoms: Annotated[int, "[2, inf)"] = 101
    """atoms of the categorical critic (Table 4)"""
    v_min: Annotated[float, "(-inf, 0]"] = -10.0
    """lowest atom (Table 4)"""
    v_max: Annotated[float, "(0, inf)"] = 10.0
    """highest atom (Table 4), to which Eq. 3 scales the largest return"""
    encoder_channels: Annotated[tuple[int, ...], "[1, inf)"] = (128, 256, 256)
    """channels of the Impala encoder's sections, each of which halves the image (Table 4)"""
    critic_width: PositiveInt = 512
    """hidden units of the dense critic (Table 4)"""
    critic_depth: NonNegativeInt = 2
    """hidden layers of the dense critic (Table 4)"""
    n_step: PositiveInt = 3
    """rewards summed before the bootstrap (Table 4)"""
    start_epsilon: Probability = 1.0
    """exploration at the first update (Table 4)"""
    end_epsilon: Probability = 0.01
    """exploration after the decay (Table 4)"""
    epsilon_decay_steps: PositiveInt = 5_000
    """steps of the linear decay, from the first update on (Table 4)"""
    augmentation: bool = True
    """random shift and intensity noise on the images of every update (Table 4)"""
    normalize_returns: bool = True
    """divide rewards by the largest return seen in their game (Eq. 2, 3)"""
    embedding_size: PositiveInt = 32
    """task embedding size (Table 4)"""
    clip_rewards: bool = False
    """learn from rewards clipped to [-1, 1], as dopamine's agents do; off, as Eq. 3 scales them"""
    variant: Literal["paper", "released-code"] = "paper"
    """released-code stands for --embedding-norm l2 --truncation-bootstrap mean-reward, where the authors' code differs
    from the paper; either given by hand wins"""
    embedding_norm: Literal["l1", "l2"] = "l1"
    """the norm that is 1 for every embedding: l1 in the paper (C.4), l2 in the released SAC code"""
    truncation_bootstrap: Literal["critic", "mean-reward"] = "critic"
    """tail of a truncated return in Eq. 2: critic output in the paper (C.2), mean reward / (1 - gamma) in the released
    code"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """number format in which the encoder computes; its parameters are float32 in any case"""


RELEASED_CODE = {  # defaults under --variant released-code, see parse_args in part 3
    "variant": "released-code", "embedding_norm": "l2", "truncation_bootstrap": "mean-reward",
}  # fmt: skip
RESUMABLE = {  # arguments that a resumed run may change
    "total_timesteps", "eval_every", "eval_episodes", "final_eval_episodes", "checkpoint_every", "keep_checkpoints",
    "save_replay", "capture_video", "track", "wandb_project", "env_backend", "env_workers", "env_timeout", "resume",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- networks

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


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 max pooling of stride 2 and padding "SAME", as flax's nn.max_pool, of x [batch, height, width, channels].

    In this form XLA's CPU backend takes a tenth of the time for its gradient, the same one; a whole update takes 3/4.
    """
    for axis in (2, 1):
        size = x.shape[axis]
        pooled = -(-size // 2)
        missing = 2 * pooled + 1 - size
        padding = [(0, 0)] * 4
        padding[axis] = (missing // 2, missing - missing // 2)
        padded = jnp.pad(x, padding, constant_values=-jnp.inf)
        x, *others = (jax.lax.slice_in_dim(padded, k, k + 2 * pooled - 1, 2, axis) for k in range(3))
        for other in others:
            x = jnp.where(other > x, other, x)  # of equals the first has the gradient
    return x


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
            x = max_pool(convolution(channels, x))
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


# ----------------------------------------------------------------------------------------------- categorical projection


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


# ------------------------------------------------------------------------------------------------- return normalization


# Copied from brc_sac_continuous.py
class ReturnNormalizer:
    """Largest absolute return seen in each task (C.2, Eq. 2): max_return is Gbar_i.

    It covers every reward as it arrives (ours: a reward is learned from before its episode ends), and every return of
    an episode once that has ended. What follows the end counts 0 if the episode terminated, the given bootstrap value
    if it was truncated. The critic's is at most Gbar_i in magnitude, so that Gbar_i <= max |r| / (1 - discount) by
    induction: |r| + discount Gbar_i keeps the bound.
    """

    def __init__(self, num_tasks: int, discount: float):
        self.max_return = np.zeros(num_tasks, np.float32)
        self.discount = discount
        self.episodes: list[list[float]] = [[] for _ in range(num_tasks)]

    def update(self, rewards, terminated, truncated, valid, bootstrap=None) -> None:
        """One step of every task, each [num_tasks]; valid is False where it was a reset (next-step autoreset).
        bootstrap: value of the final observation in units of reward, used where truncated; None takes the episode's
        mean reward / (1 - discount), as the released code does."""
        # a new array: an update in flight may still read the old one
        self.max_return = np.where(valid, np.maximum(self.max_return, np.abs(rewards)), self.max_return)
        for task in np.flatnonzero(~valid):
            self.episodes[task] = []  # also of an episode that its simulator did not survive
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

    def named(self, tasks: list[str]) -> dict[str, float]:
        """Gbar_i, for TensorBoard."""
        return {f"normalizer/{task}": g for task, g in zip(tasks, self.max_return, strict=True)}


# ----------------------------------------------------------------------------------------------- agent state and update

MIN_SCALE = 1e-8  # of Eq. 3's divisor; reached only by a game whose returns were all but zero
EVAL_EPSILON = 0.001  # as in DrQ(eps)


class AgentState(NamedTuple):
    """Everything that an update changes, on the device."""

    critic: Any  # parameters {"network": Critic's, "embedding": nn.Embed's, or absent}
    critic_optimizer: Any
    target_critic: Any
    key: jax.Array


class Agent(NamedTuple):
    """The functions of one agent, see make_agent: act, value and update are compiled; `embed` is for diagnostics."""

    init: Callable
    act: Callable
    value: Callable
    update: Callable
    embed: Callable


def make_agent(args: Args, num_tasks: int, num_actions: int, action_dims=None) -> Agent:
    """The agent as pure functions of AgentState. One task takes the same path, without embedding.

    action_dims: the tasks' own numbers of actions (default: num_actions for all); others are never chosen.
    """
    use_embedding = num_tasks > 1
    action_counts = jnp.array(action_dims or [num_actions] * num_tasks)
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

    # Copied from brc_sac_continuous.py
    def embed(critic, task_ids):
        """Unit-norm task embeddings (C.4), [..., embedding_size]."""
        embedding = embedding_network.apply(critic["embedding"], task_ids)
        order = 1 if args.embedding_norm == "l1" else 2
        return embedding / jnp.linalg.norm(embedding, ord=order, axis=-1, keepdims=True)

    def to_images(frames):
        """Stored frames [batch, 4, 84, 84] as images [batch, 84, 84, 4] in [0, 1]."""
        return jnp.moveaxis(frames, 1, -1).astype(jnp.float32) / 255

    def logits(critic, images, task_ids):
        """[batch, |A|, num_atoms]"""
        return network.apply(critic["network"], images, embed(critic, task_ids) if use_embedding else None)

    def q_values(outputs, task_ids):
        """Expected return of every action, [batch, |A|]; -inf for actions that the task does not have."""
        values = (nn.softmax(outputs) * atoms).sum(-1)
        return jnp.where(jnp.arange(num_actions) < action_counts[task_ids][:, None], values, -jnp.inf)

    def reward_scale(max_return):
        """V_max / Gbar_i for each task (Eq. 3 without entropy)."""
        return args.v_max / jnp.maximum(max_return, MIN_SCALE) if args.normalize_returns else jnp.ones(num_tasks)

    def td_target(state, batch, next_images, max_return):
        """Target distribution [batch, num_atoms] (C.2), of the online network's action by the target network, and
        normalized returns [batch]."""
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
        now, later = to_images(batch.frames), to_images(batch.next_frames)
        if args.augmentation:
            now, later = augment(image_key, now), augment(next_key, later)
        target, returns = td_target(state, batch, later, max_return)
        loss, gradient = jax.value_and_grad(critic_loss)(state.critic, batch, now, target)
        changes, critic_optimizer = optimizer.update(gradient, state.critic_optimizer, state.critic)
        critic = optax.apply_updates(state.critic, changes)
        target_critic = optax.incremental_update(critic, state.target_critic, args.polyak_tau)
        q = (target * atoms).sum(-1)
        metrics = {
            "losses/critic": loss, "gradient_norms/critic": optax.tree.norm(gradient), "q/target_mean": q.mean(),
            "q/target_min": q.min(), "q/target_max": q.max(), "returns/normalized_mean": returns.mean(),
            "returns/normalized_max_abs": jnp.abs(returns).max(),
        }  # fmt: skip
        return AgentState(critic, critic_optimizer, target_critic, key), metrics

    # Copied from brc_sac_continuous.py
    def update(state: AgentState, batches: Batch, max_return: jax.Array):
        """The utd updates of one vector step, one compiled call, and the last one's metrics. batches: [utd, batch_size,
        ...]; max_return: Gbar_i."""
        for i in range(args.utd):  # unrolled: XLA's CPU backend runs the body of a loop on one thread
            state, metrics = update_once(state, jax.tree.map(lambda x: x[i], batches), max_return)  # noqa: B023
        return state, metrics

    def act(critic, key, step, frames, task_ids, epsilon):
        """Epsilon-greedy actions [batch]. frames: [batch, 4, 84, 84]."""
        explore_key, action_key = jax.random.split(jax.random.fold_in(key, step))
        greedy = q_values(logits(critic, to_images(frames), task_ids), task_ids).argmax(-1)
        uniform = jax.random.randint(action_key, greedy.shape, 0, action_counts[task_ids])
        return jnp.where(jax.random.uniform(explore_key, greedy.shape) < epsilon, uniform, greedy)

    def value(state: AgentState, frames, max_return):
        """Critic's value of one observation per task at its greedy action, in units of reward, [num_tasks]."""
        task_ids = jnp.arange(num_tasks)
        q = q_values(logits(state.critic, to_images(frames), task_ids), task_ids).max(-1)
        return jnp.clip(q / args.v_max, -1, 1) * max_return if args.normalize_returns else q

    return Agent(init, jax.jit(act), jax.jit(value), jax.jit(update, donate_argnums=0), embed)


def exploration_epsilon(args: Args, step: int) -> float:
    """Linear from start_epsilon at the first update to end_epsilon, epsilon_decay_steps later (Table 4)."""
    share = np.clip((step - args.learning_starts) / args.epsilon_decay_steps, 0, 1)
    return float(args.start_epsilon + share * (args.end_epsilon - args.start_epsilon))


def evaluation_policy(agent: Agent, critic, seed: int) -> Callable:
    """Frames [batch, 4, 84, 84] and task_ids [batch] to actions [batch] that are greedy but for EVAL_EPSILON."""
    key, calls = jax.random.PRNGKey(seed), itertools.count()
    return lambda frames, task_ids: agent.act(critic, key, next(calls), frames, task_ids, EVAL_EPSILON)


# --------------------------------------------------------------------------------------------------------------- replay


class Batch(NamedTuple):
    """n-step transitions; leading axes [utd, batch_size] when sampled from replay."""

    frames: np.ndarray  # [..., 4, 84, 84] uint8
    actions: np.ndarray  # [...]
    returns: np.ndarray  # [...], sum of gamma^k r_{t+k}, as the game gave them: Eq. 3 is applied when they are used
    discounts: np.ndarray  # [...], gamma^m of the bootstrap after m rewards, 0 if the episode terminated among them
    next_frames: np.ndarray  # [..., 4, 84, 84] uint8
    task_ids: np.ndarray  # [...]


def record_type() -> np.dtype:
    """One slot of replay, and one record of what is written to disk."""
    return np.dtype([
        ("frame", "u1", FRAME), ("action", "i4"), ("reward", "f4"), ("terminated", "?"), ("first", "?"), ("valid", "?"),
    ])  # fmt: skip


class Replay:
    """A ring of slots per game, all games in step, that stores every frame once: slots [num_tasks, capacity + 1].

    Slot t holds frame t and what was done there; its next frame is slot t + 1's. Environments reset on the step after
    a game's end, whose action they ignore (next-step autoreset, as in envpool and Gymnasium). Here a life is lost at
    the second step, the game is truncated at the third, and the next one begins:

      slot           0      1      2      3           4      5
      frame          f_0    f_1    f_2    f_3, last   f'_0   f'_1
      action         a_0    a_1    a_2    ignored     a'_0   a'_1
      reward         r_0    r_1    r_2    0           r'_0   r'_1
      terminated     no     yes    no     no          no     no       a lost life, or the end of the game
      first          yes    no     yes    no          yes    no       older frames are not in the stack
      valid          yes    yes    yes    no          yes    yes

    An n-step return goes on to the first slot that terminated, or to an invalid one, from whose frame it is
    bootstrapped. Slot 3 is the step that reset: no transition, never sampled. The slot at `head` waits for its action.
    """

    def __init__(self, num_tasks: int, capacity: int, n_step: int, discount: float):
        self.slots = np.zeros((num_tasks, capacity + 1), record_type())
        self.inserted, self.n_step, self.discount = 0, n_step, discount

    @property
    def head(self) -> int:
        return self.inserted % self.slots.shape[1]

    @property
    def size(self) -> int:
        return min(self.inserted, self.slots.shape[1] - 1)

    def start(self, frames: np.ndarray) -> None:
        """First frames [num_tasks, 84, 84]; after a resume, the interrupted games end unlearned at `head`."""
        if self.inserted:
            self.advance()
        self.slots["frame"][:, self.head], self.slots["first"][:, self.head] = frames, True

    def advance(self) -> None:
        self.inserted += 1
        self.slots["valid"][:, self.head] = False

    def insert(self, actions, rewards, terminated, valid, next_frames, next_first) -> None:
        """One step of every game, [num_tasks, ...]; valid is False where this step was a reset."""
        values = {"action": actions, "reward": rewards, "terminated": terminated, "valid": valid}
        for name, value in values.items():
            self.slots[name][:, self.head] = value
        self.advance()
        self.slots["frame"][:, self.head], self.slots["first"][:, self.head] = next_frames, next_first

    def sample(self, rng: np.random.Generator, utd: int, batch_size: int) -> Batch:
        """Uniform over the stored transitions of all games."""
        (num_tasks, ring), shape = self.slots.shape, (utd, batch_size)
        # in steps before the head; in a full ring the oldest slots have lost frames of their stack
        max_age = self.size if self.inserted < ring else self.size - (STACK - 1)
        task_ids = rng.integers(num_tasks, size=shape, dtype=np.int32)
        slots = (self.head - rng.integers(1, max_age + 1, size=shape)) % ring
        while not (valid := self.slots["valid"][task_ids, slots]).all():
            redrawn = int((~valid).sum())
            task_ids[~valid] = rng.integers(num_tasks, size=redrawn)
            slots[~valid] = (self.head - rng.integers(1, max_age + 1, size=redrawn)) % ring
        return self.gather(task_ids, slots)

    def gather(self, task_ids: np.ndarray, slots: np.ndarray) -> Batch:
        """The transitions that begin in the given slots of the given tasks, both [...]."""
        returns, steps = np.zeros(slots.shape, np.float32), np.zeros(slots.shape, int)
        terminated, going_on = np.zeros(slots.shape, bool), np.ones(slots.shape, bool)
        for k in range(min(self.n_step, self.size)):
            now = task_ids, (slots + k) % self.slots.shape[1]
            going_on &= self.slots["valid"][now] & ~terminated
            returns += np.where(going_on, self.discount**k * self.slots["reward"][now], 0)
            terminated |= going_on & self.slots["terminated"][now]
            steps += going_on
        discounts = np.where(terminated, 0, self.discount**steps).astype(np.float32)
        return Batch(
            self.stacks(task_ids, slots), self.slots["action"][task_ids, slots], returns, discounts,
            self.stacks(task_ids, slots + steps), task_ids,
        )  # fmt: skip

    def stacks(self, task_ids: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """What the agent saw at the given slots, [..., 4, 84, 84]: see push_frames."""
        places = task_ids[..., None], (slots[..., None] + np.arange(1 - STACK, 1)) % self.slots.shape[1]
        frames, first = self.slots["frame"][places], self.slots["first"][places]
        for age in range(STACK - 1):  # whatever is older than an episode's first frame
            frames[..., : STACK - 1 - age, :, :][first[..., STACK - 1 - age]] = 0
        return frames


def save_replay(directory: Path, replay: Replay, tasks: list[str]) -> None:
    """One structured .npy per game, oldest slot first; the last is the frame that waits for its action."""
    directory.mkdir(exist_ok=True)
    oldest_first = np.arange(replay.inserted - replay.size, replay.inserted + 1) % replay.slots.shape[1]
    for task, slots in zip(tasks, replay.slots, strict=True):
        save_array(directory / f"{file_name(task)}.npy", slots[oldest_first])


# ----------------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    """Trains one agent on the games of `args`; everything it writes is in its run directory."""
    tasks, steps = resolve_tasks(args.suite, args.env_ids)
    args.total_timesteps = steps if args.total_timesteps is None else args.total_timesteps
    final_episodes = args.final_eval_episodes or 10 * args.eval_episodes
    with Run(args, args.suite or (tasks[0] if args.env_ids else "atari"), args.total_timesteps) as run:
        env_seed, eval_seed = run.seeds()
        workers = EnvWorkers(args.env_workers, args.env_timeout, run.environment_failed, run.stop)
        envs = ParallelEnvs(tasks, 1, env_seed, args.env_backend, workers)
        num_tasks, num_actions = len(tasks), envs.action_dim
        agent = make_agent(args, num_tasks, num_actions, envs.action_dims)
        # a short run allocates what it can fill, and 1,000 slots more for resumes, each of which takes one
        capacity = min(args.buffer_size, max(args.total_timesteps, 1) + 1000)
        replay = Replay(num_tasks, capacity, args.n_step, args.discount)
        normalizer = ReturnNormalizer(num_tasks, args.discount)
        rng = np.random.default_rng(args.seed)
        state, saved = run.restore(agent.init(args.seed), replay)
        if saved:
            normalizer.max_return, rng.bit_generator.state = np.float32(saved["max_return"]), saved["rng"]
        full = num_tasks * replay.slots.itemsize * (1 + (capacity if args.total_timesteps else args.buffer_size))
        learner = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        print(f"tasks: {num_tasks}, |S| = 84 x 84 x {STACK}, |A| = {num_actions}; parameters: "
              f"{parameter_count(state.critic):,} in the critic, as many in its target")  # fmt: skip
        print(f"memory: {full / 1e9:.2f} GB replay when full (host), {learner / 1e9:.2f} GB learner (device)")
        run.start(env_info=envs.information())
        if args.total_timesteps == 0:
            return envs.close()
        copies = eval_copies(num_tasks, math.gcd(args.eval_episodes, final_episodes))
        eval_envs = ParallelEnvs(tasks, copies, eval_seed, args.env_backend, workers)
        task_ids, act_key, metrics = np.arange(num_tasks), jax.random.PRNGKey(args.seed + 1), {}
        frames, batches, rng_state = envs.reset(), None, rng.bit_generator.state
        replay.start(frames[:, -1])
        draw = partial(replay.sample, rng, args.utd, args.batch_size)

        while True:
            if run.evaluation_due():
                act = evaluation_policy(agent, state.critic, args.seed + run.step)
                final = run.step >= args.total_timesteps and not args.play
                episodes = final_episodes if final else args.eval_episodes
                if run.log_evaluation(evaluate(act, eval_envs, episodes, run.stop)) and args.capture_video:
                    record_videos(act, envs, run)
            if run.checkpoint_due():
                run.save(state, replay, max_return=normalizer.max_return.tolist(), rng=rng_state)
            if run.evaluation_due():
                continue  # still due: an environment failed and cut it
            if run.over():
                break

            # 1. act with the newest critic, and update: queued together, so that the device goes on without a pause
            learning, epsilon = run.step >= args.learning_starts, exploration_epsilon(args, run.step)
            if learning:
                batches = draw() if batches is None else batches
                actions = agent.act(state.critic, act_key, run.step, frames, task_ids, epsilon)
                state, metrics = agent.update(state, batches, normalizer.max_return)
            else:
                actions = rng.integers(envs.action_dims)
            actions = np.asarray(actions)
            envs.send(actions)
            # 2. meanwhile draw the next step's batches, without this step's transitions, and move them to the device
            rng_state = rng.bit_generator.state  # saved: a resumed run draws on from here
            if learning:
                batches = jax.device_put(draw())
            # 3. receive, store, update Gbar_i; for the critic, a lost life ends an episode
            frames, rewards, terminated, truncated, life_lost, first, valid = envs.recv()
            ended = terminated | life_lost
            if args.clip_rewards:
                rewards = np.clip(rewards, -1, 1)
            replay.insert(actions, rewards, ended, valid, frames[:, -1], first)
            bootstrap = None
            if args.truncation_bootstrap == "critic" and truncated.any():
                bootstrap = np.asarray(agent.value(state, frames, normalizer.max_return))
            normalizer.update(rewards, ended, truncated & ~ended, valid, bootstrap)
            run.advance(updates=args.utd if learning else 0)
            if run.log_due():
                run.log({**metrics, **envs.last_returns, **normalizer.named(tasks), "policy/epsilon": epsilon})

        if args.save_replay:
            save_replay(run.directory / "replay", replay, tasks)
        run.finish()
        envs.close()
        eval_envs.close()


# ======================================================================================================================
# Part 2 of 3, games and environments: names and suites, scores, environments, evaluation, videos. This script's own.
# ======================================================================================================================

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
    "venture": ("Venture", 0.0, 1187.5), "videopinball": ("VideoPinball", 0.0, 17667.9),
    "wizardofwor": ("WizardOfWor", 563.5, 4756.5), "yarsrevenge": ("YarsRevenge", 3092.9, 54576.9),
}  # fmt: skip
INSTALL = {"atari": "pip install ale-py==0.12.1 opencv-python-headless==4.13.0.92"}
SUITES = {  # name: (games, steps per game), E.1 and E.2
    "atari": ([f"atari/{game}" for game in list(ATARI)[:26]], 100_000),
    "atari-transfer": ([f"atari/{game}" for game in list(ATARI)[26:]], 100_000),
}
MAX_GAME_STEPS = 27_000  # 108,000 frames, half an hour of play (Machado et al., 2018)


def resolve_tasks(suite: str | None, env_ids: tuple[str, ...]) -> tuple[list[str], int]:
    """Task names and steps per task; those of the paper's experiment, the suite atari, if nothing is named.

    Raises UserError for an unknown suite, family or game, naming the valid ones.
    """
    if suite and env_ids:
        raise UserError("--suite and --env-ids exclude each other: give one of them")
    if suite and suite not in SUITES:
        raise UserError(f"unknown suite '{suite}'; suites: {', '.join(SUITES)}")
    tasks, steps = (list(env_ids), 100_000) if env_ids else SUITES[suite or "atari"]
    spellings = {plain(name): game for game, (own, *_) in ATARI.items() for name in (game, own)}
    spellings["sequest"] = "seaquest"  # as E.1 prints it
    for number, task in enumerate(tasks):
        family, _, name = task.partition("/")
        if family not in ("atari", "ALE", "gym") or not name:
            raise UserError(f"unknown task '{task}'; tasks are atari/GAME or gym/ID, such as atari/pong")
        if family != "gym":
            game = spellings.get(plain(name.removesuffix("-v5")))
            if game is None:
                raise UserError(f"unknown task '{task}'; atari/ has: {', '.join(ATARI)}")
            tasks[number] = f"atari/{game}"
    if len(set(map(file_name, tasks))) < len(tasks):
        raise UserError("a task is named twice in --env-ids, or two of them have one file name")
    return tasks, steps


def plain(name: str) -> str:
    """Up-N-Down, up_n_down and UpNDown are one game."""
    return re.sub("[-_ ]", "", name).lower()


def normalized_score(task: str, episode_return: float) -> float:
    """Human-normalized score of a game (Eq. 5 with Agarwal et al.'s scores), NaN where there is none (gym)."""
    family, _, name = task.partition("/")
    if family != "atari":
        return math.nan
    _, random_score, human_score = ATARI[name]
    return (episode_return - random_score) / (human_score - random_score)


def make_env(task: str, render_mode: str | None = None, seed: int | None = None) -> gym.Env:
    """One Gymnasium environment with grayscale frames [84, 84] uint8 and discrete actions.

    Atari: the 18 actions of the full set, no sticky actions, four frames a step with the last two pooled, 1 to 30
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
            if env.spec.max_episode_steps is None:  # its games may never end
                env = gym.wrappers.TimeLimit(env, MAX_GAME_STEPS)
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        hint = INSTALL.get(family, f"pip install the package that registers {name}")
        raise UserError(f"{task} needs a package that is missing ({error}); install: {hint}") from error
    except (gym.error.Error, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"cannot make {task}: {describe(error)}") from error
    space = env.observation_space
    shape = tuple(side for side in space.shape if side > 1) if isinstance(space, gym.spaces.Box) else None
    if shape != FRAME or space.dtype != np.uint8:
        raise UserError(f"{task}: this script needs uint8 observations of 84 x 84, one channel, not {space}")
    if not isinstance(env.action_space, gym.spaces.Discrete) or env.action_space.start != 0:
        raise UserError(f"{task}: this script needs discrete actions 0 ... n - 1, not {env.action_space}")
    if space.shape != FRAME:
        env = gym.wrappers.ReshapeObservation(env, FRAME)
    return env


OBSERVATION = np.uint8
REPORTED = ("lives",)  # of a step's info
IMPORTS = {"atari": "ale_py", "gym": "gymnasium"}  # what the worker processes of a family import, once for all of them


def step_cost(task: str) -> float:
    return 1.0  # games cost about the same


# Copied from brc_sac_continuous.py
def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Copied from brc_sac_continuous.py
def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# Copied from brc_sac_continuous.py
class Results(NamedTuple):
    """What the environments that were sent an action answer, a row each."""

    observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    reported: np.ndarray  # what its info says of REPORTED, NaN where it says nothing
    restarted: np.ndarray  # its simulator failed: this is the first observation of an episode, or nothing


# Copied from brc_sac_continuous.py
def reported(info: dict) -> float:
    value = np.ravel(next((info[key] for key in REPORTED if key in info), math.nan))
    return float(value[0]) if value.size and value.dtype.kind in "biuf" else math.nan  # a task may report None or text


def steps_in_envpool(task: str, backend: str) -> bool:
    """Whether envpool steps this task, or else a worker process. Raises UserError if it must and cannot."""
    problem = f"envpool has no {task}"
    if backend != "gymnasium" and task.startswith("atari/"):
        if importlib.util.find_spec("envpool"):
            return True
        problem = "envpool is missing: pip install envpool==1.2.5"
    if backend == "envpool":
        raise UserError(f"{problem}; or take --env-backend auto")
    return False


class EnvPoolTask:
    """num_envs copies of one game in one envpool pool, of which some or all step while other work goes on."""

    def __init__(self, task: str, num_envs: int, seed: int, number: int = 0):
        import envpool

        self.pool = envpool.make(  # results come one by one, so that copies that finished need not be stepped
            f"{ATARI[task.partition('/')[2]][0]}-v5", env_type="gymnasium", num_envs=num_envs, batch_size=1,
            num_threads=min(num_envs, cores()), seed=seed,
            stack_num=1, frame_skip=4, noop_max=30, full_action_space=True, repeat_action_probability=0.0,
            episodic_life=False, use_fire_reset=False, reward_clip=False, max_episode_steps=MAX_GAME_STEPS,
            img_height=FRAME[0], img_width=FRAME[1],
        )  # fmt: skip
        self.task_numbers, self.num_envs, self.action_dims = [number], num_envs, [int(self.pool.action_space.n)]

    def send(self, actions: np.ndarray | None, rows: np.ndarray) -> None:
        """Steps the given copies; without actions resets all."""
        self.waiting = len(rows)
        if actions is None:
            return self.pool.async_reset()
        self.pool.send(actions.astype(np.int32), rows)

    def recv(self) -> Results:
        parts = sorted((self.pool.recv() for _ in range(self.waiting)), key=lambda part: part[4]["env_id"][0])
        frames, *arrays, infos = zip(*parts, strict=True)
        arrays = map(np.concatenate, ([frame[:, 0] for frame in frames], *arrays))
        return Results(*arrays, np.array([reported(info) for info in infos]), np.zeros(len(infos), bool))

    def close(self) -> None:
        self.pool.close()


# Copied from brc_sac_continuous.py
def next_seed(seeds: np.random.SeedSequence) -> int:
    """Of an environment that is made again: not the seed with which it failed."""
    return int(seeds.spawn(1)[0].generate_state(1)[0] % 2**30)


# Copied from brc_sac_continuous.py
class WorkerEnv:
    """make_env(task) in a worker process, with next-step autoreset as in envpool.

    NumPy's global generator, from which several HumanoidBench tasks draw, is its own: its trajectories are those that
    it would have alone in its process.
    """

    def __init__(self, task: str, seed: int):
        self.task, self.seeds = task, np.random.SeedSequence(seed)
        self.make(seed)

    def make(self, seed: int) -> None:
        with contextlib.suppress(Exception):  # what failed may hold a port or a process; the first time there is none
            self.env.close()
        self.generator, self.cached = np.random.MT19937(), None
        self.words = (ctypes.c_uint32 * 625).from_address(self.generator.ctypes.state_address)  # the last: a position
        self.seed, self.done = seed, True
        with self.own_random_numbers():
            self.env = make_env(self.task, seed=seed)
        if mujoco := sys.modules.get("mujoco"):
            # without a handler it writes MUJOCO_LOG.TXT wherever it is; of one text a warning is shown once
            mujoco.set_mju_user_warning(lambda message: warnings.warn(message.partition(" Time =")[0], stacklevel=1))
            mujoco.MjModel.from_xml_string("<mujoco/>")  # it keeps the last model, 100 MB for a humanoid with hands
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").malloc_trim(0)

    @contextlib.contextmanager
    def own_random_numbers(self):
        np.random.set_bit_generator(self.generator)
        if self.cached:  # the second half of a pair of Gaussians is no part of the generator, and copies are slow
            np.random.set_state(self.cached)  # noqa: NPY002
        position = self.words[624]
        yield
        if self.cached or self.words[624] != position:
            state = np.random.get_state(legacy=False)  # noqa: NPY002
            self.cached = state if state["has_gauss"] else None

    def step(self, action: np.ndarray | None) -> tuple:
        """As gym.Env.step; a reset after an episode's end and without an action. Raises ValueError for an observation
        or reward of another shape than they should have, and for an observation that is not finite."""
        with self.own_random_numbers():
            if action is None or self.done:
                observation, info = self.env.reset(seed=self.seed)
                self.seed = None  # later resets continue the environment's own random stream
                result = observation, 0.0, False, False, info
            else:
                space = self.env.action_space
                result = self.env.step(action[: space.shape[0]].astype(space.dtype) if space.shape else action)
        observation, reward, terminated, truncated, info = result
        if np.shape(observation) != self.env.observation_space.shape:
            declared = self.env.observation_space.shape
            raise ValueError(f"an observation of shape {np.shape(observation)} where its space has {declared}")
        with np.errstate(over="ignore"):  # what is infinite in float32 is not finite to the agent
            observation = np.asarray(observation).astype(OBSERVATION)
        if not np.isfinite(observation).all():
            raise ValueError("an observation that is not finite")
        self.done = terminated or truncated
        # many tasks reward by an array of one number
        return observation, np.asarray(reward, np.float64).item(), terminated, truncated, info


# Copied from brc_sac_continuous.py
class WorkerEnvs:
    """The environments of one ParallelEnvs in a worker process, stepped in turn; results are left in shared memory."""

    def __init__(self, connection, tasks: list[str], seeds: list[int]):
        self.envs, shapes = [], []
        for task, seed in zip(tasks, seeds, strict=True):
            with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()) as printed:
                warnings.simplefilter("default")
                self.envs.append(WorkerEnv(task, seed))
            env = self.envs[-1].env
            shapes.append(env.observation_space.shape)
            said = [*(str(warning.message) for warning in caught), *printed.getvalue().splitlines()]
            connection.send((shapes[-1][0], int(gym.spaces.flatdim(env.action_space)), said))
        dtype = results_type((max(shape[0] for shape in shapes), *shapes[0][1:]))
        self.memory = SharedMemory(create=True, size=len(tasks) * dtype.itemsize)
        self.results = np.ndarray(len(tasks), dtype, self.memory.buf)
        connection.send((self.memory.name, dtype.descr))

    def step(self, rows: np.ndarray, actions: np.ndarray | None) -> list[str]:
        """Returns what failed."""
        failures = []
        for i, row in enumerate(rows):
            env = self.envs[row]
            self.results["stepping"][row], restarted = True, False
            try:
                observation, *step, info = env.step(None if actions is None else actions[i])
            except (Exception, SystemExit) as error:
                failures.append(f"{env.task} failed: {describe(error)}")
                env.make(next_seed(env.seeds))
                (observation, *step, info), restarted = env.step(None), True
            self.results["observations"][row, : len(observation)] = observation
            for name, value in zip(Results._fields[1:], (*step, reported(info), restarted), strict=True):
                self.results[name][row] = value
            self.results["stepping"][row] = False
        return failures


# Copied from brc_sac_continuous.py
def results_type(shape: tuple[int, ...]) -> np.dtype:
    """A row of shared memory: Results, and whether its simulator is at work."""
    return np.dtype([
        ("observations", OBSERVATION, shape), ("rewards", "f8"), ("terminated", "?"), ("truncated", "?"),
        ("reported", "f8"), ("restarted", "?"), ("stepping", "?"),
    ])  # fmt: skip


# Copied from brc_sac_continuous.py
def run_worker(connection) -> None:
    """Body of a worker process: makes, resets and steps environments as the main process asks, and closes them when it
    is asked to end or the main process has ended. Signals are the main process' to handle."""

    def end_with_parent():
        multiprocessing.parent_process().join()
        time.sleep(Worker.grace)  # an environment that hangs is not closed
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup's SIGHUP stays ignored, too
            # no SIG_IGN, which processes that a task starts would inherit: they could not be terminated
            signal.signal(signum, lambda *_: None)
            os.register_at_fork(after_in_child=partial(signal.signal, signum, signal.SIG_DFL))
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    groups = []
    try:
        while request := connection.recv():
            group, *message = request
            try:
                if group is None:
                    groups.append(WorkerEnvs(connection, *message))
                else:
                    connection.send(groups[group].step(*message))
            except (Exception, SystemExit) as error:
                by_user = isinstance(error, UserError)
                connection.send({"error": str(error) if by_user else describe(error), "by_user": by_user})
    finally:
        for env in (env for group in groups for env in group.envs):
            with contextlib.suppress(Exception):
                env.env.close()
        os._exit(0)


# Copied from brc_sac_continuous.py
class WorkerFailure(Exception):
    """A worker process died or hung, or what it steps failed too often."""


# Copied from brc_sac_continuous.py
class Worker:
    """A worker process, which may hold environments of several ParallelEnvs, started again when it died or hung.

    timeout: seconds for one answer. report: called with every failure, the process' or an environment's. stop: once it
    fills, a step has `grace` seconds more.
    """

    max_failures, failures_apart = 5, 1000  # so many failures with fewer steps between them are one too many
    grace = 5

    def __init__(self, timeout: float, report: Callable[[str], None], stop):
        self.timeout, self.report, self.stop, self.process, self.groups = timeout, report, stop, None, []
        self.failures = self.steps = 0
        atexit.register(self.close)
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self.connection, theirs = context.Pipe()
        process = context.Process(target=run_worker, args=(theirs,))  # a daemon's tasks could start no processes
        process.start()
        theirs.close()
        self.process = process

    def kill(self) -> None:
        if self.process:
            self.process.kill()  # it ignores other signals, and has nothing to save
            self.connection.close()
        self.process = None

    def close(self) -> None:
        """Ends the process, which closes its environments first: they may have processes of their own."""
        if self.process:
            self.ask()
            self.process.join(self.grace)
            self.kill()

    def ask(self, *message) -> None:
        with contextlib.suppress(OSError):  # it died, and will not answer either
            self.connection.send(message)

    def answer(self, culprit: Callable[[], str], stop=()) -> Any:
        """Raises WorkerFailure if there is none, UserError if it is one. culprit(): the task that is at work."""
        reason = "ended its worker process, perhaps for lack of memory"
        with contextlib.suppress(EOFError, OSError):
            deadline, here = time.monotonic() + self.timeout, False
            while not (here or stop) and time.monotonic() < deadline:
                here = self.connection.poll(min(1, self.timeout))
            if here or (stop and self.connection.poll(min(self.grace, self.timeout))):
                answer = self.connection.recv()
                if not isinstance(answer, dict):
                    return answer
                if answer["by_user"]:
                    raise UserError(answer["error"])
                raise WorkerFailure(f"{culprit()} failed: {answer['error']}")
            limit = f"{self.grace} s of the stop" if stop else f"{self.timeout:g} s (--env-timeout)"
            reason = f"gave no answer within {limit}"
        raise WorkerFailure(f"{culprit()} {reason}")

    def failed(self, *reasons: str) -> None:
        self.failures = self.failures + 1 if self.steps < self.failures_apart else 1
        self.reason, self.steps = reasons[-1], 0
        for reason in reasons:
            self.report(reason)

    def revive(self) -> None:
        """Starts a process that died again. Raises WorkerFailure after max_failures with little between them."""
        while self.process is None or self.failures >= self.max_failures:
            if self.failures >= self.max_failures:
                raise WorkerFailure(f"{self.reason}; {self.failures} failures, each soon after the one before")
            self.start()
            try:
                for group in self.groups:
                    group.make([next_seed(seeds) for seeds in group.seeds])
                    group.made()
            except (WorkerFailure, UserError) as error:
                self.kill()
                self.failed(str(error))


# Copied from brc_sac_continuous.py
class WorkerGroup:
    """The environments of one ParallelEnvs that one worker steps; used as an EnvPoolTask is."""

    num_envs = 1

    def __init__(self, worker: Worker, task_numbers: list[int], tasks: list[str], seeds: list[int]):
        self.worker, self.task_numbers, self.tasks = worker, task_numbers, [tasks[number] for number in task_numbers]
        self.seeds = [np.random.SeedSequence(seeds[number]) for number in task_numbers]
        self.number, self.results = len(worker.groups), None
        worker.groups.append(self)
        self.make([seeds[number] for number in task_numbers])

    def make(self, seeds: list[int]) -> None:
        self.fresh, self.results = True, None  # fresh: the next step resets
        self.worker.ask(None, self.tasks, seeds)

    def made(self) -> list[str]:
        """Waits for the environments and returns what they said, warnings and lines."""
        made = [self.worker.answer(lambda task=task: task) for task in self.tasks]
        self.observation_dims, self.action_dims, said = zip(*made, strict=True)
        name, dtype = self.worker.answer(lambda: self.tasks[-1])
        self.memory = SharedMemory(name)
        self.memory.unlink()  # both processes have it now, and nothing is left when they end
        self.results = np.ndarray(len(self.tasks), np.dtype(dtype), self.memory.buf)
        return [text for texts in said for text in texts]

    def send(self, actions: np.ndarray | None, rows: np.ndarray) -> None:
        self.worker.revive()
        self.restarted = self.fresh and actions is not None
        self.rows, self.fresh = rows, False
        self.worker.ask(self.number, rows, None if self.restarted else actions)

    def recv(self) -> Results:
        try:
            if failures := self.worker.answer(self.at_work, self.worker.stop):
                self.worker.failed(*failures)
        except (WorkerFailure, UserError) as error:
            self.worker.kill()
            self.worker.failed(str(error))
            self.results["restarted"][self.rows] = True
        self.worker.steps += 1
        results = self.results[self.rows]
        results["restarted"] |= self.restarted
        return Results(*(results[name] for name in Results._fields))

    def at_work(self) -> str:
        return self.tasks[self.results["stepping"].argmax()]

    def close(self) -> None:
        self.worker.close()


# Copied from brc_sac_continuous.py
class EnvWorkers:
    """Worker processes for the environments that envpool does not step, started when the first ones are made.

    number: default one per core; never more than tasks. Each holds several tasks, dealt by what their steps cost. They
    come from a fork server that imported the heavy modules once: never a fork of this process, whose JAX threads would
    not survive it.
    """

    heavy_modules = ("jax", "flax.linen", "optax", "orbax.checkpoint", "tyro", "gymnasium")

    def __init__(self, number: int | None = None, timeout: float = 600, report: Callable[[str], None] = print, stop=()):
        self.number, self.about, self.workers = number or cores(), (timeout, report, stop), []

    def make(self, numbers: list[int], tasks: list[str], seeds: list[int]) -> list[WorkerGroup]:
        """One environment of each task that `numbers` counts."""
        if not self.workers:
            imports = {IMPORTS[tasks[number].partition("/")[0]] for number in numbers}
            multiprocessing.get_context("forkserver").set_forkserver_preload([*self.heavy_modules, *imports])
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the processes inherit
            try:
                multiprocessing.forkserver.ensure_running()
            except OSError as error:  # a path too long for a socket, or a full disk
                way_out = "set TMPDIR to a short path with free space"
                raise UserError(f"cannot start worker processes: {error}; {way_out}") from error
            finally:
                signal.signal(signal.SIGINT, handler)
            self.workers = [Worker(*self.about) for _ in range(min(self.number, len(numbers)))]
        dealt, load = [[] for _ in self.workers], np.zeros(len(self.workers))
        for number in sorted(numbers, key=lambda number: -step_cost(tasks[number])):
            least = load.argmin()
            dealt[least].append(number)
            load[least] += step_cost(tasks[number])
        dealt = zip(self.workers, map(sorted, dealt), strict=True)
        groups = [WorkerGroup(worker, numbers, tasks, seeds) for worker, numbers in dealt if numbers]
        try:
            said = [text for group in groups for text in group.made()]
        except WorkerFailure as error:
            raise UserError(str(error)) from error
        for text in dict.fromkeys(said):  # what many tasks say is shown once
            print(text, file=sys.stderr)
        return groups


def push_frames(stack: np.ndarray, frames: np.ndarray, first: np.ndarray) -> np.ndarray:
    """What the agent sees: the newest frames of every row, [rows, 4, 84, 84], oldest first, and zeros for those before
    an episode's first. Adds frames [rows, 84, 84]; first [rows]: they begin an episode (a game, or the next life)."""
    stack = np.concatenate([stack[:, 1:], frames[:, None]], axis=1)  # a new array: JAX may still read the old one
    stack[first, :-1] = 0
    return stack


class Step(NamedTuple):
    """One step of every row of ParallelEnvs, [size, ...]. Where it was a reset (see Replay), valid is False, and so are
    terminated, truncated, done and life_lost; the reward is 0."""

    frames: np.ndarray  # [size, 4, 84, 84] uint8, see push_frames
    rewards: np.ndarray
    terminated: np.ndarray  # the game is over
    truncated: np.ndarray  # and not terminated
    life_lost: np.ndarray  # the last one too
    first: np.ndarray  # the newest frame begins a game or the next life
    valid: np.ndarray

    @property
    def done(self) -> np.ndarray:
        return self.terminated | self.truncated


class ParallelEnvs:
    """num_envs copies of every game that envpool steps, and one of every other, stepped all at once.

    Row r is a copy of task task_ids[r]. After done, the next step resets that row and ignores the action: next-step
    autoreset, see Replay. Where a simulator failed, its game is dropped: that step is a reset too, and interrupted is
    True. episode_return and episode_length are those of each row's current game, at a done step of the whole one.
    """

    observation_dim = (*FRAME, STACK)

    def __init__(self, tasks: list[str], num_envs: int, seed: int, backend: str, workers: EnvWorkers | None = None):
        self.tasks, seeds = tasks, (np.random.SeedSequence(seed).generate_state(len(tasks)) % 2**30).tolist()
        self.pools = self.make_pools(num_envs, seeds, backend, workers or EnvWorkers())
        copies = {number: pool.num_envs for pool in self.pools for number in pool.task_numbers}
        self.task_ids = np.repeat(np.arange(len(tasks)), [copies[number] for number in range(len(tasks))])
        self.size = len(self.task_ids)
        self.rows = [np.flatnonzero(np.isin(self.task_ids, pool.task_numbers)) for pool in self.pools]
        dims = {n: dim for pool in self.pools for n, dim in zip(pool.task_numbers, pool.action_dims, strict=True)}
        self.observation_dims = [self.observation_dim] * len(tasks)
        self.action_dims = [dims[number] for number in range(len(tasks))]
        self.action_dim = max(self.action_dims)

    # Copied from brc_sac_continuous.py
    def make_pools(self, num_envs: int, seeds: list[int], backend: str, workers: EnvWorkers) -> list:
        in_envpool = [steps_in_envpool(task, backend) for task in self.tasks]
        numbers = [number for number, found in enumerate(in_envpool) if not found]
        pools = [EnvPoolTask(self.tasks[n], num_envs, seeds[n], n) for n, found in enumerate(in_envpool) if found]
        return pools + (workers.make(numbers, self.tasks, seeds) if numbers else [])

    # Copied from brc_sac_continuous.py
    def information(self) -> dict:
        """env_info of args.json."""
        return {
            "num_tasks": len(self.tasks), "task_names": self.tasks, "observation_dim": self.observation_dim,
            "action_dim": self.action_dim, "observation_dims": self.observation_dims, "action_dims": self.action_dims,
        }  # fmt: skip

    def reset(self) -> np.ndarray:
        """First frames [size, 4, 84, 84], see push_frames: a step that resets all."""
        self.done, self.last_returns, self.lives = np.ones(self.size, bool), {}, np.zeros(self.size)
        self.episode_return, self.episode_length = np.zeros(self.size), np.zeros(self.size, int)
        self.frames = np.zeros((self.size, STACK, *FRAME), np.uint8)
        self.send(None)
        return self.recv().frames

    # Copied from brc_sac_continuous.py
    def send(self, actions: np.ndarray | None, resting: np.ndarray | None = None) -> None:
        """actions: [size, action_dim] in [-1, 1]. Rows where resting [size] is True are not stepped. Raises
        FloatingPointError for an action that is not finite: what a simulator makes of it is not the simulator's fault.
        """
        if actions is not None and not np.isfinite(actions).all():
            raise FloatingPointError("actions")
        self.stepping = []
        for rows, pool in zip(self.rows, self.pools, strict=True):
            places = np.arange(len(rows)) if resting is None else np.flatnonzero(~resting[rows])
            if len(places):
                pool.send(None if actions is None else actions[rows[places]], places)
                self.stepping.append((rows[places], pool))

    def recv(self) -> Step:
        """Raises FloatingPointError for a reward that is not finite. Rows that were not stepped are as if they had been
        reset."""
        frames, rewards = np.zeros((self.size, *FRAME), np.uint8), np.zeros(self.size, np.float32)
        (terminated, truncated, restarted, stepped), lives = np.zeros((4, self.size), bool), np.zeros(self.size)
        for rows, pool in self.stepping:
            results, stepped[rows] = pool.recv(), True
            frames[rows], rewards[rows], restarted[rows] = results.observations, results.rewards, results.restarted
            terminated[rows], truncated[rows] = results.terminated, results.truncated
            lives[rows] = results.reported
        began, self.interrupted = (self.done & stepped) | restarted, bool(restarted.any())
        valid = stepped & ~began
        rewards = np.where(valid, rewards, 0)  # a reset's is nothing, whatever the simulator says
        for row in np.flatnonzero(~np.isfinite(rewards)):
            raise FloatingPointError(f"reward of {self.tasks[self.task_ids[row]]}")
        lives = np.where(np.isnan(lives), np.where(began, 0, self.lives), lives)  # untold is unchanged
        life_lost = valid & (lives < self.lives)
        self.frames, self.lives = push_frames(self.frames, frames, first := life_lost | ~valid), lives
        step = Step(
            self.frames, rewards, terminated & valid, truncated & ~terminated & valid, life_lost, first, valid
        )  # fmt: skip
        self.done = np.where(stepped, step.done, self.done)
        self.episode_return = np.where(began, 0, self.episode_return) + step.rewards
        self.episode_length = np.where(began, 0, self.episode_length) + valid
        for row in np.flatnonzero(step.done):
            self.last_returns[f"train/return/{self.tasks[self.task_ids[row]]}"] = self.episode_return[row]
        return step

    def close(self) -> None:
        for pool in self.pools:
            pool.close()


EVAL_ENVS = 260  # at most, for several games: 26 games with ten copies each


# Copied from brc_sac_continuous.py
def eval_copies(num_tasks: int, episodes: int) -> int:
    """Copies of each task that evaluation steps at once: a divisor of `episodes`, so that none is played in vain."""
    return max(n for n in range(1, episodes + 1) if episodes % n == 0 and (n == 1 or n * num_tasks <= EVAL_ENVS))


# Copied from brc_sac_continuous.py
def act_in_rows(act: Callable, observations: np.ndarray, task_ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """act's actions [size, ...] in the given rows, 0 in the others. It is called for these rows alone, repeated to a
    half, a quarter, ... of all, so that it is compiled for a few sizes only."""
    size = len(task_ids)
    while size // 2 >= len(rows):
        size //= 2
    taken = np.resize(rows, size)
    chosen = np.asarray(act(observations[taken], task_ids[taken]))[: len(rows)]
    actions = np.zeros((len(task_ids), *chosen.shape[1:]), chosen.dtype)
    actions[rows] = chosen
    return actions


def evaluate(act: Callable, envs: ParallelEnvs, episodes: int, stop: list) -> list[dict] | None:
    """Means over whole games, a row of eval.csv per task, empty where a column has no meaning; None if `stop` fills or
    an environment fails meanwhile.

    act: frames [rows, 4, 84, 84] and task_ids [rows] to actions [rows]. Every copy of a game plays the same number of
    whole games, so that short ones are not counted more often, and rests when it has.
    """
    returns = [[] for _ in envs.tasks]
    left = np.ceil(episodes / np.bincount(envs.task_ids)).astype(int)[envs.task_ids]  # to play, of each row
    frames = envs.reset()
    while left.any():
        if stop or envs.interrupted:
            return None
        envs.send(act_in_rows(act, frames, envs.task_ids, np.flatnonzero(left)), resting=left == 0)
        step = envs.recv()
        frames = step.frames
        left -= step.done
        for row in np.flatnonzero(step.done):
            returns[envs.task_ids[row]].append(envs.episode_return[row])
    table = []
    for task, episode_returns in zip(envs.tasks, returns, strict=True):
        mean_return = float(np.mean(episode_returns))
        score = normalized_score(task, mean_return)
        table.append({
            "task": task, "episodes": len(episode_returns), "return": rounded(mean_return), "success": "",
            "score": "" if math.isnan(score) else round(score, 5),
        })  # fmt: skip
    return table


VIDEO_FPS = 15  # a frame per step


# Copied from brc_sac_continuous.py
def record_videos(act: Callable, envs: ParallelEnvs, run: "Run") -> None:
    """One episode of every task as RUN_DIR/videos/<task>-<step>.mp4, up to where the run is stopped. act: as in
    evaluate. What cannot be drawn is a warning."""
    for task_id, task in enumerate(envs.tasks):
        if run.stop:
            return
        path = run.directory.absolute() / "videos" / f"{file_name(task)}-{run.step}.mp4"
        partial_path = path.with_name(f".partial-{path.name}")  # the film of an earlier --play stays until there is one
        try:
            import imageio

            path.parent.mkdir(exist_ok=True)
            with (
                contextlib.chdir("."),  # back to here, wherever a task goes
                warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # JAX's of ffmpeg's fork: it execs
                imageio.get_writer(partial_path, fps=VIDEO_FPS, macro_block_size=2) as video,
            ):
                for frame in episode_frames(act, task, task_id, envs, run.stop):
                    video.append_data(frame)
            partial_path.replace(path)
        except (Exception, SystemExit) as error:  # a graphics library or a package for drawing may be missing
            partial_path.unlink(missing_ok=True)
            tqdm.write(f"warning: no video of {task}: {error}", file=sys.stderr)


def episode_frames(act: Callable, task: str, task_id: int, envs: ParallelEnvs, stop: list) -> Iterator[np.ndarray]:
    """Every step's frame of one game, in color."""
    with contextlib.closing(make_env(task, render_mode="rgb_array")) as env:
        frames = push_frames(np.zeros((1, STACK, *FRAME), np.uint8), env.reset()[0][None], [True])
        lives, done = 0.0, False
        while True:
            yield env.render()
            if done or stop:
                return
            frame, _, terminated, truncated, info = env.step(int(act(frames, np.array([task_id]))[0]))
            before, lives = lives, lives if math.isnan(told := reported(info)) else told
            frames, done = push_frames(frames, frame[None], [lives < before]), terminated or truncated


# ======================================================================================================================
# Part 3 of 3, the run: arguments, run directory, curves, progress, signals, checkpoints, resume, errors. The same in
# all four scripts; part 1 says in SCRIPT, PACKAGES, RESUMABLE, RELEASED_CODE and AGGREGATES what differs.
# ======================================================================================================================

EVAL_COLUMNS = ("step", "updates", "wall_time", "task", "episodes", "return", "success", "score")
LOG_EVERY = 500  # steps between TensorBoard points and checks for values that are not finite
SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]  # the last is Slurm's
PLAYABLE = {"play", "eval_episodes", "capture_video", "env_backend", "env_workers", "env_timeout", "pretrained"}


class UserError(Exception):
    """Something the user can mend: printed as one line, exit status 2."""


def parse_args(argv: list[str] | None = None) -> Args:
    """Arguments of the command line; with --resume and --play those of the saved run, overridden by the command
    line's."""
    words = [word.partition("=")[0].replace("_", "-") for word in (sys.argv[1:] if argv is None else argv)]
    flags = [word.replace("--no-", "--", 1) for word in words if word.startswith("--")]
    lists = {"--" + field.name.replace("_", "-") for field in fields(Args) if "tuple" in str(field.type)}
    for flag in dict.fromkeys(flag for flag in flags if flags.count(flag) > 1):
        if flag in lists:
            raise UserError(f"{flag} is given twice: its values follow one flag, as in {flag} A B")
        print(f"warning: {flag} is given twice; the last one counts", file=sys.stderr)
    args = tyro.cli(Args, args=argv)
    if args.resume and args.play:
        raise UserError("--resume and --play exclude each other: give one of them")
    if "" in (args.resume, args.play):  # as of an unset variable
        raise UserError("--resume and --play need a run directory, not an empty name")
    if not (args.resume or args.play):
        released = getattr(args, "variant", "paper") == "released-code"
        return check_ranges(tyro.cli(Args, args=argv, default=Args(**RELEASED_CODE)) if released else args)
    asked = f"--play {args.play}" if args.play else f"--resume {args.resume}"
    path = Path(args.play or args.resume) / "args.json"
    try:
        saved = json.loads(path.read_text())
        if saved.get("script", SCRIPT) != SCRIPT:
            raise UserError(f"{asked}: that run was made by {saved['script']}, not by this script")
        if args.play:  # the tasks by name, and nothing that writes
            saved |= {"env_ids": saved["env_info"]["task_names"], "suite": None, "resume": None, "buffer_size": 12}
            saved |= dict.fromkeys(("save_replay", "capture_video", "log_task_statistics", "track", "heatmap"), False)
        saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        known = {field.name: saved[field.name] for field in fields(Args) if field.name in saved}  # older runs lack some
        default = Args(**{**known, "env_ids": tuple(saved["env_ids"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{asked}: no run of this script there ({path}: {error})") from error
    args = tyro.cli(Args, args=argv, default=default)
    free = PLAYABLE if args.play else RESUMABLE
    changed = [k for k, v in asdict(args).items() if v != getattr(default, k) and k not in free]
    if changed:
        names = ", ".join("--" + name.replace("_", "-") for name in changed)
        if args.play:
            raise UserError(f"--play takes the run's own arguments, not {names}; --eval-episodes may be given")
        raise UserError(f"a resumed run cannot change {names}; start a new run instead")
    return check_ranges(args)


def check_ranges(args: Args) -> Args:
    """Raises UserError for a number, also in a tuple, outside the interval that stands beside its field in Args."""
    for name, hint in get_type_hints(Args, include_extras=True).items():
        value = getattr(args, name)
        for interval in getattr(hint, "__metadata__", ()) if value is not None else ():
            low, high = map(float, interval[1:-1].split(","))
            for number in (value or (math.nan,)) if isinstance(value, tuple) else (value,):  # no tuple may be empty
                if not isinstance(number, int | float):  # of an args.json that was edited
                    raise UserError(f"--{name.replace('_', '-')} {value!r}: must be a number")
                inside = low <= number <= high and not (number == low and interval[0] == "(")
                if not inside or (number == high and interval[-1] == ")"):
                    raise UserError(f"--{name.replace('_', '-')} {value}: must be in {interval}")
    return args


def file_name(task: str) -> str:
    return task.replace("/", "-").replace(":", "-")


def rounded(value: float) -> float:
    """To four decimals; a small number to as many digits."""
    return round(value, 4) if abs(value) >= 0.1 else float(f"{value:.4g}")


def replace_file(path: Path, text: str) -> None:
    """Writes a file so that a crash, also of the machine, or a full disk leaves the old one."""
    partial_path = path.with_name(f".partial-{path.name}")
    with partial_path.open("w", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial_path.replace(path)


def save_array(path: Path, array: np.ndarray) -> None:
    """Whole or not at all, and beside a file that another process maps."""
    partial_path = path.with_name(f".partial-{path.name}")
    try:
        np.save(partial_path, array)
    except OSError as error:  # of a full disk numpy says how many items it wrote, without a number
        raise OSError(error.errno or errno.ENOSPC, "cannot write", str(partial_path)) from error
    partial_path.replace(path)


class Run:
    """A run directory, owned by one process: curves, progress, signals, checkpoints, resume. Use it in a `with`.

    step, updates: vector steps (offline: batches) and gradient steps done so far. stop: filled by the first Ctrl-C or
    SIGTERM, upon which the run writes a checkpoint and ends; a second one ends the process at once.

    With --play it is the end of a run of which only one evaluation is left: nothing is owned, logged or written but
    videos, and the run may still be going on in another process.
    """

    def __init__(self, args: Args, name: str, total: int, unit: str = "step", experiment: str = ""):
        if "DISPLAY" not in os.environ:  # training needs no graphics library, videos need a headless one
            os.environ.setdefault("MUJOCO_GL", "egl" if args.capture_video else "disable")
        self.args, self.total, self.unit, self.stop = args, total, unit, []
        self.step, self.updates, self.last_evaluation, self.rows = 0, 0, -1, []
        self.seconds, self.tensorboard, self.bar, self.wandb = 0.0, None, None, None
        self.curve, self.cut, self.save_at, self.warned = [], 0, math.inf, set()  # save_at: on the monotonic clock
        self.asked: dict[int, float] = {}  # signal: when it came first
        name = args.run_name or f"{file_name(name)}__{experiment or args.exp_name}__{args.seed}__{int(time.time())}"
        try:
            jax.devices()
        except (RuntimeError, AssertionError) as error:
            asked = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
            raise UserError(f"JAX has no device ({asked}); unset it, or install jax for it") from error
        self.directory, self.created, self.lock = Path(args.resume or Path(args.run_root) / name), [], None
        if args.play:
            self.directory = Path(args.play)
            return
        if re.search(r"\[.*\]", path := str(self.directory.absolute())) or (os.sep == "/" and "\\" in path):
            raise UserError(f"{path}: Orbax cannot save below a name with [ ] or \\ in it; choose another or rename it")
        parts = [*(self.directory / "checkpoints").glob("[!.]*"), *self.directory.glob("embedding.csv")]
        if not args.resume and parts:
            go_on = f"continue it with --resume {self.directory}, or choose another --run-name"
            raise UserError(f"{self.directory} holds a run: {go_on}")
        for step in checkpoint_steps(self.directory)[:1] if args.resume else ():
            with contextlib.suppress(OSError, ValueError, KeyError):  # a damaged one is told when it is loaded
                self.refuse_finished(read_counters(self.directory / "checkpoints" / str(step)))
        self.created = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        try:
            for number in itertools.count(2):  # two runs that start in one second get two directories
                with contextlib.suppress(FileExistsError):
                    self.directory.mkdir(parents=True, exist_ok=bool(args.resume or args.run_name))
                    break
                if not self.directory.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, "a file is in the way")
                self.directory = Path(args.run_root) / f"{name}-{number}"
                self.created = [self.directory]
            self.lock = os.open(self.directory, os.O_RDONLY) if fcntl else None
        except OSError as error:
            raise UserError(f"cannot make {self.directory}: {error.strerror}; choose another --run-root") from error
        try:
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it, however the process ends
        except BlockingIOError as error:
            os.close(self.lock)
            raise UserError(f"{self.directory} is in use by another process") from error
        except OSError:  # a file system without locks
            pass

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.tensorboard:
            with contextlib.suppress(OSError):  # a full disk
                self.tensorboard.close()
        if self.wandb:
            with contextlib.suppress(Exception):  # its process may have died
                self.wandb.finish()
        started = self.bar is not None and not self.args.play
        if isinstance(error, FloatingPointError) and started:  # for those who compare runs: see scores.py
            text = json.dumps({**self.information, "diverged_at": self.step}, indent=2)
            with contextlib.suppress(OSError):
                replace_file(self.directory / "args.json", text)
        if self.lock is not None:
            os.close(self.lock)
        with contextlib.suppress(OSError):
            for path in self.created:
                path.rmdir()  # where nothing was written
        if isinstance(error, (FloatingPointError, WorkerFailure)):
            good = [f"{self.directory}/checkpoints/{step}" for step in checkpoint_steps(self.directory)[:1]]
            last = f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint yet"
            what = "not finite" if isinstance(error, FloatingPointError) else "environments failed"
            raise UserError(f"{what} at step {self.step:,}: {error}; {last}") from error

    def seeds(self) -> list[int]:
        """Two seeds, of training and evaluation environments; a resumed run does not repeat its beginning."""
        resumed_at = (checkpoint_steps(self.directory) or [0])[0]
        return np.random.SeedSequence([self.args.seed, resumed_at]).generate_state(2).tolist()

    def restore(self, state, replay=None) -> tuple[Any, dict | None]:
        """With --resume and --play learner and counters of the newest undamaged checkpoint, else the given state and
        None. --resume fills `replay`."""
        if not (self.args.resume or self.args.play):
            return state, None
        state, counters = load_checkpoint(self.directory, state, None if self.args.play else replay, self.args.play)
        self.step, self.updates, self.seconds = counters["step"], counters["updates"], counters["wall_time"]
        if self.args.play:
            self.total = self.step
            print(f"playing {self.directory}, step {self.step:,}")
            return state, counters
        self.refuse_finished(counters)
        self.last_evaluation = counters["last_evaluation"]
        print(f"resumed {self.directory} at step {self.step:,}")
        return state, counters

    def refuse_finished(self, counters: dict) -> None:
        if getattr(self.args, "save_replay", False) and counters["step"] == self.total:
            directory = self.directory / "replay"  # not asked for then, or the disk was full: the checkpoint has it
            if not directory.exists() or any(directory.glob(".partial-*")):
                return
        if counters["step"] > self.total or counters["last_evaluation"] >= self.total:
            longer = "--total-updates" if self.unit == "update" else "--total-timesteps"
            step = f"{counters['step']:,}"
            raise UserError(f"{self.directory} is finished (step {step}); to go on, give a larger {longer}")

    def start(self, **information) -> None:
        """Writes args.json: arguments, versions and `information`. Opens everything else unless there is nothing to do.
        What the curves hold beyond the checkpoint that a run resumes from is dropped, and that it diverged there."""
        if self.args.play:
            self.bar, self.started = tqdm(disable=True), time.monotonic()
            return
        names = ("args.json", "eval.csv", "events.*", "statistics", "videos")
        found = [path for name in names for path in self.directory.glob(name) if not self.args.resume]
        if found:  # of a run of the same name that left no checkpoint
            before = self.directory / f"before-{time.time_ns()}"
            before.mkdir()
            for path in found:
                path.rename(before / path.name)
        self.information = {**asdict(self.args), **run_information(), **information}
        replace_file(self.directory / "args.json", json.dumps(self.information, indent=2))
        print(f"device: {self.information['device']}; run directory: {self.directory}")
        if self.total == 0:
            return
        for signum in SIGNALS:
            if not (signum.name == "SIGHUP" and signal.getsignal(signum) == signal.SIG_IGN):  # nohup's
                signal.signal(signum, self.ask_to_stop)
        self.curve = [row for row in read_curve(self.directory / "eval.csv") if row["step"] <= self.last_evaluation]
        self.write_curve()
        if self.args.track:
            path = self.directory.resolve()
            unique = re.sub(r"[^\w-]", "-", path.name) + f"-{zlib.crc32(str(path).encode()):08x}"
            about = {"project": self.args.wandb_project, "name": path.name, "id": unique}
            try:
                import wandb

                self.wandb = wandb.init(resume="allow", dir=str(self.directory), config=self.information, **about)
            except Exception as error:  # not installed, not logged in, no network
                ways = "pip install wandb, wandb login, or set WANDB_MODE=offline"
                raise UserError(f"--track: {' '.join(str(error).split())}; {ways}") from error
        self.open_events()
        quiet = 0.5 if sys.stderr.isatty() else 30
        self.bar = tqdm(total=self.total, initial=self.step, unit=self.unit, mininterval=quiet)
        self.started, self.logged = time.monotonic() - self.seconds, (time.monotonic(), self.step)
        self.saved = self.step, self.last_evaluation

    def ask_to_stop(self, signum: int, frame) -> None:
        """A second Ctrl-C ends the process. Other signals come twice for one event, as from `timeout` or a terminal
        that is closed: only a later one does."""
        since = time.monotonic() - self.asked.setdefault(signum, time.monotonic())
        self.stop.append(signum)
        if signum == signal.SIGINT or since > 2:
            signal.signal(signum, signal.SIG_DFL)
        if since > 2:
            os.kill(os.getpid(), signum)

    def open_events(self) -> None:
        """TensorBoard's file, written without the usual thread, in which a full disk would go unnoticed and block."""
        from tensorboardX.event_file_writer import EventsWriter  # here: it imports torch where that is installed
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        try:
            self.tensorboard = EventsWriter(str(self.directory / "events"))
            if self.step:  # hides what an earlier process wrote beyond the checkpoint
                log = SessionLog(status=SessionLog.START)
                self.tensorboard.write_event(Event(step=self.step + 1, wall_time=time.time(), session_log=log))
        except OSError as error:
            self.cannot_write("TensorBoard's file", error)

    def cannot_write(self, what: str, error: Exception) -> None:
        """Logging never ends a run: what cannot be written is left out, with one warning."""
        if what not in self.warned:
            reason = getattr(error, "strerror", None) or describe(error)
            tqdm.write(f"warning: cannot write {what}: {reason}; the run goes on without", file=sys.stderr)
        self.warned.add(what)

    def write_curve(self) -> None:
        """All of it: what a full disk left out comes with the next evaluation."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, EVAL_COLUMNS)
        writer.writeheader()
        writer.writerows(self.curve)
        try:
            replace_file(self.directory / "eval.csv", text.getvalue())
        except OSError as error:
            self.cannot_write("eval.csv", error)

    def evaluation_due(self) -> bool:
        due = self.step % self.args.eval_every == 0 or self.step == self.total or self.last_evaluation < 0
        return due and self.last_evaluation < self.step and not self.stop

    def checkpoint_due(self) -> bool:
        due = self.step % self.args.checkpoint_every == 0 or self.over() or time.monotonic() >= self.save_at
        return due and self.step > 0 and not self.args.play and (self.step, self.last_evaluation) != self.saved

    def environment_failed(self, reason: str) -> None:
        """Says so; a checkpoint of the healthy learner is due at once."""
        tqdm.write(f"warning: step {self.step:,}: {reason}; its episodes are dropped, it starts again", file=sys.stderr)
        self.save_at = 0

    def over(self) -> bool:
        return self.step == self.total or bool(self.stop)

    def log_due(self) -> bool:
        return self.step % LOG_EVERY == 0

    def advance(self, updates: int) -> None:
        """Counts a step with so many updates."""
        self.step, self.updates = self.step + 1, self.updates + updates
        self.bar.update()

    def log(self, values: dict) -> None:
        """Scalars and the speed since the last call. Raises FloatingPointError for a value that is not finite."""
        if bad := [name for name, value in values.items() if not np.isfinite(value)]:
            raise FloatingPointError(", ".join(bad))
        now, (before, step) = time.monotonic(), self.logged
        speed = {f"speed/{self.unit}s_per_second": (self.step - step) / (now - before), "updates": self.updates}
        self.scalars({**values, **speed})
        self.logged = now, self.step

    def scalars(self, values: dict, step: int | None = None) -> None:
        """Points in TensorBoard and W&B, of this step by default."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        step = self.step if step is None else step
        try:
            for name, value in values.items() if self.tensorboard else ():
                event = Event(step=step, wall_time=time.time(), summary=scalar(name, float(value)))
                self.tensorboard.write_event(event)
            if self.tensorboard:
                self.tensorboard.flush()
        except OSError as error:  # the file's end may be cut: the next checkpoint opens another
            with contextlib.suppress(OSError):
                self.tensorboard.close()
            self.tensorboard = None
            self.cannot_write("TensorBoard's file", error)
        try:
            if self.wandb:
                self.wandb.log({**values, "step": step})
        except Exception as error:  # its process died
            self.wandb = None
            self.cannot_write("to Weights & Biases", error)

    def log_evaluation(self, rows: list[dict] | None) -> bool:
        """Writes one row per task to eval.csv and shows the means; False if the evaluation was cut (rows None), by a
        signal or by an environment that failed. Raises WorkerFailure when that happens again and again."""
        if rows is None:
            self.cut += not self.stop
            if self.cut > Worker.max_failures:
                raise WorkerFailure(f"{self.cut} evaluations of this policy, each cut by an environment that failed")
            return False
        self.last_evaluation, self.cut = self.step, 0
        counts = {"step": self.step, "updates": self.updates, "wall_time": round(time.monotonic() - self.started, 2)}
        self.rows, values = [{**counts, **row} for row in rows], {}
        if self.args.play:
            return True
        self.curve += self.rows
        self.write_curve()
        for column in ("return", "success", "score"):
            if found := {f"eval/{column}/{row['task']}": row[column] for row in rows if row[column] != ""}:
                totals = {name: float(mean(list(found.values()))) for name, mean in AGGREGATES.items()}
                values |= {**found, **{f"eval/{name}_{column}": total for name, total in totals.items()}}
                self.bar.set_postfix({column: f"{totals['mean']:.3f}"}, refresh=False)
        self.scalars(values)
        return True

    def save(self, state, replay=None, **counters) -> None:
        """Writes a checkpoint. Raises FloatingPointError, before anything is written, if a parameter is not finite."""
        for leaf in jax.tree.leaves(state):
            if leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.floating) and not jnp.isfinite(leaf).all():
                raise FloatingPointError("parameters")
        counters |= {
            "step": self.step, "updates": self.updates, "last_evaluation": self.last_evaluation,
            "wall_time": time.monotonic() - self.started,
        }  # fmt: skip
        self.write_curve()  # with rows that a full disk refused, as no resumed run makes them again
        try:
            save_checkpoint(self.directory, self.step, state, replay, counters, self.args.keep_checkpoints)
        except Exception as error:  # Orbax reports a full disk in exceptions of its own
            shutil.rmtree(self.directory / "checkpoints" / f".partial-{self.step}", ignore_errors=True)
            reason = getattr(error, "strerror", None) or describe(error)[:200]
            if "No space left" in str(error) or "quota" in str(error).lower():
                reason = "disk full, free space"
            message = f"cannot write the checkpoint of step {self.step:,}; earlier ones are whole: {reason}"
            if self.over():
                raise UserError(f"{message}, then continue with --resume {self.directory}") from error
            tqdm.write(f"warning: {message}; another try in a minute", file=sys.stderr)
            self.save_at = time.monotonic() + 60
            return
        self.saved, self.save_at = (self.step, self.last_evaluation), math.inf
        if not self.tensorboard:
            self.open_events()

    def finish(self) -> None:
        """Says how the run ended: the last evaluation, or how to go on."""
        self.bar.close()
        if self.stop and self.last_evaluation < self.total:
            resume = f"; continue with --resume {self.directory}" if checkpoint_steps(self.directory) else ""
            print(f"stopped at step {self.step:,}{resume}")
            return
        if not self.rows:  # a finished run, resumed for its replay
            return
        width = max(len(row["task"]) for row in self.rows)
        print(f"{'task':<{width}} {'return':>10} {'success':>8} {'score':>7}")
        for row in self.rows:
            print(f"{row['task']:<{width}} {row['return']:>10.1f} {row['success']:>8} {row['score']:>7}")
        if scores := [row["score"] for row in self.rows if row["score"] != ""]:
            for name, mean in AGGREGATES.items():
                print(f"{name:<{width}} {'':>10} {'':>8} {mean(scores):>7.3f}")


def read_curve(path: Path) -> list[dict]:
    """Rows of eval.csv with whole numbers as steps, also where a spreadsheet or a person has been at work: columns in
    another order, other separators, a byte order mark, 60.0 for 60. Rows that cannot be read are left out; then the
    file is kept as it was found, beside it."""
    if not path.exists():
        return []
    text, rows = path.read_text(encoding="utf-8-sig", errors="replace"), []
    separator = max(",;\t", key=text.partition("\n")[0].count)
    try:
        found = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))
    except csv.Error:  # such as a quotation mark that is never closed
        found = [{}]
    for row in found:
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError):
            values = {name: row[name].strip().replace(",", ".") for name in EVAL_COLUMNS}
            values |= {name: int(float(values[name])) for name in ("step", "updates", "episodes")}
            for name in ("wall_time", "return", "success", "score"):
                float(values[name] or 0)
            rows.append(values)
    if len(rows) < len(found) or (found and list(found[0]) != list(EVAL_COLUMNS)):
        kept = path.with_name(f"eval-as-found-{time.time_ns()}.csv")
        shutil.copyfile(path, kept)
        print(f"warning: {path} was changed: {len(rows)} of {len(found)} rows read; as found: {kept}", file=sys.stderr)
    return rows


def run_information() -> dict:
    """Versions, device and commit, for args.json."""
    try:
        git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except ImportError:
            versions[package] = None
    return {"script": SCRIPT, "versions": versions, "device": jax.devices()[0].device_kind, "git_commit": commit}


def parameter_count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    return sorted((int(p.name) for p in (run_dir / "checkpoints").glob("[0-9]*") if p.name.isdigit()), reverse=True)


def save_checkpoint(run_dir: Path, step: int, state, replay, counters: dict, keep: int) -> None:
    """Writes checkpoints/<step>/: learner state (a NamedTuple, by Orbax), replay, counters, and every file's checksum.

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
    files = {}
    if replay is not None:
        files = save_replay_piece(root, step, partial_path, replay)
        counters["replay_inserted"] = replay.inserted
    for file in sorted(partial_path.rglob("*")):
        name = str(file.relative_to(partial_path))
        if file.is_file() and name not in files:
            files[name] = checksum(file)
    contents = {**counters, "files": files}
    contents["crc32"] = zlib.crc32(json.dumps(contents).encode())
    replace_file(partial_path / "checkpoint.json", json.dumps(contents))
    before = root / f".partial-{step}-before"  # of the same step: in place until the new one can be
    if path.exists():
        path.rename(before)
    try:
        partial_path.rename(path)
    except OSError:
        if before.exists():
            before.rename(path)
        raise
    shutil.rmtree(before, ignore_errors=True)
    for old in checkpoint_steps(run_dir)[keep:]:
        with contextlib.suppress(OSError):  # one that a reader holds open (NFS): the next checkpoint tries again
            (root / str(old)).rename(root / f".partial-{old}")
            shutil.rmtree(root / f".partial-{old}", ignore_errors=True)


def save_replay_piece(root: Path, step: int, partial_path: Path, replay) -> dict[str, int]:
    """Links the previous checkpoint's pieces of replay into a new one and writes the slots since then as another.

    Returns the checksums of the linked pieces: those of when they were written, as new ones would hide damage.
    """
    first, files, pieces = 0, {}, {}
    for previous in [root / str(s) for s in checkpoint_steps(root.parent) if s < step][:1]:
        with contextlib.suppress(OSError, ValueError, KeyError):  # damaged since: the whole replay is written again
            known = read_counters(previous)["files"]
            pieces = {previous / name: known[name] for name in sorted(known) if name.startswith("replay/")}
    for path, crc in pieces.items() if all(map(Path.is_file, pieces)) else ():
        end = int(path.stem.split("-")[1])
        first = max(first, end)
        if end > replay.inserted - replay.slots.shape[1]:  # older pieces were overwritten in the ring
            files[f"replay/{path.name}"], link = crc, partial_path / "replay" / path.name
            try:
                os.link(path, link)
            except OSError:  # a file system without hard links
                shutil.copy2(path, link)
    # with the slot at the head: it holds the last observation
    numbers = np.arange(max(first, replay.inserted - replay.slots.shape[1] + 1), replay.inserted + 1)
    with (partial_path / f"replay/{numbers[0]:012d}-{replay.inserted:012d}.npy").open("wb") as piece:
        header = {"descr": replay.slots.dtype.descr, "fortran_order": False, "shape": (len(replay.slots), len(numbers))}
        np.lib.format.write_array_header_1_0(piece, header)
        for slots in replay.slots:  # one task at a time: a copy of the whole replay may not fit in memory
            piece.write(slots[numbers % len(slots)])
    return files


def read_counters(path: Path) -> dict:
    """checkpoint.json of one checkpoint. Raises ValueError if it is damaged."""
    counters = json.loads((path / "checkpoint.json").read_text())
    if not isinstance(counters, dict) or counters.pop("crc32") != zlib.crc32(json.dumps(counters).encode()):
        raise ValueError("checkpoint.json does not match its checksum")
    return counters


def load_checkpoint(run_dir: Path, state, replay=None, read_only=False) -> tuple[Any, dict]:
    """Newest undamaged checkpoint: learner state like `state`, and counters; fills `replay`. Executes no file. Unless
    read_only, damaged ones get another name."""
    damaged_paths, steps = [], checkpoint_steps(run_dir)
    for step in steps:
        path = run_dir / "checkpoints" / str(step)
        try:
            counters = read_counters(path)
            pieces = [name for name in sorted(counters["files"]) if name.startswith("replay/") and replay is not None]
            wanted = [*pieces, *(name for name in counters["files"] if not name.startswith("replay/"))]
            damaged = [name for name in wanted if checksum(path / name) != counters["files"][name]]
            if damaged:
                raise ValueError(f"{damaged[0]} does not match its checksum")
            with ocp.StandardCheckpointer() as checkpointer:
                try:
                    state = type(state)(**checkpointer.restore((path / "state").absolute(), state._asdict()))
                except ValueError as error:  # Orbax's, which prints both trees; the files are as they were written
                    another = "is whole, but of other arguments or of another version of this script"
                    raise UserError(f"checkpoint {path} {another}; start a new run") from error
            for piece in (path / name for name in pieces):
                ring, inserted = replay.slots.shape[1], counters["replay_inserted"]
                first, last = map(int, piece.stem.split("-"))
                saved = np.load(piece, mmap_mode="r", allow_pickle=False)[:, max(0, inserted - ring + 1 - first) :]
                numbers = np.arange(last + 1 - saved.shape[1], last + 1) % ring
                for slots, records in zip(replay.slots, saved, strict=True):
                    slots[numbers] = records
                replay.inserted = inserted
            for damaged_path in () if read_only else damaged_paths:  # so that no later checkpoint builds on them
                with contextlib.suppress(OSError):  # where nothing may be written, there are no later ones
                    damaged_path.rename(damaged_path.with_name(f"damaged-{damaged_path.name}-{time.time_ns()}"))
            return state, counters
        except (OSError, ValueError, KeyError, TypeError) as error:
            gone = isinstance(error, FileNotFoundError | NotADirectoryError)
            if isinstance(error, OSError) and not (gone or read_only):  # it may be read again in a minute
                reason = error.strerror or error
                raise UserError(f"cannot read checkpoint {path}: {reason}; try again, or move it away") from error
            print(f"warning: checkpoint {path} is damaged ({error}); trying the one before", file=sys.stderr)
            damaged_paths.append(path)
    if read_only and set(checkpoint_steps(run_dir)) - set(steps):  # written since, and those removed
        return load_checkpoint(run_dir, state, replay, read_only)
    asked, way_out = ("play", "wait for one") if read_only else ("resume", "start a new run")
    raise UserError(f"--{asked} {run_dir}: no undamaged checkpoint in {run_dir / 'checkpoints'}; {way_out}")


class Output:
    """A standard stream whose reader may go away: from then on it leads nowhere. Output is never worth a run, nor is a
    letter that the terminal lacks. What a full disk refuses is lost, not what comes when it has space again."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None where it was closed, as by `>&-`
        if isinstance(self.stream, io.TextIOWrapper):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.guarded(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.guarded(self.stream.flush)

    def guarded(self, function: Callable, *arguments) -> None:
        try:
            function(*arguments)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


if __name__ == "__main__":
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        main(parse_args())
    except (UserError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            message = f"disk full ({error.filename or 'run directory'}): free space, then --resume the run directory"
        elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in message:
            message = "out of memory: lower the width, --batch-size or, online, --buffer-size"
        elif isinstance(error, jax.errors.JaxRuntimeError):
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the run listens to signals, or in --play
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # JAX may be compiling in threads of its own, which an orderly end would crash
