"""The command line. Exit codes: 0 all well, 1 a cell or a check failed, 2 bad input, 130 stopped by the user.

Imports no torch, fla or pandas: cells run in worker processes, and listing reads names and source text only.
"""

import contextlib
import dataclasses
import inspect
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hgrn2_bench import distributed, listing, registry
from hgrn2_bench.errors import ConfigError, unknown

if TYPE_CHECKING:
    from hgrn2_bench.figures import Plot
    from hgrn2_bench.plan import Plan
    from hgrn2_bench.results import Row

DEFAULT_RESULTS = Path("results/local")
DEVICES = ("auto", "cpu", "cuda")
CHECK_BESIDE = ("hgrn2", "attention")
CHECK_TASK = ("suite=mqar", "task=len32_kv4", "vocab_size=16", "seq_len=16", "num_pairs=3", "train_examples=24_000", "seed=0")
"""A task that every registered mixer learns in seconds, unless it sees but a few tokens back."""

app = typer.Typer(
    help="Compare HGRN2 with its baselines: one command, one definition of each mixer, one table.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Results = Annotated[Path, typer.Option(help="Results folder.")]


def main() -> None:
    """Run the program; bad input prints one line and exits with 2."""
    try:
        if sys.argv[1:2] != ["doctor"]:  # which tells of it among other things
            registry.check_packages()
        if distributed.world().size > 1 and sys.argv[1:2] != ["run"]:
            raise ConfigError(f"torchrun is for `run`: start `{' '.join(sys.argv[1:2])}` without it")
        app()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except distributed.GroupError as error:
        distributed.leave(error)


@dataclass(frozen=True)
class RunOptions:
    """How a plan is run; what is run stands in the words."""

    results: Results = DEFAULT_RESULTS
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto"
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False
    force: Annotated[bool, typer.Option("--force", help="Run finished cells again.")] = False
    workers: Annotated[int, typer.Option(help="Worker processes; 0 for one per core (CPU) or per GPU.", min=0)] = 0
    timeout: Annotated[float, typer.Option(help="Seconds that one cell may take; 0 for no limit.", min=0)] = 0
    track: Annotated[str, typer.Option(help="Mirror training curves: tensorboard or wandb.")] = ""


def _spread(command: Callable[[list[str], RunOptions], None]) -> Callable[..., None]:
    """A command of words and options as Typer reads it: with one parameter for each field of the options."""

    def spread(words: list[str], **fields: Any) -> None:
        command(words, RunOptions(**fields))

    words = inspect.signature(command).parameters["words"]
    fields = [words.replace(name=f.name, default=f.default, annotation=f.type) for f in dataclasses.fields(RunOptions)]
    spread.__doc__ = command.__doc__
    spread.__dict__["__signature__"] = inspect.Signature([words, *fields])
    spread.__annotations__ = {each.name: each.annotation for each in (words, *fields)}
    return spread


WORDS_HELP = "key=value words; a comma is a sweep: suite=mqar model=hgrn2,gla seed=0,1; data_dir=DIR is the folder of your files"


@app.command(name="run")
@_spread
def run(
    words: Annotated[
        list[str],
        typer.Argument(help=WORDS_HELP),
    ],
    options: RunOptions,
) -> None:
    """Run a suite: plan, train, evaluate, print the table. Finished cells are not run again.

    Started by torchrun, all its processes work on one cell after another, each on a share of every batch.
    """
    from hgrn2_bench.files import take_data_folder
    from hgrn2_bench.matching import announce, resolve
    from hgrn2_bench.running import Run
    from hgrn2_bench.together import choose, follow
    from hgrn2_bench.trackers import check_tracker

    if distributed.world().rank:
        take_data_folder(words)  # rank 0 sends cells, which name no folder
        follow(_device(options.device))
        return
    check_tracker(options.track)
    plan = _planned(words, options.device)
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    with _stoppable(), choose(plan.cells[0].device, plan.protocol.speed, options.workers) as executor:
        plan, matches = resolve(plan, executor.solve)
        announce(matches, sys.stdout if options.dry_run else sys.stderr)
        planned = Run(plan, executor, options.results, options.force, options.timeout or None, options.track)
        if options.dry_run:
            planned.print_plan()
            return
        planned.execute(_hint(words, plan))
    whole = _print_tables(planned.rows, plan.protocol.name, "md")
    print(f"rows: {options.results}/cells/{plan.protocol.name}/<cell>/rows.jsonl", file=sys.stderr)
    sys.exit(0 if planned.is_well and whole else 1)


@app.command(name="warm")
def warm_command(
    words: Annotated[list[str], typer.Argument(help="key=value words as in run")],
    workers: Annotated[int, typer.Option(help="Worker processes; 0 for one per core, as the GPU's memory allows.", min=0)] = 0,
) -> None:
    """Compile and tune the GPU kernels of a plan ahead of its run, in parallel over the host's cores."""
    from hgrn2_bench.files import take_data_folder
    from hgrn2_bench.warm import warm

    with _stoppable():
        well = warm(take_data_folder(words), workers)
    sys.exit(0 if well else 1)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Work that Ctrl-C, or a polite kill (Slurm, timeout), ends with one line and exit code 130."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _planned(words: Sequence[str], device: str) -> "Plan":
    """The plan of these words, after the folder of the user's data among them is known to the plan and to its workers."""
    from hgrn2_bench.files import take_data_folder
    from hgrn2_bench.plan import make_plan

    settings = take_data_folder(words)
    plan = make_plan(settings, _device(device))
    if len(settings) < len(words) and plan.protocol.fingerprint is None:
        raise ConfigError(f"data_dir has no effect on suite {plan.protocol.name}, which reads no files")
    return plan


def _device(name: str) -> str:
    from hgrn2_bench.provenance import cuda_devices

    if name not in DEVICES:
        raise unknown("device", name, DEVICES)
    if name == "cuda" and not cuda_devices():
        raise ConfigError("--device cuda: the driver shows no GPU; use --device cpu")
    return ("cuda" if cuda_devices() else "cpu") if name == "auto" else name


def _hint(words: Sequence[str], plan: "Plan") -> str:
    """On a GPU the preset for a laptop's CPU is not what its owner came for: name the one that is, with what it takes."""
    short = plan.protocol.presets.get("short")
    if plan.cells[0].device != "cuda" or short is None or plan.preset != "smoke" or any(word.startswith("preset=") for word in words):
        return ""
    return f"note: preset {plan.preset} is made for a CPU; on this GPU try preset=short: {short.summary}"


@app.command(name="list")
def list_command(name: Annotated[str, typer.Argument(help="A suite or a model, to see its keys, presets or settings.")] = "") -> None:
    """List suites, presets and models; with a name, its details."""
    if not name:
        listing.print_all()
    elif name in registry.suites():
        listing.print_suite(name)
    elif ".py" in name or name in registry.models():
        listing.print_model(name)
    else:
        raise unknown("suite or model", name, [*registry.suites(), *registry.models()])


@app.command(name="check")
def check_command(
    model: Annotated[str, typer.Argument(help="A model, or ./my_mixer.py:MyMixer.")],
    words: Annotated[list[str] | None, typer.Argument(help="key=value words as in run: d_model=128 MyMixer.width=8")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "cpu",
) -> None:
    """Check a mixer in about a minute: contract, costs, speed, and a small task beside HGRN2 and attention."""
    from hgrn2_bench.plan import plan_beside

    cells = plan_beside(model, CHECK_BESIDE, CHECK_TASK, words or (), _device(device))
    from hgrn2_bench.check import print_checks

    with _stoppable():
        well = print_checks(cells)
    sys.exit(0 if well else 1)


@app.command()
def table(
    suite: Annotated[str, typer.Argument(help="Suite whose rows to show.")],
    results: Results = DEFAULT_RESULTS,
    preset: Annotated[str, typer.Option(help="Only this preset.")] = "",
    metric: Annotated[str, typer.Option(help="Another metric than the primary one.")] = "",
    form: Annotated[str, typer.Option("--format", help="md, csv, latex, html, or jsonl for the rows themselves.")] = "md",
    published: Annotated[bool, typer.Option("--published", help="Add published values with a verdict.")] = False,
) -> None:
    """Print the tables of every row found in a results folder."""
    from hgrn2_bench.render import FORMATS, render
    from hgrn2_bench.speeds import DERIVED

    protocol = registry.protocol(suite)
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if form == "jsonl" and published:
        raise ConfigError("--format jsonl prints our own rows; published values come as md, csv, latex or html")
    if preset and preset not in protocol.presets:
        raise unknown(f"preset of {suite}", preset, protocol.presets)
    rows = [row for row in _rows(results, suite) if not preset or row.preset == preset]
    if not rows and not published:
        raise _no_rows(results, suite, preset)
    if metric and metric not in (known := {row.metric for row in rows} | (set(DERIVED) if protocol.speed else set())):
        raise unknown("metric", metric, known)
    whole = _print_tables(rows, suite, form, metric or None)
    if published:
        from hgrn2_bench.published_tables import published_table

        values = published_table(rows, protocol)
        print(render(values, form) if values else f"nothing published for {suite}")
    sys.exit(0 if whole else 1)


def _rows(results: Path, suite: str) -> "list[Row]":
    """All rows of a suite, with a note for each line that is none."""
    from hgrn2_bench.results import find_rows

    rows, problems = find_rows(results, suite)
    for problem in problems:
        print(f"note: {problem}", file=sys.stderr)
    return rows


def _no_rows(results: Path, suite: str, preset: str) -> ConfigError:
    words = f"suite={suite}" + (f" preset={preset}" if preset else "")
    return ConfigError(f"no rows of {suite}{f' preset {preset}' if preset else ''} in {results}: run {words} first")


def _print_tables(rows: "Sequence[Row]", suite: str, form: str, metric: str | None = None) -> bool:
    """Print the rows or their tables; whether none was refused."""
    from hgrn2_bench.render import render
    from hgrn2_bench.tables import make_tables

    if form == "jsonl":
        for row in rows:
            print(row.to_json())
        return True
    tables = make_tables(rows, registry.protocol(suite), metric)
    for each in tables:
        print(render(each, form))
    return all(each.columns for each in tables)


@app.command()
def plot(
    suite: Annotated[str, typer.Argument(help="Suite whose rows to draw.")],
    results: Results = DEFAULT_RESULTS,
    preset: Annotated[str, typer.Option(help="Only this preset.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder of the figures; RESULTS/figures unless given.")] = None,
) -> None:
    """Draw the suite's figures from every row found in a results folder: PNG, SVG, and their numbers as csv."""
    from importlib.util import find_spec

    from hgrn2_bench.figures import make_plots

    protocol = registry.protocol(suite)
    if preset and preset not in protocol.presets:
        raise unknown(f"preset of {suite}", preset, protocol.presets)
    if find_spec("matplotlib") is None:
        raise ConfigError('plot needs matplotlib: pip install "matplotlib>=3.8"')
    found = _rows(results, suite)
    rows = [row for row in found if not preset or row.preset == preset]
    if not rows:
        raise _no_rows(results, suite, preset)
    plots, missing = make_plots(rows, protocol)
    _draw(plots, sorted({row.model for row in found}), out or results / "figures")
    for reason in missing:
        print(f"note: {reason}", file=sys.stderr)


def _draw(plots: "Sequence[Plot]", models: Sequence[str], folder: Path) -> None:
    """Write the figures and say where they are."""
    from hgrn2_bench.drawing import draw
    from hgrn2_bench.figures import points_csv

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for plot in plots:
            paths = draw(plot, models, folder)
            (folder / f"{plot.stem}.csv").write_text(points_csv(plot))
            print(f"{paths[0]} (and .svg, .csv)")
    except OSError as error:
        raise ConfigError(f"cannot write figures to {folder}: {error.strerror or error}") from None


@app.command()
def compare(
    ours: Annotated[str, typer.Argument(help="A model that has rows.")],
    theirs: Annotated[str, typer.Argument(help="The model to compare it with.")],
    results: Results = DEFAULT_RESULTS,
    preset: Annotated[str, typer.Option(help="Only this preset.")] = "",
) -> None:
    """Compare two models over the rows they share: a table and a sentence for each suite."""
    from hgrn2_bench.compare import Names, compare_models
    from hgrn2_bench.render import render
    from hgrn2_bench.results import find_rows

    rows, problems = zip(*(find_rows(results, suite) for suite in registry.suites()), strict=True)
    for problem in dict.fromkeys(text for texts in problems for text in texts):
        print(f"note: {problem}", file=sys.stderr)
    kept = [row for found in rows for row in found if not preset or row.preset == preset]
    names = Names(*(name.rpartition(":")[2] for name in (ours, theirs)))
    for report in compare_models(kept, {row.suite: registry.protocol(row.suite) for row in kept}, names, registry.models()):
        print(f"{render(report.table, 'md')}\n{report.sentence}\n")


@app.command()
def status(results: Results = DEFAULT_RESULTS) -> None:
    """Say where every cell of a results folder stands: finished, running, interrupted, failed."""
    from hgrn2_bench.status import status_lines

    for line in status_lines(results):
        print(line)


@app.command()
def doctor(results: Results = DEFAULT_RESULTS) -> None:
    """Say what here would make runs fail or numbers wrong, and the remedy: versions, GPU, every kernel against its reference, folders."""
    from hgrn2_bench.doctor import examine

    with _stoppable():
        well = examine(results)
    sys.exit(0 if well else 1)


@app.command(name="data")
def data_command(
    suite: Annotated[str, typer.Argument(help="A suite that reads data, such as lra.")],
    action: Annotated[str, typer.Argument(help="check: what a folder holds, what is wrong with it, and how to repair it.")],
    folder: Annotated[Path | None, typer.Argument(help="The folder of the data; HGRN2_BENCH_DATA, else data, where none is given.")] = None,
) -> None:
    """Look at a suite's data in a folder: what is there, whole or not, and how to repair it. Changes nothing."""
    from hgrn2_bench.datacheck import check_data

    with _stoppable():
        well = check_data(suite, action, folder)
    sys.exit(0 if well else 1)
