"""Training steps replayed as a CUDA graph against eager ones."""

import dataclasses
import threading

import pytest
import torch
from gpu_marks import ON_GPU

from hgrn2_bench import engine
from hgrn2_bench.plan import make_plan
from hgrn2_bench.steps import Steps
from hgrn2_bench.trainer import make_optimizer
from suites.mqar import protocol
from suites.mqar.protocol import Mixture, MQARConfig, Segment
from suites.mqar.runner import Runner

pytestmark = ON_GPU

# Without biases: attention's key bias has no gradient but rounding errors, which AdamW blows up to full steps.
WORDS = ("model=attention", "backend=chunked", "attention.dropout=0", "attention.bias=false", "conv=0", "clip=1.0")


def cell(*words):
    """A cell with six batches an epoch, the last of which is short."""
    return make_plan(["suite=mqar", "preset=test", *WORDS, "train_examples=167", *words], "cuda").cells[0]


class Training:
    """A cell's model, task and steps on the GPU."""

    def __init__(self, cell, graph, loss=None):
        self.task = Runner(cell)
        self.model = engine.build(cell).cuda().train()
        optimizer = make_optimizer(self.model, cell.train, "cuda")
        autocast = torch.autocast("cuda", dtype=torch.bfloat16, enabled=cell.dtype == "bfloat16")
        self.steps = Steps(self.model, optimizer, loss or self.task.loss, autocast, cell.train.clip, graph)

    def take(self, rates):
        return torch.stack([self.steps(self.task.batch(step), rate) for step, rate in enumerate(rates)])

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).clone()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graph_takes_the_steps_of_the_eager_loop(dtype):
    one, other = (Training(cell(f"dtype={dtype}"), graph) for graph in (True, False))
    rates = [5e-3 * (step + 1) / 12 for step in range(12)]
    torch.testing.assert_close(one.take(rates), other.take(rates), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.weights(), other.weights(), rtol=0, atol=1e-3)  # a step moves a weight by up to 5e-3
    assert (one.steps.mode, other.steps.mode) == ("CUDA graph", "eager")
    assert [shapes[0][0] for shapes in one.steps.captured] == [32]  # the short batch of 7 stays eager
    assert len(one.task.batch(5)[0]) == 7


def test_a_batch_and_its_loss_are_copied_in_and_out_of_the_graph():
    training = Training(cell(), graph=True)
    training.take([1e-3] * 5)
    batch = training.task.batch(0)
    before = [t.clone() for t in batch]
    first = training.steps(batch, 1e-2)
    kept = first.clone()
    for _ in range(3):
        training.steps(training.task.batch(1), 1e-2)
    assert torch.equal(first, kept)
    assert all(torch.equal(a, b) for a, b in zip(batch, before, strict=True))


def test_a_changed_learning_rate_reaches_the_graph():
    training = Training(cell(), graph=True)
    training.take([1e-3] * 5)
    assert training.steps.mode == "CUDA graph"
    before = training.weights()
    training.steps(training.task.batch(0), 0.0)
    assert torch.equal(training.weights(), before)
    training.steps(training.task.batch(0), 1e-3)
    small = (training.weights() - before).abs().max()
    training.steps(training.task.batch(0), 1e-1)
    assert 0 < small < 1e-2 < (training.weights() - before).abs().max()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_model_that_waits_for_the_gpu_stays_eager_and_trains_on(dropout):
    stream = torch.cuda.current_stream()
    made = cell(f"embed_dropout={dropout}", f"dropout={dropout}")
    task = Runner(made)

    def waits(model, batch):
        loss = task.loss(model, batch)
        return loss if loss.item() > 0 else 2 * loss

    training = Training(made, graph=True, loss=waits)
    before = training.weights()
    losses = training.take([5e-3] * 30)
    assert training.steps.mode.startswith("eager; cannot be captured in a CUDA graph: ")
    assert "capturing" in training.steps.mode
    assert losses.isfinite().all()
    assert losses[-6:].mean() < losses[:6].mean()
    assert not torch.equal(training.weights(), before)
    assert torch.cuda.current_stream() == stream
    after = Training(made, graph=True)  # the next cell of this process
    assert after.take([5e-3] * 6).isfinite().all()
    assert after.steps.mode == "CUDA graph"


def test_a_loaders_thread_may_pin_memory_while_a_step_is_captured():
    made, told = cell(), []
    task = Runner(made)

    def pin():
        try:
            told.append(torch.empty(2**28, dtype=torch.uint8).pin_memory().is_pinned())  # so large that none is kept from before
        except Exception as error:
            told.append(error)

    def loss(model, batch):
        if torch.cuda.is_current_stream_capturing():
            thread = threading.Thread(target=pin)
            thread.start()
            thread.join()
        return task.loss(model, batch)

    training = Training(made, graph=True, loss=loss)
    assert training.take([1e-3] * 5).isfinite().all()
    assert (training.steps.mode, told) == ("CUDA graph", [True])


@pytest.mark.parametrize("words", [("embed_dropout=0.5",), ("drop_path=0.5", "num_layers=2")], ids=["dropout", "drop_path"])
def test_what_is_dropped_is_drawn_anew_at_each_replay(words):
    training = Training(cell(*words), graph=True)
    training.take([1e-3] * 5)
    losses = torch.stack([training.steps(training.task.batch(0), 0.0) for _ in range(4)])
    assert training.steps.mode == "CUDA graph"
    assert len(losses.unique()) == 4


def test_a_mixture_captures_each_of_its_shapes(monkeypatch):
    tiny = Mixture((Segment(8, 2, 160), Segment(16, 4, 167)), (Segment(16, 4, 64),))
    monkeypatch.setitem(protocol.MIXTURES, "tiny", tiny)
    made = dataclasses.replace(cell(), data=MQARConfig(vocab_size=16, mixture="tiny", **tiny.sizes))
    one, other = Training(made, graph=True), Training(made, graph=False)
    rates = [5e-3] * (2 * one.task.steps_per_epoch)
    torch.testing.assert_close(one.take(rates), other.take(rates), rtol=1e-3, atol=1e-3)
    assert [tuple(shapes[0]) for shapes in one.steps.captured] == [(32, 8), (32, 16)]
