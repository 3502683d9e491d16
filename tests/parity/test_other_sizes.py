"""Golden-like cases of sizes and options that no shipped case has, made by plain re-statements of the specs.

They go through the handlers, so both are tried: our code, and that a handler has built in nothing of a shipped case.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_compare import compare
from golden_files import GoldenError, cases
from golden_handling import UnreadWarning, case_handler, load_handlers
from plain_lightningdit import random_weights, velocity
from safetensors.torch import save_file
from torch import Tensor

from hpc_gen.runtime.errors import DataError

load_handlers()

BASE: dict[str, Any] = {
    "latent_size": 4, "patch_size": 1, "latent_channels": 4, "hidden": 32, "depth": 2, "heads": 2, "mlp_ratio": 4.0,
    "qk_norm": False, "swiglu": True, "rope": True, "rms_norm": True, "adaln_without_shift": False,
    "learn_sigma": False, "repr_tap_after_block": 4, "snippet_dim": 12, "projector_hidden": 16, "repr_dim": 8,
}  # fmt: skip
SNIPPET_WORDS = ("snippet_dim", "projector_hidden", "repr_dim", "repr_tap_after_block")
CLOSE = [{"tensors": "*", "rule": "max_rel", "tol": 5e-5}]


def differences(folder: Path, kind: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> list[str]:
    """What the handler of gmem's `kind` finds in a case of these tensors."""
    path = folder / "gmem" / "case.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"kind": kind, "config": config, "compare": CLOSE}))
    stored = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    save_file(stored, path.with_suffix(".safetensors"))
    (case,) = cases([folder])
    return compare(case_handler(case)(case), case.tensors(), case.rules, case.record)


def network(generator: torch.Generator, **change: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The neutral words of a network, and random weights of it."""
    words = {**BASE, **change}
    if "num_classes" in words:
        words = {key: value for key, value in words.items() if key not in SNIPPET_WORDS}
    return words, random_weights(words, generator)


def conditions(words: dict[str, Any], count: int, generator: torch.Generator) -> tuple[str, Tensor, Tensor]:
    """Name of the input, snippets of length 1 or labels, and the null condition."""
    if "num_classes" in words:
        labels = torch.randint(0, words["num_classes"], (count,), generator=generator)
        return "in.y", labels, torch.full_like(labels, words["num_classes"])
    snippets = torch.nn.functional.normalize(torch.randn(count, words["snippet_dim"], generator=generator), dim=1)
    return "in.snippet", snippets, torch.zeros_like(snippets)


NETWORKS: dict[str, dict[str, Any]] = {
    "patch 2, all switches off, no shift": {
        "patch_size": 2, "latent_size": 6, "rope": False, "rms_norm": False, "swiglu": False,
        "adaln_without_shift": True,
    },
    "three heads, one block": {"hidden": 36, "heads": 3, "depth": 1},
    "three heads of 12, no rotary, normed queries": {"hidden": 36, "heads": 3, "rope": False, "qk_norm": True},
    "layer norm of queries, rotary, sigma, patch 2": {
        "rms_norm": False, "qk_norm": True, "learn_sigma": True, "patch_size": 2, "latent_size": 8,
        "latent_channels": 3,
    },
    "patch 4, ratio 3": {"patch_size": 4, "latent_size": 8, "mlp_ratio": 3.0, "swiglu": False},
    "gate of an odd width": {"mlp_ratio": 2.67, "hidden": 40, "heads": 5},
    "one token, one head": {"latent_size": 1, "heads": 1},
    "classes": {"num_classes": 3, "patch_size": 2},
}  # fmt: skip


@pytest.mark.parametrize("change", NETWORKS.values(), ids=NETWORKS)
def test_networks(tmp_path: Path, change: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    words, weights = network(generator, **change)
    side = words["latent_size"]
    x, weight = (torch.randn(3, words["latent_channels"], side, side, generator=generator) for _ in range(2))
    t = torch.rand(3, generator=generator)
    name, condition, null = conditions(words, 3, generator)
    tables = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
    learned = {key: value.clone().requires_grad_() for key, value in weights.items() if key not in tables}
    given = x.clone().requires_grad_()
    found = velocity({**weights, **learned}, words, given, t, condition)
    (found * weight).sum().backward()
    out = {f"out.velocity_null_{name[3:]}": velocity(weights, words, x, t, null), "out.velocity": found}
    gradients = {f"grad.{key}": value.grad for key, value in learned.items() if value.grad is not None}
    assert given.grad is not None and len(gradients) > 10
    inputs = {"in.x": x, "in.t": t, "in.loss_weight": weight, name: condition, "grad.x": given.grad}
    parameters = {f"param.{key}": value for key, value in weights.items()}
    assert differences(tmp_path, "backbone", {"neutral": words}, {**parameters, **inputs, **out, **gradients}) == []


def diffusion(form: str, t: float, norm: float) -> float:
    """w(t) of specs/gmem.md section 5.2, linear path."""
    return {
        "linear": norm * (1 - t),
        "sigma": norm * (1 - t),
        "decreasing": 0.25 * (norm * math.cos(math.pi * t) + 1) ** 2,
        "inccreasing-decreasing": norm * math.sin(math.pi * t) ** 2,
        "constant": norm,
    }[form]


FORMS = ("linear", "sigma", "decreasing", "inccreasing-decreasing", "constant")


@pytest.mark.parametrize("guidance", [None, {"scale": 4.0, "start": 0.37, "end": 0.7}], ids=["plain", "guided"])
@pytest.mark.parametrize("points", [2, 5])
def test_every_form_and_last_step_of_the_sde(tmp_path: Path, points: int, guidance: dict[str, float] | None) -> None:
    """Also an interval of guidance that begins and ends between points of the grid."""
    generator = torch.Generator().manual_seed(2)
    words, weights = network(generator, depth=1)
    _, snippet, null = conditions(words, 2, generator)
    start = torch.randn(2, 4, 4, 4, generator=generator)
    noise = torch.randn(points - 1, 2, 4, 4, 4, generator=generator)

    def field(x: Tensor, t: float) -> Tensor:
        t_B = torch.full((2,), t)
        if guidance is None or t < guidance["start"]:
            return velocity(weights, words, x, t_B, snippet)
        without = velocity(weights, words, x, t_B, null)
        if t > guidance["end"]:
            return without
        return without + guidance["scale"] * (velocity(weights, words, x, t_B, snippet) - without)

    def score(v: Tensor, x: Tensor, t: float) -> Tensor:
        return (t * v - x) / (1 - t)

    def states(form: str, last: str | None, heun: bool, norm: float, size: float) -> Tensor:
        def drift(x: Tensor, t: float) -> Tensor:
            v = field(x, t)
            return v + diffusion(form, t, norm) * score(v, x, t)

        grid, x, found = torch.linspace(0, 1 - size, points).tolist(), start, []
        step = grid[1] - grid[0]
        for k, t in enumerate(grid[:-1]):
            kick = math.sqrt(2 * diffusion(form, t, norm) * step) * noise[k]
            if heun:
                x = x + kick
                first = drift(x, t)
                x = x + step * (first + drift(x + step * first, t + step)) / 2
            else:
                x = x + step * drift(x, t) + kick
            found.append(x)
        t = grid[-1]
        if last == "Mean":
            x = x + size * drift(x, t)
        elif last == "Euler":
            x = x + size * field(x, t)
        elif last == "Tweedie":
            x = x / t + (1 - t) ** 2 / t * score(field(x, t), x, t)
        return torch.stack([*found, x])

    variants, out = {}, {}
    for form, last, method in itertools.product(FORMS, ("Mean", "Euler", "Tweedie", None), ("Euler", "Heun")):
        if last is None and method == "Heun":
            continue  # it would look at t = 1, where the score is infinite
        size = 0.0 if last is None else 0.05
        name = f"{method}_{form}_{last}"
        variants[name] = {"method": method, "form": form, "last": last, "last_size": size, "norm": 0.7}
        out[f"out.{name}"] = states(form, last, method == "Heun", 0.7, size)
    sampler = {"kind": "sde", "num_steps": points, "variants": variants, "guidance": guidance}
    tensors = {**{f"param.{key}": value for key, value in weights.items()}, **out}
    inputs = {"in.snippet": snippet, "in.x_init": start, "in.step_noise": noise}
    assert differences(tmp_path, "sde", {"neutral": words, "sampler": sampler}, {**tensors, **inputs}) == []


@pytest.mark.parametrize(
    ("kind", "config", "told"),
    [
        ("backbone", {"neutral": {**BASE, "qk_norm_eps": 1e-3}}, "qk_norm_eps"),
        ("backbone", {"neutral": BASE, "dropout": 0.1}, "dropout"),
        ("ode", {"neutral": BASE, "sampler": {"grid_points": 3, "tolerance": 1}}, "tolerance"),
        ("ode", {"neutral": BASE, "sampler": {"grid_points": 3, "reverse": True}}, "reverse"),
        ("memory_bank", {"neutral": {"rank": 2, "seed": 3}}, "seed"),
    ],
)
def test_keys_that_no_handler_reads_are_said(tmp_path: Path, kind: str, config: dict[str, Any], told: str) -> None:
    with pytest.warns(UnreadWarning, match=told), pytest.raises((GoldenError, DataError)):  # the case holds no numbers
        differences(tmp_path, kind, config, {"out.velocity": torch.zeros(1), "in.bank": torch.zeros(2, 2)})
