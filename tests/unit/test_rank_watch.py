"""Who is named when ranks wait in vain: the verdict from two looks at what all of them told."""

from __future__ import annotations

import os
import platform
from dataclasses import replace

import pytest
import torch

from hpc_gen.runtime.errors import CollectiveError, DataError, ExitCode
from hpc_gen.runtime.rank_detection import RankInfo
from hpc_gen.runtime.rank_watch import Beat, RankWatch, blamed, is_collective, is_gone, verdict
from hpc_gen.runtime.ranks import Ranks

WHAT = "Timed out waiting 600000ms for recv operation to complete"


def beat(rank: int, number: int = 5, begun: int = 40, span: str = "collective", **more: object) -> Beat:
    return replace(Beat(rank, f"node{rank}", 1000 + rank, number, span, 12.0, begun, 640), **more)


def judge(before: list[Beat] | None, after: list[Beat] | None, me: int = 0, size: int = 3) -> CollectiveError:
    mine = next((each for each in after or [] if each.rank == me), beat(me))
    return verdict(me, mine, before, after, size, WHAT)


def moved(beats: list[Beat]) -> list[Beat]:
    return [replace(each, number=each.number + 3) for each in beats]


def test_one_that_is_behind() -> None:
    before = [beat(0), beat(1), beat(2, begun=37, span="data_wait")]
    found = judge(before, moved(before))
    assert blamed(found) == [{"rank": 2, "host": "node2"}] and found.exit_code == ExitCode.REQUEUE_ELSEWHERE
    assert str(found) == (
        "rank 2 of 3 on node2 did not come: it is alive, and behind the others; its last span: 'data_wait' for 12.0 s "
        f"at 640 images; rank 0 waited for it in 'collective' for 12.0 s at 640 images ({WHAT}); look at the log of "
        "rank 2"
    )


def test_one_that_stands_still_is_named_before_one_that_is_behind() -> None:
    before = [beat(0), beat(1), beat(2, begun=37)]
    after = [*moved(before[:1]), before[1], *moved(before[2:])]
    found = judge(before, after)
    assert found.blamed == ((1, "node1"),) and "gives no sign of life" in str(found)


def test_several_of_one_node() -> None:
    before = [beat(0), beat(1), beat(2)]
    found = judge(before, [moved(before)[0], before[1], before[2]])
    assert found.blamed == ((1, "node1"), (2, "node2")) and "(and 1 more: 2)" in str(found)


def test_a_process_that_is_gone() -> None:
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    mine = beat(0, host=platform.node(), pid=os.getpid())
    os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)
    zombie = beat(1, host=platform.node(), pid=dead, number=9)
    assert is_gone(zombie) and not is_gone(mine)
    os.waitpid(dead, 0)
    assert is_gone(zombie) and not is_gone(beat(1))  # of another host nobody here can tell
    found = judge([mine, zombie], [mine, replace(zombie, number=10)], size=2)
    assert found.blamed == ((1, platform.node()),) and "its process is gone" in str(found)


def test_one_that_said_why() -> None:
    words = beat(1, words="table x is torn", code=64, own=True)
    echo = beat(2, words="rank 1 failed", code=86, own=False)
    found = judge([beat(0), words, echo], [beat(0), words, echo])
    assert found.exit_code == ExitCode.DATA and found.blamed == ((1, "node1"),)
    assert str(found) == "rank 1 of 3 on node1 failed: table x is torn"


def test_the_one_that_all_waited_for_hears_what_they_said() -> None:
    others = [beat(rank, words="rank 2 did not come", code=86) for rank in (0, 1)]
    mine = beat(2, begun=37)
    found = judge([*others, mine], [*others, replace(mine, number=9)], me=2)
    assert found.blamed == () and "the other ranks have given up: rank 2 did not come" in str(found)


def test_no_store_no_beginning_and_nobody_behind() -> None:
    assert judge(None, None).blamed[0][0] == 0 and "rank 0, which holds the store" in str(judge(None, None))
    found = judge([beat(0), beat(2)], [beat(0, 9), beat(2, 9)])
    assert found.blamed == ((1, ""),) and "has not told anything yet" in str(found)
    before = [beat(0), beat(1), beat(2)]
    found = judge(before, moved(before))
    assert found.blamed == () and "all 3 are in 'collective'" in str(found)


def test_which_errors_are_meant() -> None:
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"
    assert is_collective(RuntimeError(gloo))
    assert is_collective(torch.distributed.DistBackendError("x"))
    assert not is_collective(RuntimeError("shape mismatch")) and not is_collective(ValueError("gloo"))


def test_one_rank_needs_no_watch_and_its_errors_pass() -> None:
    ranks = Ranks(RankInfo(0, 1, 0, 1, "python"), "gloo", torch.device("cpu"))
    watch = RankWatch.start(ranks)
    for error in (DataError("torn"), ValueError("odd")):
        with pytest.raises(type(error)) as caught, watch.naming():
            raise error
        assert caught.value is error
    watch.close()
