"""The matrix of engines: every engine on several numbers of ranks against one process, undisturbed and killed.

Shared by tests/distributed/test_engine_matrix.py (its diagonal) and tests/prove_engines.py (all of it, as a table).
"""

from __future__ import annotations

from dataclasses import dataclass

import experiments
from experiments import Workspace
from warm_ranks import WarmRanks, output

from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.journal import attempts
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.training.checkpoint import manifest

# 4 steps with micro-batches even at 4 ranks, a norm that clips, three or more buckets or units, validation of the average
STANDARD = """
name: matrix
seed: 7
method:
  {name: energy, input: pixels, image_size: 8, channels: 1, patch_size: 4, hidden: 16, depth: 2, heads: 2,
   diffusion_timesteps: 50}
data: {table: tables/toy, validation_table: tables/toyval, shuffle_shards: 2}
train:
  total_images: 128
  global_batch: 32
  micro_batch: 4
  optimizer: {lr: 1.0e-3, clip: 0.5}
  engine: {bucket_mb: 0.005}
  ema: {main: {decay: 0.9}}
  validate: {every_images: 64, num_images: 24}
  log_every: 32
  save_every: 64
  keep_last: 3
"""
# every loss on, a learnable step size (a parameter without axis) in a group of its own
ENERGY = STANDARD.replace(
    "diffusion_timesteps: 50}",
    "diffusion_timesteps: 50,\n   variant: energy, energy: {grad_multiplier: 30.0, learnable_step_size: true, "
    "step_size: 0.05, step_size_lr_scale: 10.0, contrastive_weight: 0.05}}",
)
# imported once, not by every rank of every attempt
WARM = (
    "deepspeed",
    "hpc_gen.training.engines.deepspeed",
    "megatron.core.tensor_parallel.layers",
    "torch.distributed.fsdp",
)
VARIANTS = {"standard": STANDARD, "energy": ENERGY}
SIZES = (1, 2, 4)
END = "000000000128"

ENGINES: dict[str, tuple[str, ...]] = {
    "ddp": (),
    "fsdp z2": ("train.engine.name=fsdp", "train.engine.stage=2"),
    "fsdp z3": ("train.engine.name=fsdp", "train.engine.stage=3"),
    "hsdp 2x2": ("train.engine.name=fsdp", "train.engine.stage=3", "train.engine.shards=2"),
    "deepspeed z1": ("train.engine.name=deepspeed", "train.engine.stage=1"),
    "deepspeed z2": ("train.engine.name=deepspeed", "train.engine.stage=2"),
    "deepspeed z3": ("train.engine.name=deepspeed", "train.engine.stage=3"),
    "tp 2": ("train.engine.tensor_parallel=2",),
}
_INSIDE = "refused: a loss that differentiates inside its forward"
REFUSED = {(engine, "energy"): _INSIDE for engine in ("fsdp z3", "hsdp 2x2", "deepspeed z3", "tp 2")}
FEWEST = {"hsdp 2x2": 2, "tp 2": 2}

# Rounding of fp32 sums in another order, after 4 steps: 2e-7 was measured. Tight on purpose: AdamW hides a gradient of
# the wrong scale, and half of it in every block moved these values by 5e-6 only.
TOLERANCE = {"standard": 1e-6, "energy": 2e-6}


@dataclass(frozen=True)
class Verdict:
    """What one cell showed; `worst`: the largest relative difference of a row's value from one process."""

    worst: float
    order_equal: bool
    rows_equal: bool

    def holds(self, variant: str) -> bool:
        """Whether this is the training that one process does."""
        return self.order_equal and self.rows_equal and self.worst <= TOLERANCE[variant]


def overrides(engine: str, size: int) -> list[str]:
    """The experiment's keys for an engine on so many ranks."""
    return [*ENGINES[engine], f"train.ranks={size}"]


def run_of(space: Workspace, variant: str, engine: str, size: int, kind: str) -> RunFolder:
    """A fresh run folder."""
    name = f"{variant}-{engine}-{size}-{kind}".replace(" ", "-")
    return space.run(name, *overrides(engine, size), text=VARIANTS[variant])


def undisturbed(warm: WarmRanks, space: Workspace, variant: str, engine: str, size: int) -> RunFolder:
    """A run to its end."""
    run = run_of(space, variant, engine, size, "whole")
    assert warm.train(run, size) == [0] * size, output(run)
    return run


def killed(warm: WarmRanks, space: Workspace, variant: str, engine: str, size: int) -> RunFolder:
    """The same run, preempted in its third step, then killed without notice in the step after, then to its end."""
    run = run_of(space, variant, engine, size, "killed")
    codes = warm.train(run, size, fault={"name": "stop", "rank": size - 1, "step": 2})
    assert codes == [ExitCode.REQUEUE] * size, output(run)
    codes = warm.train(run, size, fault={"name": "die", "rank": size - 1, "step": 2})
    assert codes[-1] == -9, codes
    assert warm.train(run, size) == [0] * size, output(run)
    assert [attempt.resumed_from for attempt in attempts(run)][0] is None and len(attempts(run)) == 3
    return run


def moved(warm: WarmRanks, space: Workspace, variant: str, engine: str, size: int, then: int) -> RunFolder:
    """The same run, begun on one number of ranks and ended on another."""
    run = run_of(space, variant, engine, size, f"then-{then}")
    assert warm.train(run, size, ["train.stop_at_images=64"]) == [0] * size, output(run)
    assert warm.train(run, then, [f"train.ranks={then}"]) == [0] * then, output(run)
    return run


def compare(run: RunFolder, reference: RunFolder) -> Verdict:
    """A run against that of one process: rows by value, order and draws by digest."""
    ours, theirs = experiments.rows(run), experiments.rows(reference)
    worst = 0.0
    same = [row[0] for row in ours] == [row[0] for row in theirs]
    for (_, found), (_, expected) in zip(ours, theirs, strict=False):
        same = same and found.keys() == expected.keys()
        for name in found.keys() & expected.keys():
            worst = max(worst, abs(found[name] - expected[name]) / max(abs(expected[name]), 1e-6))
    digests = {manifest.read(each.checkpoints / END).facts["digest"] for each in (run, reference)}
    return Verdict(worst, len(digests) == 1, same)


def same_bytes(run: RunFolder, other: RunFolder) -> bool:
    """Whether the last checkpoints are the same files, byte for byte."""
    return experiments.contents(run.checkpoints / END) == experiments.contents(other.checkpoints / END)
