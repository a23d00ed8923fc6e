"""``unbackdoor bench``: run a suite of attacks and defenses, watch it, and export its rows."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbackdoor.cli import options
from unbackdoor.cli.output import complain, emit, note, say, table
from unbackdoor.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from unbackdoor.bench.driver import Progress
    from unbackdoor.bench.engines import Engine
    from unbackdoor.bench.rows import ProbeRow, Row, ScanRow
    from unbackdoor.bench.suites import Suite

bench = typer.Typer(no_args_is_help=True, help="Run suites of attacks and defenses, and report the rows.")


class EngineName(StrEnum):
    """Where cells run."""

    local = "local"
    dask = "dask"


class Part(StrEnum):
    """Parts of a suite that is split."""

    tuning = "tuning"
    test = "test"
    all = "all"


class Format(StrEnum):
    """Forms of exported rows."""

    jsonl = "jsonl"
    parquet = "parquet"
    csv = "csv"
    markdown = "md"
    latex = "tex"


SuiteName = Annotated[str, typer.Argument(help="Label of a suite such as smoke-v1, or a .toml file.")]
Reference = Annotated[
    Path | None,
    typer.Option(help="Published numbers to lay beside ours, as a .csv file.", show_default=False),
]
StoreFolder = Annotated[Path, typer.Option("--store", help="Folder of the results.", rich_help_panel="Data")]
SuiteFolder = Annotated[
    Path | None,
    typer.Option(
        "--suites",
        help="Folder of suites of your own; default: those that come with unbackdoor.",
        show_default=False,
        rich_help_panel="Data",
    ),
]
STORE = Path("runs/bench")
_SCANS = ".scans"  # before the ending of the file that holds a suite's scans
_PROBES = ".probes"  # likewise


@bench.command("run")
def run(
    suite: SuiteName,
    only: Annotated[
        str | None,
        typer.Option(
            help="Run only what matches, as in */badnets/rnp or badnets/awm/images=500: data set/"
            "architecture-width/attack/defense/images=N/sample=N/rate=R/seed=N/recipe; victims themselves "
            "have victim in the place of the defense.",
            show_default=False,
        ),
    ] = None,
    part: Annotated[
        Part,
        typer.Option(
            help="Of a suite that is split: run its tuning part, on which methods may be developed, its "
            "test part, on which they are judged, or all."
        ),
    ] = Part.tuning,
    engine: Annotated[EngineName, typer.Option(help="Where cells run.")] = EngineName.local,
    workers: Annotated[
        int, typer.Option(min=0, help="Cells at a time; 0 for one for each processor.", show_default=False)
    ] = 0,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Address of a Dask scheduler, or its scheduler file; default: workers of its own.",
            show_default=False,
        ),
    ] = None,
    gpus: Annotated[float, typer.Option(min=0, help="GPU resource that a cell takes of a Dask worker.")] = 0,
    budget: Annotated[
        str | None, typer.Option(help="Stop after this time, such as 90s, 30m or 2h.", show_default=False)
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try failed cells again.")] = False,
    store: StoreFolder = STORE,
    suites: SuiteFolder = None,
    data_root: options.DataRoot = None,
    device: options.Device = "cpu",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the cells of a suite that are not done yet.

    A run may be killed at any moment and started again: finished cells stay, and at most the cells in
    progress are lost. Several runs may share a store.
    """
    from unbackdoor.bench.driver import drive
    from unbackdoor.bench.exchange import with_pinned
    from unbackdoor.bench.store import Store
    from unbackdoor.data.decode import processors

    chosen, cells, text = _planned(suite, suites, data_root)
    seconds = options.seconds_of(budget, "--budget")
    slots = workers or processors()
    threads = max(1, processors() // slots)
    place = {
        "store": str(store.resolve()),
        "data_root": str(data_root.resolve()) if data_root else os.environ.get("UNBACKDOOR_DATA"),
        "cache": os.environ.get("UNBACKDOOR_CACHE"),
        "device": device,
        "limits": {"seconds": chosen.limit.seconds, "memory_mb": chosen.limit.memory_mb, "threads": threads},
    }
    with Store(store) as opened:
        planned = with_pinned(opened, cells)
        opened.register(chosen.label, chosen.sha256(), text, [cell.entry() for cell in planned])
        if retry:
            note(f"{opened.retry(chosen.label)} failed cells are tried again.", quiet=quiet)
        where = _engine(engine, slots, scheduler, gpus)  # may wait for an answer, and must hear Ctrl-C then
        with _terminable() as asked_to_stop:
            try:
                with _live(chosen.label, slots, store, quiet=quiet) as watch:
                    done = drive(
                        opened, chosen.label, where, place,
                        only=only, part=None if part is Part.all or chosen.split is None else part.value,
                        budget=seconds, watch=watch, asked_to_stop=asked_to_stop,
                    )  # fmt: skip
            finally:
                where.close()
        counts = opened.counts(chosen.label)
    if as_json:
        emit({"suite": chosen.label, "finished": done, **counts})
    else:
        say(f"{chosen.label}: {_words(counts)}" + ("" if done else "; the budget ended"))
        if counts["waiting"]:
            say(f"Go on with: unbackdoor bench resume {suite}")


@bench.command("resume")
def resume(
    suite: SuiteName,
    part: Annotated[Part, typer.Option(help="Part of a suite that is split.")] = Part.tuning,
    budget: Annotated[str | None, typer.Option(help="Stop after this time.", show_default=False)] = None,
    workers: Annotated[int, typer.Option(min=0, help="Cells at a time; 0 for one for each processor.")] = 0,
    retry: Annotated[bool, typer.Option("--retry", help="Try failed cells again.")] = False,
    store: StoreFolder = STORE,
    suites: SuiteFolder = None,
    data_root: options.DataRoot = None,
    device: options.Device = "cpu",
    quiet: options.Quiet = False,
) -> None:
    """Go on with a suite on this machine where its last run ended."""
    if not (store / "results.db").exists():
        raise InputError(
            "there is nothing to resume", where=store, remedy=f"Start with: unbackdoor bench run {suite}"
        )
    run(
        suite, part=part, budget=budget, workers=workers, retry=retry, store=store, suites=suites,
        data_root=data_root, device=device, quiet=quiet,
    )  # fmt: skip


@bench.command("status")
def status(
    suite: Annotated[str | None, typer.Argument(help="Label of a suite; default: all in the store.")] = None,
    store: StoreFolder = STORE,
    as_json: options.AsJson = False,
) -> None:
    """Show how far the suites of a store are, and which cells failed."""
    with _opened(store) as opened:
        labels = [suite] if suite else opened.suites()
        counts = {label: opened.counts(label) for label in labels}
        failed = [
            (label, cell.key[:12], names, cell.error or "")
            for label in labels
            for cell, names in opened.failed(label)
        ]
    if as_json:
        emit(
            {
                "suites": counts,
                "failed": [{"suite": f[0], "cell": f[1], "row": f[2], "error": f[3]} for f in failed],
            }
        )
        return
    table("Suites", ("suite", ">done", ">running", ">failed", ">left"), [
        (label, n["done"], n["running"], n["failed"], n["waiting"]) for label, n in counts.items()
    ])  # fmt: skip
    for label, key, names, error in failed:
        complain(f"{label} {key} {names.get('attack')} {names.get('defense', 'victim')}: {error}")


@bench.command("export")
def export(
    suite: SuiteName,
    out: Annotated[
        Path | None, typer.Option(help="File; default: results/SUITE.jsonl.", show_default=False)
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="Form of the rows.")] = Format.jsonl,
    victims: Annotated[
        Path | None,
        typer.Option(help="Folder for the trained victims too, for others to import.", show_default=False),
    ] = None,
    store: StoreFolder = STORE,
    force: options.Force = False,
) -> None:
    """Write the rows of a suite; scans go into a second file beside them.

    JSON lines, Parquet and CSV (--format csv) have every column; Markdown (md) and LaTeX (tex, with the rules
    of booktabs) are tables to read.
    """
    from unbackdoor.bench.results import write_parquet
    from unbackdoor.bench.row_tables import write_csv, write_table
    from unbackdoor.bench.rows import Row, ScanRow, write_rows
    from unbackdoor.files import writing

    rows, scans = _rows(suite, store), _scans(suite, store)
    file = out or Path("results") / f"{Path(suite).stem}.{form.value}"
    beside = file.with_name(f"{file.stem}{_SCANS}{file.suffix}")
    with writing((file, beside) if scans else (file,), force=force):
        for where, kind_rows, kind in ((file, rows, Row), (beside, scans, ScanRow)):
            if where == beside and not scans:
                continue
            if form is Format.parquet:
                write_parquet(where, kind_rows, kind)
            elif form is Format.csv:
                write_csv(where, kind_rows, kind)
            elif form in (Format.markdown, Format.latex):
                write_table(where, kind_rows, kind, latex=form is Format.latex)
            else:
                write_rows(where, kind_rows)
            say(f"{len(kind_rows)} rows: {where}")
    if victims is not None:
        from unbackdoor.bench.exchange import export_victims

        with _holding(suite, store) as opened:
            say(f"{len(export_victims(opened, suite, victims))} victims: {victims}")


@bench.command("probe")
def probe(
    suite: Annotated[str, typer.Argument(help="Label of a suite in the store.")],
    only: Annotated[
        str | None,
        typer.Option(help="Probe only what matches, as for bench run.", show_default=False),
    ] = None,
    part: Annotated[Part, typer.Option(help="Part of a suite that is split.")] = Part.all,
    out: Annotated[
        Path | None, typer.Option(help="File; default: results/SUITE.probes.jsonl.", show_default=False)
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Probe again what failed.")] = False,
    store: StoreFolder = STORE,
    data_root: options.DataRoot = None,
    device: options.Device = "cpu",
    quiet: options.Quiet = False,
) -> None:
    """Look behind the ASR of finished repairs: can the backdoor be learned again, or reached otherwise?

    Each repaired network, its victim and a network that was trained clean are asked the same. Rows are added
    to the file one by one, and what has one is not probed again: a run may be killed at any moment and
    started again.
    """
    from unbackdoor.bench.probe_rows import probe_repairs
    from unbackdoor.cli.progress import Display

    file = out or Path("results") / f"{suite}{_PROBES}.jsonl"
    place = {
        "data_root": str(data_root) if data_root else None,
        "cache": os.environ.get("UNBACKDOOR_CACHE"),
        "device": device,
    }
    with _holding(suite, store) as opened, Display(quiet=quiet) as display:
        count = probe_repairs(
            opened, suite, file,
            only=only, part=None if part is Part.all else part.value, retry=retry, place=place,
            progress=display,
        )  # fmt: skip
    say(f"{count} repairs probed: {file}")


@bench.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="Folder of victims, from bench export --victims.")],
    store: StoreFolder = STORE,
) -> None:
    """Take trained victims over, so that their suites need not train them again."""
    from unbackdoor.bench.exchange import import_victims
    from unbackdoor.bench.store import Store

    with Store(store) as opened:
        say(f"{len(import_victims(opened, folder))} new victims")


@bench.command("report")
def report(
    suite: Annotated[str, typer.Argument(help="Label of a suite in the store, or a .jsonl file of rows.")],
    out: Annotated[Path, typer.Option(help="Folder of index.html and report.md.")] = Path("bench-report"),
    reference: Reference = None,
    store: StoreFolder = STORE,
    force: options.Force = False,
) -> None:
    """Render the rows of a suite as one HTML page that loads nothing, and as Markdown."""
    from unbackdoor.report.charts import require_charts

    require_charts()
    from unbackdoor import __version__
    from unbackdoor.bench.reference import read_published
    from unbackdoor.files import writing
    from unbackdoor.report.benchmark import bench_report
    from unbackdoor.report.html import to_html
    from unbackdoor.report.markdown import to_markdown
    from unbackdoor.report.page import write_page

    files = (out / "index.html", out / "report.md")
    options.require_writable(files, force=force)
    published = read_published(reference) if reference else None
    rows = _rows(suite, store)
    made = bench_report(
        rows,
        scans=_scans(suite, store),
        probes=_probes(suite),
        published=published,
        colophon=f"Made by unbackdoor {__version__} of {len(rows):,} rows.",
    )
    with writing(files, force=force):
        for file, text in zip(files, (to_html(made), to_markdown(made)), strict=True):
            write_page(file, text)
            say(file)


@bench.command("leaderboard")
def leaderboard(
    suites: Annotated[
        list[str], typer.Argument(help="Labels of suites in the store, or .jsonl files of rows.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of index.html.")] = Path("leaderboard"),
    reference: Reference = None,
    store: StoreFolder = STORE,
    force: options.Force = False,
) -> None:
    """Rank the defenses of suites on one HTML page that loads nothing.

    Its tables are sorted and chosen from by data set, network, attack and number of clean images; every cell
    leads to what it was measured with and to the commands that measure it again.
    """
    from unbackdoor.report.charts import require_charts

    require_charts()
    from unbackdoor import __version__
    from unbackdoor.bench.reference import read_published
    from unbackdoor.files import writing
    from unbackdoor.report import benchmark
    from unbackdoor.report.html import to_html
    from unbackdoor.report.page import write_page

    page = out / "index.html"
    options.require_writable((page,), force=force)
    rows = [row for suite in suites for row in _rows(suite, store)]
    made = benchmark.leaderboard(
        rows,
        probes=[probe for suite in suites for probe in _probes(suite)],
        published=read_published(reference) if reference else None,
        colophon=f"Made by unbackdoor {__version__} of {len(rows):,} rows.",
    )
    with writing((page,), force=force):
        write_page(page, to_html(made))
    say(page)


@bench.command("diff")
def diff(
    a: Annotated[str, typer.Argument(help="Label of a suite in the store, or a .jsonl file.")],
    b: Annotated[str, typer.Argument(help="The other one.")],
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest difference of a rate that counts as none.")
    ] = 0.0,
    store: StoreFolder = STORE,
    as_json: options.AsJson = False,
) -> None:
    """Compare two sets of rows experiment by experiment; exit code 1 if they differ."""
    from unbackdoor.bench.results import differences

    differing = differences(_rows(a, store), _rows(b, store), tolerance=tolerance)
    if as_json:
        emit({"differences": [{"key": list(d.key), "kind": d.kind, "columns": d.columns} for d in differing]})
    else:
        for difference in differing:
            words = ", ".join(
                f"{name} {left} -> {right}" for name, (left, right) in difference.columns.items()
            )
            say(
                " ".join(str(part) for part in difference.key if part is not None)
                + f": {difference.kind} {words}"
            )
        say(f"{len(differing)} differences")
    if differing:
        raise typer.Exit(1)


@bench.command("clean")
def clean(
    store: StoreFolder = STORE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove artefacts that no suite of the store refers to any more."""
    with _opened(store) as opened:
        folders = opened.collect_garbage(dry_run=dry_run)
    for folder in folders:
        say(folder)
    say(f"{len(folders)} folders " + ("would go" if dry_run else "removed"))


# ---------------------------------------------------------------------------------------------------


def _planned(name: str, folder: Path | None, data_root: Path | None) -> tuple[Suite, list[Any], str]:
    from unbackdoor.bench.altered_samples import foreign_images
    from unbackdoor.bench.cells import plan
    from unbackdoor.bench.suites import SHIPPED, check_lock, find_suite, load_suite
    from unbackdoor.cli.progress import Display
    from unbackdoor.data.datasets import load_dataset

    file = find_suite(name, folder or SHIPPED)
    suite = load_suite(file)
    check_lock(suite, file.parent)
    with Display() as display:
        data = {d.name: load_dataset(d.name, root=data_root, progress=display) for d in suite.data}
    foreign = {}
    for entry in suite.alteration:
        if entry.foreign:
            try:
                foreign[entry.foreign] = foreign_images(entry.foreign, _root(data_root), None)
            except InputError as error:
                note(f"The cells of {entry.name} are left out: {error}")
    return suite, plan(suite, data, foreign), file.read_text(encoding="utf-8")


def _root(data_root: Path | None) -> Path | None:
    named = os.environ.get("UNBACKDOOR_DATA")
    return data_root or (Path(named) if named else None)


def _engine(kind: EngineName, slots: int, scheduler: str | None, gpus: float) -> Engine:
    from unbackdoor.bench.engines import DaskEngine, LocalEngine

    if kind is EngineName.local:
        return LocalEngine(slots)
    return DaskEngine(slots, address=scheduler, resources={"GPU": gpus} if gpus else None)


def _opened(store: Path) -> Any:
    from unbackdoor.bench.store import Store

    if not (store / "results.db").exists():
        raise InputError("there is no store", where=store, remedy="Give its folder with --store")
    return Store(store)


def _rows(name: str, store: Path) -> list[Row]:
    from unbackdoor.bench.results import rows_of
    from unbackdoor.bench.rows import read_rows

    if name.endswith(".jsonl"):
        if not Path(name).exists():
            raise InputError("the file does not exist", where=name)
        return read_rows(Path(name))
    with _holding(name, store) as opened:
        return rows_of(opened, name)


def _scans(name: str, store: Path) -> list[ScanRow]:
    from unbackdoor.bench.results import scans_of
    from unbackdoor.bench.rows import read_scans

    if name.endswith(".jsonl"):
        return read_scans(Path(name.removesuffix(".jsonl") + _SCANS + ".jsonl"))
    with _holding(name, store) as opened:
        return scans_of(opened, name)


def _probes(name: str) -> list[ProbeRow]:
    from unbackdoor.bench.rows import read_probes

    rows = Path(name) if name.endswith(".jsonl") else Path("results") / f"{name}.jsonl"
    return read_probes(rows.with_name(f"{rows.stem}{_PROBES}{rows.suffix}"))


def _holding(name: str, store: Path) -> Any:
    """Open a store that holds a suite."""
    from unbackdoor.registry import near_match

    opened = _opened(store)
    suites = opened.suites()
    if name not in suites:
        opened.close()
        raise InputError(
            f"the store has no suite {name!r}{near_match(name, suites)}",
            expected="one of " + (", ".join(suites) or "none"),
            where=store,
        )
    return opened


@contextmanager
def _terminable() -> Iterator[Callable[[], bool]]:
    """Treat SIGTERM like Ctrl-C: running cells return to the queue, and the exit code is the same.

    Yields a function that returns whether a signal came. Nothing is raised: an exception between any two
    bytecodes could leave locks held that threads share, and the orderly end would wait for them for ever.
    Only the first signal counts; later ones are ignored until the process has ended.
    """
    stop_requested = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal stop_requested
        stop_requested = True

    before = {which: signal.signal(which, on_signal) for which in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: stop_requested
    finally:
        for which, handler in before.items():
            signal.signal(which, signal.SIG_IGN if stop_requested else handler)


@contextmanager
def _live(label: str, slots: int, store: Path, *, quiet: bool) -> Iterator[Any]:
    """Show a live table during the run; a line now and then where there is no terminal."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, quiet=quiet)
    last = [0.0]
    if not console.is_terminal:

        def line(progress: Progress) -> None:
            if not quiet and time.monotonic() - last[0] > 20:
                last[0] = time.monotonic()
                complain(f"{label}: {_words(progress.counts)}{_eta(progress, slots)}")

        yield line
        return
    with Live(console=console, transient=True, refresh_per_second=4) as live:
        yield lambda progress: live.update(_table(label, progress, slots, store))


def _table(label: str, progress: Progress, slots: int, store: Path) -> Any:
    from rich.table import Table

    rate = 0.0
    grid = Table(title=f"{label}: {_words(progress.counts)}{_eta(progress, slots)}", title_justify="left")
    for column in ("running", "step", "done", "seconds"):
        grid.add_column(column)
    for name, folder, start in progress.running.values():
        step, done, total, images = _step(store / "work" / folder)
        seconds = time.monotonic() - start
        rate += images / seconds if seconds else 0.0
        grid.add_row(name, step, f"{done}/{total}" if total else "", f"{seconds:.0f}")
    grid.caption = f"{rate:.0f} training images a second" if rate else None
    return grid


def _step(folder: Path) -> tuple[str, int, int | None, int]:
    import json

    try:
        state = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        return str(state["label"]), int(state["done"]), state["total"], int(state.get("images", 0))
    except (OSError, ValueError, KeyError):
        return "starting", 0, None, 0


def _eta(progress: Progress, slots: int) -> str:
    left = progress.left_seconds(slots)
    if left is None:
        return ""
    hours, minutes = divmod(int(left) // 60, 60)
    return f"; about {hours} h {minutes:02d} min left" if hours else f"; about {minutes} min left"


def _words(counts: Any) -> str:
    return (
        f"{counts['done']} cells done, {counts['running']} running, {counts['failed']} failed, "
        f"{counts['waiting']} left"
    )
