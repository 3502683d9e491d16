"""The demo of GMem: emoji become latents and snippets, a flow transformer learns them, is killed, resumed, and draws.

The training table is the memory bank. Then come pictures of images that training has not seen and pictures between two
images. Every step looks first at what is there already, so a second call repeats nothing.
"""

from __future__ import annotations

from pathlib import Path

from hpc_gen.runtime import clock
from hpc_gen.runtime.journal import attempts
from hpc_gen.stages.demo import latents
from hpc_gen.stages.demo.steps import Demo, metric_lines

FILE, NAME = "emoji32_gmem.yaml", "demo-emoji32-gmem"
ENCODER = Path("weights") / "demo_dinov2.safetensors"  # as FILE names it
STAGES = "encode,train,sample,evaluate,report"
PAIRS = 4


def run(demo: Demo) -> None:
    """The whole demo. Raises HpcGenError."""
    begun = clock.monotonic()
    demo.say("== 1. Real images, the network that scores them, and a DINOv2 with random values")
    demo.command("shards", "fetch", "emoji")
    demo.command("weights", "fetch", "inception")
    write_encoder(demo.workspace / ENCODER)
    latents.make_tokenizer(demo)
    _training(demo)
    _knowledge(demo)
    run = demo.run_folder(NAME)
    demo.say("\n== Summary")
    trained = [a for a in attempts(run) if a.stage == "train"]
    demo.say(
        f"train attempts of {NAME}: {len(trained)}, exit codes {[a.exit_code for a in trained]} (None: killed), "
        f"the last went on from {trained[-1].resumed_from or 0} images"
    )
    for line in metric_lines(run):
        demo.say(line)
    demo.say(f"report: {run.report}")
    demo.say(f"time of this call: {clock.monotonic() - begun:.0f} s")


def write_encoder(path: Path) -> None:
    """A DINOv2 of 48 channels with values drawn by a fixed seed; official weights cannot be had by a command."""
    import torch

    from hpc_gen.config.dinov2 import Dinov2Architecture
    from hpc_gen.runtime import commit, randomness, tensor_files
    from hpc_gen.tokenizers.dinov2 import metadata_for
    from hpc_gen.tokenizers.dinov2_model import Dinov2

    if path.is_file():
        return
    sizes = Dinov2Architecture(width=48, depth=4, heads=4, position_grid=4)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Dinov2(sizes).state_dict().items()}
    generator = randomness.torch_generator(0, "demo/dinov2")
    values = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        is_scale = ("norm" in name and name.endswith("weight")) or "gamma" in name
        fan_in = shape[1:].numel() if len(shape) > 1 else 1
        values[name] = 1 + 0.1 * drawn if is_scale else drawn * (fan_in**-0.5 if len(shape) > 1 else 0.1)
    commit.make_folder(path.parent)
    tensor_files.write_tensors(path, values, metadata_for(sizes))


def _training(demo: Demo) -> None:
    demo.say("\n== 2. GMem: latents and snippets, training killed and resumed, samples by the SDE, metrics, report")
    demo.killed_and_resumed(FILE, NAME, STAGES)


def _knowledge(demo: Demo) -> None:
    """Pictures of images from the held-out split, and between pairs of them."""
    demo.say("\n== 3. New knowledge: pictures from images that training has not seen, and between two of them")
    folder = demo.workspace / "demo-novel"
    _write_novel(demo.workspace, folder)
    for kind, words in (
        ("external", ("--images", str(folder / "a"), "--each", "7", "guidance.scale=4", "guidance.start=0.5")),
        ("internal", ("--first", str(folder / "a"), "--second", str(folder / "b"), "--method", "linear")),
    ):
        out = demo.run_folder(NAME).path / "knowledge" / f"{kind}.png"
        if out.is_file():
            demo.say(f"done already: {out}")
        else:
            demo.command("knowledge", kind, NAME, "--to", str(out), *words)


def _write_novel(workspace: Path, folder: Path) -> None:
    """Held-out emoji as PNG files in two folders, pairs by name."""
    import numpy as np

    from hpc_gen.data.table import Table
    from hpc_gen.sampling.images import write_png

    table = Table.open(workspace / "tables" / "emoji32-validation")
    images = table.read(np.arange(0, table.rows, table.rows // (2 * PAIRS))[: 2 * PAIRS], ["pixels"])["pixels"]
    for number, image in enumerate(images):
        path = folder / "ab"[number % 2] / f"{number // 2}.png"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, image)
