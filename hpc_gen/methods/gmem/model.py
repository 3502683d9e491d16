"""The LightningDiT backbone as GMem uses it, single device; state-dict keys are those of LINs-lab/GMem.

Facts: specs/gmem.md section 3.1. Deliberate deviations: dropout of snippets and labels is not in the network (the
objective applies it with drawn masks), and the projector runs only when it is asked for.

Shape suffixes: B batch, C input channels, S side of the input, P patch side, G = S / P, N = G * G tokens, D width,
H heads, K = D / H width of a head, E length of a snippet, R length of a representation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hpc_gen.methods.gmem.config import GmemConfig
from hpc_gen.nn.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    adaptive_parameters,
    modulate,
    sincos_positions,
)
from hpc_gen.nn.feed_forward import FeedForward

NORM_EPS = 1e-6
QK_LAYER_NORM_EPS = 1e-5  # of the reference's plain layer norm of queries and keys
ROTARY_BASE = 10000.0


def rotary_tables(head_width: int, grid: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines float32 [N, K] by which token n is rotated.

    The first half of K turns by the row, the second by the column, each with frequencies 10000^(-2j / (K/2)), every
    frequency twice in a row (adjacent channels are a pair). Positions are plain integers at every resolution.
    """
    axis = head_width // 2
    frequencies = ROTARY_BASE ** -(torch.arange(0, axis, 2, dtype=torch.float32, device="cpu") / axis)
    angles_GJ = torch.arange(grid, dtype=torch.float32, device="cpu")[:, None] * frequencies
    angles_GI = angles_GJ.repeat_interleave(2, dim=1)
    row_GGI = angles_GI[:, None].expand(grid, grid, -1)
    column_GGI = angles_GI[None].expand(grid, grid, -1)
    angles_NK = torch.cat([row_GGI, column_GGI], dim=2).reshape(grid * grid, head_width)
    return angles_NK.cos(), angles_NK.sin()


def rotate(x_BHNK: Tensor, cos_NK: Tensor, sin_NK: Tensor) -> Tensor:
    """Rotate adjacent channels (x0, x1) as pairs: x cos + (-x1, x0) sin, in the wider of the dtypes."""
    even, odd = x_BHNK[..., 0::2], x_BHNK[..., 1::2]
    turned_BHNK = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x_BHNK * cos_NK + turned_BHNK * sin_NK


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in fp32, back in the dtype of x, times a learned weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape, normalised over the last axis."""
        wide = x.float() if x.dtype != torch.float64 else x
        scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + NORM_EPS)
        return scaled.to(x.dtype) * self.weight


def make_norm(width: int, rms: bool) -> nn.Module:
    """RMS norm, or layer norm without learned parameters."""
    return RMSNorm(width) if rms else nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)


class Rotary(nn.Module):
    """The rotary tables, shared by all blocks; buffers that are part of the state dict, as in the reference."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_width: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("freqs_cos", torch.empty(grid * grid, head_width))
        self.register_buffer("freqs_sin", torch.empty(grid * grid, head_width))

    def forward(self, x_BHNK: Tensor) -> Tensor:
        """Rotated queries or keys."""
        return rotate(x_BHNK, self.freqs_cos, self.freqs_sin)


class Attention(nn.Module):
    """Self-attention with one fused projection: rows q, then k, then v, each head-major."""

    def __init__(self, config: GmemConfig) -> None:
        super().__init__()
        self.heads = config.heads
        width = config.hidden // config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        if config.qk_norm:
            rms = config.rms_norm
            self.q_norm: nn.Module = RMSNorm(width) if rms else nn.LayerNorm(width, eps=QK_LAYER_NORM_EPS)
            self.k_norm: nn.Module = RMSNorm(width) if rms else nn.LayerNorm(width, eps=QK_LAYER_NORM_EPS)
        self.qk_norm = config.qk_norm
        self.proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x_BND: Tensor, rotary: Rotary | None) -> Tensor:
        """Mixed tokens [B, N, D]."""
        batch, tokens, width = x_BND.shape
        heads_shape = (batch, tokens, self.heads, width // self.heads)
        q_BHNK, k_BHNK, v_BHNK = (part.view(heads_shape).transpose(1, 2) for part in self.qkv(x_BND).chunk(3, dim=2))
        if self.qk_norm:
            q_BHNK, k_BHNK = self.q_norm(q_BHNK), self.k_norm(k_BHNK)
        if rotary is not None:
            q_BHNK, k_BHNK = rotary(q_BHNK).to(v_BHNK.dtype), rotary(k_BHNK).to(v_BHNK.dtype)
        mixed_BHNK = F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK)
        return self.proj(mixed_BHNK.transpose(1, 2).reshape(batch, tokens, width))


class GatedFeedForward(nn.Module):
    """SwiGLU: w3(silu(first half of w12 x) * second half)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * inner)
        self.w3 = nn.Linear(inner, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Tokens [B, N, D]."""
        gate, value = self.w12(x_BND).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and feed-forward, each modulated and gated by the condition."""

    def __init__(self, config: GmemConfig) -> None:
        super().__init__()
        width, inner = config.hidden, int(config.hidden * config.mlp_ratio)
        self.norm1 = make_norm(width, config.rms_norm)
        self.norm2 = make_norm(width, config.rms_norm)
        self.attn = Attention(config)
        self.mlp: nn.Module = (
            GatedFeedForward(width, int(2 / 3 * inner)) if config.swiglu else FeedForward(width, inner)
        )
        self.shift = config.shift
        self.adaLN_modulation = adaptive_parameters(width, 6 if config.shift else 4)

    def forward(self, x_BND: Tensor, c_BD: Tensor, rotary: Rotary | None) -> Tensor:
        """Tokens [B, N, D]; `c_BD` is the condition."""
        chunks = self.adaLN_modulation(c_BD).chunk(6 if self.shift else 4, dim=1)
        if self.shift:
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = chunks
        else:
            (scale_msa, gate_msa, scale_mlp, gate_mlp), shift_msa, shift_mlp = chunks, None, None
        attended_BND = self.attn(modulate(self.norm1(x_BND), shift_msa, scale_msa), rotary)
        x_BND = x_BND + gate_msa[:, None] * attended_BND
        return x_BND + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x_BND), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated norm and the linear map from a token to the values of its patch."""

    def __init__(self, config: GmemConfig, outputs: int) -> None:
        super().__init__()
        self.norm_final = make_norm(config.hidden, config.rms_norm)
        self.linear = nn.Linear(config.hidden, outputs)
        self.adaLN_modulation = adaptive_parameters(config.hidden, 2)

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        """Patch values [B, N, P*P*C]."""
        shift_BD, scale_BD = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_BND), shift_BD, scale_BD))


class SnippetProjection(nn.Module):
    """A snippet to a vector of the model's width; the null snippet is zero, so its embedding is the bias."""

    def __init__(self, snippet_dim: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(snippet_dim, width)

    def forward(self, snippet_BE: Tensor) -> Tensor:
        """Embedding [B, D]."""
        return self.linear(snippet_BE)


def make_projector(config: GmemConfig) -> nn.ModuleList:
    """From tokens to representations: three linear maps, a list of one as in the reference's keys."""
    inner = config.projector_hidden
    layers = [nn.Linear(config.hidden, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU()]
    return nn.ModuleList([nn.Sequential(*layers, nn.Linear(inner, config.repr_dim))])


class LightningDiT(nn.Module):
    """Flow transformer: noisy latents, time and condition to a velocity, and to representations in training."""

    def __init__(self, config: GmemConfig, num_classes: int = 0) -> None:
        """`num_classes`: for the class condition, without the null class."""
        super().__init__()
        self.channels, self.patch_size = config.channels, config.patch_size
        self.grid = config.input_size // config.patch_size
        self.checkpoint_blocks, self.tap = config.checkpoint_blocks, config.repr_after_block
        self.by_snippet = config.condition == "snippet"
        # Frozen, but a parameter as in the reference: it is in the state dict and in the EMA.
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens, config.hidden), requires_grad=False)
        self.x_embedder = PatchEmbed(config.channels, config.hidden, config.patch_size)
        self.t_embedder = TimestepEmbedder(config.hidden)
        if self.by_snippet:
            self.condition_projection = SnippetProjection(config.snippet_dim, config.hidden)
        else:
            self.y_embedder = LabelEmbedder(num_classes, config.hidden)
        self.feat_rope = Rotary(config.hidden // config.heads, self.grid) if config.rope else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        if self.by_snippet:
            self.projector = make_projector(config)
        outputs = config.patch_size**2 * config.channels * (2 if config.learn_sigma else 1)
        self.final_layer = FinalLayer(config, outputs)

    def condition(self, t_B: Tensor, condition: Tensor) -> Tensor:
        """Embedding of time and snippet [B, E], or of time and class int64 [B]: [B, D]."""
        embedded_BD = self.condition_projection(condition) if self.by_snippet else self.y_embedder(condition)
        return self.t_embedder(t_B) + embedded_BD

    def forward(self, x_BCSS: Tensor, t_B: Tensor, condition: Tensor) -> Tensor:
        """Velocity [B, C, S, S] at time `t_B` in [0, 1] (0 is noise)."""
        return self.with_representations(x_BCSS, t_B, condition, project=False)[0]

    def with_representations(
        self, x_BCSS: Tensor, t_B: Tensor, condition: Tensor, project: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Velocity [B, C, S, S], and what the projector makes of the tokens after block `tap`: [B, N, R] or None."""
        x_BND = self.x_embedder(x_BCSS) + self.pos_embed
        c_BD = self.condition(t_B, condition)
        representations_BNR = None
        for number, block in enumerate(self.blocks, 1):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x_BND = checkpoint(block, x_BND, c_BD, self.feat_rope, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BND = block(x_BND, c_BD, self.feat_rope)
            if project and number == self.tap:
                representations_BNR = self.projector[0](x_BND)
        return self.unpatchify(self.final_layer(x_BND, c_BD)), representations_BNR

    def unpatchify(self, x_BNE: Tensor) -> Tensor:
        """Patch values [B, N, P*P*C'], in the order (row, column, channel), to the first C channels [B, C, S, S]."""
        grid, patch = self.grid, self.patch_size
        x_BGGPPC = x_BNE.unflatten(2, (patch, patch, -1)).unflatten(1, (grid, grid))
        image = x_BGGPPC.permute(0, 5, 1, 3, 2, 4).reshape(len(x_BNE), -1, grid * patch, grid * patch)
        return image[:, : self.channels]


@torch.no_grad()
def initialise(model: LightningDiT, generator: torch.Generator) -> None:
    """Fill every parameter and buffer. Values are drawn on the CPU in state-dict order, so no device changes them.

    As in GMem nothing is zero but the biases: unlike DiT, modulations and the output map keep their Xavier values.
    """
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            parameter.copy_(sincos_positions(parameter.shape[-1], model.grid))
        else:
            parameter.copy_(_initial_value(name, parameter.shape, generator))
    if model.feat_rope is not None:
        cos_NK, sin_NK = rotary_tables(model.feat_rope.freqs_cos.shape[1], model.grid)
        model.feat_rope.freqs_cos.copy_(cos_NK)
        model.feat_rope.freqs_sin.copy_(sin_NK)


def _initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Zero: biases. One: weights of norms. N(0, 0.02): time maps and label table. Else Xavier uniform."""
    value = torch.empty(shape, dtype=torch.float32, device="cpu")
    if name.endswith(".bias"):
        return value.zero_()
    if "norm" in name:
        return value.fill_(1.0)
    if name.startswith(("t_embedder", "y_embedder")):
        return value.normal_(0.0, 0.02, generator=generator)
    # The patch convolution is initialised as the linear map it is, so its fan-in is C * P * P.
    nn.init.xavier_uniform_(value.view(shape[0], -1), generator=generator)
    return value
