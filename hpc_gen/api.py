"""The verbs of the command line as a Python library: `hpc_gen.load(run).generate(...)`, `.metrics`, `.export`.

Nothing heavy is imported before it is needed: `import hpc_gen` starts no torch, `load` neither.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hpc_gen.runtime import env, journal
from hpc_gen.runtime.errors import UserError, nearest
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages.control import find_run

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from hpc_gen.config.experiment import Experiment, SampleConfig
    from hpc_gen.config.loader import Resolved
    from hpc_gen.data.table import Table
    from hpc_gen.methods.protocol import Method
    from hpc_gen.metrics.results import MetricFile
    from hpc_gen.sampling.generate import Decoder
    from hpc_gen.sampling.index import SampleIndex
    from hpc_gen.sampling.plan import SamplePlan
    from hpc_gen.stages.status import RunStatus
    from hpc_gen.training.checkpoint.read import CheckpointInfo

Labels = int | str | Sequence[int | str]


def load(run: str | os.PathLike[str], workspace: str | os.PathLike[str] | None = None) -> Run:
    """The run of a path, or of a name below WORKSPACE/runs.

    `workspace`: folder of runs, tables and downloads; None = the one that the run lies in, for a name
    $HPC_GEN_WORKSPACE, else the current folder. Raises UserError naming the nearest run.
    """
    place = Path(os.path.abspath(workspace)) if workspace is not None else env.workspace()
    folder = find_run(os.fspath(run), place)
    return Run(folder, place if workspace is not None else folder.workspace)


def grid(images: Tensor, columns: int | None = None, *, gap: int = 2, scale: int = 1) -> Image:
    """Images uint8 [N, 3, H, W] side by side as one picture of Pillow (it has `.save` and `.show`).

    `columns` None: about as many as rows; `gap` in pixels; `scale`: each pixel is enlarged so many times. Raises
    ValueError for no images.
    """
    from hpc_gen.sampling.images import grid as make

    return make(images, columns if columns is not None else max(1, math.ceil(math.sqrt(len(images)))), gap, scale)


class Run:
    """One run. What is asked for is read from its folder each time, so a run at work may be watched."""

    def __init__(self, folder: RunFolder, workspace: Path) -> None:
        """Use `hpc_gen.load`. `workspace`: where the tables lie that the experiment names."""
        self.folder = folder
        self.workspace = workspace
        self._ready: tuple[tuple[str, str | None, str], Method] | None = None
        self._decoders: dict[str, Decoder | None] = {}

    def __repr__(self) -> str:
        return f"hpc_gen.load({str(self.path)!r})"

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @cached_property
    def resolved(self) -> Resolved:
        """The frozen experiment with its hashes. Raises DataError when it was edited after the run began."""
        from hpc_gen.stages.run_setup import load_run

        return load_run(self.folder)

    @property
    def config(self) -> Experiment:
        """The typed experiment, defaults filled in, as in `run.config.train.total_images`."""
        return self.resolved.experiment

    def status(self) -> RunStatus:
        """What `hpc-gen status` tells: stages, attempts, goodput, checkpoints."""
        from hpc_gen.stages.status import status

        return status(self.folder)

    def history(self) -> list[dict[str, Any]]:
        """Rows of the curves, ascending, as the run stands (what a resume undid is left out).

        A row is {"images_seen": int, "t": wall seconds since 1970, "attempt": int, "loss": float, ...}.
        """
        rows = journal.history(self.folder)
        return [{"images_seen": row.images_seen, "t": row.t, "attempt": row.attempt, **row.data} for row in rows]

    def checkpoints(self) -> list[CheckpointInfo]:
        """Committed checkpoints, oldest first: images_seen, path, bytes, world_size."""
        from hpc_gen.training.checkpoint.read import list_checkpoints

        return list_checkpoints(self.folder)

    def metrics(self, tag: str = "main") -> MetricFile:
        """The numbers of a set of samples, each with how it was made, as in `run.metrics().get("fid").value`.

        Raises UserError naming the tags there are.
        """
        from hpc_gen.metrics import results

        self._check_tag(tag, self.folder.metrics(tag), "metrics", "*.json", "evaluate")
        return results.read(self.folder.metrics(tag))

    def samples(self, tag: str = "main") -> SampleIndex:
        """The images that the sample stage wrote: `run.samples().read(range(16))` is uint8 [16, 3, H, W].

        Raises UserError naming the tags there are, DataError when they are damaged.
        """
        from hpc_gen.sampling.index import INDEX_NAME, read_index

        folder = self.folder.samples(tag)
        self._check_tag(tag, folder / INDEX_NAME, "samples", f"*/{INDEX_NAME}", "sample")
        return read_index(folder)

    def generate(
        self,
        num_images: int | None = None,
        *,
        ids: Sequence[int] | None = None,
        labels: Labels | None = None,
        seed: int | None = None,
        checkpoint: int | Literal["latest"] = "latest",
        ema: str | None = "main",
        device: str | torch.device | None = None,
        batch: int | None = None,
        poll: Callable[[], None] = lambda: None,
        **settings: Any,
    ) -> Tensor:
        """New images uint8 [N, 3, H, W] on the CPU: images 0 to num_images - 1, or those of `ids` in that order.

        Image i with the experiment's own seed, settings, batch and average is, bit for bit, image i of its sample stage
        on the same kind of device, however many are asked for and in whatever order.

        Args:
            num_images: how many; or give `ids`.
            ids: image numbers from 0; each has noise of its own.
            labels: class of all images, or one per image, as numbers or names; None = what the sample section plans.
            seed: seed of the noise; None = that of the sample section (0 without one).
            checkpoint: in images seen, or "latest".
            ema: name of an average of the weights; None = the weights themselves.
            device: as in torch; None = a GPU if there is one.
            batch: images per batch; None = that of the sample section. Whole batches are computed, since the last bits
                depend on it: for a quick look at a few images of a large model give a small one.
            poll: called between batches and steps; what it raises ends the work.
            settings: of the method's sampler, as in steps=20; others are those of the sample section.

        Raises:
            UserError: for a class, setting or number that is none. CheckpointError: for a checkpoint that is not there.
            DataError: when the training table, which says what the classes are, is missing or damaged.
        """
        import torch

        from hpc_gen.stages.device import task_device
        from hpc_gen.stages.generation import generate_images
        from hpc_gen.training.checkpoint import read

        wanted = _ids(num_images, ids)
        place = torch.device(device) if device is not None else task_device(0)
        info = read.newest(self.folder) if checkpoint == "latest" else read.at(self.folder, checkpoint)
        plan, typed = self._plan(info, ema, seed, batch, place, settings)
        if labels is not None:
            plan = self._labelled(plan, wanted, labels)
        return generate_images(self._method(info, ema, place), plan, wanted, typed, self._decoder(place), poll)

    def export(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        role: str | None = None,
        ema: str | None = "main",
        checkpoint: int | Literal["latest"] = "latest",
        say: Callable[[str], None] = lambda line: None,
    ) -> Path:
        """Write one network's weights as safetensors with the official keys; returns the file.

        `path` None: exports/ of the run folder. `role`: needed where the method has several networks. `ema` None: the
        weights themselves. Raises UserError for what the run does not have, CheckpointError for a damaged checkpoint.
        """
        from hpc_gen.stages.weights_transfer import export_weights

        return export_weights(
            self.folder,
            say,
            checkpoint=None if checkpoint == "latest" else checkpoint,
            ema=ema,
            raw=ema is None,
            role=role,
            target=Path(os.path.abspath(path)) if path is not None else None,
        )

    # -- what generate needs --------------------------------------------------------------------------------------

    @cached_property
    def _table(self) -> Table:
        from hpc_gen.stages.build import open_table

        return open_table(self.workspace, self.config.data.table, self.config)

    def _decoder(self, device: torch.device) -> Decoder | None:
        from hpc_gen.stages.build import open_decoder

        if str(device) not in self._decoders:
            self._decoders[str(device)] = open_decoder(self.config, self._table, self.workspace, device)
        return self._decoders[str(device)]

    def _method(self, info: CheckpointInfo, ema: str | None, device: torch.device) -> Method:
        """The method with these weights; the last one is kept, so that a second call starts at once."""
        from hpc_gen.stages.generation import trained_method
        from hpc_gen.training.checkpoint import read

        key = read.manifest_sha256(info.path), ema, str(device)
        if self._ready is None or self._ready[0] != key:
            self._ready = None  # two large models need not fit
            self._ready = key, trained_method(self.config, self._table, info.path, ema, device)
        return self._ready[1]

    def _plan(
        self,
        info: CheckpointInfo,
        ema: str | None,
        seed: int | None,
        batch: int | None,
        device: torch.device,
        settings: dict[str, Any],
    ) -> tuple[SamplePlan, Any]:
        """The plan of the sample section with what is given instead, and the typed sampler settings."""
        from hpc_gen.sampling.plan import SamplePlan, method_hash
        from hpc_gen.stages.build import condition_table
        from hpc_gen.training.checkpoint import read

        config = self._sample_section()
        size = config.batch if batch is None else batch
        if size < 1:
            raise UserError(f"batch {size} is not a number of images; give 1 or more")
        typed = self._settings({**config.settings, **settings})
        conditions = condition_table(self.workspace, config, self._table)
        plan = SamplePlan(
            run_identity=self.resolved.identity,
            checkpoint_images_seen=info.images_seen,
            checkpoint_manifest_sha256=read.manifest_sha256(info.path),
            ema=ema,
            method_hash=method_hash(self.config.method),
            seed=config.seed if seed is None else seed,
            num_images=config.num_images,
            block_images=max(size, config.block_images),
            batch=size,
            threads=config.threads,
            device=device.type,
            classes=config.classes,
            num_classes=self._table.index.num_classes,
            settings=typed.model_dump(mode="json"),
            table_identity=conditions.identity,
            table=conditions,
            row_plan=config.rows or "in_order",
        )
        return plan, typed

    def _sample_section(self) -> SampleConfig:
        """The experiment's own, else its defaults, with more images than anybody asks for."""
        from hpc_gen.config.experiment import SampleConfig

        return self.config.sample or SampleConfig(num_images=max(1, self._table.index.num_classes) * 1_000_000)

    def _settings(self, settings: dict[str, Any]) -> Any:
        """The method's own type of them. Raises UserError naming the nearest setting, or what is refused."""
        from pydantic import ValidationError

        from hpc_gen.methods import registry
        from hpc_gen.stages.build import settings_of

        known = registry.typed_config(self.config.method)[0].settings.model_fields
        for name in settings:
            if name not in known:
                raise UserError(
                    f"the sampler of method '{self.config.method['name']}' has no setting '{name}'"
                    f"{nearest(name, known)}; it has: {', '.join(known)}"
                )
        try:
            return settings_of(self.config, settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the settings"
            raise UserError(f"{where} = {first['input']!r} is refused: {first['msg']}; give another value") from error

    def _labelled(self, plan: SamplePlan, ids: Sequence[int], labels: Labels) -> SamplePlan:
        from hpc_gen.stages.class_names import class_names
        from hpc_gen.stages.generation import LabelledPlan

        each = [labels] * len(ids) if isinstance(labels, (int, str)) else list(labels)
        if len(each) != len(ids):
            raise UserError(f"{len(each)} labels are given for {len(ids)} images; give one label, or one per image")
        if plan.num_classes == 0:
            raise UserError(f"run '{self.name}' was trained without classes, so images have no labels; leave them out")
        names = class_names(self.config, self._table, self.workspace)
        numbers = [_label(label, names, plan.num_classes) for label in each]
        chosen = dict(zip(ids, numbers, strict=True))
        if any(chosen[image_id] != number for image_id, number in zip(ids, numbers, strict=True)):
            raise UserError("one image id is given two labels, and an image has one; call generate twice")
        facts = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
        return LabelledPlan(**facts, given=chosen)

    def _check_tag(self, tag: str, path: Path, what: str, pattern: str, stage: str) -> None:
        if path.exists():
            return
        found = (self.folder.path / what).glob(pattern)
        tags = sorted(each.parent.name if "/" in pattern else each.stem for each in found)
        told = f"it has: {', '.join(tags)}" if tags else f"run its {stage} stage first"
        raise UserError(f"run '{self.name}' has no {what} with the tag '{tag}'{nearest(tag, tags)}; {told}")


def _ids(num_images: int | None, ids: Sequence[int] | None) -> list[int]:
    """Which images are asked for. Raises UserError."""
    if (num_images is None) == (ids is None):
        raise UserError("say which images: give either num_images or ids")
    chosen: Sequence[int] = range(num_images) if num_images is not None else () if ids is None else ids
    wanted = [int(image_id) for image_id in chosen]
    if not wanted or min(wanted) < 0:
        raise UserError(f"{'no' if not wanted else 'negative'} image ids are no images; give numbers from 0")
    return wanted


def _label(label: int | str, names: Sequence[str], num_classes: int) -> int:
    """The number of a class. Raises UserError naming the nearest."""
    if isinstance(label, str):
        if label not in names:
            known = "its classes have no names; give numbers" if not any(names) else f"there are {num_classes} classes"
            raise UserError(f"no class is called '{label}'{nearest(label, [n for n in names if n])}; {known}")
        return names.index(label)
    if not 0 <= label < num_classes:
        raise UserError(f"label {label} is not a class; there are {num_classes}, numbered from 0 to {num_classes - 1}")
    return int(label)
