"""GMem as typed, tiny: images -> latents and snippets -> training, killed and resumed -> samples -> new knowledge -> report.

Networks of tokenizers are random: their weights cannot be had here. Nothing of the chain knows that.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kl_vae_file import write_kl_vae
from PIL import Image
from tiny_tokenizers import DINOV2, write_dinov2

import hpc_gen
from hpc_gen.data.table import Table
from hpc_gen.metrics import results
from hpc_gen.runtime import clock
from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.tensor_files import metadata_of, read_nested
from hpc_gen.sampling.images import read_png
from hpc_gen.sampling.index import read_index
from hpc_gen.training.checkpoint import manifest

REPOSITORY = Path(__file__).resolve().parents[2]

# images of 16 pixels: latents of 4 x 4 x 2 (stride 4), snippets and representations of a 4 x 4 grid
EXPERIMENT = f"""
name: gmem
seed: 3
method:
  {{name: gmem, input: moments, image_size: 16, tokenizer_stride: 4, channels: 2, hidden: 16, depth: 2, heads: 2,
   snippet_dim: {DINOV2.width}, projector_hidden: 8, repr_dim: {DINOV2.width}, repr_after_block: 1}}
data: {{table: tables/gmem, shuffle_shards: 2}}
encode:
  source: folder
  source_path: pictures
  image_size: 16
  shard_rows: 8
  validation: false
  tokenizer: {{name: kl_vae, weights: weights/vae.safetensors}}
  also:
    dino: {{name: dinov2, weights: weights/dino.safetensors, dinov2: {{grid: 4, any_size: true}}}}
    pixels: {{name: identity}}
train:
  total_images: 128
  global_batch: 8
  ranks: 2
  optimizer: {{lr: 1.0e-3, betas: [0.9, 0.95], weight_decay: 0.0, clip: 1.0}}
  ema: {{main: {{decay: 0.9}}}}
  log_every: 16
  save_every: 32
  keep_last: 9
sample:
  num_images: 6
  block_images: 3
  batch: 3
  classes: uniform
  rows: uniform
  settings: {{points: 4}}
evaluate: {{metrics: [fid], extractor: {{name: random-conv}}, reference: {{table: tables/pixels, rows: 24}}}}
"""
PIXELS = """
name: pixels
method: {name: energy, input: pixels, image_size: 16, channels: 3, patch_size: 4, hidden: 16, depth: 1, heads: 2}
data: {table: tables/pixels}
encode: {source: folder, source_path: pictures, image_size: 16, shard_rows: 8, validation: false}
"""


class Shell:
    """Commands in a workspace, as a user types them."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace

    def start(self, *words: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, "-m", "hpc_gen.cli", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.workspace,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def __call__(self, *words: str, code: int = 0) -> str:
        process = self.start(*words)
        said, _ = process.communicate()
        assert process.returncode == code and "Traceback" not in said, said
        return said


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    folder = tmp_path_factory.mktemp("gmem")
    (folder / "weights").mkdir()
    write_kl_vae(folder / "weights" / "vae.safetensors", scale=[1.5, 0.5], shift=[0.1, -0.2])
    write_dinov2(folder / "weights" / "dino.safetensors")
    generator = np.random.default_rng(0)
    for number in range(40):
        place = folder / "pictures" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((16, 16), Image.Resampling.BILINEAR).save(place / f"{number:02d}.png")
    (folder / "gmem.yaml").write_text(EXPERIMENT)
    (folder / "pixels.yaml").write_text(PIXELS)
    return Shell(folder)


def trained(shell: Shell, name: str) -> dict[str, object]:
    path = RunFolder(shell.workspace / "runs" / name).checkpoints / f"{128:012d}"
    return dict(manifest.read(path).files)


@pytest.mark.timeout(900)
def test_the_whole_chain(shell: Shell) -> None:
    shell("run", "pixels.yaml")
    shell("run", "gmem.yaml", "name=undisturbed", "--stages", "encode,train")
    table = Table.open(shell.workspace / "tables/gmem", verify=True)
    assert table.rows == 40
    assert set(table.index.columns) == {
        *(name + end for name in ("moments", "cls_tokens", "representations") for end in ("", "_flip")),
        "labels",
        "pixels",
    }

    run = RunFolder(shell.workspace / "runs" / "gmem")
    process = shell.start("run", "gmem.yaml", "--stages", "train")
    while process.poll() is None and not any(run.checkpoints.glob("0*")):
        clock.sleep(0.05)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    shell("resume", "gmem")  # the rest of training, samples by the SDE, metrics, report
    assert trained(shell, "gmem") == trained(shell, "undisturbed")
    assert run.report.is_file() and results.read(run.metrics("main")).get("fid") is not None

    shell("run", "gmem.yaml", "name=sharded", "--stages", "train", "train.engine.name=fsdp")
    # representations computed in training from the pixels, and pictures of chosen rows of the bank on the way
    shell("run", "gmem.yaml", "name=online", "--stages", "train", "method.representations=online",
          "train.frozen.representations={name: dinov2, weights: weights/dino.safetensors, dinov2: "
          "{grid: 4, any_size: true}}", "train.preview={every_images: 64, rows: [39, 3], settings: {points: 3}}")  # fmt: skip
    names = ("undisturbed", "sharded", "online")
    history = {name: hpc_gen.load(shell.workspace / "runs" / name).history() for name in names}
    for ours, theirs in zip(history["undisturbed"], history["sharded"], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4) and theirs["images_seen"] == ours["images_seen"]
    for ours, theirs in zip(history["undisturbed"], history["online"], strict=True):  # to the bit
        assert {key: ours[key] for key in ours.keys() - {"t", "attempt"}}.items() <= theirs.items()
    previews = RunFolder(shell.workspace / "runs" / "online").previews
    assert sorted(path.name for path in (previews / f"{128:012d}").iterdir()) == ["row_3.png", "row_39.png"]
    assert hpc_gen.load(shell.workspace / "runs" / "online").generate(1).shape == (1, 3, 16, 16)  # without the encoder

    loaded = hpc_gen.load(run.path)
    sde_images = read_index(run.samples("main")).read(range(6))
    assert torch.equal(loaded.generate(6), sde_images)
    ode_images = loaded.generate(6, mode="ode", method="euler", shift=0.3)
    assert ode_images.shape == sde_images.shape == (6, 3, 16, 16) and not torch.equal(ode_images, sde_images)


@pytest.mark.timeout(900)
def test_banks_and_knowledge(shell: Shell) -> None:
    """After the chain: the training table is the bank; it goes to the reference's file and back, grows, is searched."""
    if not (shell.workspace / "tables/gmem").exists():
        shell("run", "gmem.yaml", "--stages", "encode,train")
    snippets = Table.open(shell.workspace / "tables/gmem").read(np.arange(40), ["cls_tokens"])["cls_tokens"]
    assert "would write 40 rows" in shell("bank", "export", "tables/gmem", "x.pth", "--dry-run")
    shell("bank", "export", "tables/gmem", "bank.pth")
    assert torch.equal(read_nested(shell.workspace / "bank.pth"), snippets.float())
    shell("bank", "import", "bank.pth", "tables/bank")
    assert torch.equal(
        Table.open(shell.workspace / "tables/bank", verify=True).read(np.arange(40), ["cls_tokens"])["cls_tokens"],
        snippets.float(),
    )
    shell("bank", "append", "tables/bank", "tables/grown", "--between", "2", "5", "--alpha", "0.25")
    grown = Table.open(shell.workspace / "tables/grown").read(np.array([2, 40]), ["cls_tokens"])["cls_tokens"]
    assert torch.equal(grown[0], snippets[2].float())
    assert torch.allclose(grown[1], 0.25 * snippets[2].float() + 0.75 * snippets[5].float())
    assert shell("bank", "nearest", "tables/grown", "--row", "7", "-k", "2").split()[:2] == ["7", "1.0000"]
    shell("bank", "export", "tables/grown", "low.safetensors", "--rank", "3")
    shell("bank", "import", "low.safetensors", "tables/low")
    assert "the bank has rows 0 to 40, not 41" in shell(
        "bank", "nearest", "tables/grown", "--row", "41", code=ExitCode.USER
    )
    assert "has no rank 99" in shell("bank", "export", "tables/grown", "z.pth", "--rank", "99", code=ExitCode.USER)
    (shell.workspace / "short.pth").write_bytes((shell.workspace / "bank.pth").read_bytes()[:-100])
    assert "short.pth" in shell("bank", "import", "short.pth", "tables/short", code=ExitCode.DATA)

    name = "gmem"

    for folder, files in (("novel", ("x.png", "y.png")), ("left", ("x.png",)), ("right", ("x.png",))):
        (shell.workspace / folder).mkdir()
        for number, file in enumerate(files):
            Image.radial_gradient("L").rotate(50 * number).resize((40, 24)).convert("RGB").save(
                shell.workspace / folder / file
            )
    shell("knowledge", "external", name, "--images", "novel", "--to", "external.png", "--each", "3", "points=3")
    assert read_png(shell.workspace / "external.png").shape == (3, 2 * 18 + 2, 4 * 18 + 2)
    shell("knowledge", "internal", name, "--first", "left", "--second", "right", "--to", "internal.png",
          "--method", "spherical", "--steps", "3", "points=3")  # fmt: skip
    assert read_png(shell.workspace / "internal.png").shape == (3, 18 + 2, 5 * 18 + 2)
    said = shell(
        "knowledge", "internal", name, "--first", "novel", "--second", "right", "--to", "z.png", code=ExitCode.USER
    )
    assert "has 2 images and" in said and "pairs need as many in both" in said
    said = shell("knowledge", "internal", name, "--first", "left", "--second", "right", "--to", "z.png", "--method",
                 "sperical", code=ExitCode.USER)  # fmt: skip
    assert "did you mean 'spherical'" in said or "spherical" in said

    shell("weights", "export", name, "--to", "gmem.safetensors")
    assert metadata_of(shell.workspace / "gmem.safetensors")["hpc_gen.latent_scale"] == "[1.5, 0.5]"
