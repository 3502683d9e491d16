"""(c) How long a checkpoint stops the loop, against one memcpy of the rank's share; and how long the write takes.

The stall is taken around all that the loop does for a save, from the end of the step's other work to the moment it asks
for the next iteration, on both ranks at once. The save before is over by then, and peers run on both ranks at once too.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from facts import ROOT
from in_training import RANKS, make_run, run_of, run_ranks, train_with, write_result
from measure import Spread, Table

from hpc_gen.runtime import journal

CONFIG = ROOT / "job_configs" / "demo" / "mnist16.yaml"
ROWS, SIZE, BATCH = 256, 16, 8


@dataclass(frozen=True)
class Settings:
    """Saves that count, after the first of the attempt, which makes the host buffers."""

    rounds: int


def bench(quick: bool) -> list[Table]:
    """One table: stall, memcpy, write and torch.save of the same bytes."""
    from hpc_gen.data.write import write_table

    chosen = Settings(3 if quick else 7)
    with tempfile.TemporaryDirectory(prefix="hpc-gen-bench-") as name:
        folder = Path(name)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (ROWS, 1, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        columns = {"pixels": pixels, "labels": torch.arange(ROWS) % 10}
        write_table(folder / "tables" / "bench", columns, shard_rows=64, num_classes=10)
        resolved = make_run(folder, CONFIG, _overrides(quick, chosen))
        found = run_ranks(__file__, folder, {"rounds": chosen.rounds})
        events = [event for event in journal.read(run_of(folder)) if event.task == 0]
        committed = [event.fields for event in events if event.kind == "save_committed"][1 : chosen.rounds + 1]
    return [_table(found, committed, chosen, resolved.identity)]


def _overrides(quick: bool, settings: Settings) -> list[str]:
    width = ["method.hidden=64", "method.depth=2"] if quick else ["method.hidden=512", "method.depth=6"]
    images = (settings.rounds + 2) * BATCH  # the first save is set apart, the last ends the training
    return [
        *width,
        "method.patch_size=8",
        "data.table=tables/bench",
        f"train.global_batch={BATCH}",
        f"train.total_images={images}",
        "train.schedule.warmup_images=0",
        f"train.log_every={images}",
        f"train.save_every={BATCH}",
        "train.keep_last=1",
        "train.keep_every=null",
        "train.validate=null",
        "train.preview=null",
        "stages=[train]",
    ]


def _table(found: dict[str, Any], committed: list[dict[str, Any]], settings: Settings, identity: str) -> Table:
    stall, copy, plain = (Spread.of(found[name]) for name in ("stall_s", "memcpy_s", "torch_save_s"))
    booked = Spread.of([float(fields["stall_s"]) for fields in committed])
    write = Spread.of([float(fields["write_s"]) for fields in committed])
    share_mib = found["share_bytes"] / 2**20
    table = Table(
        "Checkpoint save, 2 ranks",
        f"{found['parameters']:,} parameters; weights, one average and two moments, {found['tensors']} tensors, "
        f"{share_mib:.0f} MiB per rank; {settings.rounds} saves after the first, peers by turns with them, on both "
        "ranks at once; numbers of rank 0. Files lie in the temporary folder, both ranks on one disk. Ratio of the "
        "stall: to one memcpy of the share between warm buffers (issue 4 asks for at most 1.5); of the write: to "
        "torch.save of the share by each rank with one fsync.",
        ("what", "ms", "MiB/s per rank", "ratio"),
        identity=identity,
    )

    def add(name: str, seconds: Spread, ratio: str) -> None:
        table.add(name, seconds.show("{:.1f}", 1e3), seconds.per(share_mib).show("{:,.0f}"), ratio)

    add("stall of the loop for one save", stall, stall.over(copy).show())
    add("of it, copy to the host buffers (stall_s in the journal)", booked, booked.over(copy).show())
    add("one memcpy of the rank's share", copy, "1.00")
    first = Spread.of([found["first_stall_s"]])
    table.add("first save of an attempt (makes the host buffers)", f"{1e3 * first.values[0]:.1f}", "-", "-")
    add("write in the background (write_s): DCP, SHA-256, fsync, manifest, rename", write, write.over(plain).show())
    add("torch.save of the share, fsync (synchronous, no hash)", plain, "1.00")
    return table


# -- what each rank does --------------------------------------------------------------------------------------------


@dataclass
class Stalls:
    """A periodic action just before each save, and the question for a stop just after it."""

    job: Any
    folder: Path
    share: torch.Tensor
    target: torch.Tensor
    stall_s: list[float] = field(default_factory=list)
    memcpy_s: list[float] = field(default_factory=list)
    torch_save_s: list[float] = field(default_factory=list)
    begun: float | None = None

    def before(self, images_seen: int) -> dict[str, float]:
        """Let the save before end everywhere, time the peers, start the clock."""
        ranks = self.job.ranks
        self.job.chain.wait()
        ranks.barrier()
        self.memcpy_s.append(_seconds(lambda: self.target.copy_(self.share)))
        ranks.barrier()
        self.torch_save_s.append(_seconds(self._torch_save))
        ranks.barrier()
        self.begun = time.perf_counter()
        return {}

    def _torch_save(self) -> None:
        path = self.folder / f"plain_{self.job.ranks.rank}.pt"
        with path.open("wb") as stream:
            torch.save(self.share, stream)
            stream.flush()
            os.fsync(stream.fileno())
        path.unlink()

    def after(self) -> None:
        """The loop asks for its next iteration."""
        if self.begun is not None:
            self.stall_s.append(time.perf_counter() - self.begun)
            self.begun = None


def _seconds(action: Any) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def rank_body(folder: Path, settings: Settings) -> None:
    """One rank: our train stage, a save after each step."""
    from hpc_gen.runtime.ranks import Ranks
    from hpc_gen.runtime.stop import Stop, StopToken
    from hpc_gen.training.loop import Periodic

    found: list[Stalls] = []
    facts: dict[str, Any] = {}

    class AskedAfterSave(StopToken):
        def agree(self, ranks: Ranks) -> Stop | None:
            found[0].after()
            return super().agree(ranks)

    def hook(job: Any) -> None:
        numbers = [p.numel() for module in job.engine.modules().values() for p in module.parameters()]
        # per parameter: weight, average, two moments and a step count; buffers and the loop's own state are a few bytes
        share_bytes = 4 * 4 * sum(numbers) // RANKS
        facts.update(parameters=sum(numbers), tensors=5 * len(numbers), share_bytes=share_bytes)
        share = torch.ones(share_bytes // 4)
        found.append(Stalls(job, folder, share, torch.zeros_like(share)))
        job.periodic = [Periodic("peers", job.config.save_every, found[0].before)]
        job.stop = AskedAfterSave()

    train_with(folder, hook)
    stalls = found[0]
    if stalls.job.ranks.is_main:
        kept = slice(1, settings.rounds + 1)
        timed = {"stall_s": stalls.stall_s, "memcpy_s": stalls.memcpy_s, "torch_save_s": stalls.torch_save_s}
        content = {name: values[kept] for name, values in timed.items()}
        write_result(folder, {**facts, **content, "first_stall_s": stalls.stall_s[0]})


if __name__ == "__main__":
    rank_body(Path(sys.argv[1]), Settings(**json.loads(sys.argv[2])))
