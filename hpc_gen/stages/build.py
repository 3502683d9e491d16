"""From an experiment to a method: typed config, facts of the table, weights, decoder of its latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_gen import tokenizers
from hpc_gen.config.experiment import Experiment, SampleConfig, TokenizerConfig
from hpc_gen.data.index import differences
from hpc_gen.data.table import Table
from hpc_gen.methods import registry
from hpc_gen.methods.materialise import materialise
from hpc_gen.methods.protocol import Method, TableFacts
from hpc_gen.runtime.errors import CheckpointError, DataError, UserError
from hpc_gen.sampling.generate import Decoder
from hpc_gen.tokenizers.dinov2 import Dinov2Tokenizer

MOMENTS = "moments"  # a column that has to be scaled before it is learnt


def table_facts(table: Table) -> TableFacts:
    """What a method may know of a table when it is built."""
    columns = {name: (column.dtype, tuple(column.shape)) for name, column in table.index.columns.items()}
    return TableFacts(num_classes=table.index.num_classes, columns=columns, tokenizer=dict(table.index.tokenizer))


def open_table(workspace: Path, path: str, experiment: Experiment | None = None) -> Table:
    """The table at `path`, relative to the workspace. Raises DataError when it is not a whole table.

    One that does not say which tokenizer made it (other programs' shards) is taken to be of the tokenizer that
    `experiment` names; moments of which nobody knows the scale are refused with a UserError.
    """
    table = Table.open(workspace / path)
    if experiment is None or table.index.tokenizer:
        return table
    named = tokenizer_config(experiment)
    if named is not None and named.name != "identity":
        return table.with_tokenizer(tokenizer_identity(experiment, workspace))
    if MOMENTS in table.index.columns:
        raise UserError(
            f"table {table.folder} holds moments, but nobody says which tokenizer made them and at what scale; set "
            "data.tokenizer"
        )
    return table


def condition_table(workspace: Path, sample: SampleConfig, table: Table) -> Table:
    """The table whose rows images are conditioned on: that of `sample.conditions`, else the training table."""
    return table if sample.conditions is None else Table.open(workspace / sample.conditions)


def snippet_encoder(experiment: Experiment, workspace: Path, device: torch.device) -> Dinov2Tokenizer:
    """The DINOv2 that the experiment encodes its snippets with. Raises UserError where it has none."""
    listed: list[TokenizerConfig] = []
    if experiment.encode is not None:
        listed = [experiment.encode.tokenizer, *(experiment.encode.also or {}).values()]
    for config in listed:
        if config.name == "dinov2":
            found = tokenizers.build(config.name, workspace=workspace, device=device, **config.settings())
            assert isinstance(found, Dinov2Tokenizer)
            return found
    raise UserError(
        f"experiment '{experiment.name}' does not encode with dinov2, so nobody says which network makes its snippets; "
        "add it to encode.also"
    )


def tokenizer_config(experiment: Experiment) -> TokenizerConfig | None:
    """The tokenizer that the experiment names for its table: of the section `encode`, else of `data`."""
    return experiment.encode.tokenizer if experiment.encode is not None else experiment.data.tokenizer


def tokenizer_identity(experiment: Experiment, workspace: Path) -> dict[str, Any]:
    """Identity of the tokenizer that the experiment names, {} when it names none; its weights are read for that."""
    named = tokenizer_config(experiment)
    if named is None:
        return {}
    return tokenizers.build(named.name, workspace=workspace, **named.settings()).identity


def open_decoder(experiment: Experiment, table: Table, workspace: Path, device: torch.device) -> Decoder | None:
    """The tokenizer that decodes latents of a method trained on `table`, on `device`; None for a table of pixels.

    Raises UserError when the experiment names none for a table of latents, or another than made the table.
    """
    made_by = table.index.tokenizer
    named = tokenizer_config(experiment)
    if named is None:
        if made_by.get("name", "identity") == "identity":
            return None
        raise UserError(
            f"table {table.folder} was made by the tokenizer {made_by['name']!r}, but the experiment names none to "
            "decode with; set data.tokenizer"
        )
    tokenizer = tokenizers.build(named.name, workspace=workspace, device=device, **named.settings())
    found = differences(dict(made_by), tokenizer.identity) if made_by else ()
    for key, old, new in sorted(found, key=lambda each: each[0] != "name"):  # another name explains all the rest
        raise UserError(
            f"table {table.folder} was made by a tokenizer with {key} = {old!r}, the experiment names one with "
            f"{new!r}; give {'encode' if experiment.encode is not None else 'data'}.tokenizer the same"
        )
    return tokenizer if named.name != "identity" else None


def meta_method(experiment: Experiment, facts: TableFacts) -> Method:
    """The method on the meta device. Raises UserError for an unknown name or a config that does not fit the table."""
    entry, config = registry.typed_config(experiment.method)
    return entry.build(config, facts)


def settings_of(experiment: Experiment, settings: Mapping[str, Any]) -> Any:
    """Sampler settings typed by the experiment's method."""
    entry, _ = registry.typed_config(experiment.method)
    return entry.settings.model_validate(dict(settings))


def build_method(
    experiment: Experiment, facts: TableFacts, weights: Callable[[str], Mapping[str, Tensor]] | None = None
) -> Method:
    """The method on the CPU in eval mode: initial values of the experiment's seed, or `weights(role)`.

    Raises CheckpointError when the weights of a role do not have the role's keys and shapes exactly.
    """
    method = meta_method(experiment, facts)
    for role, module in materialise(method, experiment.seed).items():
        if weights is not None:
            try:
                module.load_state_dict(dict(weights(role)), strict=True)
            except RuntimeError as error:
                first = str(error).strip().splitlines()[-1].strip()
                raise CheckpointError(
                    f"weights of role '{role}' do not fit the method: {first}; was the method section changed?"
                ) from error
        module.eval()
        module.requires_grad_(False)
    return method


def check_columns(method: Method, table: Table) -> None:
    """Refuse a table that the method cannot train on. Raises DataError naming the column and the fix."""
    for name, spec in method.columns().items():
        column = table.index.columns.get(name)
        if column is None:
            have = ", ".join(sorted(table.index.columns))
            raise DataError(f"{table.folder} has no column '{name}' (it has: {have}); encode it, or name another table")
        if column.dtype not in spec.dtypes:
            wanted = " or ".join(spec.dtypes)
            raise DataError(
                f"{table.folder}: column '{name}' is {column.dtype}, the method reads {wanted}; encode it anew"
            )
        shape = tuple(column.shape)
        if len(shape) != len(spec.shape) or any(w not in (-1, s) for w, s in zip(spec.shape, shape, strict=True)):
            raise DataError(
                f"{table.folder}: a row of column '{name}' has shape {shape}, the method needs {spec.shape}; "
                "change the method's sizes or encode at another size"
            )
        if spec.max_value is not None and table.index.num_classes > spec.max_value + 1:
            raise DataError(
                f"{table.folder} has {table.index.num_classes} classes, the method's largest label is "
                f"{spec.max_value}; set method.num_classes"
            )
