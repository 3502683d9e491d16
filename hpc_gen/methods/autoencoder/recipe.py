"""The autoencoder's registry entry.

torch is imported only when a method is built, so that typing a config stays quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hpc_gen.methods.autoencoder.config import AutoencoderConfig, ReconstructionSettings
from hpc_gen.methods.protocol import Method, TableFacts
from hpc_gen.methods.registry import MethodEntry
from hpc_gen.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_gen.data.table import Table


def check_table(config: AutoencoderConfig, facts: TableFacts) -> None:
    """Refuse a table without fitting pixels (UserError); no columns known = nothing to check."""
    if not facts.columns:
        return
    if "pixels" not in facts.columns:
        raise UserError(
            f"an autoencoder is trained on pixels, but the training table has no column 'pixels' (it has "
            f"{', '.join(sorted(facts.columns))}); encode it with encode.tokenizer.name=identity"
        )
    dtype, shape = facts.columns["pixels"]
    if dtype != "uint8" or tuple(shape) != config.image_shape:
        raise UserError(
            f"column 'pixels' of the training table holds {dtype} {list(shape)}, but method.image_size = "
            f"{config.image_size} and method.architecture.in_channels = {config.architecture.in_channels} need uint8 "
            f"{list(config.image_shape)}; change these keys or encode the table anew"
        )


def build(config: AutoencoderConfig, facts: TableFacts) -> Method:
    """The method on the meta device; UserError when the config does not fit the training table."""
    from hpc_gen.methods.autoencoder.objective import Autoencoder

    check_table(config, facts)
    return Autoencoder(config)


def export(
    role: str, state: Mapping[str, Tensor], config: AutoencoderConfig, table: Table | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `weights export` writes of a role: see weights.export_role."""
    from hpc_gen.methods.autoencoder.weights import export_role

    return export_role(role, state, config, table)


ENTRY = MethodEntry(config=AutoencoderConfig, settings=ReconstructionSettings, build=build, export=export)
