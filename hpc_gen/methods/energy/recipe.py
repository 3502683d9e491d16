"""The energy method's registry entry, its published sizes and its optimizer groups.

torch is imported only when a method is built, so that typing a config stays quick.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpc_gen.methods.energy.config import EnergyConfig, SamplingSettings
from hpc_gen.methods.protocol import Method, TableFacts
from hpc_gen.methods.registry import MethodEntry
from hpc_gen.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Published backbones (patch size 1 on KL16 latents): keys of the experiment's `method:` section.
SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden": 384, "depth": 12, "heads": 6},
    "base": {"hidden": 768, "depth": 12, "heads": 12},
    "large": {"hidden": 1024, "depth": 24, "heads": 16},
    "xlarge": {"hidden": 1152, "depth": 28, "heads": 16},
}


# What the column of each `method.input` may hold.
_FLOATS = ("float16", "float32")
COLUMN_DTYPES: dict[str, tuple[str, ...]] = {"pixels": ("uint8",), "latents": _FLOATS, "moments": _FLOATS}


@dataclass(frozen=True)
class DecayGroups:
    """Parameter names by treatment: weight decay off, weight decay on, and the step size (no decay, own rate)."""

    undecayed: tuple[str, ...]
    decayed: tuple[str, ...]
    step_size: tuple[str, ...]


def decay_groups(trainable: Iterable[tuple[str, int]]) -> DecayGroups:
    """Split trainable parameters, given as (name, number of dimensions) in model order (specs/energy.md section 5.3).

    Undecayed: biases, vectors, and all of MAR's diffusion head. Deliberate deviation: the reference's step-size group
    takes every name that contains 'alpha'; ours takes the parameter called alpha and nothing else.
    """
    undecayed, decayed, step_size = [], [], []
    for name, num_dims in trainable:
        if name.rpartition(".")[2] == "alpha":
            step_size.append(name)
        elif num_dims == 1 or name.endswith(".bias") or "diffloss" in name:
            undecayed.append(name)
        else:
            decayed.append(name)
    return DecayGroups(tuple(undecayed), tuple(decayed), tuple(step_size))


def num_classes(config: EnergyConfig, facts: TableFacts) -> int:
    """Classes of the model: the config's, else the table's; UserError when they differ or neither says."""
    if config.num_classes is None:
        if facts.num_classes < 1:
            raise UserError(
                "the training table names no classes; set method.num_classes (1 if all images are of one kind)"
            )
        return facts.num_classes
    if facts.num_classes > config.num_classes:
        raise UserError(
            f"method.num_classes is {config.num_classes}, but the training table has {facts.num_classes} classes; "
            f"set method.num_classes to {facts.num_classes} or remove the key"
        )
    return config.num_classes


def check_table(config: EnergyConfig, facts: TableFacts) -> None:
    """Refuse a table whose column does not fit the config (UserError); no columns known = nothing to check."""
    if not facts.columns:
        return
    found = ", ".join(sorted(facts.columns))
    if "labels" not in facts.columns:
        raise UserError(f"the training table has no column 'labels' (it has {found}); encode it with labels")
    if config.column not in facts.columns:
        raise UserError(
            f"method.input is '{config.input}', but the training table has no column '{config.column}' "
            f"(it has {found}); set method.input or encode the table anew"
        )
    dtype, shape = facts.columns[config.column]
    if dtype not in COLUMN_DTYPES[config.input]:
        raise UserError(
            f"column '{config.column}' of the training table holds {dtype}, but method.input = '{config.input}' needs "
            f"{' or '.join(COLUMN_DTYPES[config.input])}; encode the table anew"
        )
    if tuple(shape) == config.row_shape:
        return
    wanted = f"method.image_size = {config.image_size} and method.channels = {config.channels}"
    if config.input != "pixels":
        wanted += f" with method.tokenizer_stride = {config.tokenizer_stride}"
    raise UserError(
        f"column '{config.column}' of the training table has rows of shape {list(shape)}, but {wanted} need "
        f"{list(config.row_shape)}; change these keys or encode the table anew"
    )


def build(config: EnergyConfig, facts: TableFacts) -> Method:
    """The method on the meta device; UserError when the config does not fit the training table."""
    from hpc_gen.methods.energy.objective import EnergyDiffusion
    from hpc_gen.nn.posterior import LatentScale

    check_table(config, facts)
    return EnergyDiffusion(config, num_classes(config, facts), LatentScale.of(facts.tokenizer))


def official(
    role: str, flat: Mapping[str, Tensor], config: EnergyConfig, own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """What `weights import` makes of an official state dict: see weights.adapt_official."""
    from hpc_gen.methods.energy.weights import adapt_official

    return adapt_official(role, flat, config, own)


ENTRY = MethodEntry(config=EnergyConfig, settings=SamplingSettings, build=build, official=official)
