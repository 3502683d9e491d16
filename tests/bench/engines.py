"""What an engine costs: one training step on two ranks, all engines in the same two processes and by turns.

Beside ours stand bare loops of the same network: torch's DistributedDataParallel, and fully_shard of every block, each
with torch's AdamW and clipping and nothing else (no guard, no global means, no named state).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from facts import ROOT
from in_training import RANKS, run_ranks, write_result
from measure import Spread, Table, by_turns
from torch import Tensor, nn

SUPPORT = str(ROOT / "tests" / "support")
GLOBAL_BATCH, CLASSES = 16, 10
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp, stage 2": {"name": "fsdp", "stage": 2},
    "fsdp, stage 3": {"name": "fsdp", "stage": 3},
    "deepspeed, stage 1": {"name": "deepspeed", "stage": 1},
    "deepspeed, stage 2": {"name": "deepspeed", "stage": 2},
    "deepspeed, stage 3": {"name": "deepspeed", "stage": 3},
    "ddp, tensor parallel 2": {"tensor_parallel": 2},
    "ddp, all blocks recomputed": {"checkpointing": "full"},
}
PEERS = {"bare DistributedDataParallel": ("ddp",), "bare fully_shard": ("fsdp, stage 3",)}


def bench(quick: bool) -> list[Table]:
    """One table: milliseconds per step, the ratio to ddp and to the bare loop, and the state that a rank holds."""
    settings = {"rounds": 2 if quick else 7, "steps": 1 if quick else 4, "hidden": 32 if quick else 128}
    with tempfile.TemporaryDirectory(prefix="hpc-gen-bench-") as name:
        found = run_ranks(__file__, Path(name), settings)
    spreads = {name: Spread.of(values) for name, values in found["seconds"].items()}
    table = Table(
        "Engines, 2 ranks",
        f"A transformer of 4 blocks ({found['parameters']:,} parameters, 64 tokens, global batch {GLOBAL_BATCH}, fp32, one "
        f"thread per rank, gloo); {settings['rounds']} rounds by turns of {settings['steps']} steps. State: masters and "
        "moments that rank 0 holds. Two ranks on one machine share its memory and cores, so gathering costs and saves "
        "nothing that a cluster would: these are the overheads of the engines, not their use.",
        ("engine", "ms per step", "ratio to ddp", "ratio to its bare loop", "state of a rank, MiB"),
    )
    bare = {ours: peer for peer, names in PEERS.items() for ours in names}
    for name, spread in spreads.items():
        per_step = spread.show("{:.1f}", 1e3 / settings["steps"])
        peer = spread.over(spreads[bare[name]]).show("{:.3f}") if name in bare else "-"
        state = f"{found['state_bytes'][name] / 2**20:.2f}" if name in found["state_bytes"] else "-"
        table.add(name, per_step, spread.over(spreads["ddp"]).show("{:.3f}"), peer, state)
    return [table]


# -- what each rank does --------------------------------------------------------------------------------------------


def rank_body(folder: Path, settings: Mapping[str, int]) -> None:
    """Build everything, then let each take its turns."""
    sys.path.insert(0, SUPPORT)
    from hpc_gen.runtime.ranks import Ranks

    torch.set_num_threads(1)
    ranks = Ranks.start()
    actions: dict[str, Callable[[], None]] = {}
    state_bytes: dict[str, int] = {}
    parameters = 0
    for name, engine in ENGINES.items():
        actions[name], state_bytes[name], parameters = ours(engine, ranks, settings)
    actions["bare DistributedDataParallel"] = bare_loop(ranks, settings, shard=False)
    actions["bare fully_shard"] = bare_loop(ranks, settings, shard=True)
    spreads = by_turns(actions, settings["rounds"])
    if ranks.is_main:
        seconds = {name: list(spread.values) for name, spread in spreads.items()}
        write_result(folder, {"seconds": seconds, "state_bytes": state_bytes, "parameters": parameters})
    ranks.stop()


def ours(engine: Mapping[str, Any], ranks: Any, settings: Mapping[str, int]) -> tuple[Callable[[], None], int, int]:
    """Steps of one of our engines, the bytes of masters and moments here, and the number of parameters."""
    from solo import train_config

    from hpc_gen.methods.materialise import materialise
    from hpc_gen.training.engines.build import build_engine, needs_values

    method = network(settings["hidden"])
    config = train_config(
        ranks=RANKS,
        global_batch=GLOBAL_BATCH,
        total_images=GLOBAL_BATCH,
        engine=dict(engine),
        log_every=GLOBAL_BATCH,
        save_every=GLOBAL_BATCH,
        optimizer={"clip": 1.0},
    )
    modules = materialise(method, 0) if needs_values(config, ranks) else method.roles()
    parameters = sum(p.numel() for p in method.model.parameters())
    built = build_engine(method, modules, config, ranks, torch.device("cpu"))
    (turn,) = method.turns(0, 0)
    micro = share_of(method, turn, built.data_rank, built.data_ranks)
    held = sum(part.numel() * part.element_size() for part in built.parts("denoiser").values())

    def steps() -> None:
        for _ in range(settings["steps"]):
            built.step(turn, [micro], 1e-4)

    return steps, 3 * held, parameters


def bare_loop(ranks: Any, settings: Mapping[str, int], shard: bool) -> Callable[[], None]:
    """The same network and batch in a loop of torch alone."""
    from hpc_gen.methods.materialise import materialise

    method = network(settings["hidden"])
    model: nn.Module = materialise(method, 0)["denoiser"]
    (turn,) = method.turns(0, 0)
    batch, draws = share_of(method, turn, ranks.rank, ranks.world_size)
    x0, t = batch["pixels"].float() / 127.5 - 1, draws["t"]
    y = torch.where(draws["drop"] < method.config.label_dropout, CLASSES, batch["labels"])
    x_t = method.diffusion.add_noise(x0, t, draws["noise"])
    if shard:
        from torch.distributed.fsdp import fully_shard

        mesh = ranks.mesh((ranks.world_size,), ("bare",))
        for block in model.dit.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        called: nn.Module = fully_shard(model, mesh=mesh)
    else:
        called = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95))

    def steps() -> None:
        for _ in range(settings["steps"]):
            optimizer.zero_grad()
            (draws["noise"] - called(x_t, t, y)).square().mean().backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()

    return steps


def network(hidden: int) -> Any:
    """The energy method's standard transformer on 16 x 16 pixels in patches of 2."""
    from hpc_gen.methods.energy.config import EnergyConfig
    from hpc_gen.methods.energy.objective import EnergyDiffusion

    section = {
        "input": "pixels",
        "image_size": 16,
        "channels": 1,
        "patch_size": 2,
        "hidden": hidden,
        "depth": 4,
        "heads": 4,
    }
    return EnergyDiffusion(EnergyConfig.model_validate(section), num_classes=CLASSES)


def share_of(method: Any, turn: Any, rank: int, ranks: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's rows of one batch that all engines see."""
    from hpc_gen.runtime.randomness import Stream

    generator = torch.Generator().manual_seed(0)
    batch = {
        "pixels": torch.randint(0, 256, (GLOBAL_BATCH, 1, 16, 16), generator=generator, dtype=torch.uint8),
        "labels": torch.randint(0, CLASSES, (GLOBAL_BATCH,), generator=generator),
    }
    ids = list(range(GLOBAL_BATCH))
    draws = {name: Stream(0, name).batch(draw, ids) for name, draw in method.draws(turn).items()}
    size = GLOBAL_BATCH // ranks
    rows = slice(rank * size, (rank + 1) * size)
    return {k: v[rows] for k, v in batch.items()}, {k: v[rows] for k, v in draws.items()}


if __name__ == "__main__":
    rank_body(Path(sys.argv[1]), json.loads(sys.argv[2]))
