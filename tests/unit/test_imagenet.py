import dataclasses
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hgrn2_bench import distributed, engine
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.distributed import World
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.plan import make_plan
from hgrn2_bench.stopping import InterruptedTrainingError
from suites.imagenet import drawn, feed, mixing
from suites.imagenet.mixing import Box, Mix
from suites.imagenet.runner import Runner
from suites.imagenet.task import TaskConfig, name_task


def cell_of(*words, preset="test"):
    return make_plan(["suite=imagenet", f"preset={preset}", "model=hgrn2", *words], "cpu").cells[0]


def runner_of(*words):
    return Runner(cell_of(*words))


@pytest.fixture
def folder_of_pictures(tmp_path, monkeypatch):
    """Two classes of JPEGs of several sizes, a class by brightness."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("timm", reason="timm is not installed")
    rng = np.random.default_rng(0)
    for split, number in {"train": 12, "val": 5, "test": 7}.items():
        for i in range(number):
            path = tmp_path / "data" / split / ("dark", "light")[i % 2] / f"{i:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 100, (40 + i, 50, 3)) + 150 * (i % 2)
            image.fromarray(pixels.astype(np.uint8)).save(path)
    monkeypatch.setenv("HGRN2_BENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(feed, "workers_here", lambda: 0)
    return ("dataset=folder", "image_size=16", "train_examples=0", "validation_examples=0", "test_examples=0")


# The drawn pictures


def test_drawn_class_is_where_the_blue_disc_lies():
    pixels_NHWC, labels_N = drawn.draw("train", 200, 24)
    strong = pixels_NHWC.astype(float) - drawn.GREY > 50
    for picture, label in zip(strong, labels_N, strict=True):
        (y0, x0), (y1, x1) = (np.argwhere(picture[..., channel]).mean(0) for channel in (0, 2))
        gap = {"right": x1 - x0, "below": y1 - y0, "left": x0 - x1, "above": y0 - y1}
        assert max(gap, key=gap.get) == drawn.CLASSES[label]


def test_drawn_colours_tell_nothing_and_classes_are_as_likely():
    pixels_NHWC, labels_N = drawn.draw("train", 2000, 24)
    assert np.bincount(labels_N).min() > 430
    colours = pixels_NHWC.mean((1, 2))
    means = np.array([colours[labels_N == k].mean(0) for k in range(4)])
    spread = colours.std(0) / np.sqrt(np.bincount(labels_N).min())
    assert (np.ptp(means, axis=0) < 5 * spread).all()


def test_drawn_splits_differ_and_longer_ones_begin_alike():
    short, long, test = (drawn.draw(*each, 16)[0] for each in (("train", 5), ("train", 9), ("test", 5)))
    assert (long[:5] == short).all()
    assert not (short == test).all((1, 2, 3)).any()


# Keys and names


def test_task_is_named_after_its_pictures():
    assert name_task(TaskConfig(dataset="drawn", image_size=24, patch=4)) == "drawn-24"
    assert name_task(TaskConfig()) == "imagenet"
    assert name_task(TaskConfig(image_size=160, patch=16)) == "imagenet-160px"
    assert name_task(TaskConfig(dataset="cifar10", image_size=32, patch=2, fingerprint="jpeg:ab")) == "cifar10-jpeg"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"patch": 15}, "image_size=224 must be a multiple of patch=15"),
        ({"dataset": "cifar10"}, "pictures of cifar10 have 32 pixels"),
        ({"augment": "shift_flip"}, "augment=shift_flip is for pictures of one size"),
        ({"repeats": 3}, "repeats=3 repeats pictures unaltered"),
        ({"mix_group": 8}, "mix_group=8 has no effect"),
        ({"mixup": 0.8, "mix_group": 7}, "mix_group=7 must be even"),
        ({"mixup": 0.8, "mix_switch": 0.2}, "mix_switch=0.2 has no effect"),
        ({"erasing": 0.1}, "erasing=0.1 has no effect with augment=none"),
        ({"augment": "timm", "randaugment": "foo"}, "randaugment=foo: expected a policy of timm's"),
        ({"augment": "timm", "randaugment": "rand-m9-zz1"}, "randaugment=rand-m9-zz1: expected a policy of timm's"),
        ({"augment": "timm", "randaugment": "rand-m9-mmax20"}, "without mmax"),
        ({"smoothing": 1.0}, "smoothing=1.0 must be at least 0 and less than 1"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        TaskConfig(**keys)


def test_paper_preset_builds_the_calculated_models():
    for task, millions in {"tiny": 4.77, "small": 18.38}.items():
        cell = make_plan(["suite=imagenet", "preset=paper", f"task={task}"], "cpu", files=False).cells[0]
        with torch.device("meta"):
            model = built(cell)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
        assert round(cell.train.warmup * cell.train.epochs) == {"tiny": 20, "small": 10}[task]


def test_deit_preset_builds_timms_models():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    for task in ("tiny", "small"):
        cell = make_plan(["suite=imagenet", "preset=deit", f"task={task}"], "cpu", files=False).cells[0]
        with torch.device("meta"):
            mine, theirs = built(cell), timm.create_model(f"deit_{task}_patch16_224")
        assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in theirs.parameters())
        assert round(cell.train.warmup * cell.train.epochs) == 5


def built(cell):
    """The model of a cell of 1000 classes whose pictures are not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("suites.imagenet.runner.pictures_of", lambda config: dataclasses.make_dataclass("Pictures", ["classes"])(range(1000)))
        return Runner.build(cell)


# Batches


def test_an_epoch_holds_every_picture_once():
    runner = runner_of()
    rows = [runner.order.rows(step) for step in range(runner.steps_per_epoch)]
    assert sorted(np.concatenate(rows)) == [*range(16)]
    assert not (runner.order.rows(runner.steps_per_epoch) == rows[0]).all()


def test_repeats_of_a_picture_share_a_batch_and_are_altered_apart():
    runner = runner_of("repeats=2", "mixup=0", "cutmix=0", "batch_size=8")
    assert runner.steps_per_epoch == 2
    for step in range(2):
        _, counts = np.unique(runner.order.rows(step), return_counts=True)
        assert counts.tolist() == [2, 2, 2, 2]
    images_BCHW, rows = runner.batch(0)[0], runner.order.rows(0)
    first, second = np.flatnonzero(rows == rows[0])
    assert not torch.equal(images_BCHW[first], images_BCHW[second])


@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_parts_of_all_processes_are_the_batch(size, world, monkeypatch):
    """Whatever is drawn, each process makes its own pictures alone, and gets those that one process would make."""
    from hgrn2_bench.accumulation import pieces

    words = ("mix_group=4", f"batch_size={size}", "train_examples=16")
    whole = runner_of(*words).batch(3)
    taken = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "current", lambda rank=rank: World(rank, world))
        runner = runner_of(*words)
        batch = runner.batch(3)
        assert len(batch[0]) <= -(-size // world) + 2
        for piece in pieces(runner.size(batch), 2, World(rank, world)):
            part = runner.part(batch, piece.rows)
            assert len(part[0]) == len(part[1]) > 0
            taken += [part] * piece.counts
    for mine, given in zip(whole, map(torch.cat, zip(*taken, strict=True)), strict=True):
        torch.testing.assert_close(given, mine)


def test_loss_is_that_of_mixed_soft_labels():
    runner = runner_of("smoothing=0.1")
    model = engine.build(cell_of()).eval()
    images, labels, others, share = runner.batch(0)
    soft = share[:, None] * F.one_hot(labels, 4) + (1 - share[:, None]) * F.one_hot(others, 4)
    expected = F.cross_entropy(model.logits(images), soft.float() * 0.9 + 0.1 / 4)
    torch.testing.assert_close(runner.loss(model, (images, labels, others, share)), expected)


# Mixing and erasing


def test_pictures_are_mixed_with_their_neighbours():
    images = torch.arange(5.0)[:, None, None, None].expand(5, 1, 4, 4)
    by_weight = mixing.mixed(images, [Mix(0.75, None)], 0, 0)
    assert by_weight[:, 0, 0, 0].tolist() == [0.25, 0.75, 2.25, 2.75, 4]  # the last one has no neighbour
    by_box = mixing.mixed(images, [Mix(0.75, Box(0, 2, 2, 4))], 0, 0)
    assert by_box[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    grouped = mixing.mixed(images[2:], [Mix(0.0, None), Mix(1.0, None), Mix(0.5, None)], 2, 2)
    assert grouped[:, 0, 0, 0].tolist() == [2, 3, 4]


def test_share_of_a_box_is_what_is_left_of_the_picture():
    config = TaskConfig(dataset="drawn", image_size=24, patch=4, cutmix=1.0)
    for seed in range(50):
        (mix,) = mixing.draw_mixes(config, 8, np.random.default_rng(seed))
        assert mix.share == 1 - mix.box.area / 24**2
        assert 0 <= mix.box.top <= mix.box.bottom <= 24


def test_kinds_of_mixing_are_drawn_as_often_as_said():
    config = TaskConfig(mixup=0.8, cutmix=1.0, mix_group=2, mix_switch=0.25)
    mixes = mixing.draw_mixes(config, 4000, np.random.default_rng(0))
    assert len(mixes) == 2000
    assert np.mean([mix.box is not None for mix in mixes]) == pytest.approx(0.25, abs=0.03)


def test_erasing_takes_a_quarter_of_the_pictures_and_leaves_the_others():
    config = TaskConfig(augment="timm", image_size=56)
    images = torch.full((400, 3, 56, 56), 9.0)
    mixing.erase(images, config, [(0, 4, 0, i) for i in range(400)])
    gone = (images != 9).all(1).flatten(1).float().mean(1)
    assert (gone > 0).float().mean().item() == pytest.approx(0.25, abs=0.06)
    assert gone[gone > 0].min() > 0.015
    assert gone.max() < 0.36
    noise = images[images != 9]
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert len(noise.unique()) > 0.9 * len(noise)  # no two pictures are given the same
    again = torch.full((1, 3, 56, 56), 9.0)
    place = int(gone.argmax())
    mixing.erase(again, config, [(0, 4, 0, place)])
    assert torch.equal(again[0], images[place])


# Encoded pictures


@pytest.mark.parametrize("augment", ["none", "crop_flip", "timm"])
def test_encoded_pictures_follow_from_seed_and_step_alone(folder_of_pictures, augment):
    words = (*folder_of_pictures, f"augment={augment}")
    runner = runner_of(*words)
    in_order = [runner.batch(step) for step in range(4)]
    other = runner_of(*words)
    for step in (2, 3, 0):  # an interruption
        for mine, theirs in zip(in_order[step], other.batch(step), strict=True):
            assert torch.equal(mine, theirs)


def test_no_strength_of_randaugment_is_refused_by_pillow(folder_of_pictures):
    runner = runner_of(*folder_of_pictures, "augment=timm", "randaugment=rand-m10-n9-inc1")  # as strong as it gets
    transform = feed.training_transform(runner.config)
    image = runner.pictures.splits["train"].image(0)
    for seed in range(30):
        with feed.seeded(seed, seed, seed):
            assert transform(image).shape == (3, 16, 16)


def test_workers_change_no_picture(folder_of_pictures, monkeypatch):
    words = (*folder_of_pictures, "augment=timm")
    alone = [runner_of(*words).batch(step) for step in range(2)]
    monkeypatch.setattr(feed, "workers_here", lambda: 2)
    runner = runner_of(*words)
    for step, expected in enumerate(alone):
        for mine, theirs in zip(runner.batch(step), expected, strict=True):
            assert torch.equal(mine, theirs)
    scored = [rows.tolist() for rows, _ in runner._scored("test")]
    assert sorted(itertools.chain.from_iterable(scored)) == [*range(7)]


READS_AND_WAITS = """
import os, sys, time
from hgrn2_bench.plan import make_plan
from suites.imagenet import feed
from suites.imagenet.runner import Runner

if __name__ == "__main__":
    feed.workers_here = lambda: 1
    runner = Runner(make_plan(["suite=imagenet", "preset=test", "model=hgrn2", *sys.argv[1:]], "cpu").cells[0])
    runner.batch(0)
    print("read", flush=True)
    time.sleep(60)
"""


def test_workers_end_when_the_run_is_killed(folder_of_pictures, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(READS_AND_WAITS)
    words = [sys.executable, str(script), *folder_of_pictures, "augment=crop_flip"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "read\n"
        run.kill()
        run.communicate(timeout=30)  # returns when the last process that could write to it has ended


def test_a_picture_is_altered_anew_in_every_epoch(folder_of_pictures):
    runner = runner_of(*folder_of_pictures, "augment=timm", "mixup=0", "cutmix=0")
    seen = {}
    for step in range(2 * runner.steps_per_epoch):
        for number, image in zip(runner.order.rows(step), runner.batch(step)[0], strict=True):
            seen.setdefault(int(number), []).append(image)
    twice = [images for images in seen.values() if len(images) == 2]
    assert twice
    assert not any(torch.equal(*images) for images in twice)


def test_augmentation_leaves_every_global_generator_alone(folder_of_pictures):
    import random

    runner = runner_of(*folder_of_pictures, "augment=timm")
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    runner.batch(0)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_evaluation_crops_the_middle_of_a_resized_picture(folder_of_pictures):
    from PIL import Image

    runner = runner_of(*folder_of_pictures, "augment=none")
    rows, images = next(runner._scored("validation"))
    split = runner.pictures.splits["validation"]
    image = split.image(int(rows[0]))
    scale = int(16 / 0.875) / min(image.size)
    resized = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - 16) // 2 for side in resized.size)
    pixels = torch.from_numpy(np.array(resized.crop((left, top, left + 16, top + 16)))).permute(2, 0, 1)
    raw = images[0] * torch.tensor([0.229, 0.224, 0.225])[:, None, None] + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    assert (raw * 255 - pixels).abs().mean() < 4  # the same picture up to half a pixel of the crop's place


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_every_picture_is_scored_once(folder_of_pictures, batch, monkeypatch):
    cell = cell_of(*folder_of_pictures, "augment=none", f"eval_batch_size={batch}")
    for world in (1, 2, 3):
        scored = []
        for rank in range(world):
            monkeypatch.setattr(distributed, "current", lambda rank=rank, world=world: World(rank, world))
            scored += itertools.chain.from_iterable(rows.tolist() for rows, _ in Runner(cell)._scored("test"))
        assert sorted(scored) == [*range(7)]


def test_real_labels_count_pictures_that_have_some():
    runner = runner_of()
    model = engine.build(cell_of()).eval()
    best = torch.cat([model.logits(images).argmax(-1) for _, images in runner._scored("test")]).tolist()
    real = [() if i == 0 else (best[i],) if i < 4 else ((best[i] + 1) % 4, best[i] - 4) for i in range(8)]
    runner.pictures = dataclasses.replace(runner.pictures, real_labels=tuple(real))
    found = {metric.name: metric for metric in runner.metrics(model, "test")}
    assert (found["real"].value, found["real"].num_items) == (3 / 7, 7)
    assert "real" not in {metric.name for metric in runner.metrics(model, "validation")}


# Whole runs

WORDS = (
    "epochs=4",
    "repeats=2",
    "ema=0.9",
    "drop_path=0.3",
    "num_layers=2",
    "dropout=0.1",
    "clip=1",
    "schedule=cosine_timm",
    "warmup=0.25",
)


def run(cell, folder, stop=lambda: False):
    with folder.lock():
        return engine.run_cell(cell, folder, lambda *_: None, stop)


@pytest.mark.parametrize("cut", [1, 6, 11])
def test_resume_in_an_epoch_gives_the_uninterrupted_run(tmp_path, cut):
    cell = cell_of(*WORDS)
    whole = run(cell, CellFolder(tmp_path / "whole", cell))
    halved = CellFolder(tmp_path / "half", cell)
    asked = iter(range(1, 1000))
    with pytest.raises(InterruptedTrainingError):
        run(cell, halved, lambda: next(asked) == cut)
    resumed = run(cell, halved)
    assert {row.split for row in whole} == {"validation", "test", "validation_ema", "test_ema"}
    for one, other in zip(whole, resumed, strict=True):
        assert (one.split, one.metric, one.value, one.weights_hash) == (other.split, other.metric, other.value, other.weights_hash)


def test_details_say_what_a_picture_costs(tmp_path):
    cell = cell_of()
    row = run(cell, CellFolder(tmp_path, cell))[0]
    assert row.details["tokens_per_image"] == 16
    assert row.details["forward_flops_per_image"] == row.train_flops_per_token * 16 / 3
    assert row.details["inference_images_per_s"] > 0
    assert row.details["inference_mode"] == "eager"
    assert row.details["loader_images_per_s"] is None


def test_the_loader_alone_is_timed_without_its_start(monkeypatch):
    class Slow(torch.utils.data.Dataset):
        def __getitem__(self, wanted):
            time.sleep(0.01)
            return torch.zeros(1)

    monkeypatch.setattr(feed, "workers_here", lambda: 0)
    source = feed.Ahead(Slow(), lambda step: [step] * (100 if step == 0 else 5), "cpu")
    began = time.perf_counter()
    rate = feed.images_per_s(source)
    assert 20 < rate < 100  # ten milliseconds a picture; those of the first batch would be most of all
    assert time.perf_counter() - began > 1 + feed.TIMED_S
    assert source.next_step == -1


def test_the_loader_is_timed_over_whole_rounds_of_its_workers(monkeypatch):
    def in_bursts(self, step):
        time.sleep(0.2 if step % 5 == 0 else 0)
        return torch.zeros(3)

    monkeypatch.setattr(feed, "workers_here", lambda: 5)
    monkeypatch.setattr(feed, "TIMED_S", 0.3)
    monkeypatch.setattr(feed.Ahead, "batch", in_bursts)
    rate = feed.images_per_s(feed.Ahead(None, None, "cpu"))
    assert 45 < rate <= 75  # five batches of three pictures in a burst every 0.2 s
