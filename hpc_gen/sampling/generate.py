"""A block of images from a method: fixed batches, draws by image id, pixels at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from hpc_gen.methods.protocol import Conditioning, Method
from hpc_gen.runtime.errors import DivergedError, UserError
from hpc_gen.runtime.randomness import Draws
from hpc_gen.sampling.plan import SamplePlan

PURPOSE = "sample"


class Decoder(Protocol):
    """The part of a tokenizer that sampling needs."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, h, w] to images uint8 [N, 3, H, W]."""
        ...


@contextmanager
def sampling_mode(method: Method) -> Iterator[None]:
    """All roles in eval mode and no gradients inside; training flags come back afterwards."""
    modules = [module for role in method.roles().values() for module in role.modules()]
    training = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        with torch.no_grad():  # not inference_mode: a method may differentiate inside (energies do)
            yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag


def generate_batch(
    method: Method,
    conditioning: Conditioning,
    draws: Draws,
    ids: Tensor,
    settings: Any,
    poll: Callable[[], None],
    decoder: Decoder | None = None,
) -> Tensor:
    """Images uint8 [N, 3, H, W] of `ids` int64 [N], all in one batch. Call inside `sampling_mode`.

    Raises DivergedError for non-finite latents, UserError when latents have no decoder.
    """
    poll()
    found = method.generate(method.conditions(ids, conditioning), draws, settings, poll)
    if found.dtype != torch.uint8:
        if not bool(torch.isfinite(found).all()):
            bad = ids[~torch.isfinite(found).flatten(1).all(dim=1).cpu()].tolist()
            raise DivergedError(
                f"{len(bad)} of {len(ids)} latents are not finite (image {bad[0]} first); "
                "sample an earlier checkpoint, or other sampler settings"
            )
        if decoder is None:
            raise UserError(
                "the method makes latents, but its table names no tokenizer that decodes them; encode with one"
            )
        found = decoder.decode(found)
    images = found.cpu()
    shape = list(images.shape)
    assert images.dtype == torch.uint8 and len(shape) == 4, f"generate returned {images.dtype} {shape}"
    assert shape[0] == len(ids) and shape[1] in (1, 3), f"generate returned {shape} for {len(ids)} images"
    return images.expand(-1, 3, -1, -1).contiguous()  # grey images become colour ones


def generate_block(
    method: Method,
    plan: SamplePlan,
    ids: Sequence[int],
    settings: Any,
    poll: Callable[[], None],
    decoder: Decoder | None = None,
) -> Tensor:
    """Images uint8 [N, 3, H, W] of the N consecutive `ids` of one block, in batches of `plan.batch`.

    `settings`: the method's typed sampler settings. The split starts at the first id, so a block gives the same images
    whenever it is computed. `poll` may raise StopRequested.
    """
    parts: list[Tensor] = []
    with sampling_mode(method):
        for start in range(0, len(ids), plan.batch):
            batch_ids = torch.tensor(list(ids[start : start + plan.batch]), dtype=torch.int64)
            draws = Draws(plan.seed, PURPOSE, batch_ids)
            parts.append(generate_batch(method, plan, draws, batch_ids, settings, poll, decoder))
    return torch.cat(parts)
