"""Keys that say what is looked at while training runs; none of them changes a number."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hpc_gen.config.base import OPERATION, PositiveInt, Section


class ProfileConfig(Section):
    """A window of steps under torch's profiler; its trace is written into the run folder, profile/."""

    start: Annotated[int, Field(ge=0)] = Field(default=10, json_schema_extra=OPERATION)
    """Steps of the attempt that pass before the window (compiling and warming up do not belong into it)."""
    steps: PositiveInt = Field(default=5, json_schema_extra=OPERATION)
    """Steps inside the window."""
    ranks: list[Annotated[int, Field(ge=0)]] = Field(default=[0], json_schema_extra=OPERATION)
    """Ranks that write a trace."""
    memory: bool = Field(default=False, json_schema_extra=OPERATION)
    """Record allocations and the shapes of operands, too; larger traces, slower steps."""
