"""Who am I: torchrun, srun and plain python start alike, and contradictions are refused with both names."""

from __future__ import annotations

import pytest
import torch

from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.ranks import RankInfo, Ranks, detect, expand_nodelist, rendezvous

_TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
# A task of `srun -N2 --ntasks-per-node=2`, as on the lab cluster (specs/slurm_lab.md 2.4).
_SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "labn[1-2]",
}
_AGENT = {
    "RANK": "7",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RUN_ID": "a",
}
_BATCH_SHELL = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environ", "info"),
    [
        ({}, RankInfo(0, 1, 0, 1, "python")),
        ({"RANK": "", "WORLD_SIZE": ""}, RankInfo(0, 1, 0, 1, "python")),
        (_TORCHRUN, RankInfo(3, 4, 1, 2, "torchrun")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, RankInfo(1, 2, 1, 2, "torchrun")),
        (_SRUN, RankInfo(3, 4, 1, 2, "srun")),
        ({**_SRUN, "SLURM_TASKS_PER_NODE": "1,3"}, RankInfo(3, 4, 1, 3, "srun")),
        ({**_SRUN, "SLURM_STEP_TASKS_PER_NODE": "1,3"}, RankInfo(3, 4, 1, 3, "srun")),
        ({**_SRUN, "SLURM_NTASKS": "64", "SLURM_STEP_NUM_TASKS": "4"}, RankInfo(3, 4, 1, 2, "srun")),
        (_BATCH_SHELL, RankInfo(0, 1, 0, 1, "python")),
        ({**_SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, RankInfo(0, 1, 0, 1, "srun")),
        # a wrapper that sets RANK from SLURM_PROCID
        ({**_SRUN, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, RankInfo(3, 4, 1, 2, "srun")),
        ({**_SRUN, "WORLD_SIZE": "4"}, RankInfo(3, 4, 1, 2, "srun")),
        # torchrun in each task of srun: torchrun wins
        (
            {**_SRUN, **_AGENT},
            RankInfo(7, 8, 3, 4, "torchrun"),
        ),
        # our local launcher in a step of one task, or in a batch shell
        ({**_SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", **_TORCHRUN}, RankInfo(3, 4, 1, 2, "torchrun")),
        ({**_BATCH_SHELL, **_TORCHRUN}, RankInfo(3, 4, 1, 2, "torchrun")),
    ],
)
def test_detect(environ: dict[str, str], info: RankInfo) -> None:
    assert detect(environ) == info


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"RANK": "0"}, ["RANK=0", "WORLD_SIZE"]),
        ({"WORLD_SIZE": "4"}, ["WORLD_SIZE=4", "RANK"]),
        ({**_BATCH_SHELL, "WORLD_SIZE": "4"}, ["WORLD_SIZE=4", "RANK"]),
        ({"RANK": "4", "WORLD_SIZE": "4"}, ["RANK=4", "WORLD_SIZE=4"]),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, ["RANK=-1", "WORLD_SIZE=4"]),
        ({"RANK": "0", "WORLD_SIZE": "0"}, ["WORLD_SIZE=0"]),
        ({"RANK": "one", "WORLD_SIZE": "4"}, ["RANK='one'", "whole number"]),
        ({"RANK": "1", "WORLD_SIZE": "4.0"}, ["WORLD_SIZE='4.0'", "whole number"]),
        ({**_TORCHRUN, "LOCAL_RANK": "2"}, ["LOCAL_RANK=2", "LOCAL_WORLD_SIZE=2"]),
        ({**_TORCHRUN, "LOCAL_WORLD_SIZE": "5"}, ["LOCAL_WORLD_SIZE=5", "WORLD_SIZE=4"]),
        ({"TORCHELASTIC_RUN_ID": "a"}, ["TORCHELASTIC_RUN_ID", "RANK"]),
        ({**_SRUN, "RANK": "0", "WORLD_SIZE": "4"}, ["RANK=0", "SLURM_PROCID=3"]),
        ({**_SRUN, "RANK": "3", "WORLD_SIZE": "8"}, ["WORLD_SIZE=8", "SLURM_NTASKS=4"]),
        ({**_SRUN, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, ["LOCAL_RANK=0", "SLURM_LOCALID=1"]),
        ({**_SRUN, "WORLD_SIZE": "1"}, ["WORLD_SIZE=1", "SLURM_NTASKS=4"]),
        ({**_SRUN, "SLURM_PROCID": "4"}, ["SLURM_PROCID=4", "SLURM_NTASKS=4"]),
        ({**_SRUN, "SLURM_PROCID": ""}, ["SLURM_STEP_ID", "SLURM_PROCID"]),
        ({**_SRUN, "SLURM_NTASKS": ""}, ["SLURM_STEP_ID", "SLURM_NTASKS"]),
        ({**_SRUN, "SLURM_LOCALID": ""}, ["SLURM_PROCID", "SLURM_LOCALID"]),
        ({**_SRUN, "SLURM_LOCALID": "2"}, ["SLURM_LOCALID=2", "SLURM_TASKS_PER_NODE"]),
        ({**_SRUN, "SLURM_NODEID": "2"}, ["SLURM_NODEID=2", "2(x2)"]),
        ({**_SRUN, "SLURM_TASKS_PER_NODE": "two"}, ["SLURM_TASKS_PER_NODE='two'"]),
    ],
)
def test_contradictions_are_refused_by_name(environ: dict[str, str], names: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        detect(environ)
    assert all(name in str(caught.value) for name in names), str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("localhost", ["localhost"]),
        ("labn[1-2,5]", ["labn1", "labn2", "labn5"]),
        ("labn[1-2],gpu[009-011]-ib,x", ["labn1", "labn2", "gpu009-ib", "gpu010-ib", "gpu011-ib", "x"]),
        ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
        ("a-b.c,d-1", ["a-b.c", "d-1"]),
    ],
)
def test_node_lists(text: str, hosts: list[str]) -> None:
    assert expand_nodelist(text) == hosts


@pytest.mark.parametrize("text", ["", "n[1-2", "n[1-b]", "n[]", "n]1["])
def test_odd_node_lists_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="MASTER_ADDR"):
        expand_nodelist(text)


def test_rendezvous() -> None:
    srun = detect(_SRUN)
    address, port = rendezvous(srun, _SRUN)
    assert address == "labn1" and 20000 <= port < 30000
    assert rendezvous(srun, {**_SRUN, "SLURM_PROCID": "0"}) == (address, port)  # the same on every rank
    assert rendezvous(srun, {**_SRUN, "SLURM_STEP_ID": "1"})[1] != port  # two steps of a job at once
    assert rendezvous(srun, {**_SRUN, "SLURM_STEP_NODELIST": "labn2"})[0] == "labn2"
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert rendezvous(srun, {**_SRUN, **given}) == ("10.0.0.1", 29500)
    torchrun = detect(_TORCHRUN)
    assert rendezvous(torchrun, given) == ("10.0.0.1", 29500)
    for missing in given:
        with pytest.raises(UserError, match=f"WORLD_SIZE=4 but {missing} is not set"):
            rendezvous(torchrun, {name: value for name, value in given.items() if name != missing})
    with pytest.raises(UserError, match="MASTER_PORT=99999 is not a port"):
        rendezvous(torchrun, {**given, "MASTER_PORT": "99999"})


def test_one_rank_needs_no_process_group() -> None:
    ranks = Ranks.start(RankInfo(0, 1, 0, 1, "python"))
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.is_main) == (0, 1, 0, True)
    assert ranks.save_group is None and ranks.control_group is None
    assert not torch.distributed.is_initialized()
    tensor = torch.tensor([1.0, 2.0])
    ranks.all_reduce_sum_(tensor)
    ranks.all_reduce_sum_async(tensor).wait()
    ranks.broadcast_(tensor)
    assert ranks.all_reduce_max_cpu(tensor) is tensor is ranks.all_reduce_sum_cpu(tensor)
    assert tensor.tolist() == [1.0, 2.0]
    assert ranks.broadcast_object("x") == "x" and ranks.gather_objects("x") == ["x"]
    assert ranks.all_gather_objects("x") == ["x"] == ranks.save_all_gather("x")
    ranks.barrier()
    ranks.stop()
    ranks.stop()


def test_more_ranks_than_gpus_on_a_node_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.raises(UserError, match="number 2 on its node, but only 2 GPUs are visible"):
        Ranks.start(RankInfo(2, 4, 2, 4, "srun"))
    assert Ranks.start(RankInfo(0, 1, 0, 1, "python")).device == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # srun --gpus-per-task=1
    with pytest.raises(UserError, match="only 1 GPUs"):
        Ranks.start(RankInfo(2, 4, 2, 4, "torchrun"))
    assert chosen == [0]
