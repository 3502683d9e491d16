"""The sample stage: blocks of images from a checkpoint, the same images on any number of tasks.

Kept are the images (png, npz) or, where nobody will look at them, only the features that the metrics compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from eval_jobs.looks import Look, digest_of, look_at, looks_of, sampled_fingerprint, sampled_name, write_features
from hpc_gen.config.experiment import SampleConfig
from hpc_gen.data.table import Table
from hpc_gen.methods.protocol import Measures, Method
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling import effort, index
from hpc_gen.sampling.class_file import classes_sha256, read_classes, unequal
from hpc_gen.sampling.generate import Decoder, generate_block
from hpc_gen.sampling.images import write_png
from hpc_gen.sampling.npz import write_npz
from hpc_gen.sampling.plan import Block, SamplePlan, method_hash
from hpc_gen.stages.build import condition_table, open_decoder, open_table, settings_of
from hpc_gen.stages.device import task_device
from hpc_gen.stages.generation import trained_method
from hpc_gen.stages.units import StageContext, Unit
from hpc_gen.training.checkpoint import read as checkpoints
from hpc_gen.training.checkpoint.read import CheckpointInfo
from hpc_gen.training.precision import set_determinism


class Methods:
    """The method of the checkpoint and average that were asked for last: one at a time fits into a GPU."""

    def __init__(self) -> None:
        self._key: tuple[Path, str | None] | None = None
        self._method: Method | None = None

    def get(self, key: tuple[Path, str | None], build: Callable[[], Method]) -> Method:
        """The method of that key, built unless it is at hand."""
        if self._method is None or self._key != key:
            self._method = None  # before the next one is built
            self._key, self._method = key, build()
        return self._method


class SampleWorker:
    """Units are the blocks of the plan; a unit's files are its PNGs and `block.json`."""

    stage = "sample"

    def __init__(self, context: StageContext, source: RunFolder | None = None, methods: Methods | None = None) -> None:
        """Fix the plan and write it. Raises UserError, DataError or CheckpointError before any work is done.

        `source`: the run that has the checkpoints; None: the one of the context. Sweeps sample another run's, and share
        `methods` between their points.
        """
        config = context.experiment.sample
        if config is None:
            raise UserError(f"experiment '{context.experiment.name}' has no sample section; add one to its file")
        self._context, self._config = context, config
        self._table = open_table(context.workspace, context.experiment.data.table, context.experiment)
        self._checkpoint = _checkpoint(source or context.run, config)
        self._device = task_device(context.task)
        self.folder = context.run.samples(config.tag)
        self.plan = _plan(context, config, self._table, self._checkpoint, self._device).adopted(self.folder)
        self._looks = self._opened_looks()
        self.plan.write(self.folder)
        self._methods = methods or Methods()
        self._tell_classes()

    def _opened_looks(self) -> list[Look]:
        """The networks that look at images which are not kept; none where they are."""
        if self._config.output != "features":
            return []
        evaluate = self._context.experiment.evaluate
        if evaluate is None:
            raise UserError(
                "sample.output = features keeps what the metrics compare, but there is no section 'evaluate' that says "
                "which; add one, or sample with output=png"
            )
        return looks_of(evaluate, self._context.workspace)

    def _tell_classes(self) -> None:
        if self.plan.listed is not None and self._context.task == 0:
            told = unequal(self.plan.listed, self.plan.num_classes)
            if told is not None:
                print(f"sample: {self._config.class_file}: {told}", flush=True)

    def units(self) -> list[Unit]:
        """One unit per block of the plan."""
        return [Unit(block.name, i) for i, block in enumerate(self.plan.blocks())]

    def fingerprint(self) -> str:
        """The plan's hash: it covers the weights, the settings, the batch split and the seeds.

        Where features are kept in place of images, what they are is part of it.
        """
        if not self._looks:
            return self.plan.hash
        return digest_of([self.plan.hash, *(look.facts() for look in self._looks), self._batch_of_looks])

    @property
    def _batch_of_looks(self) -> int:
        evaluate = self._context.experiment.evaluate
        assert evaluate is not None, "features are kept where a section 'evaluate' says which"
        return evaluate.batch

    def do(self, unit: Unit, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """Make the images of one block."""
        set_determinism(True, self.plan.threads)
        block = self.plan.blocks()[unit.index]
        settings = settings_of(self._context.experiment, self.plan.settings)
        method = self._ready_method()
        with effort.counted(method) as counts:
            images = generate_block(method, self.plan, block.ids, settings, poll, self._decoder)
        final = index.block_folder(self.folder, block.name)
        files: dict[str, Path] = {}
        for name, staged in self._keep(block, images, staging, poll):
            files[str(final / name)] = staged
        curves = method.take_curves() if isinstance(method, Measures) else {}
        curves = {**curves, effort.NAME: counts.curve(len(images))}
        facts = index.block_json(self.plan, index.describe_block(block, images), curves)
        commit.write_json(staging / index.BLOCK_NAME, facts)
        files[str(final / index.BLOCK_NAME)] = staging / index.BLOCK_NAME
        return files

    def _keep(
        self, block: Block, images: Tensor, staging: Path, poll: Callable[[], None]
    ) -> Iterator[tuple[str, Path]]:
        """Write what is kept of a block below `staging`: (name, staged path) of each file."""
        if not self._looks:
            for image_id, image in zip(block.ids, images, strict=True):
                name = index.image_name(image_id)
                write_png(staging / name, image)
                yield name, staging / name
        names = [f"image {i} of the samples" for i in block.ids]
        for look in self._looks:
            tensors = look_at(look, images, names, self._batch_of_looks, self._device, poll)
            name = sampled_name(look)
            fingerprint = sampled_fingerprint(self.plan.hash, look, self._batch_of_looks)
            write_features(staging / name, tensors, block.ids, fingerprint)
            yield name, staging / name

    def finish(self) -> None:
        """Write the index over all blocks, and the one file of all images where it was asked for."""
        index.write_index(self.folder, self.plan, has_images=not self._looks)
        if self._config.output == "npz":
            write_npz(index.read_index(self.folder))

    def _ready_method(self) -> Method:
        """The method with the plan's weights, built when the first block needs it."""
        experiment, path = self._context.experiment, self._checkpoint.path
        return self._methods.get(
            (path, self.plan.ema), lambda: trained_method(experiment, self._table, path, self.plan.ema, self._device)
        )

    @cached_property
    def _decoder(self) -> Decoder | None:
        """Opened when the first block needs it: the network of a tokenizer may be large."""
        return open_decoder(self._context.experiment, self._table, self._context.workspace, self._device)


def _checkpoint(run: RunFolder, config: SampleConfig) -> CheckpointInfo:
    if config.checkpoint == "latest":
        return checkpoints.newest(run)
    return checkpoints.at(run, config.checkpoint)


def _plan(
    context: StageContext, config: SampleConfig, table: Table, checkpoint: CheckpointInfo, device: torch.device
) -> SamplePlan:
    listed = None
    if config.class_file is not None:
        listed = read_classes(context.workspace / config.class_file, config.num_images, table.index.num_classes)
    conditions = condition_table(context.workspace, config, table)
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
        table_identity=conditions.identity,
        table=conditions,
        row_plan=config.rows or "in_order",
        classes_sha256=classes_sha256(listed) if listed is not None else None,
        listed=listed,
    )


def worker(context: StageContext) -> SampleWorker:
    """The factory that the stage runner names."""
    return SampleWorker(context)
