"""A reference of another size than the samples is refused before a run folder is made, where its size is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from experiments import TINY, make_tables
from PIL import Image

from hpc_gen.config.loader import loads
from hpc_gen.runtime.errors import UserError
from hpc_gen.stages import run_setup

ENCODED = "encode: {source: folder, source_path: none, channels: 1, image_size: %s}\n"


def scored(reference: str, metrics: str = "fid, kid") -> str:
    return (
        f"{TINY}evaluate: {{metrics: [{metrics}], extractor: {{name: random-conv}}, kid_subset_size: 4, "
        f"reference: {{{reference}}}}}\n"
    )


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tables and files of images at 16 pixels, where the experiment makes 8."""
    monkeypatch.setattr(run_setup, "PACKAGES", ("slurm",))
    make_tables(tmp_path, rows=8, size=16)
    (tmp_path / "folder/a").mkdir(parents=True)
    Image.fromarray(np.zeros((16, 12, 3), np.uint8)).save(tmp_path / "folder/a/one.png")
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 16, 16, 3), np.uint8))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (scored("table: tables/toyval"), r"tables/toyval \('evaluate.reference.table'\) 16 x 16: a score"),
        (scored("images: folder"), r"folder \('evaluate.reference.images'\) 12 x 16: a score"),
        (scored("images: images.npz"), r"images.npz .* 16 x 16: a score"),
        (scored("images: images.npz, statistics: s.npz"), "16 x 16: a score"),  # kid needs images all the same
        (
            scored("table: tables/new").replace("tables/toyval", "tables/new") + ENCODED % 4,
            r"tables/new .* 4 x 4: a score across sizes means nothing; encode the reference at the samples' size",
        ),
    ],
)
def test_another_size_is_refused_before_anything_is_made(workspace: Path, text: str, where: str) -> None:
    with pytest.raises(UserError, match=rf"the samples are 8 x 8 pixels \('method.image_size'\) and .*{where}"):
        run_setup.prepare_run(loads(text), workspace)
    assert not (workspace / "runs").exists()


@pytest.mark.parametrize(
    "text",
    [
        TINY,
        scored("table: tables/nowhere"),
        scored("images: nowhere.npz"),
        scored("images: folder, statistics: s.npz", metrics="fid"),
        scored("table: tables/new").replace("tables/toyval", "tables/new") + ENCODED % 8,
    ],
)
def test_what_is_not_known_or_not_needed_is_let_pass(workspace: Path, text: str) -> None:
    assert run_setup.prepare_run(loads(text), workspace).exists()
