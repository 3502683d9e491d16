"""A memory bank by itself, as typed: the shipped experiment at tiny size, killed and resumed, submitted, grown, searched."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_slurm import FakeSlurm
from PIL import Image
from shard_files import content
from threads import one_thread
from tiny_tokenizers import write_dinov2

from hpc_gen import cli, cli_errors
from hpc_gen.data.images import decode_image
from hpc_gen.data.table import Table
from hpc_gen.runtime import clock
from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.tensor_files import read_nested
from hpc_gen.stages.run_setup import load_run
from hpc_gen.stages.units import Ledger
from hpc_gen.tokenizers.dinov2 import Dinov2Tokenizer
from shard_tools.pixels import cut

REPOSITORY = Path(__file__).resolve().parents[2]
BANK = "job_configs/gmem/bank.yaml"
TINY = [
    "encode.source_path=pictures",
    "encode.image_size=28",
    "encode.shard_rows=4",
    "encode.tasks=2",
    "encode.tokenizer.preset=null",
    "encode.tokenizer.weights=dino.safetensors",
    "encode.tokenizer.dinov2.grid=2",
]
IMAGES, BAD = 50, "train/b/07.png"


class Desk:
    """Commands in a workspace: those that start processes as a user types them, the others in this process."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, "-m", "hpc_gen.cli", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.workspace,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables},
            start_new_session=True,
        )

    def run(self, *words: str) -> str:
        process = self.start(*words)
        said, _ = process.communicate()
        assert process.returncode == 0 and "Traceback" not in said, said
        return said

    def __call__(self, *words: str, code: int = 0) -> str:
        given = [*words, "-w", str(self.workspace)]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.chdir(self.workspace):
            ended = cli_errors.exit_code_of(lambda: cli.app(given, prog_name="hpc-gen", standalone_mode=False), given)
        assert ended == code, said.getvalue()
        return said.getvalue()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("bank")
    (folder / "job_configs").symlink_to(REPOSITORY / "job_configs")
    write_dinov2(folder / "dino.safetensors")
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        place = folder / "pictures" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (5, 6, 3), np.uint8)
        Image.fromarray(coarse).resize((36, 30), Image.Resampling.BILINEAR).save(place / f"{number:02d}.png")
    bad = folder / "pictures" / BAD.removeprefix("train/")
    bad.write_bytes(bad.read_bytes()[:50])
    found = Desk(folder)
    found.run("run", BANK, *TINY, "name=undisturbed", "data.table=tables/bank", "encode.max_bad_fraction=0.1")
    return found


def by_name(table: Table) -> dict[str, torch.Tensor]:
    rows = np.arange(table.rows)
    return dict(zip(map(str, table.names(rows) or []), table.read(rows, ["cls_tokens"])["cls_tokens"], strict=True))


@pytest.mark.timeout(600)
def test_one_command_makes_a_bank_that_knows_its_files(desk: Desk) -> None:
    table = Table.open(desk.workspace / "tables/bank", verify=True)
    assert sorted(table.index.columns) == ["cls_tokens", "labels"] and table.rows == IMAGES - 1
    found = by_name(table)
    assert BAD not in found and len(found) == IMAGES - 1
    encode = load_run(RunFolder(desk.workspace / "runs/undisturbed")).experiment.encode
    assert encode is not None
    tokenizer = Dinov2Tokenizer(desk.workspace / "dino.safetensors", dinov2={"grid": 2})
    for name in list(found)[::7]:
        image = decode_image((desk.workspace / "pictures" / name.removeprefix("train/")).read_bytes())
        with one_thread():  # as the stage
            snippet = tokenizer.snippets(cut(image, encode)[None])[0]
        assert torch.equal(snippet, found[name]), name
    assert "names     image of each row" in desk("shards", "info", "tables/bank")
    row = list(found).index("train/a/10.png")
    assert desk("shards", "rows", "tables/bank", str(row)).split() == [str(row), "train/a/10.png"]
    assert desk("shards", "rows", "tables/bank", "--find", "a/10").split() == [str(row), "train/a/10.png"]
    said = desk("bank", "nearest", "tables/bank", "--row", str(row), "-k", "3").splitlines()
    assert len(said) == 3 and said[0].split() == [str(row), "1.0000", "train/a/10.png"]
    desk("shards", "rows", "tables/bank", "99", code=ExitCode.USER)


@pytest.mark.timeout(600)
def test_killed_and_resumed_it_is_the_same_bank(desk: Desk) -> None:
    words = [BANK, *TINY, "name=killed", "data.table=tables/killed", "encode.max_bad_fraction=0.1"]
    ledger = Ledger(RunFolder(desk.workspace / "runs/killed").ledger("encode"), desk.workspace)
    process = desk.start("run", *words)
    while process.poll() is None and not any(ledger.folder.glob("train-*")):
        clock.sleep(0.02)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    desk.run("resume", "killed")
    ours, theirs = (content(desk.workspace / "tables" / name) for name in ("killed", "bank"))
    assert {name for name in ours if not Path(name).name.startswith(".t")} == set(theirs)
    assert all(ours[name] == theirs[name] for name in theirs)


@pytest.mark.timeout(600)
def test_a_tar_gives_the_same_snippets(desk: Desk) -> None:
    (desk.workspace / "tars").mkdir()
    for letter in "ab":
        with tarfile.open(desk.workspace / "tars" / f"{letter}.tar", "w") as archive:
            for path in sorted((desk.workspace / "pictures" / letter).iterdir()):
                if f"train/{letter}/{path.name}" != BAD:
                    archive.add(path, path.name)
    desk.run("run", BANK, *TINY, "name=tar", "data.table=tables/tar", "encode.source=tar", "encode.source_path=tars")
    found, wanted = (by_name(Table.open(desk.workspace / "tables" / name, verify=True)) for name in ("tar", "bank"))
    assert set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.timeout(600)
def test_it_is_an_array_of_a_cluster(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.path}:/usr/bin:/bin")
    words = [
        "submit",
        BANK,
        *TINY,
        "name=array",
        "data.table=tables/array",
        "encode.max_bad_fraction=0.1",
        "--cluster",
        "lab",
    ]
    said = desk(*words, "--dry-run")
    assert "would submit  encode" in said and "13 of 13 units missing, an array of 2 tasks" in said, said
    assert "#SBATCH --array=0-1" in said and not (desk.workspace / "runs/array").exists()


@pytest.mark.timeout(600)
def test_novel_images_are_appended_and_the_bank_is_exported(desk: Desk) -> None:
    novel = desk.workspace / "novel"
    novel.mkdir()
    for number in range(3):
        Image.radial_gradient("L").rotate(40 * number).resize((40, 30)).convert("RGB").save(novel / f"n{number}.png")
    (desk.workspace / "tiny.yaml").write_text(desk.run("config", "show", BANK, *TINY))
    words = ("bank", "append", "tables/bank", "tables/grown", "--images", "novel", "--config", "tiny.yaml")
    assert "would write 49 rows and those of 3 images" in desk(*words, "--dry-run")
    desk(*words)
    grown = Table.open(desk.workspace / "tables/grown", verify=True)
    assert grown.rows == IMAGES + 2
    assert desk("shards", "rows", "tables/grown", "51").split() == ["51", "novel/n2.png"]
    assert desk("bank", "nearest", "tables/grown", "--row", "50", "-k", "1").split()[2] == "novel/n1.png"
    desk("bank", "append", "tables/grown", "tables/both", "--table", "tables/bank")
    assert Table.open(desk.workspace / "tables/both", verify=True).rows == 2 * IMAGES + 1
    for method in ("exact", "randomised"):
        said = desk("bank", "export", "tables/grown", f"{method}.pth", "--rank", "6", "--method", method)
        assert f"52 rows of 24 at rank 6 ({method}), which hold" in said
    exact, fast = (read_nested(desk.workspace / f"{name}.pth") for name in ("exact", "randomised"))
    assert torch.allclose(exact["C"] @ exact["M"].T, fast["C"] @ fast["M"].T, atol=0.05)
    for wrong, sentence in (
        (("--images", "novel"), "--images and --config go together"),
        (("--images", "novel", "--file", "x.pth", "--config", "tiny.yaml"), "say what is appended: one of"),
        (("--images", "nothing", "--config", "tiny.yaml"), "nothing holds no image"),
        (("--table", "tables/none"), "none is not a folder"),
    ):
        code = ExitCode.DATA if "none" in sentence else ExitCode.USER
        assert sentence in desk("bank", "append", "tables/bank", "tables/z", *wrong, code=code)
    said = desk("bank", "export", "tables/grown", "z.pth", "--method", "randomised", code=ExitCode.USER)
    assert "--method randomised is of a low-rank bank; add --rank" in said
