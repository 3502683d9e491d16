"""LightningDiT of specs/gmem.md section 3.1 once more, in plain loops over a dictionary of weights.

It shares no line with hpc_gen: a second reading of the spec, for the sizes and switches that no shipped case has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Words = Mapping[str, Any]  # the neutral words of a golden case
Weights = Mapping[str, Tensor]


def positions(width: int, grid: int) -> Tensor:
    """Fixed code [N, D]: the first half encodes the column, the second the row."""
    table, quarter = torch.zeros(grid * grid, width, dtype=torch.float64), width // 4
    for token in range(grid * grid):
        for start, place in ((0, token % grid), (width // 2, token // grid)):
            for i in range(quarter):
                angle = place * 10000.0 ** -(i / quarter)
                table[token, start + i], table[token, start + quarter + i] = math.sin(angle), math.cos(angle)
    return table.float()


def rotary(width: int, grid: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, K]: the first half of the channels turns by the row, the second by the column."""
    half, angles = width // 2, torch.zeros(grid * grid, width)
    for token in range(grid * grid):
        for j in range(half // 2):
            frequency = 10000.0 ** (-2 * j / half)
            for k in (2 * j, 2 * j + 1):
                angles[token, k], angles[token, half + k] = token // grid * frequency, token % grid * frequency
    return angles.cos(), angles.sin()


def shapes(words: Words) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the reference's state dict, tables apart."""
    width, patch, channels = words["hidden"], words["patch_size"], words["latent_channels"]
    head, inner = width // words["heads"], int(width * words["mlp_ratio"])

    def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    found: dict[str, tuple[int, ...]] = {"x_embedder.proj.weight": (width, channels, patch, patch)}
    found |= {"x_embedder.proj.bias": (width,)}
    found |= linear("t_embedder.mlp.0", width, 256) | linear("t_embedder.mlp.2", width, width)
    if "num_classes" in words:
        found["y_embedder.embedding_table.weight"] = (words["num_classes"] + 1, width)
    else:
        hidden = words["projector_hidden"]
        found |= linear("condition_projection.linear", width, words["snippet_dim"])
        found |= linear("projector.0.0", hidden, width) | linear("projector.0.2", hidden, hidden)
        found |= linear("projector.0.4", words["repr_dim"], hidden)
    for i in range(words["depth"]):
        block = f"blocks.{i}"
        found |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
        found |= linear(f"{block}.adaLN_modulation.1", (4 if words["adaln_without_shift"] else 6) * width, width)
        if words["rms_norm"]:
            found |= {f"{block}.norm1.weight": (width,), f"{block}.norm2.weight": (width,)}
        for name in ("q", "k") if words["qk_norm"] else ():
            found[f"{block}.attn.{name}_norm.weight"] = (head,)
            if not words["rms_norm"]:
                found[f"{block}.attn.{name}_norm.bias"] = (head,)
        if words["swiglu"]:
            gated = int(2 / 3 * inner)
            found |= linear(f"{block}.mlp.w12", 2 * gated, width) | linear(f"{block}.mlp.w3", width, gated)
        else:
            found |= linear(f"{block}.mlp.fc1", inner, width) | linear(f"{block}.mlp.fc2", width, inner)
    if words["rms_norm"]:
        found["final_layer.norm_final.weight"] = (width,)
    found |= linear("final_layer.linear", patch**2 * channels * (2 if words["learn_sigma"] else 1), width)
    return found | linear("final_layer.adaLN_modulation.1", 2 * width, width)


def random_weights(words: Words, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of all keys, none zero, and the fixed tables."""
    grid = words["latent_size"] // words["patch_size"]
    found = {"pos_embed": positions(words["hidden"], grid)[None]}
    for name, shape in shapes(words).items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            found[name] = 0.1 * value
        elif "norm" in name:
            found[name] = 1 + 0.1 * value
        else:
            found[name] = value * (2 / (shape[0] + value[0].numel())) ** 0.5
    if words["rope"]:
        tables = rotary(words["hidden"] // words["heads"], grid)
        found |= {"feat_rope.freqs_cos": tables[0], "feat_rope.freqs_sin": tables[1]}
    return found


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _norm(weights: Weights, name: str, x: Tensor, rms: bool) -> Tensor:
    """RMS norm; or layer norm, of queries and keys with a learned map and another eps."""
    if rms:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weights[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    learned = f"{name}.bias" in weights
    normed = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + (1e-5 if learned else 1e-6))
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"] if learned else normed


def _rotated(x: Tensor, weights: Weights) -> Tensor:
    cos, sin = weights["feat_rope.freqs_cos"], weights["feat_rope.freqs_sin"]
    turned = torch.empty_like(x)
    for k in range(0, x.shape[-1], 2):
        turned[..., k] = x[..., k] * cos[:, k] - x[..., k + 1] * sin[:, k]
        turned[..., k + 1] = x[..., k + 1] * cos[:, k + 1] + x[..., k] * sin[:, k + 1]
    return turned


def _attention(weights: Weights, words: Words, name: str, x: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    head = width // words["heads"]
    parts = _linear(weights, f"{name}.qkv", x).split(width, dim=-1)
    q, k, v = (part.reshape(batch, tokens, -1, head).permute(0, 2, 1, 3) for part in parts)
    if words["qk_norm"]:
        q, k = (_norm(weights, f"{name}.{key}_norm", y, words["rms_norm"]) for key, y in (("q", q), ("k", k)))
    if words["rope"]:
        q, k = _rotated(q, weights), _rotated(k, weights)
    mixed = torch.softmax(q @ k.transpose(-1, -2) * head**-0.5, dim=-1) @ v
    return _linear(weights, f"{name}.proj", mixed.permute(0, 2, 1, 3).reshape(batch, tokens, width))


def _feed_forward(weights: Weights, words: Words, name: str, x: Tensor) -> Tensor:
    if words["swiglu"]:
        gate, value = _linear(weights, f"{name}.w12", x).chunk(2, dim=-1)
        return _linear(weights, f"{name}.w3", _silu(gate) * value)
    wide = _linear(weights, f"{name}.fc1", x)
    gelu = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    return _linear(weights, f"{name}.fc2", gelu)


def velocity(weights: Weights, words: Words, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """The network's output [B, C, S, S] for snippets [B, E] or labels [B]."""
    width, patch, channels = words["hidden"], words["patch_size"], words["latent_channels"]
    grid = words["latent_size"] // patch
    places = [(r * patch, c * patch) for r in range(grid) for c in range(grid)]
    kernel = weights["x_embedder.proj.weight"].reshape(width, -1)
    patches = [x[:, :, top : top + patch, left : left + patch].reshape(len(x), -1) for top, left in places]
    hidden = torch.stack(patches, dim=1) @ kernel.T + weights["x_embedder.proj.bias"] + weights["pos_embed"]
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    c = _linear(weights, "t_embedder.mlp.2", _silu(_linear(weights, "t_embedder.mlp.0", features)))
    if "num_classes" in words:
        c = c + weights["y_embedder.embedding_table.weight"][condition]
    else:
        c = c + _linear(weights, "condition_projection.linear", condition)
    for i in range(words["depth"]):
        block, rms = f"blocks.{i}", words["rms_norm"]
        chunks = [m[:, None] for m in _linear(weights, f"{block}.adaLN_modulation.1", _silu(c)).split(width, dim=1)]
        if words["adaln_without_shift"]:
            chunks = [torch.zeros_like(chunks[0]), *chunks[:2], torch.zeros_like(chunks[0]), *chunks[2:]]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = chunks
        inner = _norm(weights, f"{block}.norm1", hidden, rms) * (1 + scale_a) + shift_a
        hidden = hidden + gate_a * _attention(weights, words, f"{block}.attn", inner)
        inner = _norm(weights, f"{block}.norm2", hidden, rms) * (1 + scale_m) + shift_m
        hidden = hidden + gate_m * _feed_forward(weights, words, f"{block}.mlp", inner)
    shift, scale = (m[:, None] for m in _linear(weights, "final_layer.adaLN_modulation.1", _silu(c)).chunk(2, dim=1))
    last = _norm(weights, "final_layer.norm_final", hidden, words["rms_norm"]) * (1 + scale) + shift
    values = _linear(weights, "final_layer.linear", last)
    image = torch.zeros(len(x), values.shape[-1] // patch**2, *x.shape[2:])
    for token, (top, left) in enumerate(places):
        tile = values[:, token].reshape(len(x), patch, patch, -1).permute(0, 3, 1, 2)
        image[:, :, top : top + patch, left : left + patch] = tile
    return image[:, :channels]
