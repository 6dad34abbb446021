"""Replay ring and frame stacks of brc_drq_atari.py against a naive computation, game by game."""

from collections import Counter

import numpy as np
import pytest

import brc_drq_atari as brc

NUM_TASKS, CAPACITY, N_STEP, DISCOUNT = 3, 40, 3, 0.9
SHAPE = (2, 3)  # of frames, which are small so that thousands of stacks can be compared


@pytest.fixture(autouse=True)
def small_frames(request, monkeypatch):
    if "real_frames" not in request.keywords:
        monkeypatch.setattr(brc, "FRAME", SHAPE)


def picture(number: int) -> np.ndarray:
    """A frame that tells its number, at most 65,535, in the first two pixels, and fills the others with it too."""
    frame = np.full(SHAPE, number % 251, np.uint8)
    frame[0, :2] = number // 256, number % 256
    return frame


class Stream:
    """Three games played as main() plays them: the step after a game's end is a reset, not a transition.

    `history` holds, for every step of every task, what the naive computation needs: the stack that the agent saw
    before, the action, the reward, how the step ended, and the stack that it saw after; None at a reset.
    """

    def __init__(self, seed: int, capacity: int = CAPACITY, n_step: int = N_STEP, game_end: float = 0.1,
                 life_loss: float = 0.1):  # fmt: skip
        self.rng, self.capacity, self.n_step = np.random.default_rng(seed), capacity, n_step
        self.game_end, self.life_loss = game_end, life_loss
        self.replay, self.history = brc.Replay(NUM_TASKS, capacity, n_step, DISCOUNT), []
        self.number = 0  # of frames so far; the first is 1, so that 0 means a blank frame
        self.begin()

    def begin(self) -> None:
        """As main() begins, and begins again after load_checkpoint."""
        numbers = self.new_frames()
        self.seen = [[number] for number in numbers]  # by each task's agent in its current life, oldest first
        frames = np.stack([picture(number) for number in numbers])
        self.replay.start(frames)
        blank = np.zeros((NUM_TASKS, 4, *SHAPE), np.uint8)
        self.stack, self.done = brc.push_frames(blank, frames, np.ones(NUM_TASKS, bool)), np.zeros(NUM_TASKS, bool)

    def new_frames(self) -> list[int]:
        self.number += NUM_TASKS
        return list(range(self.number - NUM_TASKS + 1, self.number + 1))

    def stacked(self, task: int) -> tuple[int, ...]:
        return tuple(([0] * 3 + self.seen[task])[-4:])

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            actions = self.rng.integers(0, 300, NUM_TASKS)
            rewards = self.rng.normal(size=NUM_TASKS).astype(np.float32)
            ends, kind = self.rng.random(NUM_TASKS) < self.game_end, self.rng.random(NUM_TASKS) < 0.5
            life_lost = self.rng.random(NUM_TASKS) < self.life_loss
            terminated, truncated = ends & kind, ends & ~kind
            numbers, before = self.new_frames(), [self.stacked(task) for task in range(NUM_TASKS)]

            # as in main() and ParallelEnvs
            frames = np.stack([picture(number) for number in numbers])
            first = life_lost | self.done
            valid, done = ~self.done, ~self.done & (terminated | truncated)
            self.stack = brc.push_frames(self.stack, frames, first)
            self.replay.insert(actions, rewards, terminated | life_lost, valid, frames, first)

            # game by game
            rows = []
            for task in range(NUM_TASKS):
                new_life = self.done[task] or life_lost[task]
                self.seen[task] = [numbers[task]] if new_life else [*self.seen[task], numbers[task]]
                end = "death" if terminated[task] or life_lost[task] else "truncated" if truncated[task] else ""
                row = (before[task], int(actions[task]), float(rewards[task]), end, self.stacked(task))
                rows.append(None if self.done[task] else row)
            self.history.append(rows)
            self.done = done

    def transitions(self, steps: int) -> dict:
        """The n-step transitions that began in the last `steps` steps, by task and newest frame."""
        found = {}
        for begin in range(max(0, len(self.history) - steps), len(self.history)):
            for task in range(NUM_TASKS):
                if self.history[begin][task] is None:
                    continue
                stack, action, *_ = self.history[begin][task]
                total, discount = 0.0, 1.0
                for step in self.history[begin : begin + self.n_step]:
                    _, _, reward, end, following = step[task]
                    total, discount = total + discount * reward, discount * DISCOUNT
                    if end:
                        break
                bootstrap = 0.0 if end == "death" else discount
                found[task, stack[-1]] = (stack, action, total, bootstrap, following)
        return found


def numbers(stacks: np.ndarray) -> list[tuple[int, ...]]:
    """Numbers of the frames of [batch, 4, *SHAPE]; fails on a frame that is neither whole nor blank."""
    found = stacks[:, :, 0, 0].astype(int) * 256 + stacks[:, :, 0, 1]
    different, places = np.unique(found, return_inverse=True)
    np.testing.assert_array_equal(stacks, np.stack([picture(number) for number in different])[places])
    return [tuple(row) for row in found.tolist()]


def check(batch: brc.Batch, expected: dict) -> set:
    """Compares every transition of a batch with the expected one; returns which were there."""
    frames, actions, returns, discounts, next_frames, task_ids = (
        leaf.reshape(-1, *leaf.shape[batch.task_ids.ndim :]) for leaf in batch
    )
    stacks, next_stacks, sampled = numbers(frames), numbers(next_frames), set()
    for row, task in enumerate(task_ids.tolist()):
        key = task, stacks[row][-1]
        stack, action, total, bootstrap, following = expected[key]
        assert (stacks[row], int(actions[row])) == (stack, action)
        assert returns[row] == pytest.approx(total, abs=1e-5)
        assert discounts[row] == pytest.approx(bootstrap, rel=1e-6)
        assert next_stacks[row] == following
        sampled.add(key)
    return sampled


FILLINGS = [1, 2, 7, CAPACITY - 1, CAPACITY, CAPACITY + 1, CAPACITY + 2, CAPACITY + 5, 3 * CAPACITY + 11]


@pytest.mark.parametrize("steps", FILLINGS)
def test_samples_are_what_was_played(steps):
    """All of it, but for the oldest in a full ring, whose stacks have been overwritten."""
    stream = Stream(seed=steps)
    stream.step(steps)
    sampled = check(stream.replay.sample(np.random.default_rng(0), 2, 1200), stream.transitions(CAPACITY))
    whole = CAPACITY if steps <= CAPACITY else CAPACITY - 3
    assert sampled == stream.transitions(whole).keys()
    assert stream.replay.size == min(steps, CAPACITY)


@pytest.mark.parametrize("n_step", [1, 2, 5])
def test_samples_of_other_n(n_step):
    stream = Stream(seed=n_step, n_step=n_step)
    for steps in (20, 40, 70):
        stream.step(steps)
        check(stream.replay.sample(np.random.default_rng(0), 1, 600), stream.transitions(CAPACITY))


def test_samples_stay_right_at_every_step_of_a_long_stream():
    stream, rng = Stream(seed=5), np.random.default_rng(1)
    for _ in range(4 * CAPACITY):
        stream.step()
        check(stream.replay.sample(rng, 1, 30), stream.transitions(CAPACITY))


def test_the_streams_hold_every_kind_of_transition():
    """Without which the tests above would prove little."""
    stream = Stream(seed=5)
    stream.step(300)
    rows = stream.transitions(300).values()
    assert {round(bootstrap, 6) for _, _, _, bootstrap, _ in rows} == {0, 0.9, 0.81, 0.729}
    assert {sum(number > 0 for number in stack) for stack, *_ in rows} == {1, 2, 3, 4}
    assert max(action for _, action, *_ in rows) > 255, "actions of one byte would do"
    ends = Counter(row and row[3] for rows in stream.history for row in rows)
    assert min(ends[kind] for kind in ("", "death", "truncated", None)) > 20


def test_frame_stacks_of_acting_and_replay_agree():
    """At every step: what the agent sees, what the replay will show of it, and the frames of its current life."""
    stream = Stream(seed=8)
    for _ in range(3 * CAPACITY):
        tasks = np.arange(NUM_TASKS)
        seen = stream.replay.stacks(tasks, np.full(NUM_TASKS, stream.replay.head))
        assert numbers(seen) == numbers(stream.stack) == [stream.stacked(task) for task in tasks]
        stream.step()


def test_a_pushed_stack_leaves_the_old_one_alone():
    """JAX may still read it."""
    old = np.stack([[picture(number) for number in (0, 0, 0, 1)]])
    copy = old.copy()
    assert numbers(brc.push_frames(old, np.stack([picture(2)]), np.array([False]))) == [(0, 0, 1, 2)]
    assert numbers(brc.push_frames(old, np.stack([picture(2)]), np.array([True]))) == [(0, 0, 0, 2)]
    np.testing.assert_array_equal(old, copy)


def play(*steps, n_step: int = 3) -> dict[tuple, tuple]:
    """One game of frames 1, 2, ...; steps: (reward, "" or "death" or "end" or "reset"). Stack: (return, discount, next
    stack), rounded."""
    replay = brc.Replay(1, 30, n_step, 0.5)
    replay.start(picture(1)[None])
    for number, (reward, kind) in enumerate(steps):
        replay.insert([0], [reward], [kind == "death"], [kind != "reset"], picture(number + 2)[None],
                      [kind in ("death", "reset")])  # fmt: skip
    batch = replay.sample(np.random.default_rng(0), 1, 300)
    columns = [*(leaf[0].tolist() for leaf in (batch.returns, batch.discounts)), numbers(batch.next_frames[0])]
    return dict(zip(numbers(batch.frames[0]), zip(*columns, strict=True), strict=True))


def test_n_step_by_hand():
    """Discount 0.5, so that returns are exact: r + r' / 2 + r'' / 4."""
    assert play((1, ""), (2, ""), (4, ""), (8, "")) == {
        (0, 0, 0, 1): (3.0, 0.125, (1, 2, 3, 4)),
        (0, 0, 1, 2): (6.0, 0.125, (2, 3, 4, 5)),
        (0, 1, 2, 3): (8.0, 0.25, (2, 3, 4, 5)),  # the newest transitions know fewer rewards
        (1, 2, 3, 4): (8.0, 0.5, (2, 3, 4, 5)),
    }
    # a truncated game: what follows bootstraps from its final frame, 4, and the next begins with frame 5
    assert play((1, ""), (2, ""), (4, "end"), (99, "reset"), (8, "")) == {
        (0, 0, 0, 1): (3.0, 0.125, (1, 2, 3, 4)),
        (0, 0, 1, 2): (4.0, 0.25, (1, 2, 3, 4)),
        (0, 1, 2, 3): (4.0, 0.5, (1, 2, 3, 4)),
        (0, 0, 0, 5): (8.0, 0.5, (0, 0, 5, 6)),
    }
    # a life is lost with the second reward: nothing is bootstrapped, and the next life begins with frame 3
    found = play((1, ""), (2, "death"), (4, ""), (8, ""))
    assert {stack: row[:2] for stack, row in found.items()} == {
        (0, 0, 0, 1): (2.0, 0), (0, 0, 1, 2): (2.0, 0), (0, 0, 0, 3): (8.0, 0.25), (0, 0, 3, 4): (8.0, 0.5),
    }  # fmt: skip


@pytest.mark.parametrize("steps", [13, CAPACITY - 1, CAPACITY, 2 * CAPACITY + 9])
def test_a_resumed_run_learns_nothing_across_the_interruption(steps):
    """Unfinished games end where they were, bootstrapped from the last frame; the new ones' stacks begin blank."""
    stream = Stream(seed=steps)
    stream.step(steps)
    for task in range(NUM_TASKS):  # whoever was interrupted ends as a truncated game does
        if row := stream.history[-1][task]:
            stream.history[-1][task] = (*row[:3], row[3] or "truncated", row[4])
    stream.begin()
    stream.history.append([None] * NUM_TASKS)  # the interruption takes one slot
    for more in (0, 1, 3, 30, 2 * CAPACITY):
        stream.step(more)
        check(stream.replay.sample(np.random.default_rng(0), 1, 600), stream.transitions(CAPACITY))


def test_uniform_over_tasks_and_transitions():
    stream, draws = Stream(seed=2), 60_000
    stream.step(100)
    expected = stream.transitions(CAPACITY - 3)
    batch = stream.replay.sample(np.random.default_rng(3), 1, draws)
    newest = batch.frames[0, :, 3, 0, :2].astype(int) @ [256, 1]
    counts = Counter(zip(batch.task_ids[0].tolist(), newest.tolist(), strict=True))
    mean = draws / len(expected)
    assert counts.keys() == expected.keys()
    assert max(abs(count - mean) for count in counts.values()) < 5 * np.sqrt(mean)


@pytest.mark.real_frames
def test_shapes_and_types():
    replay = brc.Replay(2, 12, 3, 0.99)
    replay.start(np.zeros((2, 84, 84), np.uint8))
    for _ in range(5):
        replay.insert([1, 2], [0.0, 1.0], [False] * 2, [True] * 2, np.ones((2, 84, 84), np.uint8), [False] * 2)
    batch = replay.sample(np.random.default_rng(0), utd=2, batch_size=5)
    assert [leaf.shape for leaf in batch] == [(2, 5, 4, 84, 84), *[(2, 5)] * 3, (2, 5, 4, 84, 84), (2, 5)]
    assert [leaf.dtype for leaf in batch] == [np.uint8, np.int32, np.float32, np.float32, np.uint8, np.int32]


@pytest.mark.real_frames
def test_one_frame_a_step_and_26_games_fit_in_20_gigabytes():
    replay = brc.Replay(2, 1000, 3, 0.99)
    held = sum(value.nbytes for value in vars(replay).values() if isinstance(value, np.ndarray))
    step = held / 2 / 1001
    assert 84 * 84 <= step <= 84 * 84 + 16
    assert 26 * 100_001 * step < 20e9


@pytest.mark.parametrize("steps", [CAPACITY // 2, 2 * CAPACITY + 9])
def test_slots_are_what_is_written_to_disk(tmp_path, steps):
    stream = Stream(seed=6)
    stream.step(steps)
    old, new = stream.replay, brc.Replay(NUM_TASKS, CAPACITY, N_STEP, DISCOUNT)
    np.save(tmp_path / "slots.npy", old.slots)
    new.slots[:], new.inserted = np.load(tmp_path / "slots.npy", allow_pickle=False), old.inserted
    for before, after in zip(*(r.sample(np.random.default_rng(7), 2, 300) for r in (old, new)), strict=True):
        np.testing.assert_array_equal(before, after)
    assert (new.head, new.size) == (old.head, old.size)


@pytest.mark.parametrize("steps", [5, CAPACITY + 9])
def test_saved_replay_is_in_order(tmp_path, steps):
    stream = Stream(seed=8)
    stream.step(steps)
    brc.save_replay(tmp_path / "replay", stream.replay, ["gym/A", "gym/B", "gym/C"])
    for task in range(NUM_TASKS):
        records = np.load(tmp_path / "replay" / f"gym-{'ABC'[task]}.npy", allow_pickle=False)
        assert records.dtype == brc.record_type() and len(records) == min(steps, CAPACITY) + 1
        newest = NUM_TASKS * np.arange(steps - len(records) + 1, steps + 1) + task + 1
        np.testing.assert_array_equal(records["frame"], np.stack([picture(number) for number in newest]))
        kept = stream.history[-CAPACITY:]
        assert records["valid"][:-1].tolist() == [rows[task] is not None for rows in kept] and not records["valid"][-1]
        rewards = [rows[task][2] for rows in kept if rows[task] is not None]
        np.testing.assert_array_equal(records["reward"][records["valid"]], np.float32(rewards))
