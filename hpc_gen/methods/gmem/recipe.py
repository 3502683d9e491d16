"""The gmem method's registry entry, its published sizes and its columns.

torch is imported only when a method is built, so that typing a config stays quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hpc_gen.methods.gmem.config import GmemConfig, SamplingSettings
from hpc_gen.methods.protocol import ColumnSpec, FrozenSpec, Method, TableFacts
from hpc_gen.methods.registry import MethodEntry
from hpc_gen.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_gen.data.table import Table

SNIPPETS, REPRESENTATIONS, PIXELS, LABELS = "cls_tokens", "representations", "pixels", "labels"
FLIP = "_flip"  # suffix of the columns of the mirrored image
_FLOATS = ("float16", "bfloat16", "float32")

# Published backbones of LightningDiT: keys of the experiment's `method:` section; patch sizes 1 and 2.
SIZES: dict[str, dict[str, int]] = {
    "S": {"hidden": 384, "depth": 12, "heads": 6},
    "B": {"hidden": 768, "depth": 12, "heads": 12},
    "L": {"hidden": 1024, "depth": 24, "heads": 16},
    "XL": {"hidden": 1152, "depth": 28, "heads": 16},
    "1p0B": {"hidden": 1536, "depth": 24, "heads": 24},
    "1p6B": {"hidden": 1792, "depth": 28, "heads": 28},
}


def column_specs(config: GmemConfig, num_classes: int) -> dict[str, ColumnSpec]:
    """What training reads: of all columns but labels and pixels also the mirrored one where images are flipped."""
    wanted = {config.input: ColumnSpec(_FLOATS, config.row_shape)}
    if config.condition == "snippet":
        wanted[SNIPPETS] = ColumnSpec(_FLOATS, (config.snippet_dim,))
        if config.projects and not config.online:
            wanted[REPRESENTATIONS] = _representation(config)
    if config.horizontal_flip:
        wanted |= {name + FLIP: spec for name, spec in wanted.items()}
    if config.online:
        wanted[PIXELS] = _pixels(config)
    if config.condition == "class":
        wanted[LABELS] = ColumnSpec(("int64",), (), max_value=num_classes - 1)
    return wanted


def frozen_specs(config: GmemConfig) -> dict[str, FrozenSpec]:
    """The encoder of representations, where they are computed in training."""
    if not config.online:
        return {}
    return {REPRESENTATIONS: FrozenSpec(_pixels(config), {REPRESENTATIONS: _representation(config)})}


def _pixels(config: GmemConfig) -> ColumnSpec:
    return ColumnSpec(("uint8",), (3, config.image_size, config.image_size))


def _representation(config: GmemConfig) -> ColumnSpec:
    return ColumnSpec(_FLOATS, (config.num_tokens, config.repr_dim))


def num_classes(config: GmemConfig, facts: TableFacts) -> int:
    """Classes of the model: the config's, else the table's; 0 for the snippet condition. UserError when they differ."""
    if config.condition == "snippet":
        return 0
    if config.num_classes is None:
        if facts.num_classes < 1:
            raise UserError("the training table names no classes; set method.num_classes")
        return facts.num_classes
    if facts.num_classes > config.num_classes:
        raise UserError(
            f"method.num_classes is {config.num_classes}, but the training table has {facts.num_classes} classes; "
            f"set method.num_classes to {facts.num_classes} or remove the key"
        )
    return config.num_classes


def build(config: GmemConfig, facts: TableFacts) -> Method:
    """The method on the meta device; UserError when the config does not fit the training table."""
    from hpc_gen.methods.gmem.objective import Gmem
    from hpc_gen.nn.posterior import LatentScale

    return Gmem(config, num_classes(config, facts), LatentScale.of(facts.tokenizer))


def export(
    role: str, state: Mapping[str, Tensor], config: GmemConfig, table: Table | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `weights export` writes: the official keys as they are, and the scale of the latents as metadata."""
    from hpc_gen.methods.gmem.weights import scale_metadata

    return dict(state), scale_metadata(dict(table.index.tokenizer) if table is not None else {})


def official(
    role: str, flat: Mapping[str, Tensor], config: GmemConfig, own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """What `weights import` makes of an official state dict: see weights.adapt_official."""
    from hpc_gen.methods.gmem.weights import adapt_official

    return adapt_official(role, flat, config, own)


ENTRY = MethodEntry(config=GmemConfig, settings=SamplingSettings, build=build, export=export, official=official)
