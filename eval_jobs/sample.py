"""The sample stage: blocks of images from a checkpoint, the same images on any number of tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch

from hpc_gen.config.experiment import SampleConfig
from hpc_gen.data.table import Table
from hpc_gen.methods.protocol import Measures, Method
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import UserError
from hpc_gen.sampling import index
from hpc_gen.sampling.generate import Decoder, generate_block
from hpc_gen.sampling.images import write_png
from hpc_gen.sampling.plan import SamplePlan, method_hash
from hpc_gen.stages.build import open_decoder, open_table, settings_of
from hpc_gen.stages.device import task_device
from hpc_gen.stages.generation import trained_method
from hpc_gen.stages.units import StageContext, Unit
from hpc_gen.training.checkpoint import read as checkpoints
from hpc_gen.training.checkpoint.read import CheckpointInfo
from hpc_gen.training.precision import set_determinism


class SampleWorker:
    """Units are the blocks of the plan; a unit's files are its PNGs and `block.json`."""

    stage = "sample"

    def __init__(self, context: StageContext) -> None:
        """Fix the plan and write it. Raises UserError, DataError or CheckpointError before any work is done."""
        config = context.experiment.sample
        if config is None:
            raise UserError(f"experiment '{context.experiment.name}' has no sample section; add one to its file")
        self._context = context
        self._table = open_table(context.workspace, context.experiment.data.table, context.experiment)
        self._checkpoint = _checkpoint(context, config)
        self._device = task_device(context.task)
        self.folder = context.run.samples(config.tag)
        self.plan = _plan(context, config, self._table, self._checkpoint, self._device)
        self.plan.write(self.folder)
        self._method: Method | None = None

    def units(self) -> list[Unit]:
        """One unit per block of the plan."""
        return [Unit(block.name, i) for i, block in enumerate(self.plan.blocks())]

    def fingerprint(self) -> str:
        """The plan's hash: it covers the weights, the settings, the batch split and the seeds."""
        return self.plan.hash

    def do(self, unit: Unit, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """Make the images of one block."""
        set_determinism(True, self.plan.threads)
        block = self.plan.blocks()[unit.index]
        settings = settings_of(self._context.experiment, self.plan.settings)
        method = self._ready_method()
        images = generate_block(method, self.plan, block.ids, settings, poll, self._decoder)
        final = index.block_folder(self.folder, block.name)
        files: dict[str, Path] = {}
        for image_id, image in zip(block.ids, images, strict=True):
            name = index.image_name(image_id)
            write_png(staging / name, image)
            files[str(final / name)] = staging / name
        curves = method.take_curves() if isinstance(method, Measures) else {}
        facts = index.block_json(self.plan, index.describe_block(block, images), curves)
        commit.write_json(staging / index.BLOCK_NAME, facts)
        files[str(final / index.BLOCK_NAME)] = staging / index.BLOCK_NAME
        return files

    def finish(self) -> None:
        """Write the index over all blocks."""
        index.write_index(self.folder, self.plan)

    def _ready_method(self) -> Method:
        """The method with the plan's weights, built when the first block needs it."""
        if self._method is None:
            experiment, path = self._context.experiment, self._checkpoint.path
            self._method = trained_method(experiment, self._table, path, self.plan.ema, self._device)
        return self._method

    @cached_property
    def _decoder(self) -> Decoder | None:
        """Opened when the first block needs it: the network of a tokenizer may be large."""
        return open_decoder(self._context.experiment, self._table, self._context.workspace, self._device)


def _checkpoint(context: StageContext, config: SampleConfig) -> CheckpointInfo:
    if config.checkpoint == "latest":
        return checkpoints.newest(context.run)
    return checkpoints.at(context.run, config.checkpoint)


def _plan(
    context: StageContext, config: SampleConfig, table: Table, checkpoint: CheckpointInfo, device: torch.device
) -> SamplePlan:
    return SamplePlan(
        run_identity=context.resolved.identity,
        checkpoint_images_seen=checkpoint.images_seen,
        checkpoint_manifest_sha256=checkpoints.manifest_sha256(checkpoint.path),
        ema=config.ema,
        method_hash=method_hash(context.experiment.method),
        seed=config.seed,
        num_images=config.num_images,
        block_images=config.block_images,
        batch=config.batch,
        threads=config.threads,
        device=device.type,
        classes=config.classes,
        num_classes=table.index.num_classes,
        settings=settings_of(context.experiment, config.settings).model_dump(mode="json"),
        table_identity=table.identity,
        table=table,
    )


def worker(context: StageContext) -> SampleWorker:
    """The factory that the stage runner names."""
    return SampleWorker(context)
