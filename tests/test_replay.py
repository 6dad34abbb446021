"""Replay ring of brc_sac_continuous.py against a plain list of transitions."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import brc_sac_continuous as brc

NUM_TASKS, CAPACITY, OBSERVATION_DIM, ACTION_DIM = 3, 40, 2, 1


class Stream:
    """Three tasks played as main() plays them: the step after an episode's end is a reset, not a transition.

    Every observation of the whole stream is a different number, so that a transition is known by its observation.
    """

    def __init__(self, seed: int, capacity: int = CAPACITY, episode_end: float = 0.15):
        self.rng, self.capacity, self.episode_end = np.random.default_rng(seed), capacity, episode_end
        self.replay = brc.Replay(NUM_TASKS, capacity, OBSERVATION_DIM, ACTION_DIM)
        self.seen = 0  # observations so far
        self.history = []  # one list of NUM_TASKS transitions (None at a reset) per step
        self.done = np.zeros(NUM_TASKS, bool)
        self.observations = self.new_observations()
        self.replay.start(self.observations)

    def new_observations(self) -> np.ndarray:
        numbers = self.seen + np.arange(NUM_TASKS)
        self.seen += NUM_TASKS
        return np.stack([numbers, -2 * numbers], axis=1).astype(np.float32)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            actions = self.rng.uniform(-1, 1, (NUM_TASKS, ACTION_DIM)).astype(np.float32)
            rewards = self.rng.normal(size=NUM_TASKS).astype(np.float32)
            ends = self.rng.random(NUM_TASKS) < self.episode_end
            terminated = ends & (self.rng.random(NUM_TASKS) < 0.5)  # else truncated
            following = self.new_observations()
            valid = ~self.done
            self.replay.insert(actions, rewards, terminated, valid, following)
            self.history.append(
                [
                    transition(self.observations[t], actions[t], rewards[t], terminated[t], following[t], t)
                    if valid[t]
                    else None
                    for t in range(NUM_TASKS)
                ]
            )
            self.done = valid & ends
            self.observations = following

    def stored(self) -> set:
        """What replay must hold: every transition of the last `capacity` steps, without the resets."""
        return {row for rows in self.history[-self.capacity :] for row in rows if row is not None}


def transition(observation, action, reward, terminated, next_observation, task) -> tuple:
    return (*observation.tolist(), *action.tolist(), float(reward), float(terminated), *next_observation.tolist(), task)


def sampled(batch: brc.Batch) -> list[tuple]:
    """Transitions of a batch of any leading shape."""
    flat = [np.reshape(leaf, (batch.task_ids.size, -1)) for leaf in batch]
    return [(*row[:-1].tolist(), int(row[-1])) for row in np.concatenate(flat, axis=1)]


@pytest.mark.parametrize("steps", [1, 7, CAPACITY - 1, CAPACITY, CAPACITY + 1, CAPACITY + 2, 3 * CAPACITY + 11])
def test_samples_are_exactly_the_stored_transitions(steps):
    stream = Stream(seed=steps)
    stream.step(steps)
    rows = sampled(stream.replay.sample(np.random.default_rng(0), utd=2, batch_size=2000))
    assert set(rows) == stream.stored()
    assert stream.replay.size == min(steps, CAPACITY)


def test_samples_stay_right_at_every_step_of_a_long_stream():
    stream, rng = Stream(seed=5), np.random.default_rng(1)
    for _ in range(4 * CAPACITY):
        stream.step()
        assert set(sampled(stream.replay.sample(rng, 1, 30))) <= stream.stored()


def test_next_observation_of_a_final_transition_is_the_final_observation():
    replay = brc.Replay(1, 10, 1, 1)
    replay.start(np.array([[1.0]]))
    zero = np.zeros((1, 1))
    replay.insert(zero, [0.1], [False], [True], np.array([[2.0]]))
    replay.insert(zero, [0.2], [True], [True], np.array([[3.0]]))  # 3 is the final observation
    replay.insert(zero, [9.9], [False], [False], np.array([[4.0]]))  # the reset: its reward must never be seen
    replay.insert(zero, [0.4], [False], [True], np.array([[5.0]]))
    batch = replay.sample(np.random.default_rng(0), 1, 500)
    columns = batch.observations[0, :, 0], batch.rewards[0], batch.terminated[0], batch.next_observations[0, :, 0]
    found = set(map(tuple, np.round(np.stack(columns, axis=1).astype(float), 3).tolist()))
    assert found == {(1.0, 0.1, 0.0, 2.0), (2.0, 0.2, 1.0, 3.0), (4.0, 0.4, 0.0, 5.0)}


def test_truncation_does_not_cut_the_bootstrap():
    replay = brc.Replay(1, 10, 1, 1)
    replay.start(np.array([[1.0]]))
    replay.insert(np.zeros((1, 1)), [0.5], [False], [True], np.array([[2.0]]))  # the episode was truncated here
    replay.insert(np.zeros((1, 1)), [0.0], [False], [False], np.array([[3.0]]))
    batch = replay.sample(np.random.default_rng(0), 1, 20)
    assert (batch.terminated == 0).all() and (batch.next_observations == 2.0).all()


def test_shapes_and_types():
    stream = Stream(seed=0)
    stream.step(20)
    batch = stream.replay.sample(np.random.default_rng(0), utd=2, batch_size=5)
    assert [leaf.shape for leaf in batch] == [(2, 5, 2), (2, 5, 1), (2, 5), (2, 5), (2, 5, 2), (2, 5)]
    assert [leaf.dtype for leaf in batch] == [np.float32] * 3 + [bool, np.float32, np.int32]


def test_uniform_over_tasks_and_transitions():
    stream = Stream(seed=2, episode_end=0.05)
    stream.step(100)
    stored, draws = stream.stored(), 150_000
    counts = Counter(sampled(stream.replay.sample(np.random.default_rng(3), 2, draws // 2)))
    expected = draws / len(stored)
    assert counts.keys() == stored
    assert max(abs(count - expected) for count in counts.values()) < 5 * np.sqrt(expected)
    for task in range(NUM_TASKS):
        share = sum(row[-1] == task for row in stored) / len(stored)
        drawn = sum(count for row, count in counts.items() if row[-1] == task)
        assert abs(drawn - draws * share) < 5 * np.sqrt(draws * share)


@pytest.mark.parametrize(("observation_dim", "action_dim"), [(308, 61), (67, 21), (3, 1)])
def test_memory_per_transition(observation_dim, action_dim):
    num_tasks, capacity = 2, 1000
    replay = brc.Replay(num_tasks, capacity, observation_dim, action_dim)
    held = sum(value.nbytes for value in vars(replay).values() if isinstance(value, np.ndarray))
    assert held <= 1.1 * (observation_dim + action_dim + 3) * 4 * num_tasks * capacity


@pytest.mark.parametrize("steps", [CAPACITY // 2, 2 * CAPACITY + 9])
def test_slots_are_what_is_written_to_disk(tmp_path, steps):
    stream = Stream(seed=6)
    stream.step(steps)
    old, new = stream.replay, brc.Replay(NUM_TASKS, CAPACITY, OBSERVATION_DIM, ACTION_DIM)
    np.save(tmp_path / "slots.npy", old.slots)
    new.slots[:], new.inserted = np.load(tmp_path / "slots.npy", allow_pickle=False), old.inserted
    for before, after in zip(*(r.sample(np.random.default_rng(7), 2, 500) for r in (old, new)), strict=True):
        np.testing.assert_array_equal(before, after)
    assert (new.head, new.size) == (old.head, old.size)


@pytest.mark.parametrize("steps", [5, CAPACITY + 9])
def test_saved_replay_is_cut_to_the_size_of_the_task_and_in_order(tmp_path, steps):
    stream = Stream(seed=8)
    stream.step(steps)
    envs = SimpleNamespace(tasks=["gym/A", "gym/B", "gym/C"], observation_dims=[2, 1, 2], action_dims=[1, 1, 1])
    brc.save_replay(tmp_path / "replay", stream.replay, envs)
    for task, size in enumerate(envs.observation_dims):
        records = np.load(tmp_path / "replay" / f"gym-{'ABC'[task]}.npy", allow_pickle=False)
        assert records.dtype == brc.record_type(size, 1) and len(records) == min(steps, CAPACITY) + 1
        newest = NUM_TASKS * np.arange(steps - len(records) + 1, steps + 1) + task  # an observation is its number
        np.testing.assert_array_equal(records["observation"][:, 0], newest)
        kept = stream.history[-CAPACITY:]
        assert records["valid"][:-1].tolist() == [rows[task] is not None for rows in kept] and not records["valid"][-1]
        rewards = [rows[task][3] for rows in kept if rows[task] is not None]
        np.testing.assert_array_equal(records["reward"][records["valid"]], np.float32(rewards))


@pytest.mark.parametrize("steps", [13, CAPACITY - 1, CAPACITY, 2 * CAPACITY + 9])
def test_a_resumed_run_learns_nothing_across_the_interruption(steps):
    stream = Stream(seed=steps)
    stream.step(steps)
    stream.observations, stream.done[:] = stream.new_observations(), False
    stream.replay.start(stream.observations)  # as main() does after load_checkpoint
    stream.history.append([None] * NUM_TASKS)  # the interruption takes one slot
    for more in (0, 1, 30, 2 * CAPACITY):
        stream.step(more)
        rows = sampled(stream.replay.sample(np.random.default_rng(0), 2, 2000))
        assert set(rows) == stream.stored()
