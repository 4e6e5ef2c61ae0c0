"""One optimiser step on the CPU, and when a step is to be captured; what a captured one does is in `gpu/test_steps_gpu.py`."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hgrn2_bench import layers
from hgrn2_bench import steps as steps_module
from hgrn2_bench.config import TrainConfig
from hgrn2_bench.steps import EAGER_STEPS, NotCapturedError, Steps, replayed
from hgrn2_bench.trainer import make_optimizer


def net():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def batch(rows=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=rng), torch.randn(rows, 1, generator=rng)


def squares(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def steps(model, clip=0.0, graph=False, dtype=torch.float32, loss=squares):
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    return Steps(model, optimizer, loss, autocast, clip, graph)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_a_step_goes_down_the_gradient_at_the_given_rate(rate):
    model, same = net(), net()
    loss = squares(same, batch())
    grads = torch.autograd.grad(loss, list(same.parameters()))
    taken = steps(model)(batch(), rate)
    torch.testing.assert_close(taken, loss.detach(), rtol=0, atol=0)
    for mine, before, grad in zip(model.parameters(), same.parameters(), grads, strict=True):
        torch.testing.assert_close(mine, before - rate * grad)


def test_the_loss_is_that_before_the_step_as_a_tensor_without_a_graph():
    loss = steps(net())(batch(), 0.1)
    assert loss.shape == ()
    assert not loss.requires_grad


@pytest.mark.parametrize("graph", [False, True])
def test_layers_hear_whether_the_steps_are_for_a_graph(graph, monkeypatch):
    heard = []

    def loss(model, batch):
        heard.append(layers._for_a_graph)
        return squares(model, batch)

    def capture(step, pool):
        step()
        raise NotCapturedError("it waits")

    monkeypatch.setattr(steps_module, "capture", capture)
    take = steps(net(), graph=graph, loss=loss)
    for _ in range(EAGER_STEPS + 2):
        take(batch(), 0.1)
    assert heard == [graph] * (EAGER_STEPS + 2 + graph)  # after a refused capture too: a resumed run takes the same kernels
    assert not layers._for_a_graph


def test_gradients_do_not_add_up_over_steps():
    model, same = net(), net()
    take, other = steps(model), steps(same)
    take(batch(seed=1), 0.0)
    take(batch(), 0.1)
    other(batch(), 0.1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize(("clip", "scale"), [(0.0, None), (1e-3, 1e-3), (1e6, None)])
def test_gradients_are_clipped_to_their_joint_norm(clip, scale):
    model, same = net(), net()
    grads = torch.autograd.grad(squares(same, batch()), list(same.parameters()))
    norm = torch.cat([g.flatten() for g in grads]).norm()
    factor = 1.0 if scale is None else scale / norm
    steps(model, clip)(batch(), 1.0)
    for mine, before, grad in zip(model.parameters(), same.parameters(), grads, strict=True):
        torch.testing.assert_close(mine, before - factor * grad, rtol=1e-4, atol=1e-6)


def test_autocast_covers_the_loss_alone_and_weights_stay_float32():
    seen = []

    def loss(model, batch):
        out = model(batch[0])
        seen.append(out.dtype)
        return out.float().square().mean()

    model = net()
    steps(model, dtype=torch.bfloat16, loss=loss)(batch(), 0.1)
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_batches_of_every_shape_are_taken_without_a_graph():
    take = steps(net())
    for rows in (4, 4, 4, 4, 4, 1, 7):
        assert take(batch(rows), 0.01).isfinite()
    assert (take.mode, take.captured) == ("eager", {})


def test_an_eager_loop_compiles_in_its_first_step_alone():
    take, warm = steps(net()), []
    for rows in (4, 4, 1):
        warm.append(take.warm(batch(rows)))
        take(batch(rows), 0.01)
    assert warm == [True, False, False]


def test_the_rate_reaches_every_group_as_a_float_or_inside_its_tensor():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    take = Steps(model, make_optimizer(model, TrainConfig(lr=1.0), "cpu"), squares, torch.autocast("cpu", enabled=False), 0.0, False)
    take(batch(), 0.25)
    groups = take.optimizer.param_groups
    assert len(groups) == 2
    assert [group["lr"] for group in groups] == [0.25, 0.25]
    groups[0]["lr"] = tensor = torch.tensor(9.0)
    take(batch(), 0.125)
    assert groups[0]["lr"] is tensor  # what a graph has recorded is this very tensor
    assert (tensor.item(), groups[1]["lr"]) == (0.125, 0.125)


# when a step is captured; capturing itself needs a GPU


@pytest.mark.parametrize(
    ("rows", "captured"),
    [
        ((8,) * 10, [(4, 8)]),  # at the fourth
        ((8,) * 3, []),
        ((8, 8, 5) * 3, [(5, 8)]),  # the short last batch of an epoch waits for its fourth too
        ((8, 5) * 5, [(7, 8), (8, 5)]),  # shapes in any order, as texts of different lengths come
    ],
)
def test_a_shape_is_captured_after_enough_eager_steps(rows, captured, monkeypatch):
    take, taken, asked, warm = steps(net(), graph=True), [], [], []

    def capture(inputs, shapes):
        asked.append((len(taken), inputs[0].shape[0]))
        take.captured[shapes] = SimpleNamespace(inputs=inputs, loss=torch.zeros(()), norm=None, graph=SimpleNamespace(replay=lambda: None))

    monkeypatch.setattr(take, "_capture", capture)
    for size in rows:
        taken.append(size)
        warm.append(take.warm(batch(size)))
        take(batch(size), 0.01)
    assert asked == captured
    counted = [rows[: i + 1].count(size) for i, size in enumerate(rows)]
    assert warm == [n <= EAGER_STEPS + 1 for n in counted]


def test_more_shapes_than_can_be_held_leave_the_rest_eager(monkeypatch):
    monkeypatch.setattr("hgrn2_bench.steps.MAX_SHAPES", 3)
    take, asked = steps(net(), graph=True), []
    monkeypatch.setattr(take, "_capture", lambda inputs, shapes: asked.append(len(inputs[0])))
    for size in (8, 8, 8, 8, 5, 6, 7, 5, 5, 5):
        take(batch(size), 0.01)
    assert asked == [8]
    assert not take.warm(batch(5))


class Refusing(contextlib.AbstractContextManager):
    """`torch.cuda.graph` around a model that waits: its end fails as well, with words that do not say why."""

    def __init__(self, graph, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"

    def __exit__(self, *_):
        raise RuntimeError("operation failed due to a previous error during capture")


class Driver:
    """What a failed capture has to put right again."""

    def __init__(self, monkeypatch):
        self.stream, self.state = "default", "waiting"
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "default")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "default_generators", (self,))
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        monkeypatch.setattr(torch.cuda, "graph", Refusing)

    def clone_state(self):
        return "fresh"

    def graphsafe_set_state(self, state):
        self.state = state


def test_a_step_that_cannot_be_captured_stays_eager_and_says_why(monkeypatch):
    driver = Driver(monkeypatch)
    model, same = net(), net()
    waiting = [0]

    def waits(model, batch):
        waiting[0] += 1
        if waiting[0] == EAGER_STEPS + 1:
            driver.stream = "the capture's"
            raise RuntimeError("operation not permitted\nwhen stream is capturing " + "x" * 200)
        return squares(model, batch)

    take, eager = steps(model, graph=True, loss=waits), steps(same)
    losses = [take(batch(), 0.1) for _ in range(8)]
    assert losses == [eager(batch(), 0.1) for _ in range(8)]
    assert take.mode.startswith("eager; cannot be captured in a CUDA graph: operation not permitted when stream is capturing xxx")
    assert len(take.mode) == len("eager; cannot be captured in a CUDA graph: ") + 120
    assert waiting[0] == 9  # tried once
    assert (driver.stream, driver.state) == ("default", "fresh")


@pytest.mark.parametrize("recorded", [True, False])
def test_a_call_is_replayed_where_it_can_be_recorded(recorded, monkeypatch):
    calls, replays = [], []

    def capture(call):
        if not recorded:
            raise NotCapturedError("it waits")
        return SimpleNamespace(replay=lambda: replays.append(1)), call()

    monkeypatch.setattr(steps_module, "capture", capture)
    call, mode = replayed(lambda: calls.append(layers._for_a_graph))
    assert all(calls)
    assert len(calls) == EAGER_STEPS + recorded
    call()
    assert (len(calls), len(replays)) == (EAGER_STEPS + 1, int(recorded))
    assert mode == ("CUDA graph" if recorded else "eager; cannot be captured in a CUDA graph: it waits")
