"""Previews of chosen rows of a memory bank: the same memories at each place, in one batch, refused where there are none."""

from __future__ import annotations

from collections.abc import Iterator

import experiments
import pytest
import torch
from experiments import TABLE, TINY, Workspace, scratch_folder
from gmem_online import DECODER, STORED, make_space
from tiny_tokenizers import DINOV2

from hpc_gen.config.base import split
from hpc_gen.config.errors import ConfigError
from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.methods.gmem.objective import Gmem
from hpc_gen.runtime.errors import DataError, ExitCode, UserError
from hpc_gen.runtime.journal import read
from hpc_gen.runtime.randomness import Draws
from hpc_gen.sampling.generate import generate_batch, sampling_mode
from hpc_gen.sampling.images import read_png
from hpc_gen.sampling.preview import PURPOSE, Chosen, file_names
from hpc_gen.stages.build import open_decoder, open_table, settings_of
from hpc_gen.stages.generation import trained_method

BANK, ROWS = "tables/bank", [5, 27, 5]
CPU = torch.device("cpu")
PREVIEW = (
    f"train.preview={{every_images: 16, rows: {ROWS}, ema: null, settings: {{points: 3}}}}",
    f"sample={{num_images: 4, conditions: {BANK}}}",
    f"data.tokenizer={{name: kl_vae, weights: {DECODER}}}",
    "train.stop_at_images=32",
    "train.ranks=1",
)


@pytest.fixture(scope="module")
def space() -> Iterator[Workspace]:
    """With a bank of 30 rows, none of them of the training table."""
    with scratch_folder() as folder:
        made = make_space(folder)
        snippets = torch.randn(30, DINOV2.width, generator=torch.Generator().manual_seed(9))
        write_table(folder / BANK, {"cls_tokens": snippets}, shard_rows=16)
        write_table(folder / "tables/narrow", {"cls_tokens": snippets[:, :7].contiguous()}, shard_rows=16)
        yield made


def test_a_bank_row_is_the_memory_that_is_drawn(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of a training are those that its weights of the moment make of these rows of the bank."""
    batches: list[int] = []
    generate = Gmem.generate

    def counted(self, conditions, *rest):
        batches.append(len(conditions["cls_tokens"]))
        return generate(self, conditions, *rest)

    monkeypatch.setattr(Gmem, "generate", counted)
    run = space.run("bank", *PREVIEW, text=STORED)
    assert space.train(run) is ExitCode.DONE
    assert batches == [3, 3], "one batched call per preview"
    bank = Table.open(space.path / BANK)
    experiment = experiments.resolved(*PREVIEW, text=STORED).experiment
    table = Table.open(space.path / TABLE)
    told = [event for event in read(run) if event.kind == "preview"]
    assert [event.fields["images_seen"] for event in told] == [16, 32]
    assert told[0].fields["captions"] == ["row 5", "row 27", "row 5"]
    assert told[0].fields["rows"] == ROWS and told[0].fields["table"] == bank.identity
    for place in (16, 32):
        method = trained_method(experiment, table, run.checkpoints / f"{place:012d}", None, CPU)
        ids = torch.arange(3)
        with sampling_mode(method):
            wanted = generate_batch(
                method, Chosen((), ROWS, bank), Draws(experiment.seed, PURPOSE, ids), ids,
                settings_of(experiment, {"points": 3}), lambda: None, open_decoder(experiment, table, space.path, CPU),
            )  # fmt: skip
        folder = run.previews / f"{place:012d}"
        names = ["row_5.png", "row_27.png", "row_5_2.png"]
        assert file_names(ROWS, "row") == names and sorted(p.name for p in folder.iterdir()) == sorted(names)
        assert torch.equal(torch.stack([read_png(folder / name) for name in names]), wanted)


def test_without_a_bank_the_rows_are_those_of_the_training_table(space: Workspace) -> None:
    run = space.run("table", *PREVIEW, "sample=null", "train.preview.rows=[47]", "train.stop_at_images=16", text=STORED)
    assert space.train(run) is ExitCode.DONE
    (told,) = [event for event in read(run) if event.kind == "preview"]
    experiment = experiments.resolved(*PREVIEW, "sample=null", text=STORED).experiment
    assert told.fields["table"] == open_table(space.path, TABLE, experiment).identity


@pytest.mark.parametrize(
    ("overrides", "error", "told"),
    [
        (("train.preview.rows=[3, 30]",), UserError, r"names row 30, but .*tables/bank has 30 rows; use 0 to 29, or name"),
        (("sample.conditions=tables/none",), DataError, r"tables/none"),
        (("sample.conditions=tables/narrow",), UserError, r"tables/narrow has shape \[7\], the method needs \[24\]"),
        (("method.condition=class", "method.num_classes=3"), UserError,
         "conditioned on classes; give train.preview.labels in place of rows"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_drawn_are_refused_before_the_first_step(
    space: Workspace, overrides: tuple[str, ...], error: type[Exception], told: str
) -> None:
    if "method.condition=class" in overrides:
        table = Table.open(space.path / TABLE)
        columns = table.read(torch.arange(table.rows), ("latents", "latents_flip"))
        columns["labels"] = torch.zeros(table.rows, dtype=torch.int64)
        write_table(space.path / "tables/classes", columns, shard_rows=16, num_classes=3)
        overrides = (*overrides, "data.table=tables/classes")
    run = space.run(f"wrong-{abs(hash(overrides))}", *PREVIEW, *overrides, text=STORED)
    with pytest.raises(error, match=told):
        space.train(run)
    assert not [event for event in read(run) if event.kind == "interval"]


def test_a_bank_without_the_column_is_refused(space: Workspace) -> None:
    write_table(space.path / "tables/other", {"features": torch.zeros(30, 3)}, shard_rows=16)
    run = space.run("other", *PREVIEW, "sample.conditions=tables/other", text=STORED)
    with pytest.raises(DataError, match="cls_tokens"):
        space.train(run)


@pytest.mark.parametrize(
    ("preview_keys", "told"),
    [
        ("{every_images: 16}", "exactly one of 'train.preview.labels' and 'train.preview.rows' .* but neither is"),
        ("{every_images: 16, labels: [0], rows: [0]}", "must be given, but both are"),
        ("{every_images: 16, rows: []}", "'train.preview.rows' must be"),
        ("{every_images: 16, rows: [-1]}", r"'train\.preview\.rows\.0' must be an integer of at least 0"),
        ("{every_images: 16, rows: [cat]}", r"'train\.preview\.rows\.0' must be an integer"),
    ],
)
def test_configs_that_cannot_be(preview_keys: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        experiments.resolved(f"train.preview={preview_keys}", text=TINY)


def test_previews_of_labels_keep_their_identity() -> None:
    experiment = experiments.resolved("train.preview={every_images: 16, labels: [0]}", text=TINY).experiment
    assert "rows" not in split(experiment)[0]["train"]["preview"]
