"""The door to Slurm's programs: their text formats, of 22.05 and of newer versions, and what failures say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hpc_gen.runtime.errors import UserError
from slurm.commands import Answer, Commands, LiveJob, minutes, parse_ended, parse_live, parse_partitions

# squeue -h -r -o "%i|%A|%T|%r|%S|%e|%V|%P|%N|%j|%k", 22.05.8
LIVE_22 = """13_0|20|RUNNING|None|2026-11-27T07:28:20|2026-11-27T08:28:20|2026-11-27T07:23:48|low|lchn1|one.sample|/w/runs/one
13_1|13|PENDING|Resources|N/A|N/A|2026-11-27T07:23:48|low||one.sample|/w/runs/one
12|12|PENDING|BeginTime|2026-11-27T07:26:43|2026-11-27T08:26:43|2026-11-27T07:26:36|low||one.train|/w/runs/one
15|15|PENDING|Dependency|N/A|N/A|2026-11-27T07:23:48|low||a|b|/odd|path
16|16|COMPLETING|None|2026-11-27T07:28:20|2026-11-27T07:28:21|2026-11-27T07:23:48|low|n[1-4]|wrap|(null)
"""
# 23.11 prints NONE and Unknown where 22.05 prints N/A, and warns on stdout of some sites
LIVE_23 = """squeue: warning: the site says hello
4242_7|4250|PENDING|(Priority)|Unknown|NONE|2026-11-27T07:23:48|normal|(null)|big.train|/w/runs/big
"""


def test_live_jobs_of_22_05() -> None:
    jobs = parse_live(LIVE_22)
    assert [job.job_id for job in jobs] == ["13_0", "13_1", "12", "15", "16"]
    first = LiveJob("13_0", "RUNNING", "", "2026-11-27T07:28:20", "2026-11-27T08:28:20", "2026-11-27T07:23:48", "low", "lchn1",
                    "one.sample", "/w/runs/one")  # fmt: skip
    assert jobs[0] == first and first.base_id == "13"
    assert (jobs[1].reason, jobs[1].start) == ("Resources", "")
    assert (jobs[3].name, jobs[3].comment) == ("a", "b|/odd|path")  # the comment may hold anything
    assert jobs[4].comment == ""


def test_live_jobs_of_23_11() -> None:
    (job,) = parse_live(LIVE_23)
    assert (job.job_id, job.base_id, job.start, job.end, job.nodes) == ("4242_7", "4242", "", "", "")
    assert job.reason == "Priority"


def test_ended_jobs() -> None:
    found = parse_ended(
        "11_0|11|COMPLETED|0:0|2026-11-27T07:23:50|2026-11-27T07:24:08|lchn1\n"
        "12|12|CANCELLED by 1000|0:15|2026-11-27T07:24:08|2026-11-27T07:25:03|lchn[1-2]\n"
        "12.batch|12.batch|CANCELLED|0:15|||lchn1\n"
        "13|13|FAILED|42:0|2026-11-27T07:24:08|2026-11-27T07:25:03|n1\n"
        "14_[0-1%2]|14|PENDING|0:0|Unknown|Unknown|None assigned\n"
        "15|15|REQUEUED|0:0|a|b|n1\n"
        "16|16|NODE_FAIL|1:0|a|b|n1\n"
        "17|17|OUT_OF_ME+|0:125|a|b|n1\n"
    )
    assert {key: (job.state, job.exit_code, job.signal) for key, job in found.items()} == {
        "11_0": ("COMPLETED", 0, 0),
        "12": ("CANCELLED", 0, 15),
        "13": ("FAILED", 42, 0),
        "16": ("NODE_FAIL", 1, 0),
        "17": ("OUT_OF_ME", 0, 125),
    }


def test_ended_jobs_of_24_05() -> None:
    """By its manual: a job that was cancelled while it pended has no node, a heterogeneous one a plus sign in its number,
    and a node list or a reason may hold what it likes."""
    found = parse_ended(
        "sacct: warning: the database is being upgraded\n"
        "4242_7|4251|TIMEOUT|0:0|2026-11-27T07:23:50|2026-11-27T19:23:50|nid[001-002,017]\n"
        "4242_8|4252|CANCELLED by 1000|0:0|None|2026-11-27T07:25:03|None assigned\n"
        "4242_[9-12%4]|4242|PENDING|0:0|Unknown|Unknown|None assigned\n"
        "4260+0|4260|COMPLETED|0:0|2026-11-27T07:23:50|2026-11-27T07:24:08|n1\n"
        "4270|4270|PREEMPTED|0:0|2026-11-27T07:23:50|2026-11-27T07:24:08|n1\n"
        "4271|4271|DEADLINE|0:0|2026-11-27T07:23:50|2026-11-27T07:24:08|n1\n"
        "4272|4272|RUNNING|0:0|2026-11-27T07:23:50|Unknown|n1\n"
        "4272.extern|4272.extern|RUNNING|0:0|2026-11-27T07:23:50|Unknown|n1\n"
    )
    states = {key: (job.state, job.nodes) for key, job in found.items()}
    assert states == {
        "4242_7": ("TIMEOUT", "nid[001-002,017]"),
        "4242_8": ("CANCELLED", "None assigned"),
        "4260+0": ("COMPLETED", "n1"),
        "4270": ("PREEMPTED", "n1"),
        "4271": ("DEADLINE", "n1"),
    }


def test_partitions_of_24_05() -> None:
    """By its manual: a type of GPU may hold a dash, further resources stand beside them, and a state word a suffix."""
    (found,) = parse_partitions("gpu*|up|2-00:00:00|16|256|1031000+|gpu:nvidia_gh200:4(S:0-3),shard:16|gh200,hsn\n")
    assert (found.gpus, found.gpu_types, found.mem_mb, found.limit_min) == (4, ("nvidia_gh200",), 1031000, 2880)


def test_partitions_sum_their_kinds_of_nodes() -> None:
    low, gpu = parse_partitions(
        "low*|up|1-00:00:00|4|16|64000|gpu:a100:4|(null)\n"
        "gpu|up|infinite|10|128|512000+|gpu:a100:4(S:0-1),shard:8|a100,ib\n"
        "gpu|up|infinite|2|64|256000|gpu:h100:8|h100\n"
        "gpu|up|infinite|2|64|256000|(null)|(null)\n"
    )
    assert (low.name, low.default, low.limit_min, low.nodes, low.cpus, low.gpus) == ("low", True, 1440, 4, 16, 4)
    assert (gpu.default, gpu.limit_min, gpu.nodes, gpu.cpus, gpu.mem_mb, gpu.gpus) == (False, None, 14, 128, 512000, 8)
    assert gpu.gpu_types == ("a100", "h100") and gpu.features == ("a100", "h100", "ib")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1-12:30:00", 2190), ("12:00:00", 720), ("30:00", 30), ("1:00", 1), ("infinite", None), ("n/a", None)],
)
def test_minutes(text: str, expected: int | None) -> None:
    assert minutes(text) == expected


def commands_with(code: int, out: str = "", err: str = "") -> tuple[Commands, list[list[str]]]:
    asked: list[list[str]] = []

    def run(argv: Sequence[str], timeout_s: float) -> Answer:
        asked.append(list(argv))
        return Answer(code, out, err)

    return Commands(run), asked


def test_one_call_for_all_jobs() -> None:
    commands, asked = commands_with(0, "")
    commands.live()
    commands.ended(["12", "13_0", "13_1"])
    assert [words[0] for words in asked] == ["squeue", "sacct"]
    assert asked[1][asked[1].index("-j") + 1] == "12,13" and {"-X", "-P", "-n"} <= set(asked[1])
    assert commands.ended([]) == {} and len(asked) == 2


def test_without_accounting_nothing_is_known_of_ended_jobs() -> None:
    commands, _ = commands_with(1, "", "Slurm accounting storage is disabled")
    assert commands.ended(["12"]) == {}


def test_a_controller_that_does_not_answer() -> None:
    commands, _ = commands_with(1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n")
    with pytest.raises(UserError) as caught:
        commands.live()
    assert str(caught.value) == (
        "`squeue -h -r` ended with 1: slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    )


def test_what_sbatch_would_refuse() -> None:
    commands, _ = commands_with(
        1,
        "",
        "sbatch: error: invalid partition specified: nope\nallocation failure: Invalid partition name specified\n",
    )
    assert commands.test_only("x.sh") == (False, "invalid partition specified: nope")
    commands, _ = commands_with(
        0, "", "sbatch: Job 5 to start at 2026-11-27T07:23:29 using 4 processors on nodes n[1-2] in partition low\n"
    )
    assert commands.test_only("x.sh") == (
        True,
        "Job 5 to start at 2026-11-27T07:23:29 using 4 processors on nodes n[1-2] in partition low",
    )


def test_where_there_is_no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    commands = Commands()
    assert not commands.available()
    with pytest.raises(
        UserError, match="squeue is not on PATH, so nothing can be submitted from here; log in to the cluster"
    ):
        commands.live()


def test_cancel_and_signal() -> None:
    commands, asked = commands_with(0)
    commands.cancel([])
    commands.cancel(["12", "13"])
    commands.signal(["12"], "TERM")
    assert asked == [["scancel", "12", "13"], ["scancel", "--signal=TERM", "12"]]
