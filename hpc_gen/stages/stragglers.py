"""Which rank is slower than the others, and where its time goes: from the spans of one attempt. Starts no torch.

A training moves at the pace of its slowest rank, so wall times say nothing: all are alike. What differs is how long
each rank works by itself and how long it waits for the rest. `own` is the time of spans in which no rank waits for
another: forward and backward, optimizer, averages, previews; `data`: waiting for its feed; `waits`: waiting for other
ranks. The straggler is the one that waits least; where own and data of a rank are a tenth above the median, it is
marked.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from hpc_gen.runtime import spans
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.journal import Event, Reader
from hpc_gen.runtime.progress import format_duration
from hpc_gen.runtime.run_folder import RunFolder

FOLDER = "spans"
SLOW = 1.1  # of the median of own and data
WAITING = (spans.COLLECTIVE, "reduce", "save_wait")
NOT_TRAINING = ("agree",)  # its own part is a look at a file, once a second


@dataclass(frozen=True)
class RankTimes:
    """Seconds of one rank over an attempt; `slow`: own and data over the median of all; `longest`: span and seconds."""

    rank: int
    host: str
    steps: int
    images_seen: int
    own_s: float
    data_s: float
    waits_s: float
    slow: float
    longest: tuple[str, float]
    names: dict[str, float] = field(default_factory=dict)
    lost_lines: int = 0

    @property
    def is_straggler(self) -> bool:
        """Whether the others wait for it."""
        return self.slow >= SLOW


def times(run: RunFolder, attempt: int | None = None) -> tuple[int, list[RankTimes]]:
    """The attempt (None: the newest that has spans) and its ranks in order. Raises UserError where there are none."""
    events = Reader(run, "train", below=FOLDER).events()
    known = sorted({event.attempt for event in events})
    if not known:
        raise UserError(
            f"{run.path} has no spans: it has not trained yet, or with train.spans=off; the next attempt with "
            "train.spans=interval writes them"
        )
    chosen = known[-1] if attempt is None else attempt
    if chosen not in known:
        raise UserError(f"attempt {chosen} of {run.name} has no spans; there are: {', '.join(map(str, known))}")
    by_rank: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event.attempt == chosen:
            by_rank[event.task].append(event)
    found = [_rank(rank, own) for rank, own in sorted(by_rank.items())]
    usual = statistics.median(each.own_s + each.data_s for each in found)
    return chosen, [
        RankTimes(**{**_fields(each), "slow": (each.own_s + each.data_s) / usual if usual > 0 else 1.0})
        for each in found
    ]


def _fields(each: RankTimes) -> dict[str, object]:
    return {name: getattr(each, name) for name in each.__dataclass_fields__}


def _rank(rank: int, events: Iterable[Event]) -> RankTimes:
    host, steps, seen, lost = "", 0, 0, 0
    own: dict[str, float] = defaultdict(float)
    longest = ("", 0.0)
    for event in events:
        if event.kind == "begin":
            host = str(event.fields.get("host") or "")
        elif event.kind == "lost":
            lost += int(event.fields.get("lines") or 0)
        elif event.kind == "spans":
            steps += int(event.fields.get("steps") or 0)
            seen = int(event.fields.get("images_seen") or seen)
            for name, (_, _, own_s, most) in _sums(event).items():
                own[name] += own_s
                if most > longest[1] and name not in WAITING and name != "step":
                    longest = (name, most)
    data = own.get(spans.DATA_WAIT, 0.0)
    waits = sum(own.get(name, 0.0) for name in WAITING)
    left = (s for name, s in own.items() if name not in (*WAITING, *NOT_TRAINING, spans.DATA_WAIT))
    return RankTimes(rank, host, steps, seen, sum(left), data, waits, 1.0, longest, dict(own), lost)


def _sums(event: Event) -> Mapping[str, Sequence[float]]:
    names = event.fields.get("names")
    found = names if isinstance(names, dict) else {}
    return {name: each for name, each in found.items() if isinstance(each, list) and len(each) == 4}


def lines(run: RunFolder, attempt: int | None = None) -> list[str]:
    """For people: a table of ranks, then of spans, slowest rank first."""
    chosen, ranks = times(run, attempt)
    steps = max(each.steps for each in ranks)
    found = [
        f"{run.name}: attempt {chosen}, {len(ranks)} ranks, {steps} steps until {ranks[0].images_seen:,} images",
        f"  {'rank':>4}  {'host':<16} {'own/step':>9} {'data/step':>9} {'waits/step':>10} {'to median':>9}  longest",
    ]
    for each in sorted(ranks, key=lambda each: -each.slow):
        number = max(1, each.steps)
        name, seconds = each.longest
        mark = "  <- straggler" if each.is_straggler and len(ranks) > 1 else ""
        found.append(
            f"  {each.rank:>4}  {each.host[:16]:<16} {_ms(each.own_s / number):>9} {_ms(each.data_s / number):>9} "
            f"{_ms(each.waits_s / number):>10} {each.slow:>8.2f}x  {name} {format_duration(seconds)}{mark}"
        )
    lost = sum(each.lost_lines for each in ranks)
    if lost:
        found.append(f"  {lost} lines of spans were lost: the disk was too slow for them")
    found.append(f"  {'span':<18} {'mean s':>9} {'least':>9} {'most':>9}  of rank")
    for name in sorted({name for each in ranks for name in each.names}, key=lambda n: -_mean(ranks, n)):
        most = max(ranks, key=lambda each: each.names.get(name, 0.0))
        least = min(each.names.get(name, 0.0) for each in ranks)
        found.append(
            f"  {name:<18} {_mean(ranks, name):>9.2f} {least:>9.2f} {most.names.get(name, 0.0):>9.2f}  {most.rank}"
        )
    return found


def to_json(run: RunFolder, attempt: int | None = None) -> str:
    """The same for other programs."""
    chosen, ranks = times(run, attempt)
    told = [{**asdict(each), "straggler": each.is_straggler and len(ranks) > 1} for each in ranks]
    return json.dumps({"run": run.name, "attempt": chosen, "ranks": told}, indent=1)


def _mean(ranks: Sequence[RankTimes], name: str) -> float:
    return statistics.fmean(each.names.get(name, 0.0) for each in ranks)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 10 else format_duration(seconds)
