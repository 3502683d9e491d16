"""The size of the reference's images beside that of the samples, before anything is computed.

The evaluate stage compares what it opens, which is after the training; here is what files and config tell before.
"""

from __future__ import annotations

from pathlib import Path

from hpc_gen.config.experiment import Experiment
from hpc_gen.data.index import INDEX_NAME, TableIndex
from hpc_gen.runtime.errors import UserError

PIXELS = "pixels"


def check(experiment: Experiment, workspace: Path) -> None:
    """Raise UserError where the images to compare with are there, or are going to be encoded, at another size.

    What is not there yet and not made by this experiment says nothing. DataError for a damaged file.
    """
    evaluate, side = experiment.evaluate, experiment.method.get("image_size")
    if evaluate is None or not isinstance(side, int):
        return
    from hpc_gen.metrics import suite  # here, because every start of a run's process imports this module

    if not suite.needs_images(evaluate.metrics, evaluate.reference.statistics is not None):
        return
    named = evaluate.reference.table or evaluate.reference.images
    found = _size(experiment, workspace)
    if found is not None and found != (side, side):
        key = "table" if evaluate.reference.table is not None else "images"
        raise UserError(
            f"the samples are {side} x {side} pixels ('method.image_size') and the images of {workspace / str(named)} "
            f"('evaluate.reference.{key}') {found[1]} x {found[0]}: a score across sizes means nothing; encode the "
            "reference at the samples' size"
        )


def _size(experiment: Experiment, workspace: Path) -> tuple[int, int] | None:
    """(H, W) of the reference's images, None where it is not known yet."""
    assert experiment.evaluate is not None
    named, encode, data = experiment.evaluate.reference, experiment.encode, experiment.data
    if named.images is not None:
        from hpc_gen.data import image_files

        path = workspace / named.images
        height, width = image_files.shape_of(path)[-2:] if path.exists() else (0, 0)
        return (height, width) if height else None
    if named.table is None:
        return None
    folder = workspace / named.table
    if (folder / INDEX_NAME).is_file():
        column = TableIndex.read(folder).columns.get(PIXELS)
        return (column.shape[-2], column.shape[-1]) if column is not None and len(column.shape) == 3 else None
    made_here = encode is not None and named.table in (data.table, data.validation_table if encode.validation else None)
    if encode is not None and made_here and encode.tokenizer.name == "identity":
        return encode.image_size, encode.image_size
    return None
