"""Official weights of pure diffusion: key and shape lists, import with strict keys, and what a user must be told."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hpc_gen.methods.energy.config import EnergyConfig
from hpc_gen.methods.energy.model import PureDiffusion
from hpc_gen.methods.official import OfficialList, import_strict
from hpc_gen.nn.embeddings import sincos_positions

_POSITION_TOLERANCE = 1e-6  # float32 sines of another library

# Which config key decides the shape of a parameter, to say what to change; the first match counts.
_SHAPE_KEYS = {
    "pos_embed": "method.image_size, method.patch_size or method.hidden",
    "x_embedder": "method.channels, method.patch_size or method.hidden",
    "y_embedder": "method.num_classes or method.hidden",
    "final_layer.linear": "method.channels, method.patch_size or method.hidden",
    "mlp.fc": "method.mlp_ratio or method.hidden",
}


def official_list(config: EnergyConfig, num_classes: int) -> OfficialList:
    """The list for a model of this config (built on the meta device, no memory)."""
    with torch.device("meta"):
        model = PureDiffusion(config, num_classes)
    return OfficialList.of(model)


def import_flat(model: nn.Module, flat: Mapping[str, Tensor], source: str = "the weights") -> None:
    """Copy a flat state dict with the official keys into a materialised model; see methods.official.import_strict."""
    import_strict(model, flat, source, "method.depth or method.variant differs", _shape_key)


def adapt_official(
    role: str, flat: Mapping[str, Tensor], config: EnergyConfig, own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict as it is, for our keys are the official ones, and a sentence for each silent surprise in it.

    The step size of the inner loop is part of the weights, a buffer or a parameter under the same key: the reference
    lets it replace the configured one without a word (specs/energy.md section 9), ours says so. `own`: the role's
    state, for its shapes alone (it may lie on the meta device).
    """
    notes = []
    alpha = flat.get("alpha")
    if alpha is not None and alpha.numel() == 1 and float(alpha) != float(torch.tensor(config.energy.step_size)):
        notes.append(
            f"the step size in the weights, alpha = {float(alpha):g}, replaces method.energy.step_size = "
            f"{config.energy.step_size:g}; sample.settings.inner_step_size decides for sampling"
        )
    positions = flat.get("dit.pos_embed")
    if positions is not None and positions.shape == own["dit.pos_embed"].shape:
        grid = config.input_size // config.patch_size
        difference = (positions.float() - sincos_positions(positions.shape[-1], grid)).abs().max().item()
        if not difference <= _POSITION_TOLERANCE:
            notes.append(f"the fixed positions in the weights differ from sines and cosines by up to {difference:g}")
    return dict(flat), notes


def export_flat(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under the official keys, as contiguous CPU copies."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}


def _shape_key(name: str) -> str:
    return next((keys for part, keys in _SHAPE_KEYS.items() if part in name), "method.hidden")
