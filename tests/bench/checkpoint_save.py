"""(c) How long a checkpoint stops the loop, against one memcpy of the rank's share; how long writing and loading take.

First table: a real training on two ranks. The stall is taken around all that the loop does for a save, from the end of
the step's other work to the moment it asks for the next iteration, on both ranks at once. The save before is over by
then, and peers run on both ranks at once too. Second table: the chain alone, with a state of 100 million parameters.
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
    """Stall, memcpy, write and torch.save of the same bytes, in a training and for a state of 100 million parameters."""
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
    return [_table(found, committed, chosen, resolved.identity), _large(quick)]


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
    table.add(
        "first save of an attempt (its buffers were made during the steps before)",
        f"{1e3 * first.values[0]:.1f}",
        "-",
        "-",
    )
    add("write in the background (write_s): DCP, SHA-256, fsync, manifest, rename", write, write.over(plain).show())
    add("torch.save of the share, fsync (synchronous, no hash)", plain, "1.00")
    return table


# -- the chain alone ------------------------------------------------------------------------------------------------

WIDTH, LAYERS = 1024, 8  # a transformer's layer has 12 * WIDTH**2 parameters in its matrices


def _state(layers: int) -> dict[str, torch.Tensor]:
    """Weights, one average, two moments, in the shapes of a transformer; 12.6 million parameters a layer."""
    shapes = {"qkv": (3 * WIDTH, WIDTH), "proj": (WIDTH, WIDTH), "fc1": (4 * WIDTH, WIDTH), "fc2": (WIDTH, 4 * WIDTH)}
    kinds = ("model/net/{}", "ema/net/main/{}", "optim/net/{}/exp_avg", "optim/net/{}/exp_avg_sq")
    names = [f"blocks.{layer}.{name}" for layer in range(layers) for name in shapes]
    generator = torch.Generator().manual_seed(0)
    state = {
        kind.format(name): torch.randn(shapes[name.rpartition(".")[2]], generator=generator)
        for kind in kinds
        for name in names
    }
    return state | {"train/images_seen": torch.tensor(0)}


def _large(quick: bool) -> Table:
    from hpc_gen.runtime.journal import Journal
    from hpc_gen.runtime.ranks import RankInfo, Ranks
    from hpc_gen.runtime.run_folder import RunFolder
    from hpc_gen.training.checkpoint.chain import CheckpointChain, Retention

    rounds, state = (2, _state(1)) if quick else (5, _state(LAYERS))
    count = sum(tensor.numel() for name, tensor in state.items() if name.startswith("model/"))
    size_mib = sum(tensor.nbytes for tensor in state.values()) / 2**20
    seconds: dict[str, list[float]] = {}

    def timed(name: str, action: Any) -> None:
        seconds.setdefault(name, []).append(_seconds(action))

    with tempfile.TemporaryDirectory(prefix="hpc-gen-bench-") as name:
        run = RunFolder(Path(name) / "runs" / "bench")
        run.journal.mkdir(parents=True)
        ranks = Ranks(RankInfo(0, 1, 0, 1, "python"), "gloo", torch.device("cpu"))
        chain = CheckpointChain(run, ranks, None, Journal(run, 1, "train"), Retention(1), print)
        timed("cold", lambda: chain.save(1, state, {}))  # nothing was reserved: what a first save would cost
        chain.wait()
        chain = CheckpointChain(run, ranks, None, Journal(run, 2, "train"), Retention(1), print)
        chain.reserve(state)
        chain._buffers.settle()  # steps run meanwhile
        timed("first", lambda: chain.save(2, state, {}))
        chain.wait()
        copy = {key: tensor.clone() for key, tensor in state.items()}
        plain = Path(name) / "plain.pt"
        for number in range(rounds):
            timed("memcpy", lambda: torch._foreach_copy_(list(copy.values()), list(state.values())))
            timed("stall", lambda number=number: chain.save(3 + number, state, {}))
            timed("write", chain.wait)
            timed("torch_save", lambda: _torch_save(state, plain))
        for _ in range(rounds):
            timed("verify", lambda: _verified(run))
            timed("load", lambda: _loaded(run, copy))
            timed("torch_load", lambda: _into(torch.load(plain, weights_only=True), copy))
    return _large_table(seconds, count, size_mib, rounds)


def _torch_save(state: dict[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _verified(run: Any) -> None:
    from hpc_gen.training.checkpoint import read

    assert read.verify(read.newest(run).path) == []


def _loaded(run: Any, target: dict[str, torch.Tensor]) -> None:
    from hpc_gen.training.checkpoint import read, storage

    _into(storage.StoredTensors(read.newest(run).path), target)


def _into(source: Any, target: dict[str, torch.Tensor]) -> None:
    for key, tensor in target.items():
        tensor.copy_(source[key])


def _large_table(seconds: dict[str, list[float]], parameters: int, size_mib: float, rounds: int) -> Table:
    spreads = {name: Spread.of(values) for name, values in seconds.items()}
    table = Table(
        "Checkpoint of a large state, 1 rank",
        f"{parameters:,} parameters; weights, one average and two moments, {size_mib:,.0f} MiB; {rounds} rounds. Ratios: "
        "stalls to one memcpy between warm buffers; the write to torch.save; loading to torch.load. Files were read "
        "just before, so loads come from the page cache.",
        ("what", "ms", "MiB/s", "ratio"),
    )
    rows = (
        ("stall of a save", "stall", "memcpy"),
        ("stall of the first save, its buffers reserved", "first", "memcpy"),
        ("stall of a first save with nothing reserved", "cold", "memcpy"),
        ("one memcpy of the state", "memcpy", "memcpy"),
        ("write in the background: DCP, SHA-256, fsync, manifest, rename", "write", "torch_save"),
        ("torch.save of the state, fsync: what blocking would cost", "torch_save", "torch_save"),
        ("verify: SHA-256 of every file", "verify", "torch_load"),
        ("load, tensor by tensor into place", "load", "torch_load"),
        ("torch.load into memory, then into place", "torch_load", "torch_load"),
    )
    for what, name, peer in rows:
        found = spreads[name]
        same = len(found.values) == len(spreads[peer].values)
        ratio = "1.00" if name == peer else found.over(spreads[peer]).show() if same else "-"
        if not same:
            ratio = f"{found.values[0] / sorted(spreads[peer].values)[rounds // 2]:.2f}"
        table.add(what, found.show("{:.0f}", 1e3), found.per(size_mib).show("{:,.0f}"), ratio)
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
