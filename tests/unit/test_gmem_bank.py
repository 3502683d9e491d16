"""Memory banks as tables: never whole in memory, with the name of each row, to and from files, grown and searched."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_tokenizers import DINOV2, write_dinov2
from torch import Tensor

from hpc_gen.config.experiment import EncodeConfig
from hpc_gen.data.index import LABELS
from hpc_gen.data.joined import join
from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.methods.gmem.bank import LowRankBank
from hpc_gen.methods.gmem.low_rank import Randomised
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.tensor_files import read_nested, read_tensors
from hpc_gen.stages.units import Ledger
from shard_tools import bank_rows
from shard_tools.bank import append, export_bank, import_bank, nearest, open_bank, row_between, row_of
from shard_tools.bank_images import snippets_of_images
from shard_tools.bank_rows import BankRows, Loose, made_of, snippets_of_file
from shard_tools.encode import EncodeWorker

SAID: list[str] = []
CONFIG = f"""
name: bank
method: {{name: gmem, image_size: 16, tokenizer_stride: 4, channels: 2, hidden: 16, depth: 2, heads: 2,
          snippet_dim: {DINOV2.width}}}
data: {{table: tables/bank}}
encode:
  source: folder
  source_path: pictures
  image_size: 16
  shard_rows: 8
  validation: false
  tokenizer: {{name: dinov2, weights: dino.safetensors,
               dinov2: {{grid: 4, any_size: true, columns: [cls_tokens], flip: false}}}}
"""


def snippets(rows: int = 50, width: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def make_bank(folder: Path, rows: int = 50, named: bool = True, **changes: Any) -> Table:
    names = [f"train/{row:03d}.png" for row in range(rows)] if named else None
    write_table(folder, {"cls_tokens": snippets(rows, **changes)}, shard_rows=16, names=names)
    return open_bank(folder)


def every_name(table: Table) -> list[str | None]:
    return table.names(np.arange(table.rows)) or []


def all_rows(table: Table) -> Tensor:
    return table.read(np.arange(table.rows), ["cls_tokens"])["cls_tokens"]


@pytest.mark.parametrize("name", ["bank.pth", "bank.safetensors"])
def test_a_plain_bank_goes_out_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(bank_rows, "ROWS_AT_ONCE", 7)
    bank, path = make_bank(tmp_path / "t"), tmp_path / name
    export_bank(bank, path, SAID.append)
    found = read_nested(path)
    assert torch.equal(found["memory_bank"] if name.endswith(".safetensors") else found, snippets())
    if name.endswith(".pth"):
        assert torch.equal(torch.load(path, weights_only=True), snippets()), "the reference reads it so"
    import_bank(path, tmp_path / "again", SAID.append)
    again = Table.open(tmp_path / "again", verify=True)
    assert torch.equal(all_rows(again), snippets()) and every_name(again)[3] == f"{name}/3"


@pytest.mark.parametrize("method", ["exact", "randomised"])
def test_a_low_rank_bank_goes_out_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(bank_rows, "ROWS_AT_ONCE", 9)
    bank = make_bank(tmp_path / "t")
    for name in ("low.pth", "low.safetensors"):
        export_bank(bank, tmp_path / name, SAID.append, rank=5, method=method, options=Randomised(power_iterations=6))
    assert f"50 rows of 12 at rank 5 ({method}), which hold " in SAID[-1]
    found = torch.load(tmp_path / "low.pth", weights_only=True)
    assert (found["latent_dim"], found["feature_dim"]) == (5, 12)
    low, whole = LowRankBank.from_tensors(read_nested(tmp_path / "low.pth"), "low.pth"), LowRankBank.of(snippets(), 5)
    assert torch.allclose(low.decode(low.coefficients), whole.decode(whole.coefficients), atol=2e-2)
    stored = read_tensors(tmp_path / "low.safetensors")
    assert set(stored) == {"C", "M", "S", "mean"} and torch.equal(stored["C"], low.coefficients)
    import_bank(tmp_path / "low.pth", tmp_path / "again", SAID.append)
    again = Table.open(tmp_path / "again", verify=True)
    assert torch.allclose(all_rows(again), low.decode(low.coefficients), atol=1e-6)
    export_bank(
        bank, tmp_path / "twice.pth", SAID.append, rank=5, method=method, options=Randomised(power_iterations=6)
    )
    assert (tmp_path / "twice.pth").read_bytes() == (tmp_path / "low.pth").read_bytes()


def anonymous_mib() -> float:
    """Memory of this process that is no file's; what malloc only keeps for later is given back first."""
    ctypes.CDLL(None).malloc_trim(0)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


@pytest.mark.parametrize(
    ("name", "rank", "method"),
    [("a.pth", None, "exact"), ("a.safetensors", 16, "exact"), ("a.pth", 16, "randomised")],
)
def test_no_bank_is_in_memory_as_a_whole(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, name: str, rank: int | None, method: str
) -> None:
    """192 MiB of snippets; pieces of 4096 rows are 4 MiB, and a few copies of one (in float64, too) are at hand."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(196_608, 256, generator=generator)
    write_table(folder / "t", {"cls_tokens": rows}, shard_rows=8192)
    del rows
    bank = open_bank(folder / "t")
    seen: list[float] = []
    read = Table.read

    def watched(self: Table, *words: Any) -> dict[str, Tensor]:
        seen.append(anonymous_mib())
        return read(self, *words)

    monkeypatch.setattr(Table, "read", watched)
    before = anonymous_mib()
    export_bank(bank, folder / name, SAID.append, rank=rank, method=method)
    assert len(seen) >= 48 and max(seen) - before < 120
    path = folder / name
    assert path.stat().st_size > 196_608 * (rank or 256) * 4
    monkeypatch.undo()
    for each in folder.rglob("*"):
        if each.is_file():
            each.unlink()


def test_files_that_are_no_banks_are_refused(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "t")
    for value, words in (
        (torch.zeros(3, 4, 5), r"holds \[3, 4, 5\] of torch.float32, but a memory bank is floats \[rows, width\]"),
        (torch.zeros(3, 4, dtype=torch.int64), "of torch.int64"),
        (torch.zeros(0, 4), r"holds \[0, 4\]"),
        ({"a": torch.zeros(3, 4), "b": torch.zeros(3, 4)}, "holds dict"),
        (torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), "row 1 holds numbers that are not finite"),
    ):
        torch.save(value, tmp_path / "x.pth")
        with pytest.raises(DataError, match=words):
            snippets_of_file(tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.txt is no name of a bank's file; end it in \.pth or \.safetensors"):
        export_bank(bank, tmp_path / "x.txt", SAID.append)
    with pytest.raises(UserError, match="unknown method 'randomized' \\(did you mean 'randomised'"):
        export_bank(bank, tmp_path / "y.pth", SAID.append, rank=3, method="randomized")
    with pytest.raises(UserError, match="a bank of 50 rows of 12 has no rank 13; give 1 to 12"):
        export_bank(bank, tmp_path / "y.pth", SAID.append, rank=13)
    damaged = snippets()
    damaged[33, 2] = float("inf")
    write_table(tmp_path / "damaged", {"cls_tokens": damaged}, shard_rows=16)
    for rank in (None, 4):
        with pytest.raises(DataError, match=r"damaged: row 33 holds numbers that are not finite"):
            export_bank(open_bank(tmp_path / "damaged"), tmp_path / "y.pth", SAID.append, rank=rank)
    assert not (tmp_path / "y.pth").exists() and not list(tmp_path.glob(".tmp*"))
    write_table(
        tmp_path / "pixels", {"pixels": torch.zeros(3, 4), LABELS: torch.zeros(3, dtype=torch.int64)}, shard_rows=3
    )
    with pytest.raises(UserError, match=r"has no column 'cls_tokens' of vectors \(it has labels, pixels\)"):
        open_bank(tmp_path / "pixels")


def test_grown_banks_name_their_rows(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "t")
    torch.save(snippets(3, seed=1).half(), tmp_path / "more.pth")
    append(bank, snippets_of_file(tmp_path / "more.pth"), tmp_path / "filed", {}, SAID.append)
    filed = Table.open(tmp_path / "filed", verify=True)
    assert torch.equal(all_rows(filed), torch.cat([snippets(), snippets(3, seed=1).half().float()]))
    assert every_name(filed) == [*every_name(bank), "more.pth/0", "more.pth/1", "more.pth/2"]
    append(filed, row_between(filed, 2, 51, 0.25), tmp_path / "mixed", {}, SAID.append)
    mixed = Table.open(tmp_path / "mixed", verify=True)
    assert every_name(mixed)[-1] == "0.25 of train/002.png, 0.75 of more.pth/1"
    append(mixed, make_bank(tmp_path / "u", 5, seed=4), tmp_path / "both", {}, SAID.append)
    both = Table.open(tmp_path / "both", verify=True)
    assert both.rows == 59 and every_name(both)[54:] == [f"train/{row:03d}.png" for row in range(5)]
    assert torch.equal(all_rows(both)[54:], snippets(5, seed=4))
    with pytest.raises(UserError, match="5 snippets of width 7 cannot be appended to a bank of width 12"):
        append(bank, make_bank(tmp_path / "narrow", 5, width=7), tmp_path / "z", {}, SAID.append)


def test_rows_that_nobody_knows_have_no_name(tmp_path: Path) -> None:
    old, known = make_bank(tmp_path / "old", 3, named=False), make_bank(tmp_path / "known", 2)
    append(old, known, tmp_path / "a", {}, SAID.append)
    assert every_name(Table.open(tmp_path / "a", verify=True)) == [None, None, None, "train/000.png", "train/001.png"]
    append(old, make_bank(tmp_path / "other", 2, named=False, seed=2), tmp_path / "b", {}, SAID.append)
    assert not Table.open(tmp_path / "b", verify=True).has_names
    rows = BankRows((old, known), {})
    assert rows.names(np.array([4, 0])) == ["train/001.png", None]
    mixed = row_between(old, 0, 2, 0.5)
    assert mixed.names(np.array([0])) == ["0.5 of row 0, 0.5 of row 2"]


def test_neighbours_are_told_by_their_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_rows, "ROWS_AT_ONCE", 8)
    bank = make_bank(tmp_path / "t")
    found = nearest(bank, row_of(bank, 7), 4)
    unit = torch.nn.functional.normalize(snippets(), dim=1)
    wanted = (unit @ unit[7]).topk(4)
    assert [row for row, _, _ in found] == wanted.indices.tolist()
    assert [name for _, _, name in found] == [f"train/{row:03d}.png" for row in wanted.indices.tolist()]
    nameless = make_bank(tmp_path / "old", 5, named=False)
    assert [name for _, _, name in nearest(nameless, row_of(nameless, 1), 2)] == [None, None]
    with pytest.raises(UserError, match="the bank has rows 0 to 49, not 50"):
        row_of(bank, 50)


# ---------------------------------------------------------------- banks of images


@pytest.fixture
def encoded(tmp_path: Path) -> Path:
    """A workspace with pictures, two of them novel, and the bank of the others."""
    write_dinov2(tmp_path / "dino.safetensors")
    generator = np.random.default_rng(0)
    for number in range(14):
        folder = tmp_path / ("pictures/ab" if number < 12 else "novel/deep")
        folder.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (5, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((20, 24), Image.Resampling.BILINEAR).save(folder / f"{number:02d}.png")
    (tmp_path / "bank.yaml").write_text(CONFIG)
    encode(tmp_path, "pictures", "bank")
    return tmp_path


def encode(workspace: Path, source: str, table: str) -> Table:
    import yaml

    section = yaml.safe_load(CONFIG)["encode"] | {"source_path": source}
    worker = EncodeWorker(EncodeConfig.model_validate(section), workspace, {"train": table})
    book = Ledger(workspace / "ledger" / table, workspace)
    for unit in worker.units():
        staging = commit.make_folder(commit.staging_path(workspace / "staging" / unit.name))
        book.commit(unit, worker.do(unit, staging, lambda: None), worker.fingerprint())
    worker.finish()
    return Table.open(workspace / table, verify=True)


def test_images_are_appended_as_the_stage_encodes_them(encoded: Path) -> None:
    bank = open_bank(encoded / "bank")
    assert sorted(bank.index.columns) == ["cls_tokens", LABELS]
    more = snippets_of_images(str(encoded / "bank.yaml"), encoded, encoded / "novel")
    append(bank, more, encoded / "grown", {}, SAID.append)
    grown = Table.open(encoded / "grown", verify=True)
    assert every_name(grown)[12:] == ["novel/deep/12.png", "novel/deep/13.png"]
    novel = encode(encoded, "novel", "more")
    by_name = dict(zip(every_name(novel), all_rows(novel), strict=True))
    for place, file in ((12, "12.png"), (13, "13.png")):
        assert torch.equal(all_rows(grown)[place], by_name[f"train/deep/{file}"]), "bit for bit"
    append(grown, open_bank(encoded / "more"), encoded / "again", {}, SAID.append)
    assert made_of(Table.open(encoded / "again")) == made_of(bank) != {}


def test_snippets_of_another_network_or_crop_are_not_appended(encoded: Path) -> None:
    bank = open_bank(encoded / "bank")
    write_dinov2(encoded / "dino.safetensors", seed=1)
    with pytest.raises(
        UserError, match=r"not made as those of .*bank: dinov2\.weights_sha256 is '\w+' there and '\w+'"
    ):
        append(
            bank,
            snippets_of_images(str(encoded / "bank.yaml"), encoded, encoded / "novel"),
            encoded / "z",
            {},
            SAID.append,
        )
    write_dinov2(encoded / "dino.safetensors")
    (encoded / "other.yaml").write_text(CONFIG.replace("shard_rows: 8", "shard_rows: 8\n  crop: short_bicubic"))
    with pytest.raises(UserError, match=r"pixels\.crop is None there and 'short_bicubic' here"):
        append(
            bank,
            snippets_of_images(str(encoded / "other.yaml"), encoded, encoded / "novel"),
            encoded / "z",
            {},
            SAID.append,
        )
    unknown = Loose(torch.zeros(1, DINOV2.width), lambda row: None, {})
    append(bank, unknown, encoded / "trusted", {}, SAID.append)  # nobody says what made it
    assert made_of(Table.open(encoded / "trusted")) == made_of(bank)


def test_images_that_cannot_be_appended_are_refused(encoded: Path) -> None:
    config = str(encoded / "bank.yaml")
    (encoded / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no image"):
        snippets_of_images(config, encoded, encoded / "empty")
    (encoded / "novel" / "bad.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"bad\.png cannot be read as an image"):
        snippets_of_images(config, encoded, encoded / "novel")
    (encoded / "pixels.yaml").write_text(CONFIG[: CONFIG.index("  tokenizer")])
    with pytest.raises(UserError, match="does not encode with dinov2"):
        snippets_of_images(str(encoded / "pixels.yaml"), encoded, encoded / "novel")


def test_what_made_the_snippets_of_a_join_is_known(encoded: Path) -> None:
    bank = open_bank(encoded / "bank")
    labels = bank.read(np.arange(12), [LABELS])[LABELS]
    write_table(encoded / "extra", {"x": torch.zeros(12, 1), LABELS: labels}, shard_rows=8, num_classes=1)
    joined = join(encoded / "joined", [encoded / "extra", encoded / "bank"])
    assert made_of(open_bank(encoded / "joined")) == made_of(bank) and joined.has_names
    assert made_of(make_bank(encoded / "t")) == {}
