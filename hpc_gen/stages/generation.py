"""Images of a checkpoint: the method with its weights, and any images of a sampling plan as its blocks hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_gen.config.experiment import Experiment
from hpc_gen.data.table import Table
from hpc_gen.methods.protocol import Measures, Method
from hpc_gen.runtime.randomness import Draws
from hpc_gen.sampling.generate import PURPOSE, Decoder, generate_batch, sampling_mode
from hpc_gen.sampling.plan import SamplePlan
from hpc_gen.stages.build import build_method, meta_method, table_facts
from hpc_gen.training.checkpoint import read as checkpoints
from hpc_gen.training.precision import set_determinism


def trained_method(
    experiment: Experiment, table: Table, checkpoint: Path, ema: str | None, device: torch.device
) -> Method:
    """The method in eval mode on `device` with the weights of a checkpoint; `ema`: their average, None = themselves.

    Raises CheckpointError when the checkpoint is not whole or does not have them.
    """
    facts = table_facts(table)
    bare = meta_method(experiment, facts)
    frozen = {role for role in bare.roles() if not bare.parameter_groups(role)}  # these have no average

    def weights(role: str) -> dict[str, Tensor]:
        return checkpoints.load_role(checkpoint, role, None if role in frozen else ema)

    method = build_method(experiment, facts, weights)
    for module in method.roles().values():
        module.to(device)
    return method


@dataclass(frozen=True)
class LabelledPlan(SamplePlan):
    """A plan of which some images are given another class: `given` maps image ids to labels. Never written."""

    given: Mapping[int, int] = field(default_factory=dict, compare=False)

    def labels(self, ids: Tensor) -> Tensor:
        """Class label int64 [N] of image `ids` int64 [N]."""
        planned = super().labels(ids)
        return torch.tensor(
            [self.given.get(int(i), int(label)) for i, label in zip(ids, planned, strict=True)], dtype=torch.int64
        )


def batch_of(plan: SamplePlan, image_id: int) -> range:
    """The ids of the batch that an image is computed in: the split of its block, beyond the plan's end as well."""
    block = image_id // plan.block_images * plan.block_images
    start = block + (image_id - block) // plan.batch * plan.batch
    end = min(start + plan.batch, block + plan.block_images)
    return range(start, min(end, plan.num_images) if image_id < plan.num_images else end)


def generate_images(
    method: Method,
    plan: SamplePlan,
    ids: Sequence[int],
    settings: Any,
    decoder: Decoder | None,
    poll: Callable[[], None],
) -> Tensor:
    """Images uint8 [N, 3, H, W] of any N `ids`, in their order, bit for bit as the sample stage makes them.

    Batch-mates change the last bits, so the whole batch of an image is computed, each batch once. Torch's thread count
    and determinism are as they were afterwards. Raises as `generate_batch`.
    """
    wanted: dict[range, list[int]] = {}
    for image_id in sorted(set(ids)):
        wanted.setdefault(batch_of(plan, image_id), []).append(image_id)
    made: dict[int, Tensor] = {}
    with _bits_of(plan.threads), sampling_mode(method):
        for batch, members in wanted.items():
            numbers = torch.tensor(list(batch), dtype=torch.int64)
            draws = Draws(plan.seed, PURPOSE, numbers)
            images = generate_batch(method, plan, draws, numbers, settings, poll, decoder)
            made.update({image_id: images[image_id - batch.start].clone() for image_id in members})
    if isinstance(method, Measures):
        method.take_curves()  # nobody asks for them here, and they would add up from call to call
    return torch.stack([made[image_id] for image_id in ids])


@contextmanager
def _bits_of(threads: int) -> Iterator[None]:
    """What the sample stage fixes for its process, for a while in one that belongs to somebody else."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    deterministic: Any = torch.utils.deterministic
    fill, cudnn = deterministic.fill_uninitialized_memory, torch.backends.cudnn
    tf32 = torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    set_determinism(True, threads)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        deterministic.fill_uninitialized_memory = fill
        torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = tf32
