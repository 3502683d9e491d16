"""From the meta device to real weights: the one place where a method's roles get memory and initial values."""

from __future__ import annotations

import torch
from torch import nn

from hpc_gen.methods.protocol import Method
from hpc_gen.runtime import randomness


def materialise(method: Method, seed: int) -> dict[str, nn.Module]:
    """Give every role CPU memory and its initial values, a function of (`seed`, role) alone; returns the roles.

    Memory arrives filled with NaN, so a parameter or buffer that `initialise` forgets is found here and not as a bad
    loss. Raises AssertionError naming it (a bug of the method).
    """
    roles = method.roles()
    for role, module in roles.items():
        module.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in module.state_dict(keep_vars=True).values():
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
            method.initialise(role, randomness.torch_generator(seed, f"initialise/{role}"))
            for name, tensor in module.state_dict().items():
                assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), (
                    f"initialise('{role}') left '{name}' without finite values"
                )
    return roles
