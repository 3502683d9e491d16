"""The evaluate stage: features of samples and reference in blocks, then every metric from the stored features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

import hpc_gen
from eval_jobs.device import task_device
from hpc_gen.config.experiment import EvaluateConfig
from hpc_gen.metrics import extractors, fidelity, isc, kid, prc
from hpc_gen.metrics.extractors import NetworkExtractor
from hpc_gen.metrics.frechet import frechet_distance
from hpc_gen.metrics.moments import Moments, check_finite, merge_all
from hpc_gen.metrics.results import MetricFile, MetricRecord, read
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling.index import SampleIndex, read_index
from hpc_gen.sampling.plan import describe
from hpc_gen.stages.build import open_table
from hpc_gen.stages.units import StageContext, Unit
from hpc_gen.training.precision import set_determinism

PIXELS = "pixels"
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
        self.reference = open_table(context.workspace, config.reference.table)
        self.reference_rows = _reference_rows(config, self.reference.rows)
        self._check_sizes()
        chosen = config.extractor
        self.extractor = extractors.spec(chosen.name, chosen.weights, chosen.sha256, context.workspace)
        self._network: extractors.Extractor | None = None
        self._check_counts()

    def _check_sizes(self) -> None:
        column = self.reference.index.columns.get(PIXELS)
        if column is None or column.dtype != "uint8":
            have = ", ".join(f"{name} {info.dtype}" for name, info in self.reference.index.columns.items())
            raise DataError(
                f"{self.reference.folder} has no column '{PIXELS}' of uint8 (it has: {have}); "
                "name a table of pixels in evaluate.reference.table"
            )
        if tuple(column.shape[1:]) != self.samples.image_shape[1:]:
            raise DataError(
                f"the samples are {_size(self.samples.image_shape)} pixels and the images of {self.reference.folder} "
                f"{_size(column.shape)}: a score across sizes means nothing; encode the reference at the samples' size"
            )

    def _check_counts(self) -> None:
        """Refuse now what the metrics would refuse after an hour of features."""
        fewest = min(self.samples.num_images, self.reference_rows)
        wanted = {"fid": 2, "prc": prc.NEIGHBORHOOD + 1, "kid": self._config.kid_subset_size}
        for metric, number in wanted.items():
            if metric in self._config.metrics and fewest < number:
                raise UserError(
                    f"metric '{metric}' needs {number} images, but there are {self.samples.num_images} samples and "
                    f"{self.reference_rows} reference images; use more"
                    f"{', or lower evaluate.kid_subset_size' if metric == 'kid' else ''}"
                )
        if "isc" in self._config.metrics and self.samples.num_images < isc.SPLITS:
            raise UserError(
                f"metric 'isc' needs {isc.SPLITS} images, but there are {self.samples.num_images} samples; sample more"
            )

    def units(self) -> list[Unit]:
        """Blocks of the samples, then of the reference."""
        names = [f"{kind}-{i:06d}" for kind in (SAMPLES, REFERENCE) for i in range(len(self._ranges(kind)))]
        return [Unit(name, i) for i, name in enumerate(names)]

    def fingerprint(self) -> str:
        """Hash of what determines the features: images, extractor and its weights, batch split and threads."""
        facts = {
            "samples": self.samples.sha256,
            "plan": self.samples.plan.hash,
            "reference": self.reference.identity,
            "reference_rows": self.reference_rows,
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
        reference, _ = self._load(REFERENCE)
        records = [self._record(*number) for number in self._numbers(samples, reference, logits)]
        MetricFile(self._config.tag, fingerprint, tuple(records)).write(path)

    def _numbers(
        self, samples: list[Tensor], reference: list[Tensor], logits: Tensor | None
    ) -> list[tuple[str, float | None, float | None, str | None, dict[str, Any]]]:
        """(name, value, std, note, settings) of every metric asked for, in the config's order."""
        numbers: list[tuple[str, float | None, float | None, str | None, dict[str, Any]]] = []
        generated, real = torch.cat(samples), torch.cat(reference)
        for metric in self._config.metrics:
            if metric == "fid":
                value = frechet_distance(_moments(samples), _moments(reference))
                numbers.append(("fid", value, None, _rank_note(generated, real), {"covariance": "unbiased, float64"}))
            elif metric == "kid":
                size = self._config.kid_subset_size
                mean, std = kid.kernel_distance(generated, real, size)
                settings = {
                    "kernel": "polynomial, degree 3",
                    "subsets": kid.SUBSETS,
                    "subset_size": size,
                    "seed": kid.SEED,
                }
                numbers.append(("kid", mean, std, None, settings))
            elif metric == "prc":
                precision, recall = prc.precision_recall(generated, real)
                settings = {"neighborhood": prc.NEIGHBORHOOD}
                numbers.append(("precision", precision, None, None, settings))
                numbers.append(("recall", recall, None, None, settings))
            elif logits is None:
                numbers.append(("isc", None, None, isc.NO_LOGITS, {}))
            else:
                mean, std = isc.inception_score(logits)
                numbers.append(("isc", mean, std, None, {"splits": isc.SPLITS, "seed": isc.SEED}))
        return numbers

    def _record(
        self, name: str, value: float | None, std: float | None, note: str | None, settings: dict[str, Any]
    ) -> MetricRecord:
        measure: dict[str, Any] = {
            "settings": settings,
            "extractor": dict(self.extractor.description),
            "num_images": self.samples.num_images,
            "image_shape": list(self.samples.image_shape),
            "classes": self.samples.plan.classes,
            "num_classes": self.samples.plan.num_classes,
        }
        if name != "isc":
            measure["reference"] = {"table": self.reference.identity, "rows": self.reference_rows}
        plan = self.samples.plan
        subject = {
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
            "versions": {
                "hpc_gen": hpc_gen.__version__,
                "torch": str(torch.__version__),
                "numpy": np.__version__,
                "torch_fidelity": fidelity.version(),
            },
        }
        return MetricRecord(name, value, std, note, measure, subject)

    def _metrics_fingerprint(self) -> str:
        config = self._config
        return _sha256([self.fingerprint(), list(config.metrics), config.kid_subset_size, fidelity.version()])

    def _ranges(self, kind: str) -> list[range]:
        count = self.samples.num_images if kind == SAMPLES else self.reference_rows
        size = self._config.block_images
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def _images(self, kind: str, ids: range) -> Tensor:
        """Images uint8 [n, 3, H, W] of a block."""
        if kind == SAMPLES:
            return self.samples.read(ids)
        pixels = self.reference.read(np.arange(ids.start, ids.stop), [PIXELS])[PIXELS]
        return pixels.expand(-1, 3, -1, -1).contiguous()  # grey images become colour ones

    def _image_name(self, kind: str, i: int) -> str:
        return str(self.samples.path(i)) if kind == SAMPLES else f"row {i} of {self.reference.folder}"

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


def _reference_rows(config: EvaluateConfig, rows: int) -> int:
    wanted = config.reference.rows
    if wanted is not None and wanted > rows:
        raise UserError(f"evaluate.reference.rows is {wanted}, but {config.reference.table} has {rows} rows; lower it")
    return wanted or rows


def _moments(blocks: Sequence[Tensor]) -> Moments:
    return merge_all([Moments.of(block) for block in blocks])


def _rank_note(samples: Tensor, reference: Tensor) -> str | None:
    fewest, length = min(len(samples), len(reference)), samples.shape[1]
    if fewest > length:
        return None
    return f"{fewest} images give {length} features a singular covariance: compare only at the same counts"


def _size(shape: Sequence[int]) -> str:
    return f"{shape[-1]} x {shape[-2]}"


def _sha256(facts: Any) -> str:
    return hashlib.sha256(
        json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


def worker(context: StageContext) -> EvaluateWorker:
    """The factory that the stage runner names."""
    return EvaluateWorker(context)
