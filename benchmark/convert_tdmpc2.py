# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.15.0", "tensordict==0.15.3", "numpy==2.4.6", "tyro==1.0.17", "tqdm==4.70.1"]
# ///
"""Turns TD-MPC2's offline data (mt30, mt80; Hansen et al., 2024) into a data set of brc_offline_bc.py.

  uv run benchmark/convert_tdmpc2.py --chunks mt80/*.pt --tasks mt80 --out data/mt80
  python brc_offline_bc.py --dataset data/mt80

A chunk is a TensorDict [episodes, T] (T = 501 in mt30, 101 in mt80) of obs [.., |S|], action [.., |A|], reward, task,
padded with zeros to the widest task. Step t holds the observation at t and the action and reward that led to it: those
of an episode's step 0 are NaN. An episode of DMC has 500 decisions: in mt80 it is cut into five pieces of 101 steps, of
which later ones may begin with a reward; which pieces belong together is not said, so that transition is left out. The
files are pickles: they are read with torch's weights_only loader, which builds tensors and TensorDicts and refuses
anything else.

Out: one .npy per task of records (observation, action, reward, terminated, valid), of which the one with the final
observation of an episode or piece is not valid, and dataset.json with the tasks' names, with action_repeat, 2, as every
action was applied twice and evaluation has to do the same, and with the pieces per episode. This file needs torch, so
it has dependencies of its own.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

try:
    import numpy as np
    import tensordict
    import torch
    import tyro
    from tqdm import tqdm
except ImportError as error:
    print(f"error: {error}; uv run benchmark/convert_tdmpc2.py installs what it needs", file=sys.stderr)
    sys.exit(2)

SIZES = {  # dm_control's own (|S|, |A|) of each domain, which the chunks pad
    "acrobot": (6, 1), "ball-in-cup": (8, 2), "cartpole": (5, 1), "cheetah": (17, 6), "finger-spin": (9, 2),
    "finger-turn": (12, 2), "fish": (24, 5), "hopper": (15, 4), "pendulum": (3, 1), "reacher-three": (8, 3),
    "reacher": (6, 2), "walker": (24, 6),
}  # fmt: skip
DMC = """walker-stand walker-walk walker-run cheetah-run reacher-easy reacher-hard acrobot-swingup pendulum-swingup
cartpole-balance cartpole-balance-sparse cartpole-swingup cartpole-swingup-sparse ball-in-cup-catch finger-spin
finger-turn-easy finger-turn-hard fish-swim hopper-stand hopper-hop walker-walk-backwards walker-run-backwards
cheetah-run-backwards cheetah-run-front cheetah-run-back cheetah-jump hopper-hop-backwards reacher-three-easy
reacher-three-hard ball-in-cup-spin pendulum-spin""".split()
METAWORLD = """assembly basketball button-press-topdown button-press-topdown-wall button-press button-press-wall
coffee-button coffee-pull coffee-push dial-turn disassemble door-open door-close drawer-close drawer-open faucet-open
faucet-close hammer handle-press-side handle-press handle-pull-side handle-pull lever-pull peg-insert-side
peg-unplug-side pick-out-of-hole pick-place pick-place-wall plate-slide plate-slide-side plate-slide-back
plate-slide-back-side push-back push push-wall reach reach-wall shelf-place soccer stick-push stick-pull sweep-into
sweep window-open window-close bin-picking box-close door-lock door-unlock hand-insert""".split()
ACTION_REPEAT = 2  # of TD-MPC2's environments, DMC and Meta-World alike
DECISIONS = {"dmc": 500, "metaworld": 100}  # of an episode
TASKS = {  # in the order of the chunks' task numbers, by this project's names
    "mt30": [f"dmc/{task}" for task in DMC],
    "mt80": [f"dmc/{task}" for task in DMC] + [f"metaworld/{task}" for task in METAWORLD],
}


@dataclass
class Args:
    """Turns TD-MPC2's offline data into a data set of brc_offline_bc.py."""

    chunks: tuple[Path, ...]
    """the .pt files"""
    out: Path
    """folder to write"""
    tasks: str = "mt80"
    """mt30 or mt80"""


def sizes(task: str) -> tuple[int, int]:
    """(|S|, |A|) of a task without the padding."""
    family, _, name = task.partition("/")
    return (39, 4) if family == "metaworld" else next(size for key, size in SIZES.items() if name.startswith(key))


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def load(path: Path):
    """A chunk, memory-mapped. Exits with one line if it is damaged or not of the layout above."""
    allowed = [tensordict.TensorDict, torch.Size, torch.device, tensordict._td._StringKeys]
    try:
        with torch.serialization.safe_globals(allowed):
            chunk = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = {"obs", "action", "reward", "task"} - set(chunk.keys())
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if chunk.ndim != 2 or not chunk.numel() or chunk.shape[1] < 2:
            raise ValueError(f"shape {tuple(chunk.shape)}, not episodes x steps")
        if torch.isnan(chunk["reward"][:, 1:]).any():
            raise ValueError("only the first reward of an episode may be NaN")
    except Exception as error:  # torch's and pickle's own, of many kinds
        fail(f"{path} is not a chunk of TD-MPC2's data: {' '.join(str(error).split())}")
    return chunk


def main(args: Args) -> None:
    names = TASKS.get(args.tasks) or fail(f"unknown --tasks {args.tasks}; there are {', '.join(TASKS)}")
    lengths, steps = np.zeros(len(names), int), set()
    for path in tqdm(args.chunks, desc="counting"):
        chunk = load(path)
        numbers = chunk["task"][:, 0].numpy().astype(int)
        if numbers.min() < 0 or numbers.max() >= len(names):
            fail(f"{path} holds task {numbers.max()}, but {args.tasks} has {len(names)}")
        widths = chunk["obs"].shape[-1], chunk["action"].shape[-1]
        for number in np.unique(numbers):  # mt30 is padded to narrower tasks than mt80
            if sizes(names[number])[0] > widths[0] or sizes(names[number])[1] > widths[1]:
                fail(f"{path} has |S| = {widths[0]}, |A| = {widths[1]}: too narrow for {names[number]}")
        lengths += np.bincount(numbers, minlength=len(names)) * chunk.shape[1]
        steps.add(chunk.shape[1])
    if len(steps) > 1:
        fail(f"chunks with episodes of {' and '.join(map(str, sorted(steps)))} records: convert each kind by itself")

    files, dtypes = {}, {}
    for number in np.flatnonzero(lengths):
        observation_dim, action_dim = sizes(names[number])
        dtypes[number] = np.dtype([("observation", "f4", (observation_dim,)), ("action", "f4", (action_dim,)),
                                   ("reward", "f4"), ("terminated", "?"), ("valid", "?")])  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    size, free = sum(lengths[n] * dtype.itemsize for n, dtype in dtypes.items()), shutil.disk_usage(args.out).free
    if size > free:  # a full disk under a memory map would be a crash
        fail(f"--out {args.out}: the data take {size / 1e9:,.2f} GB, the disk has {free / 1e9:,.2f}")
    for number, dtype in dtypes.items():
        path = args.out / f".partial-{number}"
        files[number] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(int(lengths[number]),))
        if hasattr(os, "posix_fallocate"):  # others may fill the disk meanwhile, and a quota shows only here
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

    filled = np.zeros(len(names), int)
    for path in tqdm(args.chunks, desc="converting"):
        chunk = load(path)
        for episode in range(len(chunk)):
            number, length = int(chunk["task"][episode, 0]), chunk.shape[1]
            records = files[number][filled[number] : filled[number] + length]
            observation_dim, action_dim = sizes(names[number])
            records["observation"] = chunk["obs"][episode, :, :observation_dim].numpy()
            records["action"][:-1] = chunk["action"][episode, 1:, :action_dim].clamp(-1, 1).numpy()
            records["reward"][:-1] = chunk["reward"][episode, 1:].numpy()
            if "terminated" in chunk.keys():  # a TensorDict is no dict
                records["terminated"][:-1] = chunk["terminated"][episode, 1:].numpy().astype(bool)
            records["valid"] = np.arange(length) < length - 1
            filled[number] += length
    for number, file in files.items():
        file.flush()
        Path(file.filename).replace(args.out / f"{names[number].replace('/', '-')}.npy")
    found = [names[number] for number in files]
    pieces = {task: max(1, DECISIONS[task.split("/")[0]] // (chunk.shape[1] - 1)) for task in found}
    about = {"env_info": {"task_names": found}, "action_repeat": ACTION_REPEAT, "pieces_per_episode": pieces}
    (args.out / "dataset.json").write_text(json.dumps(about, indent=2))
    print(f"{args.out}: {len(found)} tasks, {int(lengths.sum()):,} records")


if __name__ == "__main__":
    args = tyro.cli(Args)
    try:
        main(args)
    except OSError as error:  # of writing: load tells what it cannot read
        fail(f"cannot write {args.out}: {error.strerror}")
