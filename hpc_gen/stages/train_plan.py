"""What training will hold and compute on so many ranks, with no GPU: for --dry-run --world-size, and for MFU.

The networks are built on the meta device, the objective runs on tensors without memory, process groups are fake.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from hpc_gen.config.loader import Resolved
from hpc_gen.methods.protocol import Method
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import weights
from hpc_gen.stages.build import table_facts
from hpc_gen.stages.frozen import give_stand_ins
from hpc_gen.training.engines import build
from hpc_gen.training.fake_step import FakeStep, measure
from hpc_gen.training.memory_plan import plan_memory

Columns = dict[str, tuple[str, tuple[int, ...]]]


def lines(resolved: Resolved, workspace: Path) -> list[str]:
    """The memory plan on `train.ranks` ranks and the FLOPs of an image, a line each.

    Raises UserError where the ranks or the engine do not fit, or there is no training.
    """
    config = resolved.experiment.train
    if config is None:
        raise UserError(f"experiment '{resolved.experiment.name}' has no 'train' section; add one")
    try:
        method, columns = _method(resolved, workspace)
    except UserError as error:
        return [f"not known yet ({error})"]  # the table is not there, and the config does not say what it will be
    build.refuse(method, config, config.ranks, "cuda")  # what is planned for has GPUs
    share = config.global_batch // config.engine.data_ranks(config.ranks)
    micro_batch = config.micro_batch_for(config.engine.data_ranks(config.ranks))
    step = measure(method, columns, config, micro_batch)
    method, _ = _method(resolved, workspace)
    held = measure(method, columns, config, micro_batch, as_engine=True).activation_bytes
    method, _ = _method(resolved, workspace)
    plan = plan_memory(method, config, config.ranks, held)
    turns = ", ".join(f"{name} {flops / 1e9:,.2f}" for name, flops in step.turn_flops.items())
    return [
        *plan.lines(),
        f"micro-batch of {micro_batch} images, {share // micro_batch} per step and rank",
        f"{step.flops_per_image / 1e9:,.2f} GFLOP per image, forward and backward ({turns})",
    ]


def flops_per_image(run: RunFolder, resolved: Resolved, workspace: Path) -> FakeStep:
    """What a step costs, measured once per run: the file flops.json of the run folder remembers it."""
    path = run.path / "flops.json"
    config = resolved.experiment.train
    assert config is not None
    try:
        told = json.loads(path.read_bytes())
        if told["identity"] == resolved.identity:
            return FakeStep(**told["step"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or by another version
    method, columns = _method(resolved, workspace)
    step = measure(method, columns, config, config.coupling_group)
    commit.write_json(path, {"identity": resolved.identity, "step": asdict(step)})
    return step


def _method(resolved: Resolved, workspace: Path) -> tuple[Method, Columns]:
    """A fresh method on the meta device, and the columns of its table (where there is none yet: as the method asks)."""
    method = weights.meta_of(resolved.experiment, workspace)
    give_stand_ins(method)
    table = weights.known_table(resolved.experiment, workspace)
    found: Columns = {name: (spec.dtypes[0], spec.shape) for name, spec in method.columns().items()}
    return method, {**found, **(dict(table_facts(table).columns) if table is not None else {})}
