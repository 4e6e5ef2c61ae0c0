"""What is wrong with a Pathfinder folder: files against metadata, metadata against the folder's name, pictures against metadata."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hgrn2_bench.doctor import NOTE, OK, PROBLEM, Finding, counted
from hgrn2_bench.errors import ConfigError
from suites.lra.pathfinder_files import COUNT, DIFFICULTY, KNOWN_EMPTY
from suites.lra.pathfinder_metadata import LEAST_AGREEMENT, Line, foreign_contours, margin_agreement, metadata
from suites.lra.places import RESOLUTIONS, Place

DASHES = {32: (2.0, 0.5), 64: (5.0, 1.0), 128: (5.0, 1.5), 256: (5.0, 2.0)}
"""Length and thickness of a dash, by resolution."""
PNG_HEAD, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
SHOWN = 5
"""Files that a finding names."""
LEAST_SHARE, MOST_SHARE = 0.45, 0.55
"""Of label 1."""
UNPACK = "unpack the archive again"


class Files(NamedTuple):
    """Pictures that cannot be used, by what is wrong with them."""

    empty: list[str]
    missing: list[str]
    broken: list[str]
    """Cut short, or no PNG."""
    sizes: Counter[tuple[int, int]]
    """Width and height of the others."""

    def are_whole(self, size: int) -> bool:
        """Whether all but empty ones can be read."""
        return not self.missing and not self.broken and set(self.sizes) <= {(size, size)}


def check_pathfinder(place: Place) -> Iterator[Finding]:
    """Findings of every difficulty of one resolution."""
    if DIFFICULTY not in place.files:
        yield Finding(PROBLEM, f"{place.what}: {place.folder} has no {DIFFICULTY}, the difficulty that is reported", UNPACK)
    for difficulty, (folder,) in place.files.items():
        what = f"{place.what} {difficulty}"
        if not (folder / "metadata").is_dir() or not (folder / "imgs").is_dir():
            inside = ", ".join(sorted(path.name for path in folder.iterdir())[:SHOWN]) or "nothing"
            yield Finding(PROBLEM, f"{what}: wrong nesting: {folder} holds {inside}", "move imgs and metadata directly into it")
            continue
        try:
            lines = list(metadata(folder))
            yield from _metadata_findings(what, lines, RESOLUTIONS[place.what], difficulty)
            files = _look_at(folder, lines)
            yield from _file_findings(what, folder, lines, files, RESOLUTIONS[place.what])
            if files.are_whole(RESOLUTIONS[place.what]):
                yield from _agreement_findings(what, folder, lines, RESOLUTIONS[place.what])
        except ConfigError as error:
            yield Finding(PROBLEM, f"{what}: {error}")


def _metadata_findings(what: str, lines: list[Line], size: int, difficulty: str) -> Iterator[Finding]:
    """Number, labels and drawing parameters."""
    share = sum(line.label for line in lines) / len(lines)
    text = f"{what}: {len(lines):,} lines of metadata, {share:.1%} with label 1"
    if len(lines) != COUNT:
        yield Finding(PROBLEM, f"{text}, expected {COUNT:,}", UNPACK)
    elif not LEAST_SHARE <= share <= MOST_SHARE:
        yield Finding(PROBLEM, f"{text}, expected half", UNPACK)
    else:
        yield Finding(OK, text)
    swapped = "find the right copy, and do not train on this one"
    if fault := foreign_contours(lines, difficulty):
        yield Finding(PROBLEM, f"{what}: {fault}", swapped)
    dashes = {line.dash for line in lines}
    if dashes != {DASHES[size]}:
        found = ", ".join(f"{length:g} by {thickness:g}" for length, thickness in sorted(dashes))
        expected = "{:g} by {:g}".format(*DASHES[size])
        yield Finding(PROBLEM, f"{what}: dashes of {found} pixels, expected {expected}: another resolution under this name", swapped)
    strangers = [line for line in lines if line.fields[0] != f"imgs/{line.batch}"]
    if strangers:
        text = f"{what}: {len(strangers):,} lines name a folder of another batch, the first {strangers[0].where}"
        yield Finding(PROBLEM, text, "metadata files were renamed or exchanged: " + UNPACK)
    twice = len(lines) - len({line.name for line in lines})
    if twice:
        yield Finding(PROBLEM, f"{what}: {twice:,} pictures have more than one line", UNPACK)


def _file_findings(what: str, folder: Path, lines: list[Line], files: Files, size: int) -> Iterator[Finding]:
    """Pictures that are missing, empty, cut short or of another size, and those that no line names."""
    known = [name for name in files.empty if (folder.parent.name, folder.name, name) in KNOWN_EMPTY]
    if known:
        yield Finding(NOTE, f"{what}: zero-byte PNG {known[0]}, as in the published archive", "readers leave it out and count it")
    empty = [name for name in files.empty if name not in known]
    for faults, fault, remedy in (
        (empty, "zero-byte PNG", f"{UNPACK}; until then readers leave it out and count it"),
        (files.missing, "missing file", UNPACK),
        (files.broken, "file cut short or no PNG", UNPACK),
    ):
        if faults:
            named = f"{', '.join(faults[:SHOWN])}{' ...' if len(faults) > SHOWN else ''}"
            yield Finding(PROBLEM, f"{what}: {len(faults):,} x {fault}: {named}", remedy)
    wrong = {each: number for each, number in files.sizes.items() if each != (size, size)}
    for (width, height), number in wrong.items():
        text = f"{what}: {counted(number, 'picture')} of {width}x{height} pixels, expected {size}x{size}"
        yield Finding(PROBLEM, text, f"another resolution under the name {folder.parent.name}: find the right copy")
    names = {line.name for line in lines}
    extra = sum(f"imgs/{path.parent.name}/{path.name}" not in names for path in (folder / "imgs").glob("*/*.png"))
    if extra:
        yield Finding(NOTE, f"{what}: {counted(extra, 'picture')} without metadata", "readers leave out what no line names")
    if files.are_whole(size) and not files.empty:
        yield Finding(OK, f"{what}: every picture is there, whole and {size}x{size}")


def _look_at(folder: Path, lines: list[Line]) -> Files:
    """Head and end of every picture, without decoding it."""
    files = Files([], [], [], Counter())
    for line in lines:
        try:
            with (folder / line.name).open("rb") as file:
                head = file.read(24)
                end = file.read()[-len(PNG_END) :]
        except OSError:
            files.missing.append(line.name)
            continue
        if not head:
            files.empty.append(line.name)
        elif not head.startswith(PNG_HEAD) or end != PNG_END:
            files.broken.append(line.name)
        else:
            files.sizes[int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")] += 1
    return files


def _agreement_findings(what: str, folder: Path, lines: list[Line], size: int) -> Iterator[Finding]:
    """Whether pictures have the margins that their lines say: where they have not, labels do not fit either."""
    agreement = margin_agreement(folder, lines, size)
    if agreement is None:
        yield Finding(OK, f"{what}: whether pictures fit their metadata cannot be seen, without enough pictures of two margins")
        return
    text = f"{what}: margins seen agree with the metadata in {agreement:.0%} of pairs (chance 50%)"
    if agreement < LEAST_AGREEMENT:
        yield Finding(PROBLEM, text, "labels of other pictures, with which a model stays at chance: find the right copy")
    else:
        yield Finding(OK, text)
