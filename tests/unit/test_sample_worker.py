"""The sample stage on a real tiny run: the same images on any number of tasks, whole blocks, plans that are kept."""

import json

import pytest
import torch
import toy_tokenizer

from eval_jobs.sample import SampleWorker, worker
from hpc_gen import tokenizers
from hpc_gen.data.index import TableIndex
from hpc_gen.data.write import write_table
from hpc_gen.runtime.errors import CheckpointError, DataError, StopRequested, UserError
from hpc_gen.runtime.stop import Cause, Stop
from hpc_gen.sampling.images import read_png
from hpc_gen.sampling.index import read_index
from hpc_gen.stages.units import Ledger
from tests.support import toy_run


def _worker(run, resolved, workspace, **share) -> SampleWorker:
    return worker(toy_run.context(run, resolved, workspace, "sample", **share))


def _pixels(run) -> torch.Tensor:
    index = read_index(run.samples("main"))
    return index.read(range(index.num_images))


@pytest.fixture(scope="module", autouse=True)
def _restore_determinism():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("workspace")
    run, resolved = toy_run.make_run(workspace)
    made = _worker(run, resolved, workspace)
    names = toy_run.do_units(run, made)
    made.finish()
    return workspace, run, resolved, names


def test_blocks_index_and_files(sampled):
    _, run, _, names = sampled
    assert names == ["000000", "000001", "000002"]
    folder = run.samples("main")
    index = read_index(folder)
    assert index.num_images == 20
    assert index.image_shape == (3, 8, 8)
    assert [block.count for block in index.blocks] == [8, 8, 4]
    assert (folder / "units" / "000001" / "000009.png").is_file()
    assert index.path(17) == folder / "units" / "000002" / "000017.png"
    document = json.loads((folder / "index.json").read_text())
    assert document["plan_hash"] == json.loads((folder / "plan.json").read_text())["hash"]
    assert index.plan.checkpoint_images_seen == toy_run.IMAGES_SEEN
    assert index.plan.settings["steps"] == 2
    assert not list((run.path / "staging").glob("*"))


def test_images_differ_by_id_and_are_grey(sampled):
    _, run, _, _ = sampled
    images = _pixels(run)
    assert torch.equal(images[:, 0], images[:, 1])
    assert len({image.numpy().tobytes() for image in images}) == 20


@pytest.mark.parametrize("tasks", [2, 3])
def test_images_do_not_depend_on_the_number_or_order_of_tasks(sampled, tasks, tmp_path):
    workspace, run, resolved, _ = sampled
    other, _ = toy_run.make_run(workspace, name=f"other{tasks}-{tmp_path.name}")
    for task in reversed(range(tasks)):
        made = _worker(other, resolved, workspace, task=task, tasks=tasks)
        toy_run.do_units(other, made, made.units()[task::tasks])
    made.finish()
    made.finish()  # two tasks may do it
    assert torch.equal(_pixels(run), _pixels(other))
    one, two = read_index(run.samples("main")), read_index(other.samples("main"))
    assert [block.pixel_sha256 for block in one.blocks] == [block.pixel_sha256 for block in two.blocks]
    assert one.sha256 == two.sha256


def test_second_call_does_nothing_and_a_lost_file_is_made_again(sampled):
    workspace, run, resolved, _ = sampled
    before = _pixels(run)
    made = _worker(run, resolved, workspace)
    assert toy_run.do_units(run, made) == []
    (run.samples("main") / "units" / "000001" / "000010.png").unlink()
    with pytest.raises(DataError, match=r"000010\.png cannot be read"):
        _pixels(run)
    assert toy_run.do_units(run, made) == ["000001"]
    assert torch.equal(_pixels(run), before)


def test_another_plan_is_refused_by_the_field(sampled):
    workspace, run, resolved, _ = sampled
    toy_run.write_checkpoint(run, resolved, workspace, images_seen=128)
    with pytest.raises(UserError, match=r"checkpoint_images_seen is 64 there and 128 now; use another sample\.tag"):
        _worker(run, resolved, workspace)


def test_average_and_raw_weights_give_other_images(sampled, tmp_path):
    workspace, run, _, _ = sampled
    raw, resolved = toy_run.make_run(workspace, "sample.ema=null", name=f"raw-{tmp_path.name}")
    made = _worker(raw, resolved, workspace)
    toy_run.do_units(raw, made)
    made.finish()
    assert not torch.equal(_pixels(raw), read_index(run.samples("main")).read(range(20)))


def test_a_stop_leaves_no_part_of_a_block(tmp_path):
    run, resolved = toy_run.make_run(tmp_path)
    made = _worker(run, resolved, tmp_path)
    polls = iter(range(100))

    def poll() -> None:
        if next(polls) == 5:
            raise StopRequested(Stop(Cause.PREEMPTED, "SIGTERM"))

    with pytest.raises(StopRequested):
        toy_run.do_units(run, made, poll=poll)
    done = Ledger(run.ledger("sample"), run.path)
    assert [unit.name for unit in done.missing(made.units(), made.fingerprint())] != []
    assert not list((run.samples("main") / "units").rglob("*.png")) or done.is_committed("000000", made.fingerprint())
    with pytest.raises(DataError, match=r"block\.json cannot be read"):
        made.finish()


def test_problems_are_named_before_any_work(tmp_path):
    run, resolved = toy_run.make_run(tmp_path, checkpoint=False)
    with pytest.raises(CheckpointError, match="has no checkpoint; run its train stage first"):
        _worker(run, resolved, tmp_path)
    toy_run.write_checkpoint(run, resolved, tmp_path)
    _, odd = toy_run.make_run(tmp_path, "sample.num_images=21", name="odd")
    with pytest.raises(UserError, match=r"21 is not a multiple of the 4 classes, .*use 20 or 24"):
        _worker(run, odd, tmp_path)
    _, missing = toy_run.make_run(tmp_path, "sample.checkpoint=32", name="missing")
    with pytest.raises(CheckpointError, match="has no checkpoint at 32 images; it has: 64"):
        _worker(run, missing, tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run, resolved = toy_run.make_run(tmp_path)
    made = _worker(run, resolved, tmp_path)
    data = max(run.checkpoints.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not whole"):
        toy_run.do_units(run, made)


def test_png_of_a_block_reads_back(sampled):
    _, run, _, _ = sampled
    index = read_index(run.samples("main"))
    assert torch.equal(read_png(index.path(3)), index.read(range(3, 4))[0])


LATENTS = (
    "method={name: energy, input: moments, image_size: 8, tokenizer_stride: 4, channels: 3, hidden: 8, depth: 1, heads: 2}",
    "data.tokenizer={name: kl_vae, weights: toy}",
)


def test_latents_are_decoded_by_the_tables_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setitem(tokenizers.TOKENIZERS, "kl_vae", toy_tokenizer.factory)
    columns = {key: torch.zeros(8, 6, 2, 2).half() for key in ("moments", "moments_flip")}
    index = write_table(tmp_path / "tables" / "train", columns | {"labels": torch.arange(8) % 4}, shard_rows=8)
    identity = toy_tokenizer.ToyTokenizer().identity
    TableIndex(index.columns, index.shards, 4, tokenizer=identity).write(tmp_path / "tables" / "train")
    run, resolved = toy_run.make_run(tmp_path, *LATENTS)
    made = _worker(run, resolved, tmp_path)
    toy_run.do_units(run, made)
    made.finish()
    found = read_index(run.samples("main"))
    assert found.image_shape == (3, 8, 8)
    squares = _pixels(run).unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert torch.equal(squares.amax(-1), squares.amin(-1)), "each latent cell is a square of one colour"
    assert len({image.numpy().tobytes() for image in _pixels(run)}) == 20
    _, other = toy_run.make_run(
        tmp_path, *LATENTS, "data.tokenizer.scale=2", "sample.tag=x", "evaluate.tag=x", name="other"
    )
    with pytest.raises(UserError, match=r"scale = 0\.5, the experiment names one with 2\.0; give data\.tokenizer"):
        toy_run.do_units(run, _worker(run, other, tmp_path))
