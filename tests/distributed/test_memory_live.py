"""Bytes of live tensors on each rank and class, against the plan: real engines on gloo, every byte that is allocated.

`parameters`, `gradients`, `optimizer` and `averages` are those that engine and averages hold between steps; `together`
adds the most that a step allocates at once, as the allocator tells torch's profiler.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WITHIN = 0.15

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from torch.profiler import ProfilerActivity, profile
from solo import micro_batches, train_config
from hpc_gen.methods.energy.config import EnergyConfig
from hpc_gen.methods.energy.objective import EnergyDiffusion
from hpc_gen.methods.materialise import materialise
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.training.ema import EmaSet
from hpc_gen.training.engines.build import build_engine, needs_values
from hpc_gen.training.fake_step import measure
from hpc_gen.training.memory_plan import plan_memory

given = json.loads(sys.argv[1])
SHAPE = {"input": "latents", "image_size": 32, "tokenizer_stride": 2, "channels": 4, "patch_size": 2, "hidden": 256,
         "depth": 4, "heads": 4, "num_classes": 64, "variant": given["variant"]}

def dit():
    return EnergyDiffusion(EnergyConfig.model_validate(SHAPE), 64)

torch.set_num_threads(1)
ranks = Ranks.start(timeout_s=120)
world = ranks.world_size
sizes = {"total_images": 64, "global_batch": 16, "log_every": 16, "save_every": 16, "ranks": world}
config = train_config(**sizes, engine=given["engine"], ema={"main": {"decay": 0.9}})
micro = config.micro_batch_for(world)

def bytes_of(tensors):
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())

def local(t):
    return t.to_local() if hasattr(t, "to_local") else t

method = dit()
modules = materialise(method, 0) if needs_values(config, ranks) else method.roles()
engine = build_engine(method, modules, config, ranks, ranks.device)
ema = EmaSet({r: modules[r] for r in engine.trained_roles()}, {"main": 0.9}, engine)
generator = torch.Generator().manual_seed(ranks.rank)
batch = {"latents": torch.randn(micro, 4, 16, 16, generator=generator), "labels": torch.zeros(micro, dtype=torch.int64)}
(turn,) = method.turns(0, 0)
def step():
    assert engine.step(turn, micro_batches(method, turn, batch, micro), 0.001).finite
    ema.update(engine.trained_roles())

step()
step()
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
    step()
now = most = 0
for event in sorted(profiler.profiler.kineto_results.events(), key=lambda each: each.start_ns()):
    if event.name() == "[memory]":
        now += event.nbytes()
        most = max(most, now)
role = "denoiser"
parts = engine.parts(role)
moments = [value for key, value in engine._optimizers[role]._state.items()]
live = {
    "parameters": bytes_of(parts.values()),
    "optimizer": bytes_of([t for each in moments for name, t in each.items() if name != "step"]),
    "averages": bytes_of(ema.averages[role]["main"].values()),
}
if given["engine"]["name"] == "deepspeed":
    live["copies"] = bytes_of(list(modules[role].parameters()))
if given["engine"]["name"] == "ddp":
    live["gradients"] = bytes_of(engine._buckets[role].flats)
live["together"] = sum(live.values()) + most
Path(sys.argv[2], f"{ranks.rank}.json").write_text(json.dumps(live))
ranks.barrier()
ranks.stop()
if ranks.rank == 0:
    columns = {"latents": ("float32", (4, 16, 16)), "labels": ("int64", ())}
    held = measure(dit(), columns, config, micro, as_engine=True).activation_bytes
    plan = plan_memory(dit(), config, world, held)
    Path(sys.argv[2], "plan.json").write_text(json.dumps({**plan.bytes, "together": plan.device_bytes}))
"""


def run(
    tmp_path: Path, world_size: int, engine: dict[str, Any], variant: str
) -> tuple[dict[str, int], list[dict[str, int]]]:
    """The plan, and what each rank held."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = Path(__file__).parents[2]
    processes = []
    for rank in range(world_size):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        environment = {**os.environ, **{k: str(v) for k, v in own.items()}, "MASTER_ADDR": "127.0.0.1"}
        environment.update(MASTER_PORT=port, PYTHONPATH=os.pathsep.join(map(str, (root, root / "tests" / "support"))))
        given = json.dumps({"engine": engine, "variant": variant})
        processes.append(subprocess.Popen([sys.executable, "-c", PROGRAM, given, str(tmp_path)], env=environment))
    assert [process.wait(250) for process in processes] == [0] * world_size
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    return json.loads((tmp_path / "plan.json").read_text()), ranks


@pytest.mark.parametrize(
    ("engine", "variant"),
    [
        ({"name": "ddp"}, "standard"),
        ({"name": "fsdp", "stage": 3}, "standard"),
        ({"name": "fsdp", "stage": 2}, "energy"),
        ({"name": "deepspeed", "stage": 2}, "standard"),
    ],
    ids=["ddp", "fsdp z3", "fsdp z2, energy", "deepspeed z2"],
)
def test_live_tensors_are_those_of_the_plan(tmp_path: Path, engine: dict[str, Any], variant: str) -> None:
    plan, ranks = run(tmp_path, 2, engine, variant)
    for name, planned in plan.items():
        found = [live[name] for live in ranks if name in live]
        for size in found:
            print(f"{engine} {variant} {name}: planned {planned:,}, live {size:,} ({size / max(planned, 1):.3f})")
    for name in ("parameters", "gradients", "optimizer", "averages", "together"):
        if name in ranks[0]:
            assert max(live[name] for live in ranks) == pytest.approx(plan[name], rel=WITHIN), name
    if engine["name"] == "fsdp":
        whole = 4 * 2 * plan["parameters"]
        assert ranks[0]["optimizer"] < 0.6 * whole, "moments are not sharded"
