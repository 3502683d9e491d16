"""The evaluate stage: features of samples and reference in blocks, then every metric from the stored features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval_jobs.looks import (
    MAIN,
    Look,
    digest_of,
    look_at,
    looks_of,
    read_features,
    sampled_fingerprint,
    sampled_name,
    write_features,
)
from eval_jobs.read_once import ReadOnce
from hpc_gen.metrics import fidelity, suite
from hpc_gen.metrics.results import MetricFile, MetricRecord, read
from hpc_gen.metrics.statistics import Statistics
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling import index as sample_index
from hpc_gen.sampling.index import SampleIndex, read_index
from hpc_gen.sampling.plan import describe
from hpc_gen.stages.device import task_device
from hpc_gen.stages.reference import ReferenceImages, check_image_size, open_reference, reference_images
from hpc_gen.stages.units import StageContext, Unit
from hpc_gen.training.precision import set_determinism

SAMPLES, REFERENCE = "samples", "reference"


@dataclass(frozen=True)
class FeatureBlock:
    """A unit: images `ids` of samples or reference, seen by one network."""

    name: str
    look: Look
    kind: str
    number: int
    ids: range


class EvaluateWorker:
    """Units are blocks of features, of the samples first; `finish` turns all of them into `metrics/TAG.json`.

    `reference_tag` is the tag under whose features those of the reference lie (None: that of the samples), and `of` the
    run that numbers are told of (None: the one of the context): sweeps share the first and name the second. `like`: a
    worker of the same section, but for its tag, whose networks and reference are used.
    """

    stage = "evaluate"

    def __init__(
        self,
        context: StageContext,
        reference_tag: str | None = None,
        of: RunFolder | None = None,
        like: EvaluateWorker | None = None,
    ) -> None:
        """Look at all inputs. Raises UserError or DataError before any feature is computed."""
        config = context.experiment.evaluate
        if config is None:
            raise UserError(f"experiment '{context.experiment.name}' has no evaluate section; add one to its file")
        self._config = config
        self._run, self._of = context.run, of or context.run
        self._reference_tag = reference_tag or config.tag
        self._context = context
        self._device = task_device(context.task)
        self.samples: SampleIndex = read_index(context.run.samples(config.tag))
        self.looks = like.looks if like is not None else looks_of(config, context.workspace)
        self.statistics: Statistics | None = like.statistics if like is not None else None
        self._images_of_reference: ReferenceImages | None = like._images_of_reference if like is not None else None
        if like is None:
            self._open_reference()
        elif self.samples.image_shape != like.samples.image_shape:
            other = like.samples.folder
            raise DataError(f"{self.samples.folder} has images of another size than {other}; sample again")
        images = self._images_of_reference
        num_reference = images.rows if images is not None else None
        suite.check_counts(config.metrics, self.samples.num_images, num_reference, config.kid_subset_size)
        self.blocks = [*self._in_turn(SAMPLES), *self._in_turn(REFERENCE)]
        self._once: ReadOnce = like._once if like is not None else ReadOnce()

    def _open_reference(self) -> None:
        """The statistics of the main network, and the images if any network needs features of them."""
        shape = self.samples.image_shape
        for look in self.looks:
            if look.key == MAIN:
                found = open_reference(self._config, self._context.workspace, look.spec, shape)
                look.statistics = self.statistics = found.statistics
                self._images_of_reference = found.images
            elif look.statistics is None and self._images_of_reference is None:
                if not self._config.reference.has_images:
                    raise UserError(
                        f"metric '{look.metrics[0]}' has nothing to compare with: give evaluate.reference images, or "
                        f"evaluate.{look.key} statistics of its network"
                    )
                self._images_of_reference = reference_images(self._config, self._context.workspace)
                check_image_size(self._images_of_reference, shape)

    def units(self) -> list[Unit]:
        """Blocks of the samples, then of the reference; those of second networks have names of their own.

        The set of names is the same for any number of tasks, their order is not.
        """
        return [Unit(block.name, i) for i, block in enumerate(self.blocks)]

    def unit_of(self, block: FeatureBlock) -> Unit:
        """The unit of a block."""
        return Unit(block.name, self.blocks.index(block))

    def fingerprint(self) -> str:
        """Hash of what determines the features: images, extractor and its weights, batch split and threads."""
        images = self._images_of_reference
        main = next((look for look in self.looks if look.key == MAIN), None)
        facts = {
            "samples": self.samples.sha256,
            "plan": self.samples.plan.hash,
            "reference": images.source.identity if images is not None else None,
            "reference_rows": images.rows if images is not None else 0,
            "extractor": None,
            "batch": self._config.batch,
            "block_images": self._config.block_images,
            "threads": self._config.threads,
            "device": self._device.type,
            **(main.facts() if main is not None else {}),
        }
        return digest_of(facts)

    def do(self, unit: Unit, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """Features of one block as safetensors: `features` float32 [n, D], `ids` int64 [n], `logits` if there are."""
        set_determinism(True, self._config.threads)
        block = self.blocks[unit.index]
        names = [self._image_name(block.kind, i) for i in block.ids]
        images = self._images(block.kind, block.ids)
        tensors = look_at(block.look, images, names, self._config.batch, self._device, poll)
        staged = staging / f"{block.number:06d}.safetensors"
        write_features(staged, tensors, block.ids, self.fingerprint_of(block))
        return {str(self._path(block)): staged}

    def finish(self) -> None:
        """Compute the metrics; nothing happens when the file there was made from the same features and settings."""
        path = self._run.metrics(self._config.tag)
        if not (path.exists() and read(path).fingerprint == self.metrics_fingerprint()):
            self.measure().write(path)

    def measure(self) -> MetricFile:
        """Every metric, from the stored features. Raises DataError for features of other inputs."""
        set_determinism(True, self._config.threads)
        found: dict[str, list[MetricRecord]] = {}
        for look in self.looks:
            for metric, records in self._measured(look).items():
                found[metric] = records
        records = tuple(record for metric in self._config.metrics for record in found[metric])
        return MetricFile(self._config.tag, self.metrics_fingerprint(), records)

    def _measured(self, look: Look) -> dict[str, list[MetricRecord]]:
        """Records of each metric of one network, in one reading of its features."""
        samples = self._load(look, SAMPLES)
        hashes = samples.get("hashes", [torch.empty(0)])[0]  # features of before copies were counted have none
        copies = len(hashes) - len(torch.unique(hashes))
        images = self._images_of_reference
        real = self._load(look, REFERENCE) if images is not None and self._needs_reference(look) else {}
        reference = suite.Reference(
            real.get("features"),
            look.statistics,
            images.facts() if images is not None else {},
            real.get("spatial"),
        )
        choices = suite.Choices(self._config.kid_subset_size, self._config.isc_split_images, device=self._device)
        logits = samples["logits"][0] if "logits" in samples else None
        found = suite.numbers(look.metrics, samples["features"], logits, reference, choices, samples.get("spatial"))
        note = f"{copies} of {self.samples.num_images} images are copies of others; they count" if copies else None
        records: dict[str, list[MetricRecord]] = {metric: [] for metric in look.metrics}
        for number in found:
            metric = number.name.removesuffix("_infinity")
            metric = next((name for name, parts in suite.PARTS.items() if metric in parts), metric)
            records[metric].append(self._record(number, look, reference, note))
        return records

    def _record(self, number: suite.Number, look: Look, reference: suite.Reference, note: str | None) -> MetricRecord:
        plan = self.samples.plan
        spatial = number.name.startswith("sfid")
        return suite.record(
            number,
            reference,
            extractor=look.spec.describe_spatial() if spatial else look.spec.description,
            num_images=self.samples.num_images,
            image_shape=self.samples.image_shape,
            classes=plan.class_plan,
            num_classes=plan.num_classes,
            subject=self._subject(),
            note=note,
        )

    def _subject(self) -> dict[str, Any]:
        """What was measured: run, checkpoint, plan, features."""
        plan = self.samples.plan
        return {
            "run": self._of.name,
            "run_identity": plan.run_identity if self._of is not self._run else self._context.resolved.identity,
            "checkpoint": {
                "images_seen": plan.checkpoint_images_seen,
                "manifest_sha256": plan.checkpoint_manifest_sha256,
                "ema": plan.ema,
            },
            "plan": describe(plan),
            "samples_index_sha256": self.samples.sha256,
            "features": {
                "fingerprint": self.fingerprint(),
                "batch": self._config.batch,
                "block_images": self._config.block_images,
                "threads": self._config.threads,
            },
        }

    def metrics_fingerprint(self) -> str:
        """Hash of what determines the metrics: features, settings, versions."""
        config = self._config
        looks = [[look.prefix, look.statistics.sha256 if look.statistics is not None else None] for look in self.looks]
        choices = [config.kid_subset_size, config.isc_split_images]
        return digest_of([2, self.fingerprint(), list(config.metrics), choices, fidelity.version(), looks])

    def _needs_reference(self, look: Look) -> bool:
        return suite.needs_images(look.metrics, look.statistics is not None) or (
            look.key != MAIN and look.statistics is None
        )

    def _cut(self, look: Look, kind: str) -> list[FeatureBlock]:
        """The blocks of one network and kind that this stage makes, in order."""
        images, size = self._images_of_reference, self._config.block_images
        if kind == REFERENCE and not self._needs_reference(look):
            return []
        if kind == SAMPLES and not self.samples.has_images:
            return []  # the sample stage has looked at them before it let go of them
        count = self.samples.num_images if kind == SAMPLES else images.rows if images is not None else 0
        ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]
        return [FeatureBlock(f"{look.prefix}{kind}-{i:06d}", look, kind, i, ids) for i, ids in enumerate(ranges)]

    def _in_turn(self, kind: str) -> list[FeatureBlock]:
        """The blocks of all networks, ordered so that a task meets the same images with one after the other.

        A task takes every `num_tasks`-th: of `num_tasks` blocks those of the first network, then those of the next.
        """
        cuts = [cut for cut in (self._cut(look, kind) for look in self.looks) if cut]
        tasks, length = self._context.num_tasks, max(map(len, cuts), default=0)
        return [block for start in range(0, length, tasks) for cut in cuts for block in cut[start : start + tasks]]

    def _images(self, kind: str, ids: range) -> Tensor:
        """Images uint8 [n, 3, H, W] of a block."""
        if kind == SAMPLES:
            return self._once.read(self.samples, ids)
        assert self._images_of_reference is not None
        return self._once.read(self._images_of_reference, ids)

    def _image_name(self, kind: str, i: int) -> str:
        if kind == SAMPLES or self._images_of_reference is None:
            return str(self.samples.path(i))
        return self._images_of_reference.name(i)

    def _path(self, block: FeatureBlock) -> Path:
        tag = self._config.tag if block.kind == SAMPLES else self._reference_tag
        return self._run.features(tag) / f"{block.look.prefix}{block.kind}" / f"{block.number:06d}.safetensors"

    def fingerprint_of(self, block: FeatureBlock) -> str:
        """What a file of features says it was made of. Features of a shared reference know nothing of the samples."""
        if block.kind == REFERENCE and self._reference_tag != self._config.tag:
            config, images = self._config, self._images_of_reference
            assert images is not None
            settings = [config.batch, config.block_images, config.threads, self._device.type]
            return digest_of([images.facts(), block.look.facts(), settings])
        return self.fingerprint()

    def _load(self, look: Look, kind: str) -> dict[str, list[Tensor]]:
        """Tensors of all blocks in order, each name with its blocks; logits and hashes joined.

        Raises DataError for a block made from other inputs.
        """
        if kind == SAMPLES and not self.samples.has_images:
            parts = self._load_sampled(look)
        else:
            blocks = self._cut(look, kind)
            parts = [read_features(self._path(block), block.ids, self.fingerprint_of(block)) for block in blocks]
        found = {name: [part[name] for part in parts] for name in parts[0] if name != "ids"}
        return {name: [torch.cat(each)] if name in ("logits", "hashes") else each for name, each in found.items()}

    def _load_sampled(self, look: Look) -> Sequence[dict[str, Tensor]]:
        """Features that the sample stage has left in the folders of its blocks."""
        fingerprint = sampled_fingerprint(self.samples.plan.hash, look, self._config.batch)
        parts = []
        for block in self.samples.plan.blocks():
            path = sample_index.block_folder(self.samples.folder, block.name) / sampled_name(look)
            parts.append(read_features(path, block.ids, fingerprint))
        return parts


def worker(context: StageContext) -> EvaluateWorker:
    """The factory that the stage runner names."""
    return EvaluateWorker(context)
