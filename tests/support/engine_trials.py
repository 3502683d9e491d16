"""Trials of engines against ddp on real ranks, without a run: the script forks them and prints what each trial found.

    python tests/support/engine_trials.py 2

Each trial is a function of the ranks below; what it returns on rank 0 (or its traceback) is one entry of a JSON object.
tests/distributed/test_engines.py starts this once and looks at the entries.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from solo import train_config  # noqa: E402
from tiny_method import Config, TinyMethod  # noqa: E402
from torch import Tensor  # noqa: E402
from toys import SIDE, TwoPlayer  # noqa: E402

from hpc_gen.methods.energy.config import EnergyConfig  # noqa: E402
from hpc_gen.methods.energy.objective import EnergyDiffusion  # noqa: E402
from hpc_gen.methods.materialise import materialise  # noqa: E402
from hpc_gen.methods.protocol import Method, Turn  # noqa: E402
from hpc_gen.runtime.randomness import Stream  # noqa: E402
from hpc_gen.runtime.ranks import Ranks  # noqa: E402
from hpc_gen.training.checkpoint.pieces import Pieces  # noqa: E402
from hpc_gen.training.engines.base import MicroBatch  # noqa: E402
from hpc_gen.training.engines.build import build_engine, needs_values  # noqa: E402

ROWS = 8  # of a global batch
FSDP2, FSDP3 = {"name": "fsdp", "stage": 2}, {"name": "fsdp", "stage": 3}
ZERO1, ZERO2, ZERO3 = ({"name": "deepspeed", "stage": stage} for stage in (1, 2, 3))
CPU = torch.device("cpu")


def make(method: Method, ranks: Ranks, engine: Mapping[str, Any], seed: int = 0, **changes: Any) -> Any:
    """An engine as the train stage builds it."""
    config = train_config(engine=dict(engine), **changes)
    modules = materialise(method, seed) if needs_values(config, ranks) else method.roles()
    return build_engine(method, modules, config, ranks, CPU)


def share(method: Method, turn: Turn, ranks: Ranks, counter: int, cut: int = 2) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch that is the same on any number of ranks."""
    generator = torch.Generator().manual_seed(counter)
    batch: dict[str, Tensor] = {}
    for name, spec in method.columns().items():
        shape = (ROWS, *(SIDE if size < 0 else size for size in spec.shape))
        if spec.dtypes[0].startswith("float"):
            batch[name] = torch.randn(shape, generator=generator)
        else:
            high = 256 if name == "pixels" else (spec.max_value or 1) + 1
            batch[name] = torch.randint(0, high, shape, generator=generator, dtype=getattr(torch, spec.dtypes[0]))
    draws = {
        name: Stream(0, f"trial/{turn.purpose}/{name}").batch(draw, list(range(ROWS)), counter)
        for name, draw in method.draws(turn).items()
    }
    own = ROWS // ranks.world_size
    starts = range(ranks.rank * own, (ranks.rank + 1) * own, cut)
    return [
        ({k: v[s : s + cut] for k, v in batch.items()}, {k: v[s : s + cut] for k, v in draws.items()}) for s in starts
    ]


def named_state(engine: Any, ranks: Ranks) -> dict[str, Tensor]:
    """What every engine has in a checkpoint."""
    return {name: value for name, value in whole_state(engine, ranks).items() if not name.startswith("engine/")}


def whole_state(engine: Any, ranks: Ranks) -> dict[str, Tensor]:
    """The state of an engine as a checkpoint would have it, on every rank."""
    found: dict[str, Tensor] = {}
    for name, held in engine.state().items():
        if isinstance(held, Pieces):
            full = torch.zeros(held.shape, dtype=held.dtype)
            covered = torch.zeros(held.shape)
            for box in held.boxes:
                full[box.slices] = box.tensor
                covered[box.slices] += 1
            ranks.all_reduce_sum_(full)
            ranks.all_reduce_sum_(covered)
            assert bool((covered == 1).all()), f"{name} is not covered once"
            found[name] = full
        else:
            found[name] = held.detach().clone()
    return found


def play(method: Method, engine: Any, ranks: Ranks, iterations: Sequence[int], lr: float = 0.01) -> list[Any]:
    """Every turn of these iterations."""
    return [
        engine.step(turn, share(method, turn, ranks, iteration), lr)
        for iteration in iterations
        for turn in method.turns(iteration, iteration * ROWS)
    ]


def worst(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Largest absolute difference; infinite where names, shapes or types differ."""
    if ours.keys() != theirs.keys():
        return float("inf")
    found = 0.0
    for name, value in ours.items():
        other = theirs[name]
        if value.shape != other.shape or value.dtype != other.dtype:
            return float("inf")
        if value.numel():
            found = max(found, float((value.double() - other.double()).abs().max()))
    return found


def dit(**changes: Any) -> EnergyDiffusion:
    """A tiny transformer of three blocks; `changes` of its config."""
    section = {"input": "pixels", "image_size": 8, "channels": 1, "patch_size": 4, "hidden": 16, "depth": 3, "heads": 2}
    config = EnergyConfig.model_validate({**section, "diffusion_timesteps": 50, **changes})
    return EnergyDiffusion(config, num_classes=3)


def against_ddp(
    make_method: Callable[[], Any], ranks: Ranks, engine: Mapping[str, Any], **changes: Any
) -> dict[str, Any]:
    """Six iterations of an engine and of ddp, from the same initial values."""
    # a large eps: AdamW would hide a gradient of the wrong scale otherwise
    clip = {"optimizer": {"clip": 0.05, "weight_decay": 0.1, "eps": 1e-2}}
    ours_method, theirs_method = make_method(), make_method()
    ours, theirs = make(ours_method, ranks, engine, **clip, **changes), make(theirs_method, ranks, {}, **clip)
    begun = worst(named_state(ours, ranks), named_state(theirs, ranks))
    a, b = play(ours_method, ours, ranks, range(6)), play(theirs_method, theirs, ranks, range(6))
    losses = max(abs(x.total - y.total) / max(1.0, abs(y.total)) for x, y in zip(a, b, strict=True))
    norms = max(abs(x.grad_norm - y.grad_norm) / max(1.0, y.grad_norm) for x, y in zip(a, b, strict=True))
    state = worst(named_state(ours, ranks), named_state(theirs, ranks))
    fresh = named_state(make(make_method(), ranks, {}, **clip), ranks)
    after = named_state(theirs, ranks)
    moved = worst({name: after[name] for name in fresh}, fresh)
    clipped = sum(result.grad_norm > 0.05 for result in b)
    return {"begun": begun, "losses": losses, "norms": norms, "state": state, "moved": moved, "clipped": clipped}


def compiled(ranks: Ranks, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Blocks through the compiler's tracing, without its code generator (half a minute of C++); `graphs`: it ran."""
    original, graphs = torch.compile, []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    torch.compile = lambda function: original(function, backend=backend)
    try:
        found = against_ddp(dit, ranks, {**engine, "compile": "blocks", "checkpointing": "selective"})
    finally:
        torch.compile = original
    return {**found, "graphs": len(graphs)}


def half(ranks: Ranks, stage: int) -> dict[str, Any]:
    """fp16 under a loss scale, resumed, and with a scale under which everything overflows.

    deepspeed says that only some CPUs have kernels for it; torch has them for all, slow ones.
    """
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True
    engine = {"name": "deepspeed", "stage": stage, "param_dtype": "fp16"}
    found = against_ddp(dit, ranks, engine)
    method, twin_method, hot_method = dit(), dit(), dit()
    ours, twin = make(method, ranks, engine), make(twin_method, ranks, engine, seed=99)
    play(method, ours, ranks, range(2))
    saved = whole_state(ours, ranks)
    found["scale"] = saved["engine/loss_scale/denoiser"].tolist()
    twin.load(saved)
    play(method, ours, ranks, range(2, 4))
    play(twin_method, twin, ranks, range(2, 4))
    found["resumed"] = worst(whole_state(ours, ranks), whole_state(twin, ranks))
    hot = make(hot_method, ranks, {**engine, "loss_scale": 2.0**40})
    before = whole_state(hot, ranks)
    found["overflowed"] = [result.finite for result in play(hot_method, hot, ranks, range(2))]
    found["unmoved"] = worst(whole_state(hot, ranks), before)
    return found


def refused_half(ranks: Ranks) -> dict[str, Any]:
    """fp16 where deepspeed has none."""
    from deepspeed.accelerator import get_accelerator

    from hpc_gen.runtime.errors import UserError

    type(get_accelerator()).is_fp16_supported = lambda self: False
    try:
        make(dit(), ranks, {"name": "deepspeed", "param_dtype": "fp16"})
    except UserError as error:
        return {"sentence": str(error)}
    return {"sentence": ""}


ENERGY = {"variant": "energy", "energy": {"grad_multiplier": 30.0, "learnable_step_size": True, "step_size": 0.05}}


def guarded(ranks: Ranks, engine: Mapping[str, Any]) -> dict[str, Any]:
    """A NaN and a spike among sound steps, against a twin that never saw them."""
    method, twin_method = TinyMethod(Config()), TinyMethod(Config())
    ours, twin = make(method, ranks, engine), make(twin_method, ranks, engine)
    turn, bad = Turn("net", "train"), Turn("net", "bad")
    found: dict[str, Any] = {}
    for number in range(3):
        before = whole_state(ours, ranks)
        spoilt = ours.step(bad, share(method, bad, ranks, number), 0.01)
        spike = ours.step(turn, share(method, turn, ranks, number), 0.01, highest_loss=-1.0)
        found.setdefault("finite", []).extend([spoilt.finite, spike.finite])
        found.setdefault("moved", []).append(worst(whole_state(ours, ranks), before))
        good = ours.step(turn, share(method, turn, ranks, number), 0.01)
        twin.step(turn, share(twin_method, turn, ranks, number), 0.01)
        found.setdefault("good", []).append(good.finite)
    found["twin"] = worst(whole_state(ours, ranks), whole_state(twin, ranks))
    return found


def whole_and_back(ranks: Ranks, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Inside whole() the network is a plain one, whatever ranks do; afterwards the engine goes on as its twin."""
    method, twin_method = dit(), dit()
    ours, twin = make(method, ranks, engine), make(twin_method, ranks, engine)
    (role,) = ours.trained_roles()
    found: dict[str, Any] = {"outputs": 0.0, "plain": True}
    for iteration in range(3):
        play(method, ours, ranks, [iteration])
        play(twin_method, twin, ranks, [iteration])
        full = whole_state(ours, ranks)
        with ours.whole(), torch.no_grad():
            network = method.roles()[role]
            for name, parameter in network.named_parameters():
                found["plain"] &= type(parameter) is torch.nn.Parameter and not parameter.requires_grad
                found["plain"] &= torch.equal(parameter, full[f"model/{role}/{name}"])
            for _ in range(1 + ranks.rank):  # not the same number of passes on every rank
                network.dit(torch.ones(1, 1, 8, 8), torch.tensor([3]), torch.tensor([1]))
        averages = {role: {name: part * 0 for name, part in ours.parts(role).items()}}
        with ours.whole(averages), torch.no_grad():
            made = method.roles()[role].dit(torch.ones(1, 1, 8, 8), torch.tensor([3]), torch.tensor([1]))
            found["outputs"] = max(found["outputs"], float(made.abs().max()))  # of a network of zeros
    found["twin"] = worst(whole_state(ours, ranks), whole_state(twin, ranks))
    return found


def carried(ranks: Ranks, first: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one engine taken over by another, which goes on as the first would."""
    method, other_method = dit(), dit()
    ours, theirs = make(method, ranks, first), make(other_method, ranks, then, seed=99)
    play(method, ours, ranks, range(2))
    saved = whole_state(ours, ranks)
    theirs.load(saved)
    exact = worst(whole_state(theirs, ranks), saved)
    play(method, ours, ranks, range(2, 4))
    play(other_method, theirs, ranks, range(2, 4))
    return {"exact": exact, "after": worst(whole_state(theirs, ranks), whole_state(ours, ranks))}


TRIALS: dict[str, Callable[[Ranks], Any]] = {
    "two players, fsdp 2": lambda ranks: against_ddp(TwoPlayer, ranks, FSDP2),
    "two players, fsdp 3": lambda ranks: against_ddp(TwoPlayer, ranks, FSDP3),
    "two players, deepspeed 1": lambda ranks: against_ddp(TwoPlayer, ranks, ZERO1),
    "two players, deepspeed 2": lambda ranks: against_ddp(TwoPlayer, ranks, ZERO2),
    "bf16, fsdp 3": lambda ranks: against_ddp(dit, ranks, {**FSDP3, "param_dtype": "bf16"}),
    "bf16, deepspeed 2": lambda ranks: against_ddp(dit, ranks, {**ZERO2, "param_dtype": "bf16"}),
    "bf16, deepspeed 3": lambda ranks: against_ddp(dit, ranks, {**ZERO3, "param_dtype": "bf16"}),
    "copies of shards, fsdp 2": lambda ranks: against_ddp(dit, ranks, {**FSDP2, "shards": 1}),
    "offload, fsdp 3": lambda ranks: against_ddp(dit, ranks, {**FSDP3, "offload": "cpu"}),
    "offload, deepspeed 2": lambda ranks: against_ddp(dit, ranks, {**ZERO2, "offload": "cpu"}),
    "offload, deepspeed 3": lambda ranks: against_ddp(dit, ranks, {**ZERO3, "offload": "cpu"}),
    "checkpointing, fsdp 3": lambda ranks: against_ddp(dit, ranks, {**FSDP3, "checkpointing": "selective"}),
    "checkpointing, deepspeed 3": lambda ranks: against_ddp(dit, ranks, {**ZERO3, "checkpointing": "full"}),
    "checkpointing, energy, fsdp 2": lambda ranks: against_ddp(
        lambda: dit(**ENERGY), ranks, {**FSDP2, "checkpointing": "full"}
    ),
    "checkpointing, energy, deepspeed 2": lambda ranks: against_ddp(
        lambda: dit(**ENERGY), ranks, {**ZERO2, "checkpointing": "selective"}
    ),
    "compile, fsdp 3": lambda ranks: compiled(ranks, FSDP3),
    "compile, deepspeed 2": lambda ranks: compiled(ranks, ZERO2),
    "half, deepspeed 1": lambda ranks: half(ranks, 1),
    "half, deepspeed 3": lambda ranks: half(ranks, 3),
    "no half": refused_half,
    "guard, ddp": lambda ranks: guarded(ranks, {}),
    "guard, fsdp 3": lambda ranks: guarded(ranks, FSDP3),
    "guard, deepspeed 1": lambda ranks: guarded(ranks, ZERO1),
    "guard, deepspeed 2": lambda ranks: guarded(ranks, ZERO2),
    "guard, deepspeed 3": lambda ranks: guarded(ranks, ZERO3),
    "whole, ddp": lambda ranks: whole_and_back(ranks, {}),
    "whole, fsdp 2": lambda ranks: whole_and_back(ranks, FSDP2),
    "whole, fsdp 3": lambda ranks: whole_and_back(ranks, FSDP3),
    "whole, deepspeed 3": lambda ranks: whole_and_back(ranks, ZERO3),
    "carried, ddp to fsdp 3": lambda ranks: carried(ranks, {}, FSDP3),
    "carried, fsdp 2 to deepspeed 3": lambda ranks: carried(ranks, FSDP2, ZERO3),
    "carried, deepspeed 3 to deepspeed 1": lambda ranks: carried(ranks, ZERO3, ZERO1),
    "carried, deepspeed 2 to ddp": lambda ranks: carried(ranks, ZERO2, {}),
}


def be_a_rank(size: int, rank: int, port: int, only: Sequence[str]) -> None:
    """All trials on one rank; rank 0 prints the results."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    output = os.dup(1)
    os.dup2(2, 1)  # deepspeed prints
    ranks = Ranks.start()
    for name, trial in TRIALS.items():
        if only and name not in only:
            continue
        try:
            result = trial(ranks)
        except BaseException:
            result = {"error": traceback.format_exc()[-3000:]}
        if any(ranks.all_gather_objects("error" in result)) and "error" not in result:
            result = {"error": "on the other rank"}
        if rank == 0:
            os.write(output, (json.dumps({name: result}) + "\n").encode())
    os._exit(0)


def main() -> None:
    """Fork the ranks and wait for them."""
    size, only = int(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                be_a_rank(size, rank, held.getsockname()[1], only)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main()
