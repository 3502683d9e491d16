"""Representations computed in training: what stored ones give, to the bit, on any ranks, however often it is killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import experiments
import pytest
from experiments import Workspace
from gmem_online import ENCODER, ONLINE, STORED, make_space
from warm_ranks import WarmRanks, output

from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.tokenizers.dinov2 import Dinov2Tokenizer
from hpc_gen.training.checkpoint import manifest, storage

END = f"{64:012d}"
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmRanks]:
    with WarmRanks(also=["hpc_gen.methods.gmem.objective", "hpc_gen.tokenizers.dinov2"]) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_space(tmp_path_factory.mktemp("online"))


def trained(warm: WarmRanks, space: Workspace, name: str, ranks: int, *overrides: str) -> RunFolder:
    run = space.run(name, f"train.ranks={ranks}", *overrides, text=STORED)
    assert warm.train(run, ranks) == [0] * ranks, output(run)
    return run


@pytest.fixture(scope="module")
def online(warm: WarmRanks, space: Workspace) -> RunFolder:
    """Two ranks, undisturbed."""
    return trained(warm, space, "online", 2, *ONLINE)


def state_of(run: RunFolder) -> dict[str, str]:
    """Files of the last checkpoint but the manifest, which names the experiment."""
    return {name: sha for name, sha in experiments.contents(run.checkpoints / END).items() if name != manifest.NAME}


def losses(run: RunFolder) -> list[float]:
    return [row["projection"] for _, row in experiments.rows(run)]


@pytest.mark.parametrize("keys", [(), ("method.independent_flips=true",)], ids=["one coin", "independent flips"])
def test_online_and_stored_train_the_same_bytes(
    warm: WarmRanks, space: Workspace, online: RunFolder, keys: tuple[str, ...]
) -> None:
    """The same forward pass of the same pixels in the same format, so weights, moments and averages are equal."""
    name = "independent" if keys else "plain"
    stored = trained(warm, space, f"stored-{name}", 2, *keys)
    other = trained(warm, space, f"online-{name}", 2, *ONLINE, *keys) if keys else online
    assert experiments.rows(other) == experiments.rows(stored) and losses(other)[-1] < losses(other)[0]
    assert state_of(other) == state_of(stored)


def test_killed_and_resumed_it_ends_as_undisturbed(warm: WarmRanks, space: Workspace, online: RunFolder) -> None:
    run = space.run("online-killed", "train.ranks=2", *ONLINE, text=STORED)
    assert warm.train(run, 2, fault={"name": "stop", "rank": 1, "step": 4}) == [ExitCode.REQUEUE] * 2
    codes = warm.train(run, 2, fault={"name": "die", "rank": 1, "step": 3})
    assert codes[1] == -9 and 0 not in codes
    assert warm.train(run, 2) == [0] * 2, output(run)
    assert experiments.contents(run.checkpoints / END) == experiments.contents(online.checkpoints / END)
    assert experiments.rows(run) == experiments.rows(online)


@pytest.mark.parametrize(
    ("ranks", "keys"), [(1, ()), (2, ("train.micro_batch=4",)), (2, ("train.engine.name=fsdp",))], ids=str
)
def test_other_ranks_micro_batches_and_engines(
    warm: WarmRanks, space: Workspace, online: RunFolder, ranks: int, keys: tuple[str, ...]
) -> None:
    """The same rows and draws; losses to rounding."""
    run = trained(warm, space, f"online-{ranks}-{'-'.join(key[-4:] for key in keys)}", ranks, *ONLINE, *keys)
    digests = {manifest.read(each.checkpoints / END).facts["digest"] for each in (run, online)}
    assert len(digests) == 1
    assert losses(run) == pytest.approx(losses(online), rel=1e-5)


def test_the_encoder_is_told_and_not_held(space: Workspace, online: RunFolder) -> None:
    """No tensor of it is in a checkpoint; its identity is in every manifest."""
    assert not [name for name in storage.keys(online.checkpoints / END) if "/denoiser/" not in f"{name}/"
                and not name.startswith("train/")]  # fmt: skip
    (told,) = manifest.read(online.checkpoints / END).facts["frozen"].values()
    encoder = Dinov2Tokenizer(Path(space.path) / ENCODER, dinov2={"grid": 4, "any_size": True})
    assert told == encoder.identity and told["weights_sha256"] == encoder.weights_sha256
