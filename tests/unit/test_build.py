"""From an experiment and a table to a method with weights: refusals name the column or key and the fix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments import LINEAR, resolved
from tiny_method import Config, TinyMethod
from torch import Tensor, nn
from toys import TwoPlayer

from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.methods.materialise import materialise
from hpc_gen.methods.protocol import ColumnSpec, TableFacts
from hpc_gen.runtime.errors import CheckpointError, DataError, ExitCode
from hpc_gen.stages.build import build_method, check_columns, meta_method, open_table, settings_of, table_facts

PIXELS = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
LABELS = torch.zeros(4, dtype=torch.int64)


def table(folder: Path, num_classes: int = 4, **columns: Tensor) -> Table:
    write_table(folder, columns, shard_rows=4, num_classes=num_classes)
    return Table.open(folder)


class Strict(TinyMethod):
    """Reads the columns it is told to."""

    def __init__(self, **specs: ColumnSpec) -> None:
        super().__init__(Config())
        self.specs = specs

    def columns(self) -> dict[str, ColumnSpec]:
        return self.specs


PIXEL_SPEC = ColumnSpec(("uint8", "float16"), (1, 8, 8))
LABEL_SPEC = ColumnSpec(("int64",), (), max_value=9)


@pytest.mark.parametrize(
    "spec",
    [
        PIXEL_SPEC,
        ColumnSpec(("uint8",), (-1, 8, 8)),
        ColumnSpec(("uint8",), (-1, -1, -1)),
        ColumnSpec(("uint8",), (1, 8, 8), 3),
    ],
)
def test_a_table_that_fits(tmp_path: Path, spec: ColumnSpec) -> None:
    found = table(tmp_path / "t", pixels=PIXELS, labels=LABELS)
    check_columns(Strict(pixels=spec, labels=LABEL_SPEC), found)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (Strict(codes=PIXEL_SPEC), "has no column 'codes' (it has: labels, pixels); encode it, or name another table"),
        (
            Strict(pixels=ColumnSpec(("float16", "float32"), (1, 8, 8))),
            "column 'pixels' is uint8, the method reads float16 or float32",
        ),
        (
            Strict(pixels=ColumnSpec(("uint8",), (3, 8, 8))),
            "a row of column 'pixels' has shape (1, 8, 8), the method needs (3, 8, 8); change the method's sizes or encode at another size",
        ),
        (
            Strict(pixels=ColumnSpec(("uint8",), (-1, 8))),
            "a row of column 'pixels' has shape (1, 8, 8), the method needs (-1, 8)",
        ),
        (Strict(labels=ColumnSpec(("int64",), (1,))), "a row of column 'labels' has shape (), the method needs (1,)"),
        (
            Strict(pixels=PIXEL_SPEC, labels=ColumnSpec(("int64",), (), max_value=2)),
            "has 4 classes, the method's largest label is 2; set method.num_classes",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, method: Strict, sentence: str) -> None:
    found = table(tmp_path / "odd", pixels=PIXELS, labels=LABELS)
    with pytest.raises(DataError, match=re.escape(sentence)) as info:
        check_columns(method, found)
    assert str(tmp_path / "odd") in str(info.value)
    assert info.value.exit_code == ExitCode.DATA


def test_facts_of_a_table(tmp_path: Path) -> None:
    table(tmp_path / "t", num_classes=7, pixels=PIXELS, labels=LABELS)
    facts = table_facts(open_table(tmp_path, "t"))
    assert facts == TableFacts(7, {"pixels": ("uint8", (1, 8, 8)), "labels": ("int64", ())}, {})


def test_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        open_table(tmp_path, "absent")


def bits(method: Any) -> dict[str, Tensor]:
    return {f"{role}/{k}": v for role, module in method.roles().items() for k, v in module.state_dict().items()}


def test_initial_values_are_a_function_of_the_seed() -> None:
    facts = TableFacts(4)
    first, again, other = (
        bits(build_method(resolved(f"seed={seed}", text=LINEAR).experiment, facts)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_a_built_method_is_for_inference() -> None:
    method = build_method(resolved(text=LINEAR).experiment, TableFacts(4))
    for module in method.roles().values():
        assert not module.training
        assert all(p.device.type == "cpu" and not p.requires_grad for p in module.parameters())
    on_meta = meta_method(resolved(text=LINEAR).experiment, TableFacts(4))
    assert {p.device.type for p in on_meta.roles()["net"].parameters()} == {"meta"}


def test_given_weights_are_taken_over() -> None:
    asked: list[str] = []

    def weights(role: str) -> dict[str, Tensor]:
        asked.append(role)
        return {"weight": torch.full((1, 64), 0.25)}

    method = build_method(resolved(text=LINEAR).experiment, TableFacts(4), weights)
    assert asked == ["net"]
    assert bits(method)["net/weight"].unique().tolist() == [0.25]


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        ({}, "weight"),
        ({"weight": torch.zeros(1, 64), "bias": torch.zeros(1)}, "bias"),
        ({"weight": torch.zeros(1, 49)}, r"weight.*49.*64"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: dict[str, Tensor], found: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"weights of role 'net' do not fit the method: .*{found}.*method section"
    ) as info:
        build_method(resolved(text=LINEAR).experiment, TableFacts(4), lambda role: weights)
    assert "\n" not in str(info.value)


def test_settings_are_typed_by_the_method() -> None:
    experiment = resolved().experiment
    settings = settings_of(experiment, {})
    assert type(settings).__module__ == "hpc_gen.methods.energy.config"
    with pytest.raises(ValueError, match="no_such"):
        settings_of(experiment, {"no_such": 1})


def test_materialise_finds_what_initialise_forgets() -> None:
    class Forgets(TwoPlayer):
        def initialise(self, role: str, generator: torch.Generator) -> None:
            super().initialise(role, generator)
            if role == "discriminator":
                self.discriminator.power.fill_(float("nan"))

    with pytest.raises(AssertionError, match=r"initialise\('discriminator'\) left 'power' without finite values"):
        materialise(Forgets(), 0)


def test_a_role_does_not_depend_on_the_other_roles() -> None:
    """Each has a generator of its own: a method that gains a role keeps the initial values of the others."""

    class Alone(TwoPlayer):
        def roles(self) -> dict[str, nn.Module]:
            return {"discriminator": self.discriminator}

    both, alone = bits_after(TwoPlayer()), bits_after(Alone())
    assert all(torch.equal(value, both[name]) for name, value in alone.items())

    class Twins(TwoPlayer):
        def __init__(self) -> None:
            super().__init__()
            with torch.device("meta"):
                self._roles = {name: nn.Linear(3, 3) for name in ("generator", "discriminator")}

    twins = bits_after(Twins())
    assert not torch.equal(twins["generator/weight"], twins["discriminator/weight"])  # nor repeats another's numbers


def bits_after(method: TwoPlayer) -> dict[str, Tensor]:
    materialise(method, 3)
    return bits(method)
