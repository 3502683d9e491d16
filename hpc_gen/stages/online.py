"""Evaluation during training: images of the current weights, made by all ranks, scored as the evaluate stage scores.

Every rank makes and looks at an equal number of batches; batches are cut by image id, so features do not depend on the
number of ranks. They are gathered on rank 0 in the order of ids, where the metrics are computed in a thread, so that
all ranks go on looking at the stop token.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hpc_gen.config.experiment import EvaluateConfig, OnlineEvaluationConfig
from hpc_gen.methods.protocol import Curve
from hpc_gen.metrics import suite
from hpc_gen.metrics.extractors import Extractor, Features, NetworkExtractor, joined
from hpc_gen.metrics.moments import check_finite
from hpc_gen.metrics.results import MetricFile
from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.agreement import Poll
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.randomness import Draws
from hpc_gen.sampling.generate import PURPOSE, generate_batch, sampling_mode
from hpc_gen.sampling.plan import SamplePlan, describe, method_hash
from hpc_gen.sampling.preview import in_order, share_of
from hpc_gen.stages.build import settings_of
from hpc_gen.stages.networks import extractor_spec
from hpc_gen.stages.reference import OpenedReference, check_image_size, open_reference
from hpc_gen.stages.surroundings import Surroundings, measured, scalars

IN_TRAINING = "in training"  # stands where a plan names the manifest of its checkpoint: these weights are not saved yet
NOT_IN_TRAINING = ("sfid", "clip_fid", "fd_dinov2")  # other layers and networks: the evaluate stage has them
POLL_S = 0.2  # how often rank 0 looks at the stop token while it computes metrics

_Result = TypeVar("_Result")


class OnlineEvaluation:
    """Metrics of `train.evaluate`: values for the row, and `metrics/online-IMAGES.json` with how they were made."""

    def __init__(self, around: Surroundings, config: OnlineEvaluationConfig) -> None:
        """Open and check everything. Raises UserError or DataError before the first step."""
        offline = around.experiment.evaluate
        assert offline is not None, "an experiment with train.evaluate has a section evaluate"
        self._around, self._config, self._offline = around, config, offline
        self._metrics = [name for name in offline.metrics if name not in NOT_IN_TRAINING]
        if not self._metrics:
            raise UserError(
                f"train.evaluate has nothing to measure: {', '.join(offline.metrics)} are for the evaluate stage; name "
                "fid, kid, prc or isc in evaluate.metrics"
            )
        self._deadline: float | None = None
        chosen = offline.extractor
        self._spec = extractor_spec(chosen.name, chosen.weights, chosen.sha256, around.workspace)
        self._opened: OpenedReference = open_reference(offline, around.workspace, self._spec, None)
        num_reference = self._opened.images.rows if self._opened.images is not None else None
        suite.check_counts(self._metrics, config.num_images, num_reference, offline.kid_subset_size)
        num_classes = around.table.index.num_classes
        if config.classes != "uniform" and num_classes and config.num_images % num_classes:
            raise UserError(
                f"train.evaluate.num_images {config.num_images} is not a multiple of the {num_classes} classes; "
                f"use {config.num_images - config.num_images % num_classes + num_classes}, or "
                "train.evaluate.classes=uniform"
            )
        self._settings = settings_of(around.experiment, config.settings)
        self._network: Extractor | None = None
        self._reference: list[Tensor] | None = None  # features of the reference, on rank 0, once they are there
        self._begun: list[Tensor] = []  # of them, this rank's so far: a budget that ends among them costs none
        _ = around.decoder  # a tokenizer that does not fit is refused now

    def __call__(self, images_seen: int) -> dict[str, float]:
        """Evaluate the current weights; the same values on every rank. Raises StopRequested on all ranks at once."""
        job = self._around.job
        begun = clock.monotonic()
        self._deadline = begun + self._config.budget_s if self._config.budget_s is not None else None
        network = self._ready_network()
        try:
            self._prepare_reference(network)
            plan = self._plan(images_seen)
            features, logits, shape, curves = self._samples(network, plan)
        finally:
            if isinstance(network, NetworkExtractor):
                network.to(torch.device("cpu"))  # between evaluations the GPU is the training's
        found: list[suite.Number] = []
        with self._shared() as poll:
            if job.ranks.is_main:
                found = in_background(lambda: self._numbers(features, logits), poll)
                self._write(images_seen, plan, found, shape)
        values: dict[str, float] = job.ranks.broadcast_object(suite.row_values(found))
        seconds = clock.monotonic() - begun
        job.journal.event(
            "evaluate", images_seen=images_seen, num_images=plan.num_images, seconds=seconds, ema=plan.ema, **values
        )
        text = ", ".join(f"{name.removeprefix('evaluate/')} {value:.4g}" for name, value in values.items())
        job.say(f"evaluation at {images_seen} images: {text or 'no metric available'} ({seconds:.0f} s)")
        return {**values, **curves}

    @contextmanager
    def _shared(self) -> Iterator[Poll]:
        """A stretch of work of all ranks that ends on all of them when the budget of any is spent (a UserError)."""
        with self._around.shared() as poll:

            def look() -> None:
                poll()
                if self._deadline is not None and clock.monotonic() > self._deadline:
                    raise UserError(
                        f"train.evaluate.budget_s = {self._config.budget_s:g} is spent; raise it, or draw fewer images"
                    )

            yield look

    # ---- images and features, on all ranks

    def _plan(self, images_seen: int) -> SamplePlan:
        """What defines the images, in the words of the sample stage."""
        experiment, config, table = self._around.experiment, self._config, self._around.table
        return SamplePlan(
            run_identity=self._around.resolved.identity,
            checkpoint_images_seen=images_seen,
            checkpoint_manifest_sha256=IN_TRAINING,
            ema=config.ema,
            method_hash=method_hash(experiment.method),
            seed=config.seed,
            num_images=config.num_images,
            block_images=config.batch,
            batch=config.batch,
            threads=self._around.job.config.threads,
            device=self._around.job.ranks.device.type,
            classes=config.classes,
            num_classes=table.index.num_classes,
            settings=self._settings.model_dump(mode="json"),
            table_identity=table.identity,
            table=table,
        )

    def _samples(
        self, network: Extractor, plan: SamplePlan
    ) -> tuple[list[Tensor], Tensor | None, tuple[int, ...], dict[str, float]]:
        """On rank 0 features in batches and logits, elsewhere nothing; shape [3, H, W] of images; the row's scalars."""
        job, ranks = self._around.job, self._around.job.ranks
        wrapped = _Wrapped(plan)
        mine: list[Features] = []
        curves: list[dict[str, Curve]] = []
        shape: tuple[int, ...] = ()
        measured(job.method)  # not of this evaluation
        with job.ema.applied(plan.ema), self._shared() as poll, sampling_mode(job.method):
            for share in share_of(plan.num_images, plan.batch, ranks.rank, ranks.world_size):
                ids = torch.tensor(list(share), dtype=torch.int64)
                draws = Draws(plan.seed, PURPOSE, ids)
                images = generate_batch(job.method, wrapped, draws, ids, self._settings, poll, self._around.decoder)
                found = measured(job.method)
                if share.start < plan.num_images:
                    curves.append(found)
                if not shape:
                    shape = tuple(images.shape[1:])
                    if self._opened.images is not None:
                        check_image_size(self._opened.images, shape)
                mine.append(_look(network, images, self._offline.batch))
                check_finite(mine[-1].features, [f"image {i} of the evaluation" for i in share])
        gathered = ranks.gather_objects([(part.features, part.logits) for part in mine])
        values = scalars([part for parts in ranks.all_gather_objects(curves) for part in parts], "evaluate")
        if gathered is None:
            return [], None, shape, values
        features = in_order([[part[0] for part in parts] for parts in gathered], plan.num_images)
        logits = None
        if self._spec.has_logits:
            logits = in_order([[part[1] for part in parts] for parts in gathered], plan.num_images)
        return list(features.split(plan.batch)), logits, shape, values

    def _prepare_reference(self, network: Extractor) -> None:
        """Features of the reference's images on rank 0: from memory, from the run folder, or made by all ranks."""
        images, ranks = self._opened.images, self._around.job.ranks
        if images is None:
            return
        if ranks.is_main and self._reference is None:
            kept = _read_features(self._features_path, self._features_fingerprint())
            self._reference = list(kept.split(self._offline.batch)) if kept is not None else None
        if ranks.broadcast_object(self._reference is not None):
            return
        batch = self._offline.batch
        with self._shared() as poll:
            for share in list(share_of(images.rows, batch, ranks.rank, ranks.world_size))[len(self._begun) :]:
                poll()
                rows = [row % images.rows for row in share]
                features = network(images.read(rows)).features
                check_finite(features, [images.name(row) for row in rows])
                self._begun.append(features)
        gathered = ranks.gather_objects(self._begun)
        self._begun = []
        if gathered is not None:
            self._reference = list(in_order(gathered, images.rows).split(batch))
            self._keep_reference(torch.cat(self._reference))

    def _keep_reference(self, features: Tensor) -> None:
        """Write them for the next attempt; a full disk costs that attempt some time, nothing else."""
        content = safetensors.torch.save({"features": features}, {"fingerprint": self._features_fingerprint()})
        try:
            commit.make_folder(self._features_path.parent)
            commit.write_bytes(self._features_path, content, self._around.job.chain.fence)
        except (OSError, UserError) as error:
            self._around.job.journal.event("fault", what="features were not written", detail=str(error))

    @property
    def _features_path(self) -> Path:
        return self._around.run.features("online") / "reference.safetensors"

    def _features_fingerprint(self) -> str:
        images, job = self._opened.images, self._around.job
        assert images is not None
        return _sha256(
            {
                **images.facts(),
                "extractor": dict(self._spec.description),
                "batch": self._offline.batch,
                "threads": job.config.threads,
                "device": job.ranks.device.type,
            }
        )

    def _ready_network(self) -> Extractor:
        if self._network is None:
            self._network = self._spec.build()
        if isinstance(self._network, NetworkExtractor):
            self._network.to(self._around.job.ranks.device)
        return self._network

    # ---- metrics, on rank 0

    def _numbers(self, features: Sequence[Tensor], logits: Tensor | None) -> list[suite.Number]:
        config: EvaluateConfig = self._offline
        choices = suite.Choices(config.kid_subset_size, config.isc_split_images, errors=False)
        return suite.numbers(self._metrics, features, logits, self._reference_set(), choices)

    def _reference_set(self) -> suite.Reference:
        images = self._opened.images
        facts = images.facts() if images is not None else {}
        return suite.Reference(self._reference, self._opened.statistics, facts)

    def _write(self, images_seen: int, plan: SamplePlan, found: Sequence[suite.Number], shape: Sequence[int]) -> None:
        """The metrics file; a full disk costs the file, not the row or the training."""
        job, tag = self._around.job, f"online-{images_seen:012d}"
        subject = {
            "run": self._around.run.name,
            "run_identity": self._around.resolved.identity,
            "checkpoint": {"images_seen": images_seen, "manifest_sha256": None, "ema": plan.ema},
            "plan": describe(plan),
            "features": {"batch": self._offline.batch, "threads": plan.threads},
            "world_size": job.ranks.world_size,
        }
        reference = self._reference_set()
        records = tuple(
            suite.record(
                number,
                reference,
                extractor=self._spec.description,
                num_images=plan.num_images,
                image_shape=shape,
                classes=plan.classes,
                num_classes=plan.num_classes,
                subject=subject,
            )
            for number in found
        )
        fingerprint = _sha256([plan.hash, list(self._metrics), self._offline.kid_subset_size])
        try:
            MetricFile(tag, fingerprint, records).write(self._around.run.metrics(tag), job.chain.fence)
        except (OSError, UserError) as error:
            job.journal.event("fault", what="metrics were not written", images_seen=images_seen, detail=str(error))
            job.say(f"the metrics of {images_seen} images were not written: {error}")


class _Wrapped:
    """The plan's conditioning for padding ids, too: these repeat images from the start."""

    def __init__(self, plan: SamplePlan) -> None:
        self._plan = plan

    def labels(self, ids: Tensor) -> Tensor:
        return self._plan.labels(ids % self._plan.num_images)

    def rows(self, ids: Tensor, columns: Sequence[str]) -> dict[str, Tensor]:
        return self._plan.rows(ids % self._plan.num_images, columns)


def in_background(work: Callable[[], _Result], poll: Poll) -> _Result:
    """Do `work` in a thread, looking at `poll` meanwhile; what either raises is raised here.

    When `poll` raises, the thread is left to itself and what it finds is lost: the process ends soon, or the training
    goes on beside it where a budget was spent.
    """
    results: list[_Result] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="metrics", daemon=True)
    thread.start()
    while thread.is_alive():
        poll()
        thread.join(POLL_S)
    if failures:
        raise failures[0]
    return results[0]


def _look(network: Extractor, images: Tensor, batch: int) -> Features:
    """Features of images, in batches of at most `batch`."""
    return joined([network(part) for part in images.split(batch)])


def _read_features(path: Path, fingerprint: str) -> Tensor | None:
    """Features that an earlier attempt has left; None when there are none, or of other images or settings."""
    try:
        with safetensors.safe_open(path, framework="pt") as stream:
            if (stream.metadata() or {}).get("fingerprint") != fingerprint:
                return None
            features: Tensor = stream.get_tensor("features")
            return features
    except (OSError, safetensors.SafetensorError):
        return None  # absent or torn: made again


def _sha256(facts: Any) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
