"""The training loop: schedules, optimiser groups, stop and selection rules, and exact resume at every step."""

import json
import math

import pytest
import torch
from torch import nn

from hgrn2_bench import trainer as trainer_module
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.config import TrainConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Mixer
from hgrn2_bench.plan import make_plan
from hgrn2_bench.steps import Steps
from hgrn2_bench.trainer import DivergedError, InterruptedTrainingError, Trainer, learning_rate, make_optimizer


class Regression:
    """A task on fixed random data; scores come from a list, then from the loss."""

    steps_per_epoch = 10

    def __init__(self, scores=(), nan_at=None):
        rng = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(40, 8, generator=rng), torch.randn(40, 1, generator=rng)
        self.scores, self.nan_at, self.asked = list(scores), nan_at, []

    def batch(self, step):
        rows = slice(step % 10 * 4, step % 10 * 4 + 4)
        return self.x[rows], self.y[rows] * (math.nan if step == self.nan_at else 1)

    def loss(self, model, batch):
        x, y = batch
        return (model(x) - y).square().mean()

    def score(self, model, split):
        self.asked.append(split)
        return self.scores.pop(0) if self.scores else 0.5


@pytest.fixture
def folder(tmp_path):
    cell = make_plan(["suite=mqar", "preset=test", "model=attention"], "cpu").cells[0]
    made = CellFolder(tmp_path, cell)
    with made.lock():
        yield made


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))


def train(folder, config, task=None, stop=lambda: False):
    made = Trainer(net(), task or Regression(), config, folder, "cpu", "float32")
    torch.manual_seed(1)
    made.fit(lambda *_: None, stop)
    return made


def records(folder):
    """The curve without what depends on the clock."""
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in folder.curve.read_text().splitlines()]


def test_cosine_warms_up_linearly_and_ends_at_zero():
    config = TrainConfig(lr=1.0, warmup=0.1, schedule="cosine")
    rates = [learning_rate(config, step, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_cosine_epoch_is_constant_inside_an_epoch():
    config = TrainConfig(lr=1.0, epochs=4, schedule="cosine_epoch")
    rates = [learning_rate(config, step, 40, 10) for step in range(40)]
    assert rates[0] == rates[9] == 1.0
    assert rates[10] == rates[19] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_constant_schedule_keeps_the_rate_after_warm_up():
    config = TrainConfig(lr=2.0, warmup=0.5, schedule="constant")
    assert [learning_rate(config, step, 4, 4) for step in range(4)] == [1.0, 2.0, 2.0, 2.0]


class Decaying(Mixer):
    no_weight_decay = ("matrix",)

    def __init__(self):
        nn.Module.__init__(self)
        self.matrix, self.other, self.vector = (nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (3, 3), (4,)))


@pytest.mark.parametrize(("decay_all", "expected"), [(False, {9}), (True, {4, 9})])
def test_weight_decay_takes_matrices_that_the_mixer_does_not_exempt(decay_all, expected):
    model = Decaying()
    groups = make_optimizer(model, TrainConfig(decay_all=decay_all, weight_decay=0.3), "cpu").param_groups
    decayed = {p.numel() for group in groups if group["weight_decay"] for p in group["params"] if p.ndim == 2}
    assert decayed == expected
    vectors = {group["weight_decay"] for group in groups for p in group["params"] if p.ndim == 1}
    assert vectors == ({0.3} if decay_all else {0.0})


class Slow(Decaying):
    max_lr = {"matrix": 1e-3}


@pytest.mark.parametrize(("lr", "slow"), [(4e-3, 1e-3), (1e-3, 1e-3), (5e-4, 5e-4)])
def test_parameters_with_a_greatest_rate_follow_the_schedule_below_it(lr, slow):
    model = Slow()
    optimizer = make_optimizer(model, TrainConfig(lr=lr, weight_decay=0.3), "cpu")
    autocast = torch.autocast("cpu", enabled=False)
    take = Steps(model, optimizer, lambda model, batch: sum(p.sum() for p in model.parameters()), autocast, 0.0, False)
    for share in (1.0, 0.25):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        take((), share * lr)
        moved = {name: (before[name] - p.detach()).mean().item() for name, p in model.named_parameters()}
        decay = 0.3 * share * lr * before["other"].mean().item()
        assert moved == pytest.approx({"matrix": share * slow, "other": share * lr + decay, "vector": share * lr}, rel=1e-3)


def test_training_lowers_the_loss_and_writes_the_curve(folder):
    train(folder, TrainConfig(lr=1e-2, epochs=20, schedule="constant"))
    curve = [json.loads(line) for line in folder.curve.read_text().splitlines()]
    losses = [record["loss"] for record in curve if "loss" in record]
    assert [record["step"] for record in curve if "loss" in record] == [50, 100, 150, 200]
    assert losses[-1] < losses[0]


def test_early_stop_looks_at_the_selection_split_only(folder):
    task = Regression(scores=[0.2, 0.991, 0.3])
    made = train(folder, TrainConfig(epochs=5, stop_at=0.99, select="test"), task)
    assert made.at.step == 20
    assert set(task.asked) == {"test"}


def test_score_equal_to_the_threshold_does_not_stop(folder):
    assert train(folder, TrainConfig(epochs=3, stop_at=0.99), Regression(scores=[0.99] * 3)).at.step == 30


def test_keep_best_returns_the_weights_of_the_best_evaluation(folder):
    scores = [0.1, 0.9, 0.2]
    best = train(folder, TrainConfig(lr=0.05, epochs=3, keep="best", schedule="constant"), Regression(scores)).model.state_dict()
    folder.start_over()
    two_epochs = train(folder, TrainConfig(lr=0.05, epochs=2, keep="last", schedule="constant"), Regression(scores)).model.state_dict()
    assert all(torch.equal(best[name], two_epochs[name]) for name in best)


def test_loss_that_is_not_finite_diverges_at_its_step(folder):
    with pytest.raises(DivergedError, match="loss nan at step 8 of 20"):
        train(folder, TrainConfig(epochs=2), Regression(nan_at=7))


def test_speed_counts_the_tokens_of_each_step(folder):
    """Steps of an epoch hold 4 x 8 numbers, in its second half 2 x 8; every five steps are a window."""

    class Shrinking(Regression):
        def batch(self, step):
            x, y = super().batch(step)
            return (x[:2], y[:2]) if step % 10 >= 5 else (x, y)

    at = train(folder, TrainConfig(epochs=2, eval_every=5), Shrinking()).at
    counted = [rate * took for rate, took in zip(at.token_rates, at.step_times, strict=True)]
    assert counted == pytest.approx([32, 16, 32, 16])  # of the first window, all but the step that warms up


@pytest.mark.parametrize("cut", [1, 9, 10, 37, 50, 51, 79])
def test_resume_continues_bit_for_bit(folder, cut):
    config = TrainConfig(lr=0.02, epochs=8, warmup=0.1, clip=1.0, keep="best")
    scores = [0.1, 0.3, 0.2, 0.5, 0.4, 0.6, 0.1, 0.2]
    whole = train(folder, config, Regression(scores))
    curve = records(folder)
    folder.start_over()
    steps = iter(range(1, 1000))
    with pytest.raises(InterruptedTrainingError):
        train(folder, config, Regression(scores), stop=lambda: next(steps) == cut)
    with folder.curve.open("a") as file:  # written after the checkpoint, before the kill
        file.write('{"step": 99999, "loss": 1.0}\n')
    resumed = train(folder, config, Regression(scores[cut // 10 :]))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    assert records(folder) == curve
    assert (resumed.at.step, resumed.at.best) == (80, 0.6)


def test_checkpoint_is_written_while_training(folder, monkeypatch):
    monkeypatch.setattr(trainer_module, "CHECKPOINT_EVERY_S", 0.0)
    train(folder, TrainConfig(epochs=1))
    content = torch.load(folder.checkpoint, weights_only=True)
    assert content["progress"]["step"] == 10
    assert folder.status()["step"] == 10


def test_damaged_checkpoint_starts_the_cell_again(folder):
    steps = iter(range(1, 1000))
    with pytest.raises(InterruptedTrainingError):
        train(folder, TrainConfig(epochs=2), stop=lambda: next(steps) == 5)
    folder.checkpoint.write_bytes(folder.checkpoint.read_bytes()[:100])
    assert train(folder, TrainConfig(epochs=2)).at.step == 20


def test_bfloat16_keeps_weights_and_optimizer_state_in_float32(folder):
    made = Trainer(net(), Regression(), TrainConfig(epochs=1), folder, "cpu", "bfloat16")
    made.fit(lambda *_: None, lambda: False)
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    states = [v for state in made.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    assert {v.dtype for v in states} == {torch.float32}


def test_a_schedule_of_its_own_length():
    """As transformers' get_cosine_schedule_with_warmup: HGRN2's run on Text ends at 0.952 of its peak, that on Image past its end."""
    text = TrainConfig(lr=1.0, warmup_steps=10_000, schedule_steps=50_000)
    assert learning_rate(text, 15_600, 15_600, 390) == pytest.approx(0.952, abs=1e-3)
    image = TrainConfig(lr=1.0, warmup_steps=30_000, schedule_steps=50_000)
    assert learning_rate(image, 52_725, 52_725, 703) == pytest.approx(0.045, abs=1e-3)
    assert learning_rate(text, 999, 15_600, 390) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"warmup": 0.1, "warmup_steps": 5}, "warmup=0.1 and warmup_steps=5: give one of them"),
        ({"schedule": "constant", "schedule_steps": 5}, "schedule_steps=5 has no effect with schedule=constant"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must not be negative"),
    ],
)
def test_schedules_that_cannot_be_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**words)
