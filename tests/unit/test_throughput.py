"""The throughput suite: its keys, and what a cell times, refuses or skips."""

import time

import pytest
import torch

from hgrn2_bench import engine, numerics, registry, timing
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context
from hgrn2_bench.ops import cache, chunked
from hgrn2_bench.plan import make_plan
from suites.throughput import runner
from suites.throughput.protocol import PROTOCOL, ThroughputConfig, name_task


def cells(*words, model="hgrn2"):
    return make_plan(["suite=throughput", "preset=test", f"model={model}", *words], "cpu").cells


def run(tmp_path, *words, model="hgrn2"):
    """The rows of one cell."""
    (cell,) = cells(*words, model=model)
    folder = CellFolder(tmp_path, cell)
    with folder.lock():
        return engine.run_cell(cell, folder, lambda *_: None, lambda: False)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ({}, "op_training_32768"),
        ({"passes": "forward"}, "op_forward_32768"),
        ({"kind": "layer", "compile": True}, "layer_training_32768_compiled"),
        ({"kind": "train", "tokens": 64, "graph": False}, "train_64_eager"),
        ({"kind": "decode", "batch": 4}, "decode_batch4_graph"),
        ({"kind": "memory"}, "memory_batch1"),
    ],
)
def test_a_task_is_named_by_what_must_not_mix(words, name):
    assert name_task(ThroughputConfig(**words)) == name


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"kind": "train", "passes": "forward"}, "passes=forward has no effect with kind=train"),
        ({"kind": "op", "compile": True}, "compile=true has no effect with kind=op"),
        ({"kind": "op", "graph": False}, "graph=false has no effect with kind=op"),
        ({"kind": "op", "batch": 2}, "batch=2 has no effect with kind=op"),
        ({"seq_len": 1}, "seq_len=1 must be at least 2"),
        ({"sample_s": 0.0}, "sample_s=0.0 must be positive"),
    ],
)
def test_combinations_that_say_nothing_are_refused(words, line):
    with pytest.raises(ConfigError, match=line):
        ThroughputConfig(**words)


@pytest.mark.parametrize("word", ["lr=0.1", "batch_size=4", "cuda_graph=false", "hgrn2.epochs=2"])
def test_keys_of_training_are_refused(word):
    with pytest.raises(ConfigError, match=f"'{word}' has no effect on suite=throughput"):
        cells("task=train", word)


@pytest.mark.parametrize(("kind", "sequences"), [("op", 4), ("decode", 3)])
def test_a_batch_holds_the_tokens_asked_for(kind, sequences):
    batch = 3 if kind == "decode" else 1
    assert ThroughputConfig(kind=kind, seq_len=512, tokens=2100, batch=batch).sequences == sequences
    assert ThroughputConfig(seq_len=4096, tokens=2048).sequences == 1


def test_the_pair_of_the_crossover_is_the_one_fixed_beforehand():
    cells = make_plan(["suite=throughput", "preset=short", "task=op", "model=hgrn2,attention", "backend=chunked"], "cpu").cells
    assert {cell.model_config.d_model for cell in cells} == {1024}
    assert {cell.settings["expand_ratio"] for cell in cells if cell.model == "hgrn2"} == {128}
    assert {cell.settings["num_heads"] for cell in cells if cell.model == "attention"} == {8, 16}
    assert {cell.data.tokens for cell in cells} == {32_768}
    assert {cell.data.seq_len for cell in cells} == {2**n for n in range(9, 17)}
    assert PROTOCOL.beside == ("hgrn2", "attention")


@pytest.mark.parametrize("task", ["op", "op_forward", "layer", "train", "prefill"])
def test_a_timed_cell_says_how_its_number_came_about(tmp_path, task):
    rate, latency = run(tmp_path, f"task={task}")
    assert (rate.status, rate.metric, rate.unit, rate.higher_is_better) == ("ok", "tokens_per_s", "tokens/s", True)
    assert (latency.metric, latency.unit, latency.higher_is_better) == ("latency", "s", False)
    assert rate.value == pytest.approx(32 / latency.value)
    details = rate.details
    assert details["seconds"][0] <= details["seconds"][1] <= details["seconds"][2]
    assert details["relative_error"] < 1e-5
    assert details["flops_per_s"] == pytest.approx(details["flops"] / latency.value)
    assert 0 < details["roofline"] < 1
    assert details["above_ceiling"] is False
    assert rate.steps == 0


def test_backward_counts_twice_the_forward_pass(tmp_path):
    forward, both = (run(tmp_path, f"task={task}")[0].details for task in ("op_forward", "op"))
    assert both["flops"] == 3 * forward["flops"]
    assert both["bytes"] > 2 * forward["bytes"]


def test_bytes_of_a_layer(tmp_path):
    both = run(tmp_path, "task=layer", model="attention")[0].details
    assert both["bytes"] == 5 * 32 * 16 * 4 + 3 * 4 * (16 * 48 + 48 + 16 * 16 + 16)


@pytest.mark.parametrize(("model", "extra"), [("hgrn2", 65 * 32), ("gated_delta_net", None), ("attention", 0)])
def test_the_extra_work_of_chunks(model, extra):
    (cell,) = cells("task=op", model=model)
    built = engine.build(cell)
    inputs = built.mixers[0].project(torch.randn(1, 8, 16), Context())
    found = runner.chunk_extra(inputs)
    if extra is None:  # per head: scores, outputs, key products, solved keys and values, one more reading of the state
        (H, K), V = inputs.k_BTHK.shape[-2:], inputs.v_BTHV.shape[-1]
        extra = H * (65 * (3 * K + 2 * V) + 2 * K * V)
    assert found == extra


def test_what_runs_before_the_timed_calls_counts_as_compiling(tmp_path, monkeypatch):
    right = numerics.results

    def slow(*arguments):
        time.sleep(0.2)
        return right(*arguments)

    monkeypatch.setattr(numerics, "results", slow)
    assert run(tmp_path, "task=op_forward")[0].compile_s > 0.15


def test_decoding_says_what_it_holds(tmp_path):
    rows = {row.metric: row for row in run(tmp_path, "task=decode")}
    assert rows["tokens_per_s"].value == pytest.approx(1 / rows["latency"].value)
    assert rows["state"].value == rows["state"].state_bytes  # hgrn2's does not grow
    assert rows["latency"].details["mode"] == "eager"
    (held,) = run(tmp_path, "task=memory")
    assert (held.metric, held.value, held.unit) == ("state", rows["state"].value, "bytes")


def test_a_cache_is_full_at_the_context_asked_for(tmp_path):
    (row,) = run(tmp_path, "task=memory", "seq_len=512", "batch=2", model="attention")
    assert row.value == 2 * row.state_bytes
    assert row.details["bucket"] == 512


def test_a_kernel_that_computes_something_else_is_not_timed(tmp_path, monkeypatch):
    right = chunked.per_channel_decay
    monkeypatch.setattr(chunked, "per_channel_decay", lambda inputs, state: (1.1 * right(inputs, state)[0], ()))
    monkeypatch.setattr(timing, "time_calls", lambda *_: pytest.fail("was timed"))
    (row,) = run(tmp_path, "task=op_forward")
    assert row.status == "failed"
    assert "not timed: o of the recurrence is off by 0.1" in row.reason


def test_the_skip_term_hides_no_wrong_kernel(tmp_path, monkeypatch):
    right = chunked.scalar_decay
    monkeypatch.setattr(chunked, "scalar_decay", lambda inputs, state: (1.1 * right(inputs, state)[0], ()))
    (row,) = run(tmp_path, "task=op_forward", model="mamba2")
    assert "not timed: o of the recurrence is off by 0.1" in row.reason


@pytest.mark.parametrize("model", ["gla", "attention"])
def test_what_decodes_a_token_is_checked(tmp_path, monkeypatch, model):
    module, name = (cache, "attend") if model == "attention" else (chunked, "per_channel_decay")
    right = getattr(module, name)

    def forgetful(inputs, state, *position):
        if inputs.v_BTHV.shape[1] > 1:
            return right(inputs, state)
        return right(inputs, tuple(torch.zeros_like(x) for x in state), *position)

    monkeypatch.setattr(module, name, forgetful)
    (row,) = run(tmp_path, "task=decode", model=model)
    assert "not timed: a single token's o of the recurrence is off by" in row.reason


@pytest.mark.parametrize("model", [name for name in registry.models() if name not in ("base_conv", "hybrid")])
def test_every_recurrence_passes_the_check_of_decoding(tmp_path, model):
    error = run(tmp_path, "task=decode", "d_model=32", model=model)[0].details["relative_error"]
    assert error < 1e-5


def test_every_kind_of_layer_is_checked(tmp_path, monkeypatch):
    right = chunked.per_channel_decay
    monkeypatch.setattr(chunked, "per_channel_decay", lambda inputs, state: (1.1 * right(inputs, state)[0], ()))
    (row,) = run(tmp_path, "task=prefill", "num_layers=2", "hybrid.layers=[attention,gla]", model="hybrid")
    assert "not timed: o of the recurrence is off by 0.1" in row.reason


@pytest.mark.parametrize("task", ["op", "layer"])
@pytest.mark.parametrize(("model", "words"), [("hybrid", ()), ("hgrn2", ("first_layer=base_conv",))])
def test_one_layer_does_not_stand_for_layers_that_differ(tmp_path, task, model, words):
    (row,) = run(tmp_path, f"task={task}", "num_layers=2", *words, model=model)
    assert row.status == "skipped"
    assert f"the layers of {model} differ here" in row.reason


@pytest.mark.parametrize("task", ["op", "train", "prefill", "decode", "memory"])
def test_a_rehearsal_runs_the_work_and_times_nothing(task, monkeypatch):
    monkeypatch.setattr(timing, "time_calls", lambda *_: pytest.fail("was timed"))
    monkeypatch.setattr(timing, "ceilings", lambda *_: pytest.fail("measured a ceiling"))
    (cell,) = cells(f"task={task}")
    rehearsed = runner.Runner(cell)
    rehearsed.rehearse(engine.build(cell))
    assert rehearsed.cold_calls > 0


def test_a_compiled_cell_is_compiled_anew(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_: done.append("compile"))
    run(tmp_path, "task=layer", "compile=true")
    assert done == ["reset", "compile"]


def test_a_plain_module_is_timed_on_a_gpu(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text("import torch\n\n\nclass Mine(torch.nn.LayerNorm):\n    pass\n")
    (cell,) = cells("task=layer", model=f"{file}:Mine")
    timed, model = runner.Runner(cell), engine.build(cell)
    timed.device = "cuda"

    def reached(*_):
        raise RuntimeError("comes to be timed")

    monkeypatch.setattr(timing, "ceilings", reached)
    with pytest.raises(RuntimeError, match="comes to be timed"):
        timed.measure(model)


def test_what_the_device_cannot_have_done_fails(tmp_path, monkeypatch):
    def refuse(*_):
        raise timing.MeasuringFaultError("measuring fault: 5000 TFLOP/s")

    monkeypatch.setattr(timing, "ceilings", refuse)
    (row,) = run(tmp_path, "task=op")
    assert (row.status, row.value) == ("failed", None)
    assert "measuring fault" in row.reason


def test_out_of_memory_is_a_data_point(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(runner.timing, "time_calls", full)
    (row,) = run(tmp_path, "task=layer")
    assert (row.status, row.value) == ("oom", None)


def test_a_model_without_a_recurrence_is_skipped_with_the_reason(tmp_path):
    (row,) = run(tmp_path, "task=op", model="base_conv")
    assert (row.status, row.reason) == ("skipped", "base_conv has no recurrence: time its layer")


def test_a_model_without_a_kernel_has_no_speed_on_a_gpu():
    (cell,) = cells("task=layer", model="mamba")
    timed = runner.Runner(cell)
    timed.device = "cuda"
    with pytest.raises(engine.SkippedError, match="mamba has no Triton kernel here"):
        timed.measure(engine.build(cell))


def test_inputs_of_the_recurrence_are_tensors_of_their_own(monkeypatch):
    (cell,) = cells("task=op", model="retnet")
    model = engine.build(cell)
    seen = []
    monkeypatch.setattr(numerics, "relative_error", lambda inputs, *_: seen.append(inputs) or (0.0, "o"))
    runner.Runner(cell)._gate(model)
    q, log_f = seen[0].q_BTHK, seen[0].log_f_BTH
    assert q.is_contiguous()
    assert not q.requires_grad
    assert 0 in log_f.stride()  # one decay for all tokens stays one number in memory
