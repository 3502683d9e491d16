"""The DiT backbone of pure diffusion, single device; state-dict keys are those of Averyyy/mar_ebwm.

Architecture: Peebles & Xie 2022 (arXiv 2212.09748) with adaLN-Zero; facts and initialisation in specs/energy.md
sections 3.1 and 3.2. Deliberate deviation: label dropout is not in the network (the reference switches it by train
mode); the objective passes the null class instead, so a label never depends on module state, and all evaluations of
one acceptance test see the same label.

Shape suffixes: B batch, C input channels, S side of the input, P patch side, G = S / P, N = G * G tokens,
D width, H heads, K = D / H width of a head, F features of the timestep.
"""

from __future__ import annotations

import enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpc_gen.methods.energy.config import EnergyConfig
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


class Derivatives(enum.Enum):
    """Which kernels the blocks may use: fused ones have a first derivative only, some a wrong second one."""

    FIRST = "first"  # fused attention
    SECOND = "second"  # attention from matrix products: the backward pass is differentiated again
    FORWARD = "forward"  # the norm from primitives too: the forward-mode derivative is differentiated


def normalise(x_BND: Tensor, derivatives: Derivatives = Derivatives.FIRST) -> Tensor:
    """Layer norm over the width without learned scale or shift.

    The forward-mode derivative of F.layer_norm has wrong parameter gradients in torch 2.13 (specs/energy.md section
    3.1), so it is written out there.
    """
    if derivatives is Derivatives.FORWARD:
        centred = x_BND - x_BND.mean(dim=-1, keepdim=True)
        return centred * (centred.square().mean(dim=-1, keepdim=True) + NORM_EPS).rsqrt()
    return F.layer_norm(x_BND, (x_BND.shape[-1],), eps=NORM_EPS)


def attend(q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, derivatives: Derivatives) -> Tensor:
    """Softmax attention [B, H, N, K] at scale K^-0.5."""
    if derivatives is Derivatives.FIRST:
        return F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK)
    scores_BHNN = (q_BHNK * q_BHNK.shape[-1] ** -0.5) @ k_BHNK.transpose(-2, -1)
    return scores_BHNN.softmax(dim=-1) @ v_BHNK


class Attention(nn.Module):
    """Self-attention with one fused projection: rows q, then k, then v, each head-major."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads  # tensor parallelism leaves a rank some of the heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, derivatives: Derivatives = Derivatives.FIRST) -> Tensor:
        """Mixed tokens [B, N, D]."""
        batch, tokens, _ = x_BND.shape
        # Split before reshaping: the backward pass then joins three gradients and copies nothing else.
        heads_shape = (batch, tokens, -1, self.head_width)
        q_BHNK, k_BHNK, v_BHNK = (part.view(heads_shape).transpose(1, 2) for part in self.qkv(x_BND).chunk(3, dim=2))
        mixed_BHNK = attend(q_BHNK, k_BHNK, v_BHNK, derivatives)
        return self.proj(mixed_BHNK.transpose(1, 2).reshape(batch, tokens, -1))


class Block(nn.Module):
    """Attention and feed-forward, each modulated and gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = FeedForward(width, int(width * mlp_ratio))
        self.adaLN_modulation = adaptive_parameters(width, 6)

    def forward(self, x_BND: Tensor, c_BD: Tensor, derivatives: Derivatives = Derivatives.FIRST) -> Tensor:
        """Tokens [B, N, D]; `c_BD` is the condition."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c_BD).chunk(6, dim=1)
        attended_BND = self.attn(modulate(normalise(x_BND, derivatives), shift_msa, scale_msa), derivatives)
        x_BND = x_BND + gate_msa[:, None] * attended_BND
        fed_BND = self.mlp(modulate(normalise(x_BND, derivatives), shift_mlp, scale_mlp))
        return x_BND + gate_mlp[:, None] * fed_BND


class FinalLayer(nn.Module):
    """Modulated norm and the linear map from a token to the values of its patch."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = adaptive_parameters(width, 2)

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        """Patch values [B, N, P*P*C]."""
        shift_BD, scale_BD = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return self.linear(modulate(normalise(x_BND), shift_BD, scale_BD))


class EnergyLayer(nn.Module):
    """Tokens to one energy per sample; no norm or modulation before it."""

    def __init__(self, width: int, linear_then_mean: bool) -> None:
        super().__init__()
        self.linear_then_mean = linear_then_mean
        self.energy_head = nn.Sequential(nn.Linear(width, width // 2), nn.SiLU(), nn.Linear(width // 2, 1))

    def forward(self, x_BND: Tensor) -> Tensor:
        """Energies float32 (or better) [B]: whatever autocast does elsewhere, a sum over tokens is not rounded."""
        with torch.autocast(x_BND.device.type, enabled=False):
            x_BND = x_BND.to(self.energy_head[0].weight.dtype)
            if self.linear_then_mean:
                return self.energy_head(x_BND).mean(dim=1).squeeze(-1)
            return self.energy_head(x_BND.mean(dim=1)).squeeze(-1)


class DiT(nn.Module):
    """Diffusion transformer: noisy input, timestep and class to the noise it holds, or to an energy."""

    def __init__(self, config: EnergyConfig, num_classes: int) -> None:
        super().__init__()
        self.channels, self.patch_size = config.channels, config.patch_size
        self.grid = config.input_size // config.patch_size
        self.checkpoint_blocks = config.checkpoint_blocks
        # Frozen, but a parameter as in the reference: it is in the state dict and in the EMA.
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid**2, config.hidden), requires_grad=False)
        self.x_embedder = PatchEmbed(config.channels, config.hidden, config.patch_size)
        self.t_embedder = TimestepEmbedder(config.hidden)
        self.y_embedder = LabelEmbedder(num_classes, config.hidden)
        self.blocks = nn.ModuleList(Block(config.hidden, config.heads, config.mlp_ratio) for _ in range(config.depth))
        if config.variant == "energy":
            # Never used and never trained; here for the keys of the reference's checkpoints.
            self.final_layer = FinalLayer(config.hidden, config.patch_size**2)
            self.energy_layer = EnergyLayer(config.hidden, config.energy.linear_then_mean)
        else:
            self.final_layer = FinalLayer(config.hidden, config.patch_size**2 * config.channels)

    def embed(self, x_BCSS: Tensor) -> Tensor:
        """Tokens [B, N, D] of the input; without autocast, so that an input gradient is not rounded on its way out."""
        with torch.autocast(x_BCSS.device.type, enabled=False):
            return self.x_embedder(x_BCSS) + self.pos_embed

    def condition(self, t_B: Tensor, y_B: Tensor) -> Tensor:
        """Embedding of timestep and class [B, D]."""
        return self.t_embedder(t_B) + self.y_embedder(y_B)

    def tokens(self, x_BCSS: Tensor, t_B: Tensor, y_B: Tensor, derivatives: Derivatives) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, D] after the last block, and the condition [B, D]."""
        x_BND, c_BD = self.embed(x_BCSS), self.condition(t_B, y_B)
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x_BND = checkpoint(block, x_BND, c_BD, derivatives, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BND = block(x_BND, c_BD, derivatives)
        return x_BND, c_BD

    def forward(self, x_BCSS: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        """Noise prediction [B, C, S, S]; `t_B` int64 in [0, T), `y_B` int64 in [0, num_classes] (last = null)."""
        return self.unpatchify(self.final_layer(*self.tokens(x_BCSS, t_B, y_B, Derivatives.FIRST)))

    def energies(self, x_BCSS: Tensor, t_B: Tensor, y_B: Tensor, derivatives: Derivatives) -> Tensor:
        """Energies float32 [B] of the energy variant."""
        return self.energy_layer(self.tokens(x_BCSS, t_B, y_B, derivatives)[0])

    def unpatchify(self, x_BNE: Tensor) -> Tensor:
        """Patch values [B, N, P*P*C], in the order (row, column, channel), to an image [B, C, S, S]."""
        grid, patch = self.grid, self.patch_size
        x_BGGPPC = x_BNE.view(-1, grid, grid, patch, patch, self.channels)
        return x_BGGPPC.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.channels, grid * patch, grid * patch)


class PureDiffusion(nn.Module):
    """The role's module: the backbone as `dit.*` and the inner loop's step size as `alpha`.

    `alpha` is a buffer when it is fixed and a parameter when it is learnable, under the same key.
    """

    alpha: Tensor

    def __init__(self, config: EnergyConfig, num_classes: int) -> None:
        super().__init__()
        self.is_energy = config.variant == "energy"
        self.grad_multiplier = config.energy.grad_multiplier
        self.step_size = config.energy.step_size
        if self.is_energy and config.energy.learnable_step_size:
            self.alpha = nn.Parameter(torch.empty(()))
        else:
            self.register_buffer("alpha", torch.empty(()))
        self.dit = DiT(config, num_classes)

    def forward(self, x_BCSS: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        """Noise prediction [B, C, S, S]: the network's output, or grad_multiplier * dE/dx."""
        if self.is_energy:
            return self.energy_and_noise(x_BCSS, t_B, y_B)[1]
        return self.dit(x_BCSS, t_B, y_B)

    def energy(self, x_BCSS: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        """Energies float32 [B]; differentiable once."""
        return self.dit.energies(x_BCSS, t_B, y_B, Derivatives.FIRST)

    def energy_and_noise(self, x_BCSS: Tensor, t_B: Tensor, y_B: Tensor) -> tuple[Tensor, Tensor]:
        """Energies [B] and the noise prediction grad_multiplier * dE/dx [B, C, S, S].

        Both are differentiable where gradients are enabled outside, and then the backward pass of this one is kept;
        under no_grad (sampling, validation) it is freed at once. Deliberate deviation: the reference keeps it always.
        """
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            x_BCSS = x_BCSS if x_BCSS.requires_grad else x_BCSS.detach().requires_grad_()
            energy_B = self.dit.energies(x_BCSS, t_B, y_B, Derivatives.SECOND if keep else Derivatives.FIRST)
            (slope_BCSS,) = torch.autograd.grad(energy_B.sum(), x_BCSS, create_graph=keep)
        energy_B = energy_B if keep else energy_B.detach()
        return energy_B, self.grad_multiplier * slope_BCSS


@torch.no_grad()
def initialise(model: PureDiffusion, generator: torch.Generator) -> None:
    """Fill every parameter and buffer. Values are drawn on the CPU in state-dict order, so no device changes them."""
    for name, parameter in model.named_parameters():
        if name == "dit.pos_embed":
            parameter.copy_(sincos_positions(parameter.shape[-1], model.dit.grid))
        elif name != "alpha":
            parameter.copy_(_initial_value(name, parameter.shape, generator))
    model.alpha.fill_(model.step_size)


def _initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Zero: biases, modulations and the output map. N(0, 0.02): label table, timestep maps. Else Xavier uniform."""
    value = torch.empty(shape, dtype=torch.float32, device="cpu")
    if name.endswith(".bias") or "adaLN_modulation" in name or "final_layer" in name:
        return value.zero_()
    if "embedding_table" in name or "t_embedder" in name:
        return value.normal_(0.0, 0.02, generator=generator)
    # The patch convolution is initialised as the linear map it is, so its fan-in is C * P * P.
    nn.init.xavier_uniform_(value.view(shape[0], -1), generator=generator)
    return value
