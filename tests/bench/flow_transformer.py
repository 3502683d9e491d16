"""GMem beside a plain re-statement of the reference's maths: a training step, and its SDE sampler.

The re-statement is written from specs/gmem.md: a loss that is read out every step, AdamW parameter by parameter, two
network calls per drift (one for the velocity, one for the score), previews image by image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu.gmem_plain import heun_sde
from measure import Table, by_turns
from torch import Tensor
from torch.nn import functional as F

from hpc_gen.config.experiment import OptimizerConfig
from hpc_gen.methods.gmem.config import GmemConfig, SamplingSettings
from hpc_gen.methods.gmem.objective import ROLE, Gmem
from hpc_gen.methods.gmem.sampler import guided_velocity, solution
from hpc_gen.methods.materialise import materialise
from hpc_gen.training.ema import update_ema_
from hpc_gen.training.optimizers import RoleOptimizer

SETTINGS = OptimizerConfig(lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0, clip=1.0)


def bench(quick: bool) -> list[Table]:
    """The tables of training and of sampling."""
    torch.set_num_threads(1)
    return [_training(quick), _sampling(quick)]


def _method(quick: bool) -> Gmem:
    depth = 4 if quick else 6
    config = GmemConfig(
        image_size=64 if quick else 128,
        tokenizer_stride=16,
        channels=32,
        hidden=192,
        depth=depth,
        heads=6,
        projector_hidden=512,
        horizontal_flip=False,
    )
    method = Gmem(config)
    materialise(method, seed=0)
    return method


def _training(quick: bool) -> Table:
    rows, rounds = (4, 1) if quick else (16, 7)
    ours, theirs = _method(quick), _method(quick)
    table = Table(
        "Training step of GMem",
        f"{sum(p.numel() for p in ours.model.parameters()):,} parameters, {ours.config.num_tokens} tokens, batch {rows}, "
        f"fp32, one thread, {rounds} rounds by turns; forward, backward, clipping, AdamW, one average. Ratio: to ours.",
        ("step", "ms", "ratio"),
    )
    found = by_turns({"hpc-gen": _our_step(ours, rows), "plain re-statement": _plain_step(theirs, rows)}, rounds)
    for name, seconds in found.items():
        table.add(name, seconds.show("{:.0f}", 1000), seconds.over(found["hpc-gen"]).show())
    return table


def _inputs(method: Gmem, rows: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(rows, *spec.shape, generator=generator) for name, spec in method.columns().items()}
    (turn,) = method.turns(0, 0)
    draws = {name: torch.rand(rows, *draw.shape, generator=generator) for name, draw in method.draws(turn).items()}
    return batch, draws


def _our_step(method: Gmem, rows: int) -> Callable[[], None]:
    batch, draws = _inputs(method, rows)
    (turn,) = method.turns(0, 0)
    optimizer = RoleOptimizer(method.model, method.parameter_groups(ROLE), SETTINGS)
    parameters = [p for p in method.model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]

    def step() -> None:
        terms = method.objective(turn, batch, draws).terms
        total = torch.stack([t.weight / t.count * t.sum for t in terms.values()]).sum()
        method.model.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(2e-4)
        update_ema_(average, [p.detach() for p in parameters], 0.9999)

    return step


def _plain_step(method: Gmem, rows: int) -> Callable[[], None]:
    batch, draws = _inputs(method, rows)
    model = method.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}

    def step() -> None:
        t = torch.sigmoid(draws["t"])
        x1, x0 = batch["latents"], draws["noise"]
        x_t = t[:, None, None, None] * x1 + (1 - t[:, None, None, None]) * x0
        snippet = F.dropout(F.normalize(batch["cls_tokens"], dim=-1), 0.4)
        v, z = model.with_representations(x_t, t, snippet)
        u = x1 - x0
        assert z is not None
        projection = sum(
            -(F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1).mean()
            for a, b in zip(z, batch["representations"], strict=True)
        ) / len(z)
        loss = ((v - u) ** 2).mean() + (1 - F.cosine_similarity(v, u, dim=1)).mean() + 0.5 * projection
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name].mul_(0.9999).add_(p, alpha=1e-4)
        loss.item()

    return step


def _sampling(quick: bool) -> Table:
    images, points, rounds = (2, 5, 1) if quick else (8, 50, 3)
    method = _method(quick)
    method.model.eval()
    generator = torch.Generator().manual_seed(1)
    snippet = F.normalize(torch.randn(images, method.config.snippet_dim, generator=generator), dim=-1)
    x = torch.randn(images, *method.config.input_shape, generator=generator)
    noise = torch.randn(points, *x.shape, generator=generator)
    settings = SamplingSettings(points=points)
    calls = {"n": 0}
    velocity = guided_velocity(method.model, snippet, torch.zeros_like(snippet), settings.guidance)

    def counted(x: Tensor, t_B: Tensor) -> Tensor:
        calls["n"] += 1
        return velocity(x, t_B)

    @torch.no_grad()
    def ours() -> None:
        for _ in solution(counted, x, settings, lambda k: noise[k], lambda: None):
            pass

    @torch.no_grad()
    def reference() -> None:
        heun_sde(counted, x, points, noise)

    @torch.no_grad()
    def one_by_one() -> None:
        for i in range(images):
            alone = guided_velocity(
                method.model, snippet[i : i + 1], torch.zeros(1, snippet.shape[1]), settings.guidance
            )
            heun_sde(alone, x[i : i + 1], points, noise[:, i : i + 1])

    evaluations = {}
    for name, action in (("hpc-gen", ours), ("two calls per drift, as the reference", reference)):
        calls["n"] = 0
        action()
        evaluations[name] = calls["n"]
    evaluations["the same image by image: its previews"] = images * evaluations["two calls per drift, as the reference"]
    names = list(evaluations)
    found = by_turns(dict(zip(names, (ours, reference, one_by_one), strict=True)), rounds)
    table = Table(
        f"Heun's SDE of GMem, {points} points",
        f"{images} images, {method.config.num_tokens} tokens, one thread, {rounds} rounds by turns. Ratio: to ours.",
        ("sampler", "network calls", "s", "ratio"),
    )
    for name, seconds in found.items():
        table.add(name, f"{evaluations[name]}", seconds.show("{:.2f}"), seconds.over(found["hpc-gen"]).show())
    return table
