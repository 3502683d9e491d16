"""The evaluate stage: features of samples and reference in blocks, then every metric from the stored features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hpc_gen.metrics import extractors, fidelity, suite
from hpc_gen.metrics.extractors import NetworkExtractor
from hpc_gen.metrics.moments import check_finite
from hpc_gen.metrics.results import MetricFile, read
from hpc_gen.metrics.statistics import Statistics
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling.index import SampleIndex, read_index
from hpc_gen.sampling.plan import describe
from hpc_gen.stages.device import task_device
from hpc_gen.stages.reference import ReferenceImages, open_reference
from hpc_gen.stages.units import StageContext, Unit
from hpc_gen.training.precision import set_determinism

SAMPLES, REFERENCE = "samples", "reference"


class EvaluateWorker:
    """Units are blocks of features, of the samples first; `finish` turns all of them into `metrics/TAG.json`."""

    stage = "evaluate"

    def __init__(self, context: StageContext) -> None:
        """Look at all inputs. Raises UserError or DataError before any feature is computed."""
        config = context.experiment.evaluate
        if config is None:
            raise UserError(f"experiment '{context.experiment.name}' has no evaluate section; add one to its file")
        self._config = config
        self._run: RunFolder = context.run
        self._context = context
        self.samples: SampleIndex = read_index(context.run.samples(config.tag))
        chosen = config.extractor
        self.extractor = extractors.spec(chosen.name, chosen.weights, chosen.sha256, context.workspace)
        found = open_reference(config, context.workspace, self.extractor, self.samples.image_shape)
        self.statistics: Statistics | None = found.statistics
        self._images_of_reference: ReferenceImages | None = found.images
        self._network: extractors.Extractor | None = None
        num_reference = found.images.rows if found.images is not None else None
        suite.check_counts(config.metrics, self.samples.num_images, num_reference, config.kid_subset_size)

    def units(self) -> list[Unit]:
        """Blocks of the samples, then of the reference."""
        names = [f"{kind}-{i:06d}" for kind in (SAMPLES, REFERENCE) for i in range(len(self._ranges(kind)))]
        return [Unit(name, i) for i, name in enumerate(names)]

    def fingerprint(self) -> str:
        """Hash of what determines the features: images, extractor and its weights, batch split and threads."""
        images = self._images_of_reference
        facts = {
            "samples": self.samples.sha256,
            "plan": self.samples.plan.hash,
            "reference": images.table.identity if images is not None else None,
            "reference_rows": images.rows if images is not None else 0,
            "extractor": dict(self.extractor.description),
            "batch": self._config.batch,
            "block_images": self._config.block_images,
            "threads": self._config.threads,
            "device": task_device(self._context.task).type,
        }
        return _sha256(facts)

    def do(self, unit: Unit, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """Features of one block as safetensors: `features` float32 [n, D], `ids` int64 [n], `logits` if there are."""
        set_determinism(True, self._config.threads)
        kind, _, number = unit.name.partition("-")
        ids = self._ranges(kind)[int(number)]
        images = self._images(kind, ids)
        network = self._ready_network()
        found: list[extractors.Features] = []
        for start in range(0, len(ids), self._config.batch):
            poll()
            found.append(network(images[start : start + self._config.batch]))
        tensors = {"features": torch.cat([part.features for part in found]), "ids": torch.tensor(list(ids))}
        if self.extractor.has_logits:
            tensors["logits"] = torch.cat([part.logits for part in found if part.logits is not None])
        check_finite(tensors["features"], [self._image_name(kind, i) for i in ids])
        staged = staging / f"{number}.safetensors"
        commit.write_bytes(staged, safetensors.torch.save(tensors, {"fingerprint": self.fingerprint()}))
        return {str(self._path(kind, int(number))): staged}

    def finish(self) -> None:
        """Compute the metrics; nothing happens when the file there was made from the same features and settings."""
        path = self._run.metrics(self._config.tag)
        fingerprint = self._metrics_fingerprint()
        if path.exists() and read(path).fingerprint == fingerprint:
            return
        set_determinism(True, self._config.threads)
        samples, logits = self._load(SAMPLES)
        images, facts = self._images_of_reference, {}
        if images is not None:
            facts = {"table": images.table.identity, "rows": images.rows}
        reference = suite.Reference(self._load(REFERENCE)[0] if images is not None else None, self.statistics, facts)
        found = suite.numbers(self._config.metrics, samples, logits, reference, self._config.kid_subset_size)
        plan = self.samples.plan
        records = [
            suite.record(
                number,
                reference,
                extractor=self.extractor.description,
                num_images=self.samples.num_images,
                image_shape=self.samples.image_shape,
                classes=plan.classes,
                num_classes=plan.num_classes,
                subject=self._subject(),
            )
            for number in found
        ]
        MetricFile(self._config.tag, fingerprint, tuple(records)).write(path)

    def _subject(self) -> dict[str, Any]:
        """What was measured: run, checkpoint, plan, features."""
        plan = self.samples.plan
        return {
            "run": self._run.name,
            "run_identity": self._context.resolved.identity,
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

    def _metrics_fingerprint(self) -> str:
        config = self._config
        statistics = self.statistics.sha256 if self.statistics is not None else None
        return _sha256(
            [self.fingerprint(), list(config.metrics), config.kid_subset_size, fidelity.version(), statistics]
        )

    def _ranges(self, kind: str) -> list[range]:
        images = self._images_of_reference
        count = self.samples.num_images if kind == SAMPLES else images.rows if images is not None else 0
        size = self._config.block_images
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def _images(self, kind: str, ids: range) -> Tensor:
        """Images uint8 [n, 3, H, W] of a block."""
        if kind == SAMPLES:
            return self.samples.read(ids)
        assert self._images_of_reference is not None
        return self._images_of_reference.read(ids)

    def _image_name(self, kind: str, i: int) -> str:
        if kind == SAMPLES or self._images_of_reference is None:
            return str(self.samples.path(i))
        return self._images_of_reference.name(i)

    def _path(self, kind: str, number: int) -> Path:
        return self._run.features(self._config.tag) / kind / f"{number:06d}.safetensors"

    def _ready_network(self) -> extractors.Extractor:
        if self._network is None:
            self._network = self.extractor.build()
            if isinstance(self._network, NetworkExtractor):
                self._network.to(task_device(self._context.task))
        return self._network

    def _load(self, kind: str) -> tuple[list[Tensor], Tensor | None]:
        """Features of all blocks in order, and logits. Raises DataError for a block made from other inputs."""
        features: list[Tensor] = []
        logits: list[Tensor] = []
        for number, ids in enumerate(self._ranges(kind)):
            path = self._path(kind, number)
            tensors, fingerprint = _read_features(path)
            if fingerprint != self.fingerprint() or tensors["ids"].tolist() != list(ids):
                raise DataError(f"{path} was made from other images or settings; run the evaluate stage again")
            features.append(tensors["features"])
            if "logits" in tensors:
                logits.append(tensors["logits"])
        return features, torch.cat(logits) if logits else None


def _read_features(path: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safetensors.safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            return {name: stream.get_tensor(name) for name in stream.keys()}, metadata.get("fingerprint")  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it and run the evaluate stage again") from error


def _sha256(facts: Any) -> str:
    return hashlib.sha256(
        json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


def worker(context: StageContext) -> EvaluateWorker:
    """The factory that the stage runner names."""
    return EvaluateWorker(context)
