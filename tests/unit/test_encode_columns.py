"""Encode with several tokenizers in one pass, as an extra stage, and with decoding ahead of the network."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import toy_tokenizer
from PIL import Image
from tiny_tokenizers import toy_settings, write_dinov2, write_vqgan

from hpc_gen import tokenizers
from hpc_gen.config.experiment import EncodeConfig
from hpc_gen.data.index import TableIndex
from hpc_gen.data.table import Table
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.stages.units import Ledger
from shard_tools.centroids import CentroidsOptions, CentroidsWorker
from shard_tools.encode import EncodeWorker, extra_worker
from shard_tools.pixels import AHEAD, ahead


def make_images(root: Path, count: int = 6) -> None:
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        folder = root / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((30, 28), Image.Resampling.BICUBIC).save(folder / f"{i}.png")


def section(**changes: Any) -> dict[str, Any]:
    keys = {"source": "folder", "source_path": "images", "image_size": 28, "shard_rows": 5, "validation": False}
    return keys | changes


def encode(workspace: Path, worker: Any, ledger: str = "run") -> None:
    book = Ledger(workspace / "ledger" / ledger, workspace)
    for unit in book.missing(worker.units(), worker.fingerprint()):
        staging = commit.make_folder(workspace / "staging" / unit.name)
        book.commit(unit, worker.do(unit, staging, lambda: None), worker.fingerprint())
    worker.finish()


def worker_of(workspace: Path, table: str = "t", **changes: Any) -> EncodeWorker:
    return EncodeWorker(EncodeConfig.model_validate(section(**changes)), workspace, {"train": table})


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tokenizers.TOKENIZERS, "kl_vae", toy_tokenizer.factory)


KL = {"name": "kl_vae", "weights": "toy"}
VQ = {"name": "vqgan", "weights": "vqgan.safetensors"}


def dino(**changes: Any) -> dict[str, Any]:
    return {"name": "dinov2", "weights": "dinov2.safetensors", "dinov2": toy_settings(**changes)}


def test_columns_of_several_are_those_of_each_alone(tmp_path: Path, toy: None) -> None:
    make_images(tmp_path)
    write_dinov2(tmp_path / "dinov2.safetensors")
    write_vqgan(tmp_path / "vqgan.safetensors")
    encode(tmp_path, worker_of(tmp_path, "all", tokenizer=KL, also={"snippets": dino(), "pixels": {}, "vq": VQ}))
    together = Table.open(tmp_path / "all", verify=True)
    assert sorted(together.index.columns) == [
        "cls_tokens", "cls_tokens_flip", "labels", "moments", "moments_flip", "pixels", "representations",
        "representations_flip", "vq_codes", "vq_codes_flip",
    ]  # fmt: skip
    found = together.read(np.arange(12), tuple(together.index.columns))
    for name, tokenizer in (("kl", KL), ("dino", dino()), ("vq", VQ), ("pixels", {})):
        encode(tmp_path, worker_of(tmp_path, name, tokenizer=tokenizer), ledger=name)
        alone = Table.open(tmp_path / name)
        rows = alone.read(np.arange(12), tuple(alone.index.columns))
        assert all(torch.equal(found[column], values) for column, values in rows.items()), name
    index = together.index
    assert index.tokenizer["name"] == "kl_vae" and set(index.recipe["also"]) == {"snippets", "pixels", "vq"}
    assert index.recipe["computed"] == {"threads": 1, "device": "cpu"}
    assert set(index.statistics["columns"]) == {
        "moments", "moments_flip", "cls_tokens", "cls_tokens_flip", "pixels",
    }, "sequences of tokens have no statistics per channel"  # fmt: skip


def test_others_belong_to_the_identity(tmp_path: Path, toy: None) -> None:
    make_images(tmp_path)
    write_dinov2(tmp_path / "dinov2.safetensors")
    one, two, three = (
        worker_of(tmp_path, tokenizer=KL, also=also).fingerprint()
        for also in (None, {"s": dino()}, {"s": dino(flip=False)})
    )
    assert len({one, two, three}) == 3
    encode(tmp_path, worker_of(tmp_path, tokenizer=KL, also={"s": dino()}))
    with pytest.raises(UserError, match=r"table .*t was encoded with also\.s\.columns"):
        worker_of(tmp_path, tokenizer=KL, also={"s": dino(flip=False)}).units()


def test_others_that_are_refused(tmp_path: Path, toy: None) -> None:
    with pytest.raises(UserError, match="encode.tokenizer and encode.also.x both make the column 'moments'"):
        worker_of(tmp_path, tokenizer=KL, also={"x": KL})
    with pytest.raises(Exception, match="'encode.also' does not go with 'encode.format' = 'npz'"):
        EncodeConfig.model_validate(section(format="npz", also={"x": KL}))


def context(tmp_path: Path, options: dict[str, Any]) -> Any:
    stage = SimpleNamespace(options=options)
    return SimpleNamespace(
        experiment=SimpleNamespace(extra_stages={"features": stage}), stage="features", workspace=tmp_path, task=0
    )


def test_images_to_features_to_centroids_to_codes(tmp_path: Path) -> None:
    """The chain of DiGIT, each table by the stage that makes it."""
    make_images(tmp_path)
    write_dinov2(tmp_path / "dinov2.safetensors")
    features = dino(columns=["features"], flip=False, precision="float32")
    encode(tmp_path, extra_worker(context(tmp_path, {"table": "f", "encode": section(tokenizer=features)})), "f")
    encode(tmp_path, CentroidsWorker(CentroidsOptions(table="f", codes=6, output="km.npy"), tmp_path), "c")
    codes = dino(columns=["codes"], centroids="km.npy")
    encode(tmp_path, worker_of(tmp_path, "codes", tokenizer=codes), "t")
    table = Table.open(tmp_path / "codes", verify=True)
    rows = table.read(np.arange(12), ("codes", "codes_flip", "labels"))
    vectors = Table.open(tmp_path / "f").read(np.arange(12), ("features",))["features"]
    nearest = torch.cdist(vectors.double(), torch.from_numpy(np.load(tmp_path / "km.npy")).double().expand(12, -1, -1))
    assert torch.equal(rows["codes"].long(), nearest.argmin(-1)) and rows["codes"].unique().numel() == 6
    assert TableIndex.read(tmp_path / "codes").tokenizer["centroids"]["codes"] == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "'extra_stages.features.options' needs 'encode' .* and 'table'"),
        ({"table": "f", "encode": {}, "tabel": 1}, "needs 'encode'"),
        ({"table": "f", "encode": {"source": "folder"}}, "options.encode' is refused: "),
        ({"table": "f", "encode": section(imagesize=3)}, "refused: imagesize"),
        ({"table": "f", "validation_table": "v", "encode": section()}, "exactly where encode.validation is true"),
    ],
)
def test_options_that_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        extra_worker(context(tmp_path, options))


def test_a_task_that_goes_on_asks_no_network_for_its_forecast(tmp_path: Path, toy: None) -> None:
    make_images(tmp_path)
    worker = worker_of(tmp_path, tokenizer=KL)
    before = worker.forecast()
    assert worker.tokenizer.encoded == [1]  # type: ignore[attr-defined]
    unit = worker.units()[0]
    book = Ledger(tmp_path / "ledger", tmp_path)
    book.commit(unit, worker.do(unit, commit.make_folder(tmp_path / "staging"), lambda: None), worker.fingerprint())
    again = worker_of(tmp_path, tokenizer=KL)
    after = again.forecast()
    assert again.tokenizer.encoded == []  # type: ignore[attr-defined]
    assert before.bytes is not None and after.bytes is not None
    assert after.bytes == before.bytes // 12 * 7, "five of twelve rows are there"


class TestAhead:
    def test_the_same_items_in_order(self) -> None:
        assert list(ahead(iter(range(3 * AHEAD)))) == list(range(3 * AHEAD))
        assert list(ahead(iter(()))) == []

    def test_it_works_ahead_but_not_without_limit(self) -> None:
        drawn: list[int] = []
        full = threading.Event()

        def source() -> Iterator[int]:
            for i in range(100):
                drawn.append(i)
                if len(drawn) == 6:
                    full.set()  # one handed over, four waiting, one in hand
                yield i

        with closing(ahead(source(), limit=4)) as items:
            assert next(items) == 0
            assert full.wait(30)
            time.sleep(0.05)
            assert len(drawn) == 6
        assert not [thread for thread in threading.enumerate() if thread.name == "decode"]

    def test_an_error_comes_in_its_place(self) -> None:
        def source() -> Iterator[int]:
            yield 1
            raise DataError("broken")

        items = ahead(source())
        assert next(items) == 1
        with pytest.raises(DataError, match="broken"):
            next(items)


def test_the_network_and_the_decoder_work_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the network has an image in hand, the next ones are decoded."""
    make_images(tmp_path, count=12)
    seen_while_busy: list[int] = []
    decoded: list[int] = []
    monkeypatch.setattr("shard_tools.pixels.cut", _counting(decoded))

    class Slow(toy_tokenizer.ToyTokenizer):
        def encode(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            goal = min(24, 8 * (len(seen_while_busy) + 1) + 8)
            waited = 0
            while len(decoded) < goal and waited < 300:
                time.sleep(0.1)
                waited += 1
            seen_while_busy.append(len(decoded))
            return super().encode(pixels)

    monkeypatch.setitem(tokenizers.TOKENIZERS, "kl_vae", lambda workspace, device, **_: Slow())
    worker = worker_of(tmp_path, tokenizer=KL, shard_rows=24)
    worker.do(worker.units()[0], commit.make_folder(tmp_path / "staging"), lambda: None)
    assert len(seen_while_busy) == 3 and seen_while_busy[0] >= 16 and seen_while_busy[-1] == 24
    assert worker.network_s > 0


def _counting(decoded: list[int]) -> Any:
    from shard_tools.pixels import cut

    def counting(image: Image.Image, encode: EncodeConfig) -> torch.Tensor:
        found = cut(image, encode)
        decoded.append(1)
        return found

    return counting
