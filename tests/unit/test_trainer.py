"""The training loop: schedules, optimiser groups, stop and selection rules, and exact resume at every step."""

import json
import math

import pytest
import torch
from torch import nn

from hgrn2_bench import engine, parallel, registry
from hgrn2_bench import trainer as trainer_module
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.config import ModelConfig, TrainConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Mixer
from hgrn2_bench.language import LanguageModel
from hgrn2_bench.plan import make_plan
from hgrn2_bench.steps import Steps
from hgrn2_bench.stopping import InterruptedTrainingError
from hgrn2_bench.trainer import DivergedError, Trainer, learning_rate, make_optimizer


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


def test_cosine_of_timm_goes_by_epochs_and_counts_the_warm_up():
    config = TrainConfig(lr=1.0, epochs=10, schedule="cosine_timm", warmup=0.2, warmup_from=0.1, lr_end=0.05)
    rates = [learning_rate(config, step, 40, 4) for step in range(0, 40, 4)]
    assert rates[:2] == pytest.approx([0.1, 0.55])
    assert rates[2:] == pytest.approx([0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * epoch / 10)) for epoch in range(2, 10)])
    assert learning_rate(config, 3, 40, 4) == rates[0]


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


def test_average_of_weights_follows_its_formula_and_is_resumed(folder):
    config = TrainConfig(lr=0.02, epochs=2, ema=0.9)
    expected = {name: tensor.clone() for name, tensor in net().state_dict().items()}

    class Watched(Regression):
        def batch(self, step):
            if step:
                self.take()
            return super().batch(step)

        def take(self):
            for name, tensor in made.model.state_dict().items():
                expected[name] = 0.9 * expected[name] + 0.1 * tensor

    task = Watched()
    made = Trainer(net(), task, config, folder, "cpu", "float32")
    torch.manual_seed(1)
    made.fit(lambda *_: None, lambda: False)
    task.take()
    torch.testing.assert_close(made.average.tensors, expected)
    folder.start_over()
    steps = iter(range(1, 1000))
    with pytest.raises(InterruptedTrainingError):
        train(folder, config, stop=lambda: next(steps) == 7)
    resumed = train(folder, config).average.tensors
    assert all(torch.equal(resumed[name], tensor) for name, tensor in made.average.tensors.items())


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


def test_inverse_sqrt_is_that_of_fairseq():
    """Its update number n, which counts from 0, has the rate of our step n (InverseSquareRootSchedule of fairseq)."""
    config = TrainConfig(lr=5e-4, schedule="inverse_sqrt", warmup_steps=4000)
    rate = [learning_rate(config, step, 50_000, 100) for step in (0, 1, 2000, 3999, 4000, 4001, 16_000, 49_999)]
    rise = (5e-4 - 1e-7) / 4000
    decay = 5e-4 * 4000**0.5
    expected = [1e-7, 1e-7 + rise, 1e-7 + 2000 * rise, 1e-7 + 3999 * rise, 5e-4, decay * 4001**-0.5, 2.5e-4, decay * 49_999**-0.5]
    assert rate == pytest.approx(expected, rel=1e-12)
    assert learning_rate(TrainConfig(schedule="inverse_sqrt", warmup_steps=10, warmup_from=0.0), 0, 20, 20) == 0.0


class FairseqAdam(torch.optim.Optimizer):
    """Adam with decoupled decay as fairseq's `optim/adam.py` orders it: decay, then m / (sqrt(v) + eps) at a corrected step size."""

    def __init__(self, parameters, lr, betas, weight_decay, eps=1e-8):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})
        self.t = 0

    @torch.no_grad()
    def step(self):
        self.t += 1
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            size = group["lr"] * math.sqrt(1 - beta2**self.t) / (1 - beta1**self.t)
            for p in group["params"]:
                m, v = self.state[p].setdefault("mv", (torch.zeros_like(p), torch.zeros_like(p)))
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.add_(p, alpha=-group["weight_decay"] * group["lr"]).addcdiv_(m, v.sqrt() + group["eps"], value=-size)


def test_adamw_on_all_parameters_is_fairseqs_adam():
    """But for eps; gradients here are far above it."""
    config = TrainConfig(lr=1e-2, beta1=0.9, beta2=0.98, weight_decay=0.1, decay_all=True)
    task, ours, theirs = Regression(), net().eval(), net().eval()
    optimizers = make_optimizer(ours, config, "cpu"), FairseqAdam(theirs.parameters(), 1e-2, (0.9, 0.98), 0.1)
    for step in range(30):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            task.loss(model, task.batch(step)).backward()
            optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    other_betas = make_optimizer(net(), TrainConfig(), "cpu").param_groups[0]["betas"]
    assert other_betas == (0.9, 0.999)


def test_updates_are_the_length_in_steps(folder):
    assert train(folder, TrainConfig(updates=23, schedule="constant")).at.step == 23
    assert TrainConfig(updates=23).steps(10) == 23
    assert TrainConfig(epochs=3).steps(10) == 30


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_the_curve_holds_the_norm_of_the_last_gradient_before_clipping(folder, clip):
    config = TrainConfig(updates=50, schedule="constant", clip=clip, lr=1e-3)
    train(folder, config)
    (record,) = [each for each in records(folder) if "loss" in each]
    made = Trainer(net(), Regression(), config, folder, "cpu", "float32")
    torch.manual_seed(1)
    made.model.train()
    for step in range(49):
        made.steps(made.task.batch(step), 1e-3)
    made.optimizer.zero_grad()
    made.task.loss(made.model, made.task.batch(49)).backward()
    norm = torch.cat([p.grad.flatten() for p in made.model.parameters()]).norm().item()
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > 0.1


def test_the_curve_holds_speed_and_the_share_of_the_peak(folder):
    made = Trainer(net(), Regression(), TrainConfig(epochs=10), folder, "cpu", "float32")
    made.peak_tokens_per_s = 1e9
    heard = []
    made.mirror = heard.append
    made.fit(lambda *_: None, lambda: False)
    curve = [json.loads(line) for line in folder.curve.read_text().splitlines()]
    assert heard == curve
    logged = [record for record in curve if "loss" in record]
    assert len(logged) == 2
    for record in logged:
        assert record["tokens_per_s"] > 0
        assert record["mfu"] == pytest.approx(record["tokens_per_s"] / 1e9)


class Splitting(Regression):
    """The same task, whose batches can be split."""

    def size(self, batch):
        return len(batch[0])

    targets = size

    def part(self, batch, rows):
        return tuple(tensor[rows] for tensor in batch)


ACCUMULATED = TrainConfig(
    lr=0.02, updates=80, micro_batch=3, schedule="inverse_sqrt", warmup_steps=7, clip=1.0, beta2=0.98, decay_all=True, keep="best"
)


@pytest.mark.parametrize("cut", [3, 50, 61])
def test_resume_in_micro_batches_continues_bit_for_bit(folder, cut):
    whole = train(folder, ACCUMULATED, Splitting())
    curve = records(folder)
    folder.start_over()
    steps = iter(range(1, 1000))
    with pytest.raises(InterruptedTrainingError):
        train(folder, ACCUMULATED, Splitting(), stop=lambda: next(steps) == cut)
    resumed = train(folder, ACCUMULATED, Splitting())
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    assert records(folder) == curve


def test_a_checkpoint_of_an_older_program_is_taken(folder):
    """It knows neither of other processes' generators nor of their number."""
    config = TrainConfig(lr=0.02, epochs=4)
    whole = train(folder, config)
    folder.start_over()
    steps = iter(range(1, 1000))
    with pytest.raises(InterruptedTrainingError):
        train(folder, config, stop=lambda: next(steps) == 15)
    content = torch.load(folder.checkpoint, weights_only=True)
    del content["other_rngs"], content["progress"]["processes"]
    torch.save(content, folder.checkpoint)
    resumed = train(folder, config)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"schedule": "inverse_sqrt"}, "schedule=inverse_sqrt falls from the end of its warm-up: give warmup_steps"),
        ({"warmup_from": 1e-6}, "warmup_from=1e-06 has no effect with schedule=cosine"),
        ({"schedule": "inverse_sqrt", "warmup_steps": 5, "warmup_from": 1.0}, "warmup_from=1.0 must be at most lr=0.001"),
        ({"updates": 5, "epochs": 2}, r"epochs=2 and updates=5: give one of them \(epochs=1 or updates=0\)"),
        ({"updates": 5, "schedule": "cosine_epoch"}, "schedule=cosine_epoch goes by epochs: updates=5 must be 0"),
        ({"micro_batch": 33}, "micro_batch=33 must be at most batch_size=32"),
        ({"beta2": 1.0}, "beta2=1.0 must be at least 0 and less than 1"),
    ],
)
def test_lengths_and_optimisers_that_cannot_be_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**words)


TRACER = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # it looks at it


@TRACER
def test_compiled_blocks_train_as_eager_ones(tmp_path, monkeypatch):
    """Traced and run as traced: torch's code generator takes half a minute here."""
    compile_it = nn.Module.compile
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: asked.append(self) or compile_it(self, backend="eager"))
    words = ["suite=mqar", "preset=test", "model=hgrn2", "train_examples=640", "lr=1e-2"]
    losses = {}
    for compiled in ("false", "true"):
        cell = make_plan([*words, f"compile_blocks={compiled}"], "cpu").cells[0]
        made = CellFolder(tmp_path / compiled, cell)
        with made.lock():
            rows = engine.run_cell(cell, made, lambda *_: None, lambda: False)
        assert {row.status for row in rows} == {"ok"}, rows[0].reason
        losses[compiled] = [record["loss"] for record in records(made) if "loss" in record]
    assert [type(each).__name__ for each in asked] == ["Block"]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-5)


@TRACER
def test_blocks_that_differ_in_their_layer_alone_are_compiled_once(monkeypatch):
    """Twelve layers: the compiler's usual limit of eight would leave four of them eager, and each of eight would be compiled anew."""
    compile_it = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_it(self, backend="eager"))
    config = ModelConfig(d_model=16, num_layers=12, lower_bound="inclusive", channel_mixer="glu")
    model = LanguageModel(config, registry.load("hgrn2"), {"expand_ratio": 8}, "chunked", 20, 16)
    tokens = torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = model.loss(tokens, tokens)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = parallel.trained(model, lambda model, batch: model.loss(*batch), TrainConfig(compile_blocks=True), "cpu")
    for _ in range(2):
        assert found.loss(found.model, (tokens, tokens)).item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8
    assert not torch._dynamo.utils.counters["unimplemented"]
    torch._dynamo.reset()


def test_a_model_without_blocks_cannot_be_compiled_by_them(folder):
    with pytest.raises(ConfigError, match="Sequential has no list of blocks"):
        Trainer(net(), Regression(), TrainConfig(compile_blocks=True), folder, "cpu", "float32")
