"""Frozen networks of a training (`train.frozen`): what they give, how they are identified, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import experiments
import numpy as np
import pytest
import torch
from experiments import LINEAR, TABLE, Workspace, scratch_folder
from gmem_online import DECODER, ENCODER, ONLINE, STORED, make_space
from PIL import Image
from tiny_tokenizers import DINOV2, write_dinov2
from torch import Tensor

from hpc_gen.config import loader
from hpc_gen.config.errors import ConfigError
from hpc_gen.config.experiment import EncodeConfig
from hpc_gen.data.table import Table
from hpc_gen.methods.gmem.config import GmemConfig
from hpc_gen.methods.gmem.objective import Gmem
from hpc_gen.methods.protocol import Method
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, ExitCode, UserError
from hpc_gen.runtime.journal import read
from hpc_gen.runtime.randomness import Stream
from hpc_gen.stages import run_setup, train_plan
from hpc_gen.stages.build import check_columns, meta_method, open_table, table_facts
from hpc_gen.stages.fork import fork
from hpc_gen.stages.frozen import give_frozen
from hpc_gen.tokenizers.dinov2 import Dinov2Tokenizer
from shard_tools.encode import EncodeWorker

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def space() -> Iterator[Workspace]:
    with scratch_folder() as folder:
        yield make_space(folder)


@pytest.fixture(autouse=True)
def no_copy_of_the_code(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The copy is a hundred fsyncs; runs made by a test are removed after it."""
    monkeypatch.setattr(run_setup, "PACKAGES", ("slurm",))
    yield
    shutil.rmtree(space.path / "runs", ignore_errors=True)


def method_of(space: Workspace, *overrides: str, text: str = STORED) -> tuple[Method, dict[str, Any]]:
    """The method of an experiment with its frozen networks, and their identities."""
    experiment = experiments.resolved(*overrides, text=text).experiment
    table = open_table(space.path, experiment.data.table)
    method = meta_method(experiment, table_facts(table))
    check_columns(method, table)
    return method, give_frozen(experiment, method, space.path, CPU)


# ---------------------------------------------------------------- online is what would be stored


def encoded(tmp_path: Path, precision: str) -> Table:
    """A table by the stage encode, of images that have to be cropped: pixels and representations of one pass."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for number in range(6):
        coarse = generator.integers(0, 256, (5, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((70, 41), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    write_dinov2(tmp_path / ENCODER)
    dino = {"name": "dinov2", "weights": ENCODER, "dinov2": {"grid": 4, "any_size": True, "precision": precision}}
    encode = EncodeConfig.model_validate(
        {"source": "folder", "source_path": "images", "image_size": 16, "shard_rows": 4, "validation": False,
         "also": {"dino": dino}}
    )  # fmt: skip
    worker = EncodeWorker(encode, tmp_path, {"train": "t"})
    for unit in worker.units():
        for path, staged in worker.do(unit, commit.make_folder(tmp_path / unit.name), lambda: None).items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(staged, path)
    worker.finish()
    return Table.open(tmp_path / "t", verify=True)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_what_is_computed_is_what_the_stage_encode_stores(tmp_path: Path, precision: str) -> None:
    """The same crop, resize, format and coin, to the bit; of both ways of tossing coins."""
    (tmp_path / "weights").mkdir()
    table = encoded(tmp_path, precision)
    assert table.index.columns["representations"].dtype == precision
    batch = table.read(np.arange(6), tuple(table.index.columns))
    section = {"image_size": 16, "tokenizer_stride": 4, "channels": 2, "hidden": 16, "depth": 1, "heads": 2,
               "snippet_dim": DINOV2.width, "repr_dim": DINOV2.width, "repr_after_block": 1}  # fmt: skip
    encoder = Dinov2Tokenizer(
        tmp_path / ENCODER, dinov2={"grid": 4, "any_size": True, "precision": precision, "columns": ["representations"]}
    )
    for independent in (False, True):
        stored = Gmem(GmemConfig(**section, independent_flips=independent))
        online = Gmem(GmemConfig(**section, independent_flips=independent, representations="online"))
        online.take_frozen({"representations": encoder.on_device})
        assert online.columns().keys() == stored.columns().keys() - {"representations", "representations_flip"} | {
            "pixels"
        }
        (turn,) = stored.turns(0, 0)
        draws = {name: Stream(1, name).batch(draw, range(6)) for name, draw in stored.draws(turn).items()}
        coins = draws["flip_representation" if independent else "flip"] < 0.5
        assert 0 < int(coins.sum()) < 6
        wanted = stored.representations(batch, draws)
        assert torch.equal(online.representations(batch, draws), wanted)
        assert torch.equal(wanted[coins], batch["representations_flip"][coins])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(online.representations(batch, draws), wanted), (
                "the policy of training is not the encoder's"
            )


def test_the_format_of_its_products_can_be_bf16(space: Workspace) -> None:
    """A number format of its own, told in the identity; values near those of float32."""
    images = Table.open(space.path / TABLE).read(np.arange(8), ["pixels"])["pixels"]
    settings = {"grid": 4, "any_size": True, "precision": "float32", "columns": ["representations"]}
    plain = Dinov2Tokenizer(space.path / ENCODER, dinov2=settings)
    half = Dinov2Tokenizer(space.path / ENCODER, dinov2={**settings, "compute": "bfloat16"})
    assert half.identity == {**plain.identity, "compute": "bfloat16"}
    one, two = (each.encode(images)["representations"] for each in (plain, half))
    assert two.dtype == torch.float32 and not torch.equal(one, two)
    assert float((one - two).norm() / one.norm()) < 0.02
    assert torch.equal(half.on_device(images)["representations"], two)


@pytest.mark.parametrize("layout", ["ptshard", "safetensors"])
def test_tables_hold_bfloat16(tmp_path: Path, layout: Any) -> None:
    from hpc_gen.data.write import write_table

    column = torch.randn(10, 3, 5).to(torch.bfloat16)
    write_table(tmp_path / "t", {"representations": column}, shard_rows=4, layout=layout)
    table = Table.open(tmp_path / "t", verify=True)
    rows = np.array([7, 0, 9, 9])
    assert torch.equal(table.read(rows, ["representations"])["representations"], column[rows])


# ---------------------------------------------------------------- identity


def test_without_the_new_keys_nothing_changes_its_identity() -> None:
    """Optional keys of a method that are null are no part of it, and `stored` said aloud trains the same."""
    resolved = experiments.resolved(text=STORED)
    assert "representations" not in resolved.experiment.method and "representations: null" not in resolved.to_yaml()
    again = run_setup.typed(loader.loads(resolved.to_yaml()))
    assert again.identity == resolved.identity
    assert experiments.resolved("method.representations=online", text=STORED).identity != resolved.identity


def test_the_identity_covers_the_file(space: Workspace) -> None:
    given = loader.loads(STORED, ONLINE)
    run = run_setup.prepare_run(given, space.path, "one")
    pinned = run_setup.load_run(run).experiment.train
    assert pinned is not None and pinned.frozen is not None
    assert pinned.frozen["representations"].sha256 == commit.sha256_file(space.path / ENCODER)
    before = run_setup.load_run(run).identity
    kept = (space.path / ENCODER).read_bytes()
    try:
        (space.path / ENCODER).unlink()
        assert run_setup.load_run(run_setup.prepare_run(given, space.path, "one")).identity == before  # as it was
        with pytest.raises(UserError, match=r"'train\.frozen\.representations\.weights' cannot be read: .*dino"):
            run_setup.prepare_run(given, space.path, "two")
        write_dinov2(space.path / ENCODER, seed=1)
        other = run_setup.prepare_run(given, space.path, "two")
        assert run_setup.load_run(other).identity != before
        with pytest.raises(DataError, match=r"dino\.safetensors has the SHA-256 .*, not "):
            space.train(run)  # the run holds the file to what it was
    finally:
        (space.path / ENCODER).write_bytes(kept)
    wrong = [*ONLINE[:1], ONLINE[1].replace("{name", '{sha256: "' + "0" * 64 + '", name')]
    with pytest.raises(DataError, match=r"'train\.frozen\.representations\.sha256' is 0000"):
        run_setup.prepare_run(loader.loads(STORED, wrong), space.path, "three")
    moved = [*ONLINE, "train.frozen.representations.weights=weights/moved.safetensors"]
    shutil.copy(space.path / ENCODER, space.path / "weights/moved.safetensors")
    run_setup.prepare_run(loader.loads(STORED, moved), space.path, "one")  # where a file lies changes no number


# ---------------------------------------------------------------- in a training

ALONE = ("train.ranks=1", "train.micro_batch=8", "train.total_images=32")


def test_validation_asks_it_and_a_fork_may_change_to_it(space: Workspace) -> None:
    """A run with stored representations, one that computes them, and one that changes in the middle: the same numbers."""
    shutil.copytree(space.path / TABLE, space.path / "tables/held")
    keys = ("data.validation_table=tables/held", "train.validate={every_images: 16, num_images: 16}")
    runs = {name: space.run(name, *ALONE, *keys, *more, text=STORED) for name, more in (("a", ()), ("b", ONLINE))}
    for run in runs.values():
        assert space.train(run) is ExitCode.DONE
    rows = experiments.rows(runs["a"])
    assert rows == experiments.rows(runs["b"]) and "validation/projection" in dict(rows)[16]
    child = fork(runs["a"], "child", ONLINE, lambda line: None, at=16)
    pinned = run_setup.load_run(child).experiment.train
    assert pinned is not None and pinned.frozen is not None and pinned.frozen["representations"].sha256 is not None
    assert space.train(child) is ExitCode.DONE
    assert experiments.rows(child)[-1] == rows[-1]


# ---------------------------------------------------------------- refusals


def dino(weights: str = ENCODER, extra: str = "", settings: str = "grid: 4, any_size: true") -> str:
    return f"train.frozen.representations={{name: dinov2, weights: {weights}, dinov2: {{{settings}}}{extra}}}"


@pytest.mark.parametrize(
    ("overrides", "error", "told"),
    [
        ((), UserError, r"asks the frozen network 'representations' .*'train\.frozen\.representations' does not say"),
        ((dino(settings="grid: 2, any_size: true"),), UserError, r"gives representations of shape \[4, 24\], the method "
         r"needs \[16, 24\]; change its grid or weights"),
        ((dino(settings="grid: 4"),), DataError, r"dinov2 sees images of 256 x 256 .* got 16 x 16"),
        ((dino(settings="grid: 4, any_size: true, columns: [cls_tokens]"),), UserError,
         r"gives no representations \(it gives: cls_tokens\)"),
        (("method.repr_dim=12", dino()), UserError, r"gives representations of shape \[16, 24\].* needs \[16, 12\]"),
        ((dino("none.safetensors"),), UserError, r"none\.safetensors"),
        ((dino(DECODER),), DataError, r"vae\.safetensors holds a KL autoencoder, not a DINOv2 network"),
        ((f"train.frozen.representations={{name: kl_vae, weights: {DECODER}}}",), UserError,
         r"'kl_vae' cannot be asked in training; dinov2 can"),
        ((dino(), "train.frozen.represent={name: identity}"), UserError,
         r"'train\.frozen\.represent' is a network that this method does not ask .*'representations'"),
        (("method.representations=stored", dino()), UserError, r"does not ask \(it asks none\); remove it"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_first_step(
    space: Workspace, overrides: tuple[str, ...], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        method_of(space, ONLINE[0], *overrides)


def test_methods_that_ask_none(tmp_path: Path) -> None:
    experiments.make_tables(tmp_path)
    space = Workspace(tmp_path)
    assert method_of(space, text=LINEAR)[1] == {}
    with pytest.raises(UserError, match="does not ask"):
        method_of(space, "train.frozen.x={name: identity}", text=LINEAR)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("method.projection_weight=0", "method.representations=online"), "'online', but no loss asks for them"),
        (("method.condition=class", "method.representations=online"), "'online', but no loss asks for them"),
        (("method.representations=onlin",), "'method.representations' must be one of 'stored', 'online' or null"),
        (("train.frozen.x={name: dinov2}",), "name 'dinov2' needs 'weights'"),
    ],
)
def test_configs_that_cannot_be(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        experiments.resolved(*overrides, text=STORED)


def table_with(space: Workspace, path: Path, **changes: Tensor | None) -> Workspace:
    """A workspace whose table has other columns."""
    from hpc_gen.data.write import write_table

    table = Table.open(space.path / TABLE)
    columns = table.read(np.arange(table.rows), tuple(table.index.columns)) | changes
    write_table(path / TABLE, {k: v for k, v in columns.items() if v is not None}, shard_rows=16)
    shutil.copytree(space.path / "weights", path / "weights")
    return Workspace(path)


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (None, "has no column 'pixels'"),
        (
            torch.zeros(48, 3, 8, 8, dtype=torch.uint8),
            r"'pixels' has shape \(3, 8, 8\), the method needs \(3, 16, 16\)",
        ),
        (torch.zeros(48, 1, 16, 16, dtype=torch.uint8), r"has shape \(1, 16, 16\)"),
        (torch.zeros(48, 3, 16, 16), "column 'pixels' is float32, the method reads uint8"),
    ],
)
def test_tables_without_the_pixels_are_refused(
    space: Workspace, tmp_path: Path, column: Tensor | None, told: str
) -> None:
    with pytest.raises(DataError, match=told):
        method_of(table_with(space, tmp_path, pixels=column), *ONLINE)


def test_an_encoder_whose_features_are_not_finite_is_refused(space: Workspace) -> None:
    """Its weights are finite, what they make is not: NaN losses would be the method's fault."""
    loud = torch.full((DINOV2.width, 3, 14, 14), 3e38)
    write_dinov2(space.path / "weights/loud.safetensors", **{"patch_embed.proj.weight": loud})
    with pytest.raises(DataError, match=r"loud\.safetensors gives representations that are not finite; get the file"):
        method_of(space, ONLINE[0], dino("weights/loud.safetensors"))


def test_features_that_are_not_finite_cost_their_steps(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later on, without a look at each batch: the guard skips the step, weights do not change."""
    calls: list[int] = []
    whole = Dinov2Tokenizer.on_device

    def sometimes(self: Dinov2Tokenizer, images: Tensor) -> dict[str, Tensor]:
        calls.append(len(images))
        found = whole(self, images)
        return {name: each * float("nan") if len(calls) == 3 else each for name, each in found.items()}

    monkeypatch.setattr(Dinov2Tokenizer, "on_device", sometimes)
    run = space.run("nan", *ONLINE, *ALONE, text=STORED)
    assert space.train(run) is ExitCode.DONE
    assert [event.fields["images_seen"] for event in read(run) if event.kind == "non_finite"] == [16]
    assert calls == [1, 8, 8, 8, 8]  # the trial, then a call per micro-batch


def test_plans_of_memory_and_flops_need_no_file(tmp_path: Path) -> None:
    """Before anything is encoded: what is measured is the method, not its encoder."""
    online = train_plan.lines(experiments.resolved(*ONLINE, text=STORED), tmp_path)
    stored = train_plan.lines(experiments.resolved(text=STORED), tmp_path)
    assert online[-1] == stored[-1] and "GFLOP per image" in online[-1]
