"""The algorithm of brc_drq_atari.py against independent computations: Table 4, scores, augmentation, network, two whole
updates in float64, acting."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brc_drq_atari as brc

jax.config.update("jax_default_matmul_precision", "highest")  # no TF32 on a GPU: results are compared with float64


# ----------------------------------------------------------------------------------------- defaults, suites, scores


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("utd", 2),  # Table 4
        ("embedding_size", 32),
        ("discount", 0.99),
        ("num_atoms", 101),
        ("v_min", -10),
        ("v_max", 10),
        ("polyak_tau", 5e-3),
        ("weight_decay", 1e-4),
        ("batch_size", 256),
        ("buffer_size", 1e5),
        ("learning_rate", 1e-4),
        ("encoder_channels", (128, 256, 256)),
        ("critic_depth", 2),
        ("critic_width", 512),
        ("augmentation", True),
        ("start_epsilon", 1.0),
        ("end_epsilon", 0.01),
        ("epsilon_decay_steps", 5000),
        ("n_step", 3),
        ("normalize_returns", True),  # C.2
        ("truncation_bootstrap", "critic"),  # C.2
        ("embedding_norm", "l1"),  # C.4
        ("dtype", "float32"),
        ("learning_starts", 1600),  # google/dopamine, DrQ_eps.gin
    ],
)
def test_defaults_are_the_papers(argument, value):
    assert getattr(brc.Args(), argument) == value


def test_evaluation_explores_as_dopamines_does():
    assert brc.EVAL_EPSILON == 0.001


TABLE_5 = """Alien 7127.7 616.9 739.9 841.9 865.2 906.6; Amidar 1719.5 88.0 188.6 179.7 137.8 147.8;
Assault 742.0 527.2 431.2 565.6 579.6 503.4; Asterix 8503.3 1128.3 470.8 962.5 763.6 1285.4;
BankHeist 753.1 34.2 51.0 345.4 232.9 104.5; BattleZone 37187.5 5184.4 10124.6 14834.1 10165.3 20316.0;
Boxing 12.1 9.1 0.2 35.7 9.0 45.1; Breakout 30.5 16.4 1.9 19.6 19.8 20.6;
ChopperCommand 7387.8 1246.9 861.8 946.3 844.6 1848.4; CrazyClimber 35829.4 62583.6 16185.3 36700.5 21539.0 94606.8;
DemonAttack 1971.0 208.1 508.0 517.6 1321.5 479.6; Freeway 29.6 20.3 27.9 19.3 20.3 28.4;
Frostbite 4334.7 254.7 866.8 1170.7 1014.2 715.7; Gopher 2412.5 771.0 349.5 660.6 621.6 1477.6;
Hero 30826.4 2656.6 6857.0 5858.6 4167.9 7472.3; Jamesbond 302.8 125.3 301.6 366.5 349.1 288.6;
Kangaroo 3035.0 323.1 779.3 3617.4 1088.4 1184.0; Krull 2665.5 4539.9 2851.5 3681.6 4402.1 6764.8;
KungFuMaster 22736.3 17257.2 14346.1 14783.2 11467.4 13723.2; MsPacman 6951.6 1480.0 1204.1 1318.4 1218.1 1682.1;
Pong 14.6 12.8 -19.3 -5.4 -9.1 0.2; PrivateEye 69571.3 58.3 97.8 86.0 3.5 99.8;
Qbert 13455.0 1288.8 1152.9 866.3 1810.7 1954.6; RoadRunner 7845.0 5640.6 9600.0 12213.1 11211.4 18021.2;
Seaquest 42054.7 683.3 354.1 558.1 352.3 635.2; UpDown 11693.2 3350.3 2877.4 10859.2 4324.5 7102.2"""
TABLE_5 = {line.split()[0]: [float(cell) for cell in line.split()[1:]] for line in TABLE_5.split(";")}
TRANSFER = """asteroids atlantis beamrider berzerk bowling centipede double-dunk fishingderby gravitar icehockey
namethisgame pitfall riverraid stargunner timepilot tutankham venture videopinball wizardofwor yarsrevenge"""  # E.2


def test_suites_are_the_papers():
    assert brc.SUITES["atari"] == ([f"atari/{game.lower()}" for game in TABLE_5], 100_000)
    assert brc.SUITES["atari-transfer"] == ([f"atari/{game}" for game in TRANSFER.split()], 100_000)
    assert brc.resolve_tasks(None, ()) == brc.SUITES["atari"], "the paper's experiment by default"
    assert brc.resolve_tasks("atari-transfer", ()) == brc.SUITES["atari-transfer"]
    assert brc.resolve_tasks(None, ("atari/pong",)) == (["atari/pong"], 100_000)


def test_human_scores_are_table_5s():
    for game, (human, *_) in TABLE_5.items():
        assert brc.ATARI[game.lower()][0] == game.replace("UpDown", "UpNDown")
        assert brc.normalized_score(f"atari/{game.lower()}", human) == pytest.approx(1)


@pytest.mark.parametrize(
    ("column", "mean"), [("SimPLe", 0.443), ("DER", 0.285), ("SPR", 0.616), ("DrQ", 0.465), ("Ours (MT)", 0.849)]
)
def test_scores_give_the_means_that_table_5_prints(column, mean):
    """Of 26 games, which checks every random score."""
    index = 1 + ["SimPLe", "DER", "SPR", "DrQ", "Ours (MT)"].index(column)
    scores = [brc.normalized_score(f"atari/{game.lower()}", row[index]) for game, row in TABLE_5.items()]
    assert brc.AGGREGATES["mean"](scores) == pytest.approx(mean, abs=6e-4)


SCORES = """alien 227.8 7127.7; amidar 5.8 1719.5; assault 222.4 742.0; asterix 210.0 8503.3; bankheist 14.2 753.1;
battlezone 2360.0 37187.5; boxing 0.1 12.1; breakout 1.7 30.5; choppercommand 811.0 7387.8;
crazyclimber 10780.5 35829.4; demonattack 152.1 1971.0; freeway 0.0 29.6; frostbite 65.2 4334.7;
gopher 257.6 2412.5; hero 1027.0 30826.4;
jamesbond 29.0 302.8; kangaroo 52.0 3035.0; krull 1598.0 2665.5; kungfumaster 258.5 22736.3; mspacman 307.3 6951.6;
pong -20.7 14.6; privateeye 24.9 69571.3; qbert 163.9 13455.0; roadrunner 11.5 7845.0; seaquest 68.4 42054.7;
updown 533.4 11693.2; asteroids 719.1 47388.7; atlantis 12850.0 29028.1; beamrider 363.9 16926.5; berzerk 123.7 2630.4;
bowling 23.1 160.7; centipede 2090.9 12017.0; double-dunk -18.6 -16.4; fishingderby -91.7 -38.7; gravitar 173.0 3351.4;
icehockey -11.2 0.9; namethisgame 2292.3 8049.0; pitfall -229.4 6463.7; riverraid 1338.5 17118.0;
stargunner 664.0 10250.0; timepilot 3568.0 5229.2; tutankham 11.4 167.6; venture 0.0 1187.5; videopinball 0.0 17667.9;
wizardofwor 563.5 4756.5; yarsrevenge 3092.9 54576.9"""  # game, random, human: Agarwal et al. (2021)


@pytest.mark.parametrize("row", SCORES.split(";"), ids=lambda row: row.split()[0])
def test_scores_of_random_and_human_play(row):
    game, *scores = row.split()
    random, human = map(float, scores)
    assert brc.normalized_score(f"atari/{game}", random) == 0
    assert brc.normalized_score(f"atari/{game}", human) == 1
    assert brc.normalized_score(f"atari/{game}", (random + human) / 2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("named", "task"),
    [("atari/sequest", "seaquest"), ("atari/Seaquest", "seaquest"), ("atari/updown", "updown"),
     ("atari/UpNDown", "updown"), ("atari/up-n-down", "updown"), ("atari/up_n_down", "updown"),
     ("ALE/Pong-v5", "pong"), ("atari/Double_Dunk", "double-dunk"), ("atari/MsPacman", "mspacman")],
)  # fmt: skip
def test_games_by_other_names(named, task):
    """The paper's spelling, the emulator's, Gymnasium's, and any case."""
    assert brc.resolve_tasks(None, (named,)) == ([f"atari/{task}"], 100_000)
    with pytest.raises(brc.UserError, match="named twice"):
        brc.resolve_tasks(None, (named, f"atari/{task}"))


def test_every_game_has_its_own_scores():
    assert len({row[1:] for row in brc.ATARI.values()}) == len(brc.ATARI) == 46
    assert all(random < human for _, random, human in brc.ATARI.values())
    assert math.isnan(brc.normalized_score("gym/pixel_tasks:PixelCatch-v0", 1.0))


def test_aggregates_by_hand():
    """Eight scores, of which the middle four count; 26, of which the middle 14 do."""
    scores = [7.0, 1.0, 100.0, 3.0, 2.0, -50.0, 6.0, 5.0]
    found = {name: mean(scores) for name, mean in brc.AGGREGATES.items()}
    assert found == pytest.approx({"mean": 74 / 8, "median": 4.0, "iqm": (2 + 3 + 5 + 6) / 4})
    assert brc.interquartile_mean(np.arange(26.0) ** 2) == pytest.approx(sum(k * k for k in range(6, 20)) / 14)
    assert brc.interquartile_mean([4.0]) == 4 and brc.interquartile_mean([1.0, 2.0, 6.0]) == 3


def test_epsilon_schedule():
    args = brc.Args()
    expected = {
        0: 1.0, 1599: 1.0, 1600: 1.0, 1601: 1 - 0.99 / 5000, 2600: 0.802, 4100: 0.505, 6599: 0.01 + 0.99 / 5000,
        6600: 0.01, 100_000: 0.01,
    }  # fmt: skip
    for step, epsilon in expected.items():
        assert brc.exploration_epsilon(args, step) == pytest.approx(epsilon, abs=1e-9), step
    other = brc.Args(start_epsilon=0.5, end_epsilon=0.1, epsilon_decay_steps=4, learning_starts=10)
    steps = [9, 10, 11, 12, 13, 14, 15]
    epsilons = [brc.exploration_epsilon(other, step) for step in steps]
    assert epsilons == pytest.approx([0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1])


# ------------------------------------------------------------------------------------------------------ augmentation

augment = jax.jit(brc.augment, static_argnums=(2, 3))


def augmented(images: np.ndarray, corners: np.ndarray, noise: np.ndarray, pad: int, intensity: float) -> np.ndarray:
    """Image by image, pixel by pixel: what is shifted in from outside is the nearest pixel of the border."""
    result = np.zeros(images.shape)
    height, width = images.shape[1:3]
    for number, image in enumerate(images):
        for row in range(height):
            for column in range(width):
                source_row = min(max(row + corners[number, 0] - pad, 0), height - 1)
                source_column = min(max(column + corners[number, 1] - pad, 0), width - 1)
                factor = 1 + intensity * min(max(noise[number], -2.0), 2.0)
                result[number, row, column] = image[source_row, source_column] * factor
    return result


@pytest.mark.parametrize(("pad", "intensity"), [(4, 0.05), (2, 0.5), (0, 0.0)])
def test_augmentation_is_the_per_image_one(pad, intensity):
    images, key = np.random.default_rng(0).random((7, 11, 9, 4)).astype(np.float32), jax.random.PRNGKey(5)
    shift_key, intensity_key = jax.random.split(key)
    corners = np.asarray(jax.random.randint(shift_key, (7, 2), 0, 2 * pad + 1))
    noise = np.asarray(jax.random.normal(intensity_key, (7, 1, 1, 1)), np.float64).reshape(7)
    expected = augmented(images, corners, noise, pad, intensity)
    np.testing.assert_allclose(augment(key, images, pad, intensity), expected, rtol=1e-5)


def test_augmentation_covers_all_shifts_and_no_others():
    """Its draws read off its results: images whose channels tell the row, the column and the factor."""
    rows, columns = np.meshgrid(np.arange(20.0), np.arange(20.0), indexing="ij")
    image = np.stack([rows + 1, columns + 1, np.ones((20, 20))], -1).astype(np.float32)
    result = np.asarray(augment(jax.random.PRNGKey(1), np.stack([image] * 4000), 4, 0.05), np.float64)
    factors = result[:, 0, 0, 2]
    np.testing.assert_allclose(result[..., 2], np.broadcast_to(factors[:, None, None], (4000, 20, 20)), rtol=1e-6)
    shifts = np.round(result[:, 10, 10, :2] / factors[:, None]).astype(int) - 11
    found, counts = np.unique(shifts, axis=0, return_counts=True)
    assert set(map(tuple, found.tolist())) == {(y, x) for y in range(-4, 5) for x in range(-4, 5)}
    assert counts.min() > 20 and counts.max() < 90, "4000 / 81 = 49 on average"
    assert factors.min() == pytest.approx(0.9) and factors.max() == pytest.approx(1.1), "a normal cut at +-2"
    assert np.mean(factors < 0.9001) == pytest.approx(0.0228, abs=0.01)
    assert np.mean(np.abs(factors - 1) < 0.05) == pytest.approx(0.683, abs=0.03)


# ------------------------------------------------------------------------------------------------------------ agents

NUM_TASKS, NUM_ACTIONS, ACTION_DIMS, BATCH, SIZE = 3, 4, (4, 2, 3), 24, 10
SMALL = dict(encoder_channels=(2, 3), critic_width=8, num_atoms=21, embedding_size=4, utd=1, augmentation=False)
SMALL |= dict(learning_rate=0.01, polyak_tau=0.3, weight_decay=0.1)  # no part of an update is lost in rounding


@pytest.fixture(autouse=True)
def small_frames(request, monkeypatch):
    """Agents look at 10 x 10 pixels, except in tests marked real_frames."""
    if "real_frames" not in request.keywords:
        monkeypatch.setattr(brc, "FRAME", (SIZE, SIZE))


def make(num_tasks: int = NUM_TASKS, **changes) -> tuple[brc.Args, brc.Agent]:
    """A small agent, compiled once for all tests."""
    return make_cached(num_tasks, frozenset(changes.items()))


@functools.cache
def make_cached(num_tasks: int, changes: frozenset) -> tuple[brc.Args, brc.Agent]:
    args = brc.Args(**(SMALL | dict(changes)))
    return args, brc.make_agent(args, num_tasks, NUM_ACTIONS, list(ACTION_DIMS[:num_tasks]))


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def random_state(agent: brc.Agent, seed: int = 12) -> brc.AgentState:
    """A state in which nothing coincides: random parameters, also of the target critic, and fresh moments of Adam."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: agent.init(0))
    random = jax.tree.map(lambda leaf: jnp.float32(0.5 * rng.normal(size=leaf.shape)), shapes)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return zeros._replace(critic=random.critic, target_critic=random.target_critic, key=jax.random.PRNGKey(3))


def make_batch(seed: int = 0, num_tasks: int = NUM_TASKS, utd: int = 1, size: int = BATCH) -> brc.Batch:
    rng, shape = np.random.default_rng(seed), (utd, size)
    task_ids = rng.integers(num_tasks, size=shape)
    return brc.Batch(
        frames=rng.integers(0, 256, (*shape, 4, SIZE, SIZE), dtype=np.uint8),
        actions=rng.integers(np.array(ACTION_DIMS)[task_ids]).astype(np.int32),
        returns=rng.uniform(-0.5, 0.5, shape).astype(np.float32),
        discounts=rng.choice([0.0, 0.99, 0.99**2, 0.99**3], shape).astype(np.float32),
        next_frames=rng.integers(0, 256, (*shape, 4, SIZE, SIZE), dtype=np.uint8),
        task_ids=task_ids.astype(np.int32),
    )


MAX_RETURN = np.float32([0.5, 20.0, 3.0])


class Reference:
    """The paper's quantities from the networks' parameters alone, without Flax, in float64."""

    def __init__(self, args: brc.Args, num_tasks: int = NUM_TASKS):
        self.args, self.num_tasks = args, num_tasks
        self.atoms = args.v_min + np.arange(args.num_atoms) * (args.v_max - args.v_min) / (args.num_atoms - 1)
        self.compiled_logits, self.compiled_loss = jax.jit(self.logits), jax.jit(jax.value_and_grad(self.loss))
        self.owned = np.arange(NUM_ACTIONS) < np.array(ACTION_DIMS)[:num_tasks, None]

    @staticmethod
    def convolution(x, layer):
        """3 x 3 with zeros outside."""
        height, width = x.shape[1:3]
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return jnp.concatenate(windows, -1) @ layer["kernel"].reshape(9 * x.shape[-1], -1) + layer["bias"]

    @staticmethod
    def pooling(x):
        """Largest of 3 x 3 at every second pixel; what is outside is shared by both sides, one more at the end."""
        _, height, width, _ = x.shape
        rows, columns = -(-height // 2), -(-width // 2)
        outside = [max(2 * (n - 1) + 3 - size, 0) for n, size in ((rows, height), (columns, width))]
        pads = [(total // 2, total - total // 2) for total in outside]
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
        windows = [x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2] for i in range(3) for j in range(3)]
        return jnp.stack(windows).max(0)

    def features(self, critic, images):
        """Figure 14's encoder and its layer norm."""
        layers = critic["network"]["params"]
        convolutions = [layers["ImpalaEncoder_0"][f"Conv_{k}"] for k in range(5 * len(self.args.encoder_channels))]
        x = images
        while convolutions:
            first, *blocks = convolutions[:5]
            convolutions = convolutions[5:]
            x = self.pooling(self.convolution(x, first))
            for one, other in (blocks[:2], blocks[2:]):
                x = x + self.convolution(jnp.maximum(self.convolution(jnp.maximum(x, 0), one), 0), other)
        x = jnp.maximum(x, 0).reshape(len(x), -1)
        centered = x - x.mean(-1, keepdims=True)
        norm = layers["LayerNorm_0"]
        return centered / jnp.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]

    def logits(self, critic, images, task_ids):
        """[batch, |A|, atoms]"""
        x, layers = self.features(critic, images), critic["network"]["params"]
        if self.num_tasks > 1:
            table = critic["embedding"]["params"]["embedding"]
            power = 1 if self.args.embedding_norm == "l1" else 2
            unit = table / (abs(table) ** power).sum(-1, keepdims=True) ** (1 / power)
            x = jnp.concatenate([x, unit[task_ids]], axis=-1)
        for k in range(self.args.critic_depth):
            x = jnp.maximum(x @ layers[f"Dense_{k}"]["kernel"] + layers[f"Dense_{k}"]["bias"], 0)
        last = layers[f"Dense_{self.args.critic_depth}"]
        return (x @ last["kernel"] + last["bias"]).reshape(len(x), NUM_ACTIONS, self.args.num_atoms)

    def probs(self, critic, images, task_ids) -> np.ndarray:
        return np.asarray(jax.nn.softmax(self.compiled_logits(critic, images, task_ids)))

    def q_values(self, critic, images, task_ids) -> np.ndarray:
        """Expected returns, -inf for actions that a task does not have."""
        values = (self.probs(critic, images, task_ids) * self.atoms).sum(-1)
        return np.where(self.owned[task_ids], values, -np.inf)

    def target(self, state, batch, images, max_return) -> np.ndarray:
        """Target distributions; images: of the next observations."""
        best = self.q_values(state.critic, images, batch.task_ids).argmax(-1)
        probs = self.probs(state.target_critic, images, batch.task_ids)
        scale = np.ones(self.num_tasks)
        if self.args.normalize_returns:
            scale = self.args.v_max / max_return.astype(np.float64)
        projected, spacing = np.zeros((len(best), self.args.num_atoms)), self.atoms[1] - self.atoms[0]
        for row, task in enumerate(batch.task_ids):
            for atom, mass in zip(self.atoms, probs[row, best[row]], strict=True):
                value = float(batch.returns[row]) * scale[task] + float(batch.discounts[row]) * atom
                position = (np.clip(value, self.args.v_min, self.args.v_max) - self.args.v_min) / spacing
                below = min(int(position), self.args.num_atoms - 2)
                projected[row, below] += mass * (below + 1 - position)
                projected[row, below + 1] += mass * (position - below)
        return projected

    def loss(self, critic, batch, images, target):
        log_probs = jax.nn.log_softmax(self.logits(critic, images, batch.task_ids))
        chosen = log_probs[np.arange(len(batch.actions)), batch.actions]
        return -(target * chosen).sum(-1).mean()


def double(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def scaled(frames: np.ndarray) -> np.ndarray:
    """[batch, 4, height, width] bytes to [batch, height, width, 4] in [0, 1]."""
    return np.transpose(frames, (0, 2, 3, 1)) / 255.0


def assert_trees_close(actual, expected, **tolerances):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(double(a), double(b), **tolerances), actual, expected)


def reference_updates(args, state, batches, max_return, num_tasks: int):
    """`utd` updates in float64: the critic and target critic after them, and the last update's metrics."""
    reference = Reference(args, num_tasks)
    critic, target_critic, key = double(state.critic), double(state.target_critic), state.key
    first, second = (jax.tree.map(np.zeros_like, critic) for _ in range(2))  # moments of Adam
    for t in range(1, args.utd + 1):
        batch = jax.tree.map(lambda leaf, t=t: leaf[t - 1], batches)
        key, image_key, next_key = jax.random.split(key, 3)
        images, next_images = scaled(batch.frames), scaled(batch.next_frames)
        if args.augmentation:
            images, next_images = (
                np.asarray(augment(k, np.float32(x), 4, 0.05), np.float64)
                for k, x in ((image_key, images), (next_key, next_images))
            )
        with jax.enable_x64(True):
            now = brc.AgentState(critic, None, target_critic, None)
            target = reference.target(now, batch, next_images, max_return)
            loss, gradient = reference.compiled_loss(critic, batch, images, target)
            loss, gradient = float(loss), double(gradient)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, gradient)

        def adamw(parameter, m, v, t=t):
            m, v = m / (1 - 0.9**t), v / (1 - 0.999**t)
            return parameter - args.learning_rate * (m / (np.sqrt(v) + 1.5e-4) + args.weight_decay * parameter)

        critic = jax.tree.map(adamw, critic, first, second)
        target_critic = jax.tree.map(
            lambda new, old: args.polyak_tau * new + (1 - args.polyak_tau) * old, critic, target_critic
        )
    scale = args.v_max / max_return[batch.task_ids].astype(float) if args.normalize_returns else 1.0
    values, returns = (target * reference.atoms).sum(-1), batch.returns * scale
    norm = math.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
    return critic, target_critic, {
        "losses/critic": loss, "gradient_norms/critic": norm, "q/target_mean": values.mean(),
        "q/target_min": values.min(), "q/target_max": values.max(), "returns/normalized_mean": returns.mean(),
        "returns/normalized_max_abs": np.abs(returns).max(),
    }  # fmt: skip


SHALLOW = dict(encoder_channels=(2,), critic_depth=0)  # compiles faster
UPDATES = {
    "multi-task": (3, {}),
    "single-task, two updates": (1, dict(utd=2) | SHALLOW),
    "augmented, l2": (2, dict(augmentation=True, embedding_norm="l2") | SHALLOW),
    "raw returns": (1, dict(normalize_returns=False) | SHALLOW),
}


@pytest.mark.parametrize("name", UPDATES)
def test_updates_are_the_papers(name):
    """Loss, AdamW's step and the moving average, from nothing but the equations."""
    num_tasks, changes = UPDATES[name]
    args, agent = make(num_tasks, **changes)
    before, batches = random_state(agent), make_batch(num_tasks=num_tasks, utd=args.utd)
    max_return = MAX_RETURN[:num_tasks]
    critic, target_critic, metrics = reference_updates(args, before, batches, max_return, num_tasks)
    after, found = agent.update(copy(before), batches, max_return)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(metrics, rel=2e-4, abs=1e-5)
    assert_trees_close(after.critic, critic, atol=2e-4, rtol=1e-4)
    assert_trees_close(after.target_critic, target_critic, atol=2e-4, rtol=1e-4)
    moved = jax.tree.map(lambda a, b: np.abs(double(a) - double(b)).max(), after.critic, before.critic)
    assert min(jax.tree.leaves(moved)) > 2e-3, "an update that moves nothing would prove nothing"
    assert not np.array_equal(after.key, before.key)


def test_the_batch_of_the_test_above_tells_its_parts_apart():
    """Online and target network disagree on the best action, and masked actions would often be the best."""
    args, agent = make()
    state, batch = random_state(agent), jax.tree.map(lambda leaf: leaf[0], make_batch())
    reference, images = Reference(args), scaled(batch.next_frames)
    online, target = (reference.q_values(c, images, batch.task_ids) for c in (state.critic, state.target_critic))
    assert np.mean(online.argmax(-1) != target.argmax(-1)) > 0.2
    reference.owned[:] = True
    unmasked = reference.q_values(state.critic, images, batch.task_ids)
    assert np.mean(unmasked.argmax(-1) != online.argmax(-1)) > 0.1
    gap = np.sort(online, -1)
    assert (gap[:, -1] - gap[:, -2]).min() > 1e-5, "rounding must not decide"
    assert {round(float(x), 4) for x in batch.discounts} == {0, 0.99, 0.9801, 0.9703}


def test_target_critic_starts_as_the_critic_and_weights_are_xaviers():
    args, agent = make(2, **SHALLOW)
    state = agent.init(4)
    assert_trees_close(state.critic, state.target_critic)
    kernels = {path: leaf for path, leaf in jax.tree.leaves_with_path(state.critic) if leaf.ndim > 1}
    for path, kernel in kernels.items():
        if "embedding" in jax.tree_util.keystr(path):
            continue
        field = math.prod(kernel.shape[:-2])
        bound = math.sqrt(6 / (field * (kernel.shape[-2] + kernel.shape[-1])))
        assert 0.8 * bound < np.abs(kernel).max() <= bound * (1 + 1e-6), path


def test_return_factors_that_are_zero_or_tiny():
    """A game without any reward so far: nothing overflows, and its zeros stay zeros."""
    _, agent = make()
    batches = make_batch()._replace(returns=np.zeros((1, BATCH), np.float32))
    state, metrics = agent.update(copy(random_state(agent)), batches, np.zeros(3, np.float32))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics)))
    assert metrics["returns/normalized_max_abs"] == 0
    value = agent.value(state, make_batch(size=3).frames[0], np.float32([0, 1e-30, 1]))
    assert np.isfinite(value).all() and np.abs(value[:2]).max() < 1e-6


def test_value_is_in_units_of_reward():
    """Best own action of each task, times G_i / V_max."""
    args, agent = make()
    state, frames = random_state(agent), make_batch(size=3).frames[0]
    with jax.enable_x64(True):
        q = Reference(args).q_values(double(state.critic), scaled(frames), np.arange(3))
    np.testing.assert_allclose(agent.value(state, frames, MAX_RETURN), q.max(-1) * MAX_RETURN / 10, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------- network


def closed_form(channels, width: int, actions: int, atoms: int, tasks: int, embedding: int = 32, depth: int = 2) -> int:
    """Weights and biases, written out."""
    total, before, side = 0, 4, 84
    for c in channels:
        total += 9 * before * c + c + 4 * (9 * c * c + c)
        before, side = c, (side + 1) // 2
    features = side * side * before
    total += 2 * features  # layer norm
    inputs = features + (embedding if tasks > 1 else 0)
    for _ in range(depth):
        total, inputs = total + inputs * width + width, width
    return total + inputs * actions * atoms + actions * atoms + (tasks * embedding if tasks > 1 else 0)


@pytest.mark.real_frames
@pytest.mark.parametrize(
    ("changes", "tasks", "actions"),
    [({}, 26, 18), ({}, 1, 18), (dict(encoder_channels=(4, 8), critic_width=16, num_atoms=51), 2, 3),
     (dict(encoder_channels=(3,), critic_width=5, critic_depth=0), 1, 4)],
)  # fmt: skip
def test_parameter_count(changes, tasks, actions):
    args = brc.Args(**changes)
    agent = brc.make_agent(args, tasks, actions)
    state = jax.eval_shape(lambda: agent.init(0))
    expected = closed_form(
        args.encoder_channels, args.critic_width, actions, args.num_atoms, tasks, depth=args.critic_depth
    )
    assert brc.parameter_count(state.critic) == brc.parameter_count(state.target_critic) == expected
    if not changes and tasks == 26:
        assert expected == 23_335_642
    assert ("embedding" in state.critic) == (tasks > 1), "a single task has no embedding"


@pytest.mark.real_frames
def test_output_shapes():
    network = brc.Critic((2, 3, 4), 8, 2, 18, 101, jnp.float32)
    images = jax.ShapeDtypeStruct((5, 84, 84, 4), jnp.float32)
    for embeddings in (jax.ShapeDtypeStruct((5, 32), jnp.float32), None):
        shape = jax.eval_shape(lambda x, e: network.init_with_output(jax.random.PRNGKey(0), x, e), images, embeddings)
        logits, parameters = shape
        assert logits.shape == (5, 18, 101) and logits.dtype == jnp.float32
        assert parameters["params"]["LayerNorm_0"]["scale"].shape == (11 * 11 * 4,), "the norm is the encoder's alone"
        rows = 11 * 11 * 4 + (32 if embeddings is not None else 0)
        assert parameters["params"]["Dense_0"]["kernel"].shape == (rows, 8)


@pytest.mark.parametrize("size", [42, 11, 2, 1])
def test_max_pool_is_flaxs_with_its_gradient_ties_and_nans(size):
    """Integers from 0 to 2 tie in most windows, as the flat surfaces of a game do; one image is all zeros, as after a
    rectifier, and one all NaN."""
    images = np.random.default_rng(0).integers(0, 3, (3, size, size, 2)).astype(np.float32)
    images[0] = 0

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradient(pool, images, weights):
        values, gradient = jax.vjp(pool, images)
        return values, gradient(weights)[0]

    def flaxs(images):
        return brc.nn.max_pool(images, (3, 3), (2, 2), padding="SAME")

    pooled = -(-size // 2)
    weights = np.exp2(np.random.default_rng(1).integers(-4, 4, (3, pooled, pooled, 2)), dtype=np.float32)  # exact sums
    ours, theirs = (value_and_gradient(pool, images, weights) for pool in (brc.max_pool, flaxs))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    images[1] = np.nan
    assert not np.isfinite(value_and_gradient(brc.max_pool, images, weights)[0][1]).any()


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_embeddings_have_norm_one(norm):
    """And keep their direction: only their length is fixed."""
    _, agent = make(embedding_norm=norm)
    critic = random_state(agent).critic
    (table,) = jax.tree.leaves(critic["embedding"])
    unit = np.asarray(agent.embed(critic, np.arange(NUM_TASKS)))
    lengths = np.abs(unit).sum(-1) if norm == "l1" else np.sqrt((unit**2).sum(-1))
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
    ratio = unit / np.asarray(table)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-5)


def blind_to_tasks(critic) -> dict:
    """The same critic with all weights of the embedding zero in the dense layer that it enters."""
    critic = copy(critic)
    dense = critic["network"]["params"]["Dense_0"]
    dense["kernel"] = dense["kernel"].at[-SMALL["embedding_size"] :].set(0)
    return critic


def test_encoder_is_task_agnostic():
    """The embedding acts through its rows of the first dense layer only: without them, the task changes neither values
    nor the encoder's gradient; with them, it does."""
    _, agent = make()
    state = random_state(agent)
    blind = state._replace(critic=blind_to_tasks(state.critic), target_critic=blind_to_tasks(state.target_critic))
    batch = make_batch()._replace(actions=np.zeros((1, BATCH), np.int32), discounts=np.zeros((1, BATCH), np.float32))

    def encoder_moments(state, task):
        batches = batch._replace(task_ids=np.full((1, BATCH), task, np.int32))
        after, _ = agent.update(copy(state), batches, np.ones(3, np.float32))
        return optax.tree_utils.tree_get(after.critic_optimizer, "mu")["network"]["params"]["ImpalaEncoder_0"]

    one, other = (encoder_moments(blind, task) for task in (0, 1))
    assert_trees_close(one, other, rtol=1e-4, atol=1e-7)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(one)) > 1e-4
    one, other = (encoder_moments(state, task) for task in (0, 1))
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)) > 1e-4


def test_embeddings_learn():
    _, agent = make()
    before = random_state(agent)
    batches = make_batch()
    batches.task_ids[batches.task_ids == 1] = 0
    after, _ = agent.update(copy(before), batches, MAX_RETURN)
    moments = optax.tree_utils.tree_get(after.critic_optimizer, "mu")["embedding"]
    moved = np.abs(np.asarray(jax.tree.leaves(moments)[0])).max(-1)
    assert moved[0] > 0 and moved[2] > 0 and moved[1] == 0, "only of tasks in the batch"


def test_bfloat16_is_close_to_float32():
    """Only the encoder computes in it; parameters, and what comes out, stay float32."""
    images = jnp.float32(scaled(make_batch().frames[0]))
    outputs = {}
    for dtype in ("float32", "bfloat16"):
        network = brc.Critic((8,), 16, 1, NUM_ACTIONS, 21, jnp.dtype(dtype))
        parameters = network.init(jax.random.PRNGKey(0), images, None)
        assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype("float32")}
        outputs[dtype] = np.asarray(network.apply(parameters, images, None))
        assert outputs[dtype].dtype == np.float32
    difference = np.abs(outputs["bfloat16"] - outputs["float32"]).max()
    assert 0 < difference < 0.03 * np.abs(outputs["float32"]).max()


# ------------------------------------------------------------------------------------------------------------ acting


def test_greedy_actions_are_the_best_own_actions():
    args, agent = make()
    state, batch = random_state(agent), jax.tree.map(lambda leaf: leaf[0], make_batch(size=60))
    actions = agent.act(state.critic, jax.random.PRNGKey(0), 1, batch.frames, batch.task_ids, 0.0)
    with jax.enable_x64(True):
        q = Reference(args).q_values(double(state.critic), scaled(batch.frames), batch.task_ids)
    np.testing.assert_array_equal(actions, q.argmax(-1))
    assert len(np.unique(actions)) > 1


def test_random_actions_are_uniform_over_the_tasks_own():
    _, agent = make()
    critic, task_ids = random_state(agent).critic, np.repeat(np.arange(3), 2000).astype(np.int32)
    frames = np.zeros((6000, 4, SIZE, SIZE), np.uint8)
    actions = np.asarray(agent.act(critic, jax.random.PRNGKey(0), 7, frames, task_ids, 1.0))
    for task, count in enumerate(ACTION_DIMS):
        found = np.bincount(actions[task_ids == task], minlength=NUM_ACTIONS)
        assert (found[count:] == 0).all()
        assert np.abs(found[:count] - 2000 / count).max() < 5 * math.sqrt(2000 / count)


def test_epsilon_is_the_share_of_random_actions():
    _, agent = make()
    critic, task_ids = random_state(agent).critic, np.zeros(6000, np.int32)
    frames = np.zeros((6000, 4, SIZE, SIZE), np.uint8)
    act = lambda step, epsilon: np.asarray(  # noqa: E731
        agent.act(critic, jax.random.PRNGKey(0), step, frames, task_ids, epsilon)
    )
    greedy = act(0, 0.0)
    assert len(np.unique(greedy)) == 1
    for epsilon in (0.01, 0.4):
        other = np.mean(act(3, epsilon) != greedy)
        assert other == pytest.approx(epsilon * 3 / 4, abs=5 * math.sqrt(epsilon / 6000))  # a quarter is greedy anyway
    assert (act(3, 0.4) != act(4, 0.4)).any(), "each step draws anew"
    np.testing.assert_array_equal(act(3, 0.4), act(3, 0.4))


def test_updates_are_deterministic():
    num_tasks, changes = UPDATES["augmented, l2"]
    _, agent = make(num_tasks, **changes)
    batches = make_batch(num_tasks=num_tasks)
    one, other = (agent.update(copy(random_state(agent)), batches, MAX_RETURN[:num_tasks])[0] for _ in range(2))
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
