"""(g) Encoding: who decodes how fast, and the share of its time that a task spends in the network, decoded ahead or not.

Each task is a process with one thread that encodes photograph-like JPEGs by a network of a published size with random
weights, through the worker of the stage encode as it stands.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import Spread, Table, by_turns
from PIL import Image

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
TASKS = 2
# name -> section tokenizer, side of the images, images of one unit, rounds
NETWORKS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "DINOv2 S/14, 224 of 256 pixels": (
        {"name": "dinov2", "weights": "w", "preset": "vits14", "dinov2": {"flip": False, "columns": ["cls_tokens"]}},
        256,
        16,
        2,
    ),
    "SD f8, 128 pixels, image and mirror image": ({"name": "kl_vae", "weights": "w", "preset": "sd_f8"}, 128, 8, 1),
}


def bench(quick: bool) -> list[Table]:
    """How much of the time is the network's, with decoding overlapped and in turn; and who decodes how fast."""
    return [_decoders(quick), _shares(quick)]


def _decoders(quick: bool) -> Table:
    """Pillow and DALI read and decode the same JPEGs, Pillow crops them, nothing else is done."""
    from hpc_gen.config.experiment import EncodeConfig
    from shard_tools.pixels import squares
    from shard_tools.sources import open_source

    dali, why_not = _has_dali()
    images = 16 if quick else 64
    with tempfile.TemporaryDirectory() as folder:
        _write_images(Path(folder), images)
        split = open_source("folder", Path(folder) / "images").splits["train"]

        def reading(decoder: str, threads: int) -> Callable[[], None]:
            keys = {"source": "folder", "source_path": "images", "image_size": 256, "validation": False}
            encode = EncodeConfig.model_validate(keys | {"decode": decoder, "threads": threads})
            return lambda: [None for _ in squares(split, list(range(images)), encode)].clear()

        actions = {"Pillow": reading("pillow", 1)}
        if dali:
            actions |= {"DALI, 1 thread": reading("dali", 1), "DALI, 2 threads": reading("dali", 2)}
        seconds = by_turns(actions, 1 if quick else 5)
    table = Table(
        "JPEGs to squares of 256 pixels",
        f"{images} JPEGs of 640 x 480, read, decoded and cropped as ADM does, in one process.{why_not}",
        ("decoder", "images/s", "over Pillow"),
    )
    for name, spread in seconds.items():
        table.add(name, spread.per(images).show("{:.0f}"), seconds["Pillow"].over(spread).show())
    return table


def _has_dali() -> tuple[bool, str]:
    """Whether DALI is here, and a sentence for the table where it is not."""
    from hpc_gen.data import decode

    try:
        decode.import_dali()
    except Exception as error:  # whatever an import of a package for GPUs may raise
        why = f" DALI IS LEFT OUT, 2 rows: {error}"
        print(why.strip(), file=sys.stderr, flush=True)
        return False, why
    return True, ""


def _shares(quick: bool) -> Table:
    """Two tasks at once, each with a network."""
    table = Table(
        "Encoding: share of the time in the network",
        f"{TASKS} tasks at once, a thread each; JPEGs of 640 x 480, crop and all; both tasks of every round count.",
        ("network", "decoding", "in the network", "images/s per task"),
    )
    for name, (tokenizer, side, images, rounds) in NETWORKS.items():
        if quick and tokenizer["name"] != "dinov2":
            continue
        rows = 8 if quick else images
        with tempfile.TemporaryDirectory() as folder:
            _prepare(Path(folder), tokenizer, rows)
            for overlap in (True, False):
                asked = {"tokenizer": tokenizer, "rows": rows, "side": side, "overlap": overlap}
                told = [_round(Path(folder), asked) for _ in range(1 if quick else rounds)]
                flat = [each for tasks in told for each in tasks]
                share = Spread.of([each["network_s"] / each["seconds"] for each in flat])
                rate = Spread.of([rows / each["seconds"] for each in flat])
                how = "ahead, by a thread" if overlap else "before each unit"
                table.add(name, how, share.show("{:.1f} %", 100), rate.show("{:.2f}"))
    return table


def _prepare(folder: Path, tokenizer: dict[str, Any], images: int) -> None:
    """Images of one class, and the weights in a file."""
    import torch

    from hpc_gen.runtime.tensor_files import write_tensors
    from hpc_gen.stages.tokenizer_weights import Statistics, known

    _write_images(folder, images)
    model = known(tokenizer["preset"])
    state = {
        name: torch.randn(value.shape) * (value[0].numel() ** -0.5 if value.ndim > 1 else 0.1)
        for name, value in model.model.state_dict().items()
    }
    write_tensors(folder / "w", state, model.metadata(Statistics(None, None)))


def _write_images(folder: Path, images: int) -> None:
    """JPEGs of one class, smooth with a little noise, as photographs are."""
    generator = np.random.default_rng(0)
    (folder / "images" / "a").mkdir(parents=True)
    for i in range(images):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC), np.int16)
        noisy = (image + generator.integers(-12, 13, image.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
        (folder / "images" / "a" / f"{i:03d}.jpg").write_bytes(buffer.getvalue())


def _round(folder: Path, asked: dict[str, Any]) -> list[dict[str, float]]:
    """What each of the tasks tells, run at once."""
    command = [sys.executable, str(HERE), json.dumps({"folder": str(folder), **asked})]
    tasks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(TASKS)]
    return [json.loads(task.communicate()[0].splitlines()[-1]) for task in tasks]


def _task(asked: dict[str, Any]) -> dict[str, float]:
    """Encode one unit; seconds of it, and those in the network."""
    from hpc_gen.config.experiment import EncodeConfig
    from hpc_gen.runtime import commit
    from shard_tools import encode

    if not asked["overlap"]:
        encode.ahead = lambda source: (item for item in list(source))
    section = {
        "source": "folder", "source_path": "images", "image_size": asked["side"], "validation": False,
        "shard_rows": asked["rows"], "tokenizer": asked["tokenizer"],
    }  # fmt: skip
    folder = Path(asked["folder"])
    worker = encode.EncodeWorker(EncodeConfig.model_validate(section), folder, {"train": "t"})
    unit = worker.units()[0]
    staging = commit.make_folder(commit.staging_path(folder / "staging"))
    begun = time.perf_counter()
    worker.do(unit, staging, lambda: None)
    return {"seconds": time.perf_counter() - begun, "network_s": worker.network_s}


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    print(json.dumps(_task(json.loads(sys.argv[1]))))
