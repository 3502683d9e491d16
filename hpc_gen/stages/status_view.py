"""The status of a run, and of all runs, as people read it: tables in a terminal, plain columns in pipes and logs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from hpc_gen.runtime import clock, journal
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.progress import count, format_bytes, format_count, format_duration
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages.control import Holder, runs_folder
from hpc_gen.stages.status import RunStatus, StageStatus, StatusReader, all_runs, ending

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN_ATTEMPTS = 8


class JobsShown(Protocol):
    """The jobs of a run on a cluster, as this page shows them (slurm/watch.py, which this room does not know)."""

    @property
    def over(self) -> bool:
        """Whether none of them is queued or running."""
        ...

    def lines(self) -> list[str]:
        """For people, a line each."""
        ...

    def to_json(self) -> dict[str, Any]:
        """For other programs."""
        ...


Jobs = Callable[[], JobsShown | None]
_STYLES = {
    "done": "green",
    "running": "bold cyan",
    "requeued": "yellow",
    "stopped": "yellow",
    "killed": "yellow",
    "failed": "bold red",
    "waiting": "dim",
}


@dataclass(frozen=True)
class Sheet:
    """A table with lines above and below it."""

    above: list[str]
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    below: list[str]
    over: bool  # nothing more will change
    news: object  # what it was made from: equal as long as nothing but time has passed

    def lines(self) -> Iterator[str]:
        """As plain text; columns are aligned by blanks."""
        yield from self.above
        if self.rows:
            table = [self.columns, *self.rows]
            widths = [max(len(row[i]) for row in table) for i in range(len(self.columns))]
            for row in table:
                yield "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        yield from self.below

    def rich(self) -> RenderableType:
        """As a table of rich, with colours for states."""
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in self.columns:
            table.add_column(name, overflow="fold", no_wrap=name in ("run", "stage", "state"))
        for row in self.rows:
            table.add_row(*(Text(text, style=_STYLES.get(text, "")) for text in row))
        first, *rest = [Text(line) for line in self.above]
        first.stylize("bold")
        return Group(first, *rest, *([table] if self.rows else []), *(Text(line) for line in self.below))


def sheet(found: RunStatus, now: float | None = None) -> Sheet:
    """One run: its stages as a table, then what else there is to say."""
    now = clock.now() if now is None else now
    rows = [
        (stage.name, stage.state, _amount(stage), _left(stage), str(stage.attempts or ""), stage.cause)
        for stage in found.stages
    ]
    columns = ("stage", "state", "progress", "time left", "attempts", "cause")
    above, below = [f"{found.name}: {found.state}"], list(_facts(found, now))
    return Sheet(above, columns, rows, below, found.over, news=replace(found, disk=None, forecast=()))


def lines(found: RunStatus, now: float | None = None) -> Iterator[str]:
    """The status in plain words, for a terminal without tables and for logs."""
    return sheet(found, now).lines()


def list_sheet(found: Sequence[RunStatus], problems: Iterable[str], folder: Path, now: float | None = None) -> Sheet:
    """All runs of a workspace, a line each."""
    now = clock.now() if now is None else now
    rows = []
    for run in found:
        stage = _current(run)
        rows.append(
            (
                run.name,
                stage.state,
                stage.name,
                _amount(stage),
                _left(stage),
                _loss(run.last_row),
                f"{run.checkpoints[-1].images_seen:,}" if run.checkpoints else "",
                f"{format_duration(now - run.last_seen)} ago" if run.last_seen is not None else "",
            )
        )
    columns = ("run", "state", "stage", "progress", "time left", "loss", "last checkpoint", "last sign of life")
    head = f"{len(rows)} run{'s' if len(rows) > 1 else ''} in {folder}"
    if not rows:
        head = f"no runs in {folder} yet; `hpc-gen run CONFIG` makes one"
    below = [f"  {problem}" for problem in problems]
    return Sheet([head], columns, rows, below, all(run.over for run in found), news=(list(found), below))


def tell(
    run: RunFolder | None,
    workspace: Path,
    *,
    as_json: bool = False,
    watch: bool = False,
    every_s: float = 2.0,
    stream: TextIO | None = None,
    jobs: Jobs | None = None,
) -> None:
    """Print the status of a run (None: of all runs of the workspace), once or until nothing more will change.

    `watch`: a terminal is redrawn every `every_s` seconds, elsewhere the text is printed when it has changed; Ctrl-C
    ends it. `jobs` tells of the run's jobs on a cluster.

    Raises UserError for `watch` with JSON, or an interval that is none; ConfigError for an unreadable run.
    """
    stream = sys.stdout if stream is None else stream
    if as_json:
        if watch:
            raise UserError("--json prints once and --watch again and again; give one of them")
        shown = StatusReader(run).read().to_json() if run is not None else _json_of_all(workspace)
        told = jobs() if jobs is not None else None
        if told is not None:
            shown = {**shown, "slurm": told.to_json()}
        print(json.dumps(shown, indent=1), file=stream)
        return
    if not every_s > 0:
        raise UserError(f"--every {every_s:g} is not a time to wait; give seconds above 0")
    reader = StatusReader(run) if run is not None else None

    def read() -> Sheet:
        if reader is None:
            return list_sheet(*all_runs(workspace), runs_folder(workspace))
        shown, told = sheet(reader.read()), jobs() if jobs is not None else None
        if told is None:
            return shown
        lines = told.lines()
        return replace(shown, below=[*lines, *shown.below], news=(shown.news, lines), over=shown.over and told.over)

    if watch:
        _watch(read, every_s, stream)
    else:
        _print(read(), stream)


def _json_of_all(workspace: Path) -> dict[str, object]:
    found, problems = all_runs(workspace)
    return {"runs": [each.to_json() for each in found], "unreadable": problems}


def _print(shown: Sheet, stream: TextIO) -> None:
    if stream.isatty():
        from rich.console import Console

        Console(file=stream, highlight=False).print(shown.rich())
    else:
        for line in shown.lines():
            print(line, file=stream, flush=True)


def _watch(read: Callable[[], Sheet], every_s: float, stream: TextIO) -> None:
    """Show `read()` again and again until it is over or the user has seen enough."""
    try:
        if stream.isatty():
            from rich.console import Console
            from rich.live import Live

            with Live(console=Console(file=stream, highlight=False), auto_refresh=False) as live:
                _again(read, lambda shown: live.update(shown.rich(), refresh=True), every_s)
        else:
            told: list[object] = []

            def changed(shown: Sheet) -> None:
                if told != [shown.news]:
                    _print(shown, stream)
                    told[:] = [shown.news]

            _again(read, changed, every_s)
    except KeyboardInterrupt:
        print(file=stream)  # the usual way to leave a watch, not an error


def _again(read: Callable[[], Sheet], show: Callable[[Sheet], None], every_s: float) -> None:
    while True:
        shown = read()
        show(shown)
        if shown.over:
            return
        clock.sleep(every_s)


# ---------------------------------------------------------------- words


def _current(run: RunStatus) -> StageStatus:
    """The stage that a run is at: the running one, else the first that is not done, else the last."""
    running = [stage for stage in run.stages if stage.state == "running"]
    left = [stage for stage in run.stages if stage.state not in ("done", "waiting")]
    waiting = [stage for stage in run.stages if stage.state == "waiting"]
    return (running or left or waiting or run.stages[-1:])[0]


def _amount(stage: StageStatus) -> str:
    if stage.state == "done" and not stage.attempts and not stage.done:
        return ""  # nothing was to be done
    if stage.total is None:
        return f"{stage.done:,} {stage.unit}"
    share = f" ({stage.done / stage.total:.0%})" if stage.total and 0 < stage.done < stage.total else ""
    return f"{stage.done:,} of {stage.total:,} {stage.unit}{share}"


def _left(stage: StageStatus) -> str:
    return format_duration(stage.eta_s) if stage.eta_s is not None else ""


def _loss(row: journal.Row | None) -> str:
    return f"{row.data['loss']:.4g}" if row is not None and "loss" in row.data else ""


def _facts(found: RunStatus, now: float) -> Iterator[str]:
    """What there is to say below the table of stages, a line each."""
    if found.last_row is not None:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in sorted(found.last_row.data.items()))
        age = f", {format_duration(now - found.last_row.t)} ago" if found.running is not None else ""
        yield f"  newest row   at {found.last_row.images_seen:,} images{age}: {numbers}"
    for stage in found.stages:
        if stage.rate:
            yield f"  speed        {format_count(stage.rate)} {stage.unit}/s of late"
    if found.held_rank_seconds > 0:
        yield f"  goodput      {_goodput(found)}"
    if found.checkpoints:
        told = ", ".join(f"{c.images_seen:,} ({format_bytes(c.bytes)})" for c in found.checkpoints[-4:])
        more = f"{len(found.checkpoints) - 4} older, " if len(found.checkpoints) > 4 else ""
        yield f"  checkpoints  {more}{told}"
    for problem in found.unreadable:
        yield f"  checkpoint   {problem}"
    if found.disk is not None:
        yield f"  disk used    {'' if found.disk.whole else 'at least '}{format_bytes(found.disk.bytes)}"
    for line in found.forecast:
        yield f"  disk to come {line}"
    for what, words in found.origins:
        yield f"  {what:<12} {words}"
    yield f"  at work      {_at_work(found, now)}"
    yield f"  folder       {found.path}"
    yield f"  identity     {found.identity[:16]}"
    hidden = len(found.attempts) - SHOWN_ATTEMPTS
    if hidden > 0:
        yield f"  {hidden} earlier attempts; --json has all of them"
    for attempt in found.attempts[-SHOWN_ATTEMPTS:]:
        yield f"  {_attempt_line(attempt, found.running, now)}"
    if found.torn_lines:
        yield f"  journal      {found.torn_lines} lines were cut off by kills and are left out"


def _goodput(found: RunStatus) -> str:
    held, waited = format_duration(found.held_rank_seconds), format_duration(found.waiting_s)
    rest = sorted(((name, share) for name, share in found.goodput.items() if name != "productive"), key=lambda x: -x[1])
    told = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in rest if share >= 0.005)
    lost = f"; the rest: {told}" if told else ""
    productive = found.goodput["productive"]
    return f"{productive:.0%} of {held} held (ranks x time) was productive{lost}; {waited} between attempts"


def _at_work(found: RunStatus, now: float) -> str:
    if found.running is None:
        return found.lost_holder or "nobody"
    alive = "alive on this host" if found.running.here else f"on {found.running.host}, which cannot be asked from here"
    seen = f"; its last line was written {format_duration(now - found.last_seen)} ago" if found.last_seen else ""
    return f"process {found.running.pid} of attempt {found.running.attempt}, {alive}{seen}"


def _attempt_line(attempt: journal.Attempt, running: Holder | None, now: float) -> str:
    at_work = running is not None and running.attempt == attempt.number and attempt.end is None
    lasted = format_duration((now if at_work else attempt.end or attempt.last_seen) - attempt.start)
    start = f" from {attempt.resumed_from:,} images" if attempt.resumed_from is not None else ""
    width = f", {count(attempt.world_size, 'rank')}" if attempt.stage == "train" else ""
    ended = "running" if at_work else ending(attempt)
    return f"attempt {attempt.number:<4} {attempt.stage}{start}{width}, {lasted}: {ended}"
