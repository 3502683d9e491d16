"""Snippets of images that no table holds yet, to be appended to a bank: few of them, here and now.

Many are encoded as a table of their own by the stage encode (job_configs/gmem/bank.yaml), as an array of tasks, and
that table is appended.
"""

from __future__ import annotations

from pathlib import Path

import torch

from hpc_gen.config import loader
from hpc_gen.data.images import decode_image, images_below
from hpc_gen.runtime.errors import DataError
from hpc_gen.runtime.progress import Progress
from hpc_gen.stages.build import snippet_encoder
from hpc_gen.stages.device import task_device
from hpc_gen.training.precision import set_determinism
from shard_tools.bank_rows import Loose, made_with
from shard_tools.pixels import cut


def snippets_of_images(config: str, workspace: Path, folder: Path) -> Loose:
    """Snippets of the images of a folder, as the stage encode of the experiment `config` makes them, bit for bit.

    Named after the folder and the path in it. Raises UserError for an experiment that does not encode with dinov2,
    DataError for an image that cannot be read: none is left out.
    """
    experiment = loader.load(config, []).experiment
    encode = experiment.encode
    encoder = snippet_encoder(experiment, workspace, task_device(0))
    assert encode is not None  # or there is no encoder
    paths = images_below(folder, deep=True)
    set_determinism(True, encode.threads)
    rows = []
    with Progress(len(paths), "encode") as progress:
        for number, path in enumerate(paths):
            try:
                image = decode_image(path.read_bytes(), encode.background)
            except (OSError, DataError) as error:
                raise DataError(f"{path} cannot be read as an image ({error}); repair it or take it away") from error
            rows.append(encoder.snippets(cut(image, encode)[None]))
            progress.update(number + 1)
    names = [f"{folder.name}/{path.relative_to(folder).as_posix()}" for path in paths]
    pixels = encode.model_dump(mode="json")
    return Loose(torch.cat(rows), lambda row: names[row], made_with(encoder.identity, pixels))
