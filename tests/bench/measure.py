"""Timing by turns, and the tables that say what came out.

Whatever is compared is measured in the same run, one after the other, several rounds long: a machine that is slow for
a minute is slow for both. A number is the median over rounds with the lowest and the highest in brackets; a ratio is
formed within each round first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Action = Callable[[], "float | None"]  # returns its seconds itself, or None: it is timed from outside


@dataclass(frozen=True)
class Spread:
    """Values of one quantity, one per round."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """At least one value."""
        assert values, "nothing was measured"
        return cls(tuple(values))

    def over(self, other: Spread) -> Spread:
        """The ratio to another quantity, round by round."""
        return Spread.of([a / b for a, b in zip(self.values, other.values, strict=True)])

    def per(self, amount: float) -> Spread:
        """`amount` divided by each value: seconds become a rate."""
        return Spread.of([amount / value for value in self.values])

    def show(self, pattern: str = "{:.2f}", scale: float = 1.0) -> str:
        """`median [lowest - highest]`, each multiplied by `scale`."""
        found = (statistics.median(self.values), min(self.values), max(self.values))
        middle, low, high = (pattern.format(scale * value) for value in found)
        return f"{middle} [{low} - {high}]"


def by_turns(actions: Mapping[str, Action], rounds: int, warm_up: int = 1) -> dict[str, Spread]:
    """Seconds of each action, run one after the other `rounds` times after `warm_up` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(warm_up + rounds):
        for name, action in actions.items():
            begun = time.perf_counter()
            told = action()
            taken = time.perf_counter() - begun if told is None else told
            if number >= warm_up:
                seconds[name].append(taken)
    return {name: Spread.of(values) for name, values in seconds.items()}


@dataclass(frozen=True)
class Clocks:
    """Wall and processor seconds of one action, round by round; the second hardly knows what else the machine does."""

    wall: Spread
    cpu: Spread

    def over(self, other: Clocks) -> Clocks:
        """The ratios to another action, round by round."""
        return Clocks(self.wall.over(other.wall), self.cpu.over(other.cpu))


def by_clocks(actions: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, Clocks]:
    """Both clocks of each action of this process, run one after the other; every second round in reverse order."""
    wall: dict[str, list[float]] = {name: [] for name in actions}
    cpu: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds):
        order = list(actions) if number % 2 == 0 else list(actions)[::-1]
        for name in order:
            begun = time.perf_counter(), time.process_time()
            actions[name]()
            wall[name].append(time.perf_counter() - begun[0])
            cpu[name].append(time.process_time() - begun[1])
    return {name: Clocks(Spread.of(wall[name]), Spread.of(cpu[name])) for name in actions}


@dataclass(frozen=True)
class Table:
    """One result. `about` says what was done and how often, `identity` is the hash of the experiment used, if any."""

    title: str
    about: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    identity: str = ""

    def add(self, *cells: str) -> None:
        """One more row."""
        assert len(cells) == len(self.header), (cells, self.header)
        self.rows.append(cells)

    def text(self) -> str:
        """For a terminal: columns side by side."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        body.insert(1, "  ".join("-" * width for width in widths))
        told = [f"experiment {self.identity}"] if self.identity else []
        return "\n".join([f"== {self.title}", self.about, *told, "", *body, ""])

    def markdown(self, command: str) -> str:
        """For docs/benchmarks: the table with the command that makes it and the experiment's hash."""
        lines = [f"## {self.title}", "", self.about, "", f"Command: `{command}`"]
        if self.identity:
            lines[-1] += f"; identity of the experiment: `{self.identity}`"
        lines += ["", _row(self.header), _row(["---"] * len(self.header))]
        return "\n".join([*lines, *(_row(row) for row in self.rows), ""])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
