"""What the start of a training costs, part by part, from the launch of its task to the end of the first step.

The parts, in order, with the moment at which each one ends:
  container     this process began (its start in /proc): srun and the container runtime have done their work
  import        the train stage is entered: interpreter, imports, health probe
  rendezvous    the process groups stand
  load          everything is built and restored to the newest checkpoint
  first step    the first step is done: first batch, compilation
The first part is known only where the batch script said when it began to launch (`LAUNCHED`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hpc_gen.runtime import clock, env

LAUNCHED = "HPC_GEN_LAUNCHED"
"""Variable with the wall seconds since 1970 at which the batch script started the step."""
PARTS = ("container", "import", "rendezvous", "load", "first_step")


@dataclass
class StartUp:
    """The moments of one start, in wall seconds; `begin` is called when the train stage is entered."""

    began: float
    ends: dict[str, float] = field(default_factory=dict)

    @classmethod
    def begin(cls) -> StartUp:
        """A start whose imports are done now."""
        process, launched = clock.process_start(), _launched()
        if launched is None or not 0.0 <= process - launched < 3600.0:  # another node's clock, or an old variable
            found = cls(process)
        else:
            found = cls(launched, {"container": process})
        found.mark("import")
        return found

    def mark(self, part: str) -> None:
        """A part ends now."""
        assert part in PARTS, part
        self.ends[part] = clock.now()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each part that has ended, in order."""
        found, before = {}, self.began
        for part in PARTS:
            if part in self.ends:
                found[part] = max(0.0, self.ends[part] - before)
                before = self.ends[part]
        return found

    @property
    def fields(self) -> dict[str, float]:
        """The same for the journal: PART_s, and total_s."""
        seconds = self.seconds
        return {**{f"{part}_s": value for part, value in seconds.items()}, "total_s": sum(seconds.values())}

    def sentence(self) -> str:
        """The budget as one line."""
        parts = ", ".join(f"{part.replace('_', ' ')} {value:.1f}" for part, value in self.seconds.items())
        return f"start-up {sum(self.seconds.values()):.1f} s: {parts}"


def _launched() -> float | None:
    try:
        return float(env.get(LAUNCHED) or "")
    except ValueError:
        return None
