"""The encode stage with a tokenizer that computes: sizes, flips, the formats of the seed, kills and second writers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments import scratch_folder
from PIL import Image
from toy_tokenizer import ToyTokenizer, factory, moments

from hpc_gen import tokenizers
from hpc_gen.config.experiment import EncodeConfig
from hpc_gen.data.images import center_crop, resize, to_pixels
from hpc_gen.data.index import INDEX_NAME, TableIndex
from hpc_gen.data.table import Table
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.stages.units import Ledger
from shard_tools.encode import EncodeWorker

KEYS = ("moments", "moments_flip")
CLASSES = ("n01440764", "n01443537", "n01484850")
FORMATS = pytest.mark.parametrize("layout", ["ptshard", "webdataset", "safetensors", "pt", "npz"])


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tokenizers.TOKENIZERS, "kl_vae", factory)
    monkeypatch.setattr("shard_tools.encode.set_determinism", lambda *_: None)


def make_images(root: Path, each: int = 4) -> None:
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (root / "images" / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            image = Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8))
            image.save(root / "images" / name / f"{name}_{i}.png")


def make_worker(workspace: Path, table: str = "table", **changes: object) -> EncodeWorker:
    section: dict[str, object] = {
        "source": "folder", "source_path": "images", "image_size": 16, "shard_rows": 5,
        "tokenizer": {"name": "kl_vae", "weights": "toy"},
    }  # fmt: skip
    return EncodeWorker(EncodeConfig.model_validate(section | changes), workspace, {"train": table})


def run(workspace: Path, worker: EncodeWorker, finish: bool = True, ledger: str = "ledger") -> list[str]:
    book, done = Ledger(workspace / "ledgers" / ledger, workspace), []
    for unit in book.missing(worker.units(), worker.fingerprint()):
        staging = commit.make_folder(commit.staging_path(workspace / "staging" / unit.name))
        book.commit(unit, worker.do(unit, staging, lambda: None), worker.fingerprint())
        done.append(unit.name)
    if finish:
        worker.finish()
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def expected(workspace: Path, size: int, crop: int | None = None) -> dict[bytes, int]:
    """{bytes of the float32 moments: label} of every image, computed apart."""
    found = {}
    for label, name in enumerate(CLASSES):
        for path in sorted((workspace / "images" / name).iterdir()):
            image = center_crop(Image.open(path).convert("RGB"), crop or size)
            pixels = to_pixels(resize(image, size) if crop else image)
            found[moments(pixels[None])[0].numpy().tobytes()] = label
    return found


@pytest.mark.parametrize(("size", "crop"), [(16, None), (8, 16), (12, 32), (32, None)])
def test_any_size_by_resizing_the_crop(tmp_path: Path, size: int, crop: int | None) -> None:
    make_images(tmp_path)
    run(tmp_path, make_worker(tmp_path, image_size=size, crop_size=crop, format="npz"))
    table = Table.open(tmp_path / "table", verify=True)
    found = table.read(np.arange(12), (*KEYS, "labels"))
    assert found["moments"].shape == (12, 6, size // 4, size // 4) and found["moments"].dtype == torch.float32
    wanted = expected(tmp_path, size, crop)
    assert wanted == {m.numpy().tobytes(): int(y) for m, y in zip(found["moments"], found["labels"], strict=True)}
    assert table.index.recipe.get("crop_size") == crop


def test_the_flip_is_of_the_image(tmp_path: Path) -> None:
    make_images(tmp_path)
    run(tmp_path, make_worker(tmp_path))
    found = Table.open(tmp_path / "table").read(np.arange(12), KEYS)
    assert found["moments"].dtype == torch.float16
    assert not torch.equal(found["moments_flip"], found["moments"].flip(-1)), "a flipped latent"
    assert not torch.equal(found["moments_flip"], found["moments"])


@FORMATS
def test_formats_hold_the_same_rows(tmp_path: Path, layout: str) -> None:
    make_images(tmp_path)
    run(tmp_path, make_worker(tmp_path, "plain"))
    worker = make_worker(tmp_path, "other", format=layout)
    assert len(run(tmp_path, worker, ledger=layout)) == 3
    plain, other = Table.open(tmp_path / "plain"), Table.open(tmp_path / "other", verify=True)
    names = (*KEYS, "labels")
    one, two = plain.read(np.arange(12), names), other.read(np.arange(12), names)
    assert torch.equal(one["labels"], two["labels"]) and other.index.class_names == CLASSES
    assert all(torch.equal(one[key], two[key].half()) for key in KEYS)
    assert other.index.layout == layout and other.index.tokenizer == ToyTokenizer().identity
    assert ("format" in other.index.recipe) == (layout != "ptshard")
    assert run(tmp_path, make_worker(tmp_path, "other", format=layout), ledger=layout) == [], "nothing is done twice"
    before = contents(tmp_path / "other")
    assert len(run(tmp_path, make_worker(tmp_path, "other", format=layout), ledger="another run")) == 3
    assert contents(tmp_path / "other") == before, "whole units are taken over"


@FORMATS
def test_classes_keep_their_labels(tmp_path: Path, layout: str) -> None:
    """By folder name and number; the reference's npz and pt readers would call them 0 and 1."""
    make_images(tmp_path)
    run(tmp_path, make_worker(tmp_path, format=layout, classes=["n01484850", 1]))
    table = Table.open(tmp_path / "table", verify=True)
    labels = table.read(np.arange(8), ("labels",))["labels"]
    assert set(labels.tolist()) == {1, 2} and table.index.class_names == CLASSES and table.rows == 8
    with pytest.raises(UserError, match=r"has no class 'n01484851' \(did you mean 'n01484850'\?\)"):
        make_worker(tmp_path, "t", classes=["n01484851"]).units()


@FORMATS
def test_bad_images_are_counted_and_left_out(tmp_path: Path, layout: str) -> None:
    make_images(tmp_path)
    (tmp_path / "images" / CLASSES[1] / f"{CLASSES[1]}_2.png").write_bytes(b"no image")
    run(tmp_path, make_worker(tmp_path, format=layout, max_bad_fraction=0.1))
    table = Table.open(tmp_path / "table", verify=True)
    assert table.rows == 11 and len(table.index.bad_images) == 1
    assert table.index.statistics["skipped"] == {"unreadable": 1}


class Killed(BaseException):
    """As SIGKILL: nothing of ours catches it."""


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do the work, dying before its file operation `number`; False when it has fewer."""
    count = 0

    def observer(name: str, path: Path) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise Killed

    commit.ops.observer = observer
    try:
        work()
    except Killed:
        return True
    finally:
        commit.ops.observer = None
    return False


@FORMATS
def test_a_kill_at_any_operation_leaves_no_false_table(layout: str) -> None:
    with scratch_folder() as folder:  # in memory where it can be: thousands of fsyncs
        kill_at_every_operation(folder, layout)


def kill_at_every_operation(tmp_path: Path, layout: str) -> None:
    """After each kill the folder is not a table (never a smaller one); going on gives the bytes of an undisturbed run."""
    make_images(tmp_path, each=1)
    section = {"format": layout, "shard_rows": 2}
    run(tmp_path, make_worker(tmp_path, "whole", **section), ledger="whole")
    wanted = contents(tmp_path / "whole")
    operation = 0
    while True:
        operation += 1
        here = f"t{operation}"
        worker = make_worker(tmp_path, here, **section)
        died = killed_at(operation, partial(run, tmp_path, worker, ledger=here))
        if (tmp_path / here / INDEX_NAME).exists():
            assert contents_without_staging(tmp_path / here) == wanted
        else:
            with pytest.raises(DataError, match="run the stage encode"):
                Table.open(tmp_path / here)
        if not died:
            break
        if operation % 5 == 0:  # of all, it would take seconds
            run(tmp_path, make_worker(tmp_path, here, **section), ledger=here)
            assert contents_without_staging(tmp_path / here) == wanted
    assert operation > 20


def contents_without_staging(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if commit.STAGING_PREFIX not in name}


@FORMATS
def test_two_writers_at_once(tmp_path: Path, layout: str) -> None:
    make_images(tmp_path)
    run(tmp_path, make_worker(tmp_path, "alone", format=layout), ledger="alone")
    workers = [make_worker(tmp_path, "shared", format=layout) for _ in range(2)]
    for worker in workers:
        worker.units()
    errors: list[BaseException] = []

    def work(worker: EncodeWorker, ledger: str) -> None:
        try:
            run(tmp_path, worker, ledger=ledger)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(w, f"writer{i}")) for i, w in enumerate(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    Table.open(tmp_path / "shared", verify=True)


def test_another_tokenizer_is_refused_by_field(tmp_path: Path) -> None:
    make_images(tmp_path)
    run(tmp_path, make_worker(tmp_path))
    for changes, message in (
        ({"tokenizer": {"name": "kl_vae", "weights": "other"}}, r"tokenizer\.weights_sha256 = 'toy', asked is 'other'"),
        ({"tokenizer": {"name": "identity"}}, "computed = "),
        ({"format": "pt"}, "format = None, asked is 'pt'"),
        ({"crop_size": 20}, "crop_size = None, asked is 20"),
        ({"threads": 2}, r"computed\.threads = 1, asked is 2"),
    ):
        with pytest.raises(UserError, match=message):
            make_worker(tmp_path, **changes).units()  # type: ignore[arg-type]


@FORMATS
def test_shards_of_another_program_are_not_written_over(tmp_path: Path, layout: str) -> None:
    make_images(tmp_path)
    run(tmp_path, make_worker(tmp_path, format=layout))
    (tmp_path / "table" / INDEX_NAME).unlink()
    commit.remove_tree(tmp_path / "table" / "facts")
    before = contents(tmp_path / "table")
    with pytest.raises(UserError, match=r"holds shards that this stage did not write \("):
        make_worker(tmp_path, format=layout).units()
    assert contents(tmp_path / "table") == before


def test_names_of_files(tmp_path: Path) -> None:
    """The image's own name; where two of a class share one, the path below the class folder in one name."""
    make_images(tmp_path, each=1)
    sub = tmp_path / "images" / CLASSES[0] / "more"
    sub.mkdir()
    Image.new("RGB", (16, 16)).save(sub / "x.png")
    run(tmp_path, make_worker(tmp_path, "a", format="npz"), ledger="a")
    assert (tmp_path / "a" / CLASSES[0] / "x.png.npz").is_file()
    Image.new("RGB", (16, 16), (9, 9, 9)).save(sub / f"{CLASSES[0]}_0.png")
    run(tmp_path, make_worker(tmp_path, "b", format="npz"), ledger="b")
    assert sorted(p.name for p in (tmp_path / "b" / CLASSES[0]).iterdir()) == [
        f"more-{CLASSES[0]}_0.png.npz", "more-x.png.npz", f"{CLASSES[0]}_0.png.npz",
    ]  # fmt: skip
    assert (tmp_path / "b" / CLASSES[1] / f"{CLASSES[1]}_0.png.npz").is_file()
    Image.new("RGB", (16, 16), (8, 8, 8)).save(tmp_path / "images" / CLASSES[0] / "more-x.png")
    with pytest.raises(UserError, match=r"would both become n01440764/more-x\.png\.npz; use encode\.format=ptshard"):
        make_worker(tmp_path, "c", format="npz").units()


def test_a_class_that_cannot_be_a_folder(tmp_path: Path) -> None:
    make_images(tmp_path, each=1)
    (tmp_path / "images" / CLASSES[0]).rename(tmp_path / "images" / "facts")
    with pytest.raises(UserError, match="class 'facts' of source 'folder' is no folder name"):
        make_worker(tmp_path, format="pt").units()


def test_a_stop_is_looked_for_between_forward_passes(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    make_images(tmp_path, each=8)
    worker = make_worker(tmp_path, shard_rows=24)
    calls: list[int] = []

    def poll() -> None:
        calls.append(1)
        if len(calls) == 10:  # the second image after a forward pass of eight
            raise Stop

    with pytest.raises(Stop):
        worker.do(worker.units()[0], tmp_path / "staging", poll)
    assert worker.tokenizer.encoded == [8]  # type: ignore[attr-defined]
    assert not (tmp_path / "table").exists()


def test_moments_that_are_not_finite_stop_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path)
    real = ToyTokenizer.encode_float32

    def broken(self: ToyTokenizer, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        columns = real(self, pixels)
        columns["moments_flip"][0] = float("nan")
        return columns

    monkeypatch.setattr(ToyTokenizer, "encode_float32", broken)
    for layout in ("ptshard", "npz"):
        with pytest.raises(DataError, match="tokenizer 'kl_vae' makes non-finite moments_flip; check its weights"):
            run(tmp_path, make_worker(tmp_path, layout, format=layout), ledger=layout)
        assert not (tmp_path / layout / INDEX_NAME).exists()


def test_statistics_of_latents(tmp_path: Path) -> None:
    make_images(tmp_path)
    run(tmp_path, make_worker(tmp_path, format="pt"))
    index = TableIndex.read(tmp_path / "table")
    found = Table.open(tmp_path / "table").read(np.arange(12), KEYS)
    for key in KEYS:
        values = found[key].double().numpy()
        np.testing.assert_allclose(index.statistics["columns"][key]["std"], values.std((0, 2, 3)), rtol=1e-9)
    facts = json.loads((tmp_path / "table" / "facts" / "shard_00000.json").read_text())
    assert len(facts["shards"]) == 5 and facts["rows"] == 5
