"""Official checkpoints, whatever the method: the list of a model's keys and shapes, and the strict copy into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpc_gen.runtime.errors import DataError

_NAMED = 5  # keys named in an error before "and N more"


@dataclass(frozen=True)
class OfficialList:
    """Keys and shapes of a checkpoint in state-dict order, what of it is no parameter or not trained, and counts."""

    state_dict: dict[str, tuple[int, ...]]
    buffers: tuple[str, ...]
    frozen: tuple[str, ...]
    num_params: int
    num_trainable: int

    @classmethod
    def of(cls, model: nn.Module) -> OfficialList:
        """The list of a model, which may lie on the meta device."""
        parameters = dict(model.named_parameters())
        return cls(
            state_dict={name: tuple(value.shape) for name, value in model.state_dict().items()},
            buffers=tuple(name for name, _ in model.named_buffers()),
            frozen=tuple(name for name, p in parameters.items() if not p.requires_grad),
            num_params=sum(p.numel() for p in parameters.values()),
            num_trainable=sum(p.numel() for p in parameters.values() if p.requires_grad),
        )


@torch.no_grad()
def import_strict(
    model: nn.Module, flat: Mapping[str, Tensor], source: str, hint: str, keys_of_shape: Callable[[str], str]
) -> None:
    """Copy a flat state dict with the model's keys into a materialised model, values cast to the model's dtypes.

    All or nothing: every key must be there, no other, in the right shape; else DataError naming `source`, the keys and
    what to look at: `hint` where keys differ, `keys_of_shape(name)` where the shape of `name` does.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in flat]
    unexpected = [name for name in flat if name not in own]
    if missing or unexpected:
        parts = [f"lack {_some(missing)}"] if missing else []
        parts += [f"have unknown {_some(unexpected)}"] if unexpected else []
        raise DataError(f"{source} {' and '.join(parts)}; {hint}, or these are other weights")
    for name, value in own.items():
        if flat[name].shape != value.shape:
            raise DataError(
                f"{source} hold '{name}' as {list(flat[name].shape)}, but the model needs {list(value.shape)}; "
                f"change {keys_of_shape(name)}"
            )
    for name, value in own.items():
        value.copy_(flat[name])


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_NAMED])
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
