"""Which rank am I? Read from the variables of whoever started the process: torchrun, srun or nobody.

Contradictions are refused: a job whose processes each believe to be rank 0 of 1 trains many models onto one
folder without a word. Variables under srun: specs/slurm_lab.md section 2.4.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hpc_gen.runtime.errors import UserError

Launcher = Literal["torchrun", "srun", "python"]


@dataclass(frozen=True)
class RankInfo:
    """Place of this process among those of the run. `launcher` "torchrun" also stands for our own local
    launcher.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: Launcher


def detect(environ: Mapping[str, str]) -> RankInfo:
    """Find this process's rank from the environment of torchrun, srun or nothing.

    - RANK and WORLD_SIZE (torchrun, runtime.launch): they say it. LOCAL_RANK and LOCAL_WORLD_SIZE default to
      one node.
    - a step of srun with several tasks: SLURM_PROCID and SLURM_NTASKS say it; RANK and WORLD_SIZE, where set,
      must agree.
    - torchrun inside srun (one agent per task, TORCHELASTIC_RUN_ID set): torchrun wins.
    - a batch shell, or a step of one task, says nothing about ranks: plain python there is one rank of one.

    Raises UserError naming the variables that contradict each other and the fix.
    """
    elastic = bool(environ.get("TORCHELASTIC_RUN_ID"))
    step = _slurm_step(environ)
    several_tasks = step is not None and step.world_size > 1
    if step is not None and several_tasks and not elastic:
        _must_agree(environ, "RANK", step.rank, "SLURM_PROCID")
        _must_agree(environ, "WORLD_SIZE", step.world_size, "SLURM_NTASKS")
        _must_agree(environ, "LOCAL_RANK", step.local_rank, "SLURM_LOCALID")
        return step
    rank, world_size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    if rank is None and world_size is None:
        if elastic:
            raise UserError("TORCHELASTIC_RUN_ID is set but RANK is not; start with torchrun or unset it")
        return RankInfo(0, 1, 0, 1, "srun" if step is not None else "python")
    if rank is None:
        raise UserError(f"WORLD_SIZE={world_size} is set but RANK is not; set both or unset WORLD_SIZE")
    if world_size is None:
        raise UserError(f"RANK={rank} is set but WORLD_SIZE is not; set both or unset RANK")
    _check_place("RANK", rank, "WORLD_SIZE", world_size)
    local_world_size = _integer(environ, "LOCAL_WORLD_SIZE")
    local_rank = _integer(environ, "LOCAL_RANK")
    if local_world_size is None:
        local_world_size = world_size
    if local_rank is None:
        local_rank = rank
    if local_world_size > world_size:
        raise UserError(
            f"LOCAL_WORLD_SIZE={local_world_size} is larger than WORLD_SIZE={world_size}; "
            "set LOCAL_WORLD_SIZE to the number of ranks on this node"
        )
    _check_place("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world_size)
    return RankInfo(rank, world_size, local_rank, local_world_size, "torchrun")


def _slurm_step(environ: Mapping[str, str]) -> RankInfo | None:
    """What a step of srun says, or None outside a step. A batch shell has SLURM_PROCID=0 but no step id."""
    if not environ.get("SLURM_JOB_ID") or not (environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID")):
        return None
    # The step's own count: SLURM_NTASKS may be left over from the allocation.
    count_name = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    rank, world_size = _integer(environ, "SLURM_PROCID"), _integer(environ, count_name)
    if rank is None or world_size is None:
        missing = "SLURM_PROCID" if rank is None else count_name
        raise UserError(
            f"SLURM_STEP_ID is set but {missing} is not; a container or wrapper drops SLURM_ variables: "
            "let it pass them all"
        )
    _check_place("SLURM_PROCID", rank, count_name, world_size)
    if world_size == 1:
        return RankInfo(0, 1, 0, 1, "srun")
    local_rank = _integer(environ, "SLURM_LOCALID")
    if local_rank is None:
        raise UserError("SLURM_PROCID is set but SLURM_LOCALID is not; pass on all SLURM_ variables")
    local_world_size = _tasks_on_this_node(environ, world_size)
    _check_place("SLURM_LOCALID", local_rank, "SLURM_TASKS_PER_NODE (tasks on this node)", local_world_size)
    return RankInfo(rank, world_size, local_rank, local_world_size, "srun")


def _tasks_on_this_node(environ: Mapping[str, str], world_size: int) -> int:
    """Number of tasks of the step on this node, from a text such as "2(x2),1" and SLURM_NODEID."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(world_size)
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UserError(f"SLURM_TASKS_PER_NODE={text!r} is not of the form '2(x2),1'; leave it to Slurm")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _integer(environ, "SLURM_NODEID") or 0
    _check_place("SLURM_NODEID", node, f"the nodes of SLURM_TASKS_PER_NODE={text},", len(counts))
    return counts[node]


def _integer(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if not text:
        return None
    if not re.fullmatch(r"\s*-?\d+\s*", text):
        raise UserError(f"{name}={text!r} is not a whole number; set it to one or unset it")
    return int(text)


def _check_place(name: str, value: int, count_name: str, count: int) -> None:
    if count < 1:
        raise UserError(f"{count_name}={count} must be at least 1; set it to the number of processes")
    if not 0 <= value < count:
        raise UserError(f"{name}={value} is not below {count_name}={count}; correct one of the two")


def _must_agree(environ: Mapping[str, str], name: str, wanted: int, slurm_name: str) -> None:
    value = _integer(environ, name)
    if value is not None and value != wanted:
        raise UserError(
            f"{name}={value} contradicts {slurm_name}={wanted} of this srun step; unset {name} "
            "(srun sets the ranks), or start torchrun once per node with --ntasks-per-node=1"
        )


def expand_nodelist(text: str) -> list[str]:
    """Host names of a Slurm node list: "labn[1-2,5],gpu[001-002]-ib" -> labn1, labn2, labn5, gpu001-ib,
    gpu002-ib.
    """
    hosts: list[str] = []
    item_pattern = r"(?:[^,\s\[\]]|\[[^\[\]]+\])+"
    if not re.fullmatch(f"{item_pattern}(?:,{item_pattern})*", text.strip()):
        raise UserError(f"SLURM_JOB_NODELIST={text!r} is not a node list; set MASTER_ADDR to the first host")
    for item in re.findall(item_pattern, text):
        pieces = re.split(r"(\[[^\]]*\])", item)
        choices = [_expand_range(piece) if piece.startswith("[") else [piece] for piece in pieces]
        hosts += ["".join(parts) for parts in itertools.product(*choices)]
    return hosts


def _expand_range(bracket: str) -> list[str]:
    names: list[str] = []
    for part in bracket[1:-1].split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise UserError(f"{bracket!r} is not a range of a node list; set MASTER_ADDR to the first host")
        names += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return names


def rendezvous(info: RankInfo, environ: Mapping[str, str]) -> tuple[str, int]:
    """Address and port where the ranks meet: MASTER_ADDR and MASTER_PORT, or under srun the first host of the
    job and a port made of job and step id (20000-29999, below the ports that systems hand out). Raises
    UserError.
    """
    address = environ.get("MASTER_ADDR")
    port = _integer(environ, "MASTER_PORT")
    if info.launcher == "srun":
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        if not address and nodes:
            address = expand_nodelist(nodes)[0]
        if port is None:
            step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID") or "0"
            digits = [int(re.sub(r"\D", "", text) or 0) for text in (environ.get("SLURM_JOB_ID", "0"), step)]
            port = 20000 + (digits[0] * 31 + digits[1]) % 10000
    if not address or port is None:
        missing = "MASTER_ADDR" if not address else "MASTER_PORT"
        raise UserError(
            f"WORLD_SIZE={info.world_size} but {missing} is not set; start with torchrun, srun or hpc-gen run"
        )
    if not 0 < port < 65536:
        raise UserError(f"MASTER_PORT={port} is not a port; use one between 1024 and 65535")
    return address, port
