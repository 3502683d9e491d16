"""What training does between steps, put together as callables: validation, previews and evaluation.

All ranks do it side by side and leave it together when a stop is asked for (runtime/agreement.py). A preview or an
evaluation that comes to nothing (latents that are not finite, degenerate features, a full disk) is journaled and said;
training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hpc_gen.config.experiment import PreviewConfig, TrainConfig, ValidateConfig
from hpc_gen.data.index import LABELS
from hpc_gen.data.table import Table
from hpc_gen.runtime import commit, journal
from hpc_gen.runtime.errors import ExitCode, HpcGenError, StopRequested, UserError
from hpc_gen.runtime.journal import Event
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling.images import captioned_grid, png_bytes
from hpc_gen.sampling.preview import Chosen, caption, file_names, in_order, numbered, preview
from hpc_gen.stages.build import check_columns, condition_table, open_table, settings_of
from hpc_gen.stages.class_names import class_names
from hpc_gen.stages.online import OnlineEvaluation
from hpc_gen.stages.surroundings import Surroundings, measured, scalars
from hpc_gen.training import loop
from hpc_gen.training.validation import validate

HARMLESS = (ExitCode.USER, ExitCode.DATA, ExitCode.DIVERGED)  # failures that cost the picture or score, not the run
GRID_COLUMNS = 10
SMALL = 64  # images are enlarged to about this many pixels


def periodic_work(around: Surroundings, micro_batch: int) -> list[loop.Periodic]:
    """Everything that the `train` section asks for between steps, in its order at one clock.

    Raises UserError or DataError now for what would be refused at the first interval. `micro_batch`: images per forward
    pass of this rank.
    """
    config = around.job.config
    found: list[loop.Periodic] = []
    if config.validate is not None:
        found.append(_validation(around, config, config.validate, micro_batch))
    if config.preview is not None:
        action = PreviewWork(around, config.preview)
        places = frozenset(config.preview.at_images)
        found.append(loop.Periodic("preview", config.preview.every_images, _guarded(around, "preview", action), places))
    if config.evaluate is not None:
        evaluation = OnlineEvaluation(around, config.evaluate)
        end = frozenset([config.total_images] if config.evaluate.at_end else [])
        action = _guarded(around, "evaluate", evaluation)
        found.append(loop.Periodic("evaluate", config.evaluate.every_images, action, end))
    return found


def cuts_at(run: RunFolder, images_seen: int, before: int = 0) -> int:
    """How many attempts in a row a stop has cut short what is due at this clock; 0: it is done, or was never begun.

    `before`: how many it were in the run that this one is a fork of.
    """
    return cuts_of(journal.Reader(run, stage="train", task=0).events(), images_seen, before)


def cuts_of(events: Iterable[Event], images_seen: int, before: int = 0) -> int:
    """As `cuts_at`, from the events of rank 0."""
    cuts = before
    for event in events:
        if event.kind == "attempt_start" and event.fields.get("resumed_from") != images_seen:
            cuts = 0  # passed again, from an older checkpoint
        elif event.fields.get("images_seen") == images_seen:
            cuts = cuts + 1 if event.kind == "cut_short" else 0 if event.kind == "caught_up" else cuts
    return cuts


def _guarded(
    around: Surroundings, name: str, action: Callable[[int], Mapping[str, float]]
) -> Callable[[int], Mapping[str, float]]:
    """The action, whose harmless failures (the same on every rank) do not end the training."""

    def guarded(images_seen: int) -> Mapping[str, float]:
        try:
            return action(images_seen)
        except StopRequested:
            raise
        except HpcGenError as error:
            if error.exit_code not in HARMLESS:
                raise
            around.job.journal.event("fault", what=f"{name} failed", images_seen=images_seen, detail=str(error))
            around.job.say(f"{name} at {images_seen} images failed and was left out: {error}")
            return {}

    return guarded


def _validation(around: Surroundings, config: TrainConfig, chosen: ValidateConfig, micro_batch: int) -> loop.Periodic:
    path = around.experiment.data.validation_table
    assert path is not None, "an experiment with train.validate has a held-out table"
    held_out = open_table(around.workspace, path, around.experiment)
    check_columns(around.job.method, held_out)
    job = around.job

    def run_validation(images_seen: int) -> Mapping[str, float]:
        with job.ema.applied(chosen.ema):
            means = validate(
                job.method,
                job.engine,
                held_out,
                chosen,
                seed=around.experiment.seed,
                micro_batch=micro_batch,
                coupling_group=config.coupling_group,
                ranks=job.ranks,
                shared=around.shared,
            )
        job.journal.event("validate", images_seen=images_seen, ema=chosen.ema, **means)
        return {f"validation/{name}": value for name, value in means.items()}

    return loop.Periodic("validate", chosen.every_images, run_validation)


class PreviewWork:
    """Pictures of a few classes, or rows of a memory bank: `previews/IMAGES.png` with captions, and each alone in
    `previews/IMAGES/`."""

    def __init__(self, around: Surroundings, config: PreviewConfig) -> None:
        """Check everything that can be wrong. Raises UserError or DataError."""
        self._around = around
        self._config = config
        self._told: dict[str, object] = {}
        if config.rows is not None:
            table = _bank_of(around, config.rows)
            self._chosen = _rows_chosen(around, config.rows, table)
            self._captions = [f"row {row}" for row in config.rows]
            self._files = file_names(config.rows, "row")
            self._told = {"rows": list(config.rows), "table": table.identity}
        else:
            self._choose_labels(around, config.labels or [])
        self._settings = settings_of(around.experiment, config.settings)
        self._seed = around.experiment.seed if config.seed is None else config.seed
        _ = around.decoder  # a tokenizer that does not fit is refused now

    def _choose_labels(self, around: Surroundings, given: Sequence[int | str]) -> None:
        num_classes = around.table.index.num_classes
        names = class_names(around.experiment, around.table, around.workspace)
        labels = numbered(given, num_classes, names)
        self._chosen = Chosen(labels, (), around.table)
        if LABELS in around.job.method.columns():
            self._captions = [caption(label, num_classes, names) for label in labels]
            self._files = file_names(labels)
        else:  # pictures of rows of the table, or of nothing: their labels only count them
            self._captions = [f"image {i}" for i in range(len(labels))]
            self._files = [f"image_{i}.png" for i in range(len(labels))]

    def __call__(self, images_seen: int) -> dict[str, float]:
        """Make and write the pictures; what the sampler measured is for the row. Raises StopRequested."""
        job, ranks = self._around.job, self._around.job.ranks
        measured(job.method)  # not of this preview
        with job.ema.applied(self._config.ema), self._around.shared() as poll:
            mine = preview(
                job.method,
                self._chosen,
                self._seed,
                self._settings,
                ranks,
                poll,
                batch=self._config.batch,
                decoder=self._around.decoder,
            )
        gathered = ranks.gather_objects(mine)
        if gathered is not None:
            self._write(images_seen, in_order(gathered, len(self._chosen)))
        return scalars(ranks.all_gather_objects(measured(job.method)), "preview")

    def _write(self, images_seen: int, images: Tensor) -> None:
        """Write the files (rank 0); a full disk costs the picture, not the training."""
        job, run = self._around.job, self._around.run
        folder = run.previews / f"{images_seen:012d}"
        grid_path = folder.with_suffix(".png")
        scale = max(1, SMALL // images.shape[-1])
        grid = captioned_grid(images, self._captions, min(GRID_COLUMNS, len(images)), scale=scale)
        paths = [folder / name for name in self._files]
        try:
            commit.write_bytes(grid_path, png_bytes(grid), job.chain.fence)
            for path, image in zip(paths, images, strict=True):
                commit.write_bytes(path, png_bytes(image), job.chain.fence)
        except (OSError, UserError) as error:
            job.journal.event("fault", what="preview was not written", detail=str(error))
            job.say(f"the preview of {images_seen} images was not written: {error}")
            return
        job.journal.event(
            "preview",
            images_seen=images_seen,
            file=grid_path.relative_to(run.path).as_posix(),
            files=[path.relative_to(run.path).as_posix() for path in paths],
            captions=self._captions,
            seed=self._seed,
            ema=self._config.ema,
            **self._told,
        )


def _bank_of(around: Surroundings, rows: Sequence[int]) -> Table:
    """The table that images are conditioned on. Raises UserError where it does not have these rows."""
    sample = around.experiment.sample
    table = around.table if sample is None else condition_table(around.workspace, sample, around.table)
    if max(rows) >= table.rows:
        raise UserError(
            f"train.preview.rows names row {max(rows)}, but {table.folder} has {table.rows} rows; use 0 to "
            f"{table.rows - 1}, or name the bank that has it with sample.conditions"
        )
    return table


def _rows_chosen(around: Surroundings, rows: Sequence[int], table: Table) -> Chosen:
    """These rows as conditioning, read once. Raises UserError or DataError where the method cannot use them."""
    chosen, method = Chosen((), rows, table), around.job.method
    specs = method.columns()
    for name, value in method.conditions(torch.arange(len(rows)), chosen).items():
        if name in specs and tuple(value.shape[1:]) != specs[name].shape:
            raise UserError(
                f"train.preview.rows: a row of '{name}' of {table.folder} has shape {list(value.shape[1:])}, the "
                f"method needs {list(specs[name].shape)}; name a bank of the encoder that it is trained with"
            )
    return chosen
