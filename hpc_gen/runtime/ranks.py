"""The process groups of a run; torchrun, srun and plain python start alike (rank_detection.py)."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_gen.runtime import env, spans
from hpc_gen.runtime.errors import RendezvousError, UserError
from hpc_gen.runtime.rank_detection import Launcher, RankInfo, detect, expand_nodelist, rendezvous

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Launcher", "PendingReduction", "RankInfo", "Ranks", "detect", "expand_nodelist", "rendezvous"]

_DEFAULT_TIMEOUT_S = 600.0
_SAVE_TIMEOUT_S = 3600.0  # a rank on a slow disk keeps the others' saving threads waiting, while training goes on
_STORE_TIMEOUT_S = 20.0


class PendingReduction:
    """A sum over ranks that is under way."""

    def __init__(self, work: Any) -> None:
        """`work`: torch's handle, or None where there is nothing to wait for."""
        self._work = work

    def wait(self) -> None:
        """Until the tensor holds the sum."""
        if self._work is not None:
            with spans.span(spans.COLLECTIVE):
                self._work.wait()


class Ranks:
    """The process groups of one process. With world_size 1 there are none, and every method works all the
    same.

    Besides the default group (gloo on CPU; gloo and NCCL on GPU) there are two of gloo: `control_group` for
    flags and small objects on the host, and `save_group` for the asynchronous checkpoint, whose thread must
    not interleave its collectives with those of the training thread.
    """

    def __init__(self, info: RankInfo, backend: str, device: torch.device) -> None:
        """Use `Ranks.start`."""
        self.info = info
        self.rank = info.rank
        self.world_size = info.world_size
        self.local_rank = info.local_rank
        self.backend = backend
        self.device = device
        self.save_group: ProcessGroup | None = None
        self.control_group: ProcessGroup | None = None
        self._meeting: tuple[str, int] | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @classmethod
    def start(cls, info: RankInfo | None = None, timeout_s: float = _DEFAULT_TIMEOUT_S) -> Ranks:
        """Join the process groups. `info` None: detected from the environment. `timeout_s` bounds the meeting
        and every collective after it (Slurm notices a lost node later than that). Raises UserError,
        RendezvousError.
        """
        import torch

        environ = env.snapshot()
        info = detect(environ) if info is None else info
        device = _device(info)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        ranks = cls(info, backend, device)
        if info.world_size > 1:
            address, port = rendezvous(info, environ)
            ranks._meeting = address, port
            if address in ("127.0.0.1", "localhost") and Path("/sys/class/net/lo").exists():
                # gloo would look up the host's name, which laptops and build machines often cannot resolve
                env.set_default("GLOO_SOCKET_IFNAME", "lo")
            timeout = datetime.timedelta(seconds=timeout_s)
            try:
                torch.distributed.init_process_group(
                    backend,
                    init_method=f"tcp://{address}:{port}",
                    rank=info.rank,
                    world_size=info.world_size,
                    timeout=timeout,
                )
                ranks.save_group = _gloo_group(max(timeout, datetime.timedelta(seconds=_SAVE_TIMEOUT_S)))
                ranks.control_group = _gloo_group(timeout)
            except RuntimeError as error:  # DistStoreError and its kin
                raise RendezvousError(
                    f"rank {info.rank} of {info.world_size} did not meet the others at {address}:{port} "
                    f"within {timeout_s:.0f} s ({str(error).splitlines()[0][:200]}); "
                    "look at the logs of the other ranks and nodes"
                ) from error
        return ranks

    def mesh(self, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
        """All ranks as a grid, the last axis of neighbours, with a process group for each line of each axis.

        Collective. Where this is the only rank, which needs no groups otherwise, one is made for it. The product of
        `shape` is the world size.
        """
        import torch.distributed as dist
        from torch.distributed import HashStore  # type: ignore[attr-defined]
        from torch.distributed.device_mesh import init_device_mesh

        if not dist.is_initialized():
            assert self.world_size == 1, "use Ranks.start"
            dist.init_process_group(self.backend, store=HashStore(), rank=0, world_size=1)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    def all_reduce_sum_(self, tensor: torch.Tensor, group: ProcessGroup | None = None) -> None:
        """Sum a tensor over all ranks (or those of `group`) in place, on its own device (default group)."""
        if self.world_size > 1:
            import torch.distributed as dist

            with spans.span(spans.COLLECTIVE):
                dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)

    def all_reduce_max_cpu(self, tensor: torch.Tensor) -> torch.Tensor:
        """Maximum of a CPU tensor over all ranks, in place (control group); returns the tensor."""
        if self.world_size > 1:
            import torch.distributed as dist

            with spans.span(spans.COLLECTIVE):
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control_group)
        return tensor

    def broadcast_(self, tensor: torch.Tensor, src: int = 0) -> None:
        """The tensor of rank `src`, on every rank in place (default group, the tensor's own device)."""
        if self.world_size > 1:
            import torch.distributed as dist

            with spans.span(spans.COLLECTIVE):
                dist.broadcast(tensor, src=src)

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """The small picklable object of rank `src`, on every rank. Others' `obj` is ignored."""
        if self.world_size == 1:
            return obj
        import torch.distributed as dist

        box = [obj if self.rank == src else None]
        with spans.span(spans.COLLECTIVE):
            dist.broadcast_object_list(box, src=src, group=self.control_group)
        return box[0]

    def gather_objects(self, obj: Any) -> list[Any] | None:
        """Small picklable objects of all ranks in order, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [obj]
        import torch.distributed as dist

        boxes: list[Any] | None = [None] * self.world_size if self.is_main else None
        with spans.span(spans.COLLECTIVE):
            dist.gather_object(obj, boxes, dst=0, group=self.control_group)
        return boxes

    def barrier(self) -> None:
        """Wait for all ranks (control group)."""
        if self.world_size > 1:
            import torch.distributed as dist

            with spans.span(spans.COLLECTIVE):
                dist.barrier(group=self.control_group)

    def all_reduce_sum_async(self, tensor: torch.Tensor, group: ProcessGroup | None = None) -> PendingReduction:
        """Begin to sum a tensor over all ranks (or those of `group`) in place; leave it alone until `wait`."""
        if self.world_size == 1:
            return PendingReduction(None)
        import torch.distributed as dist

        return PendingReduction(dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group, async_op=True))

    def all_reduce_sum_cpu(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of a small CPU tensor over all ranks, in place (control group); returns the tensor."""
        if self.world_size > 1:
            import torch.distributed as dist

            with spans.span(spans.COLLECTIVE):
                dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.control_group)
        return tensor

    def all_gather_objects(self, obj: Any) -> list[Any]:
        """Small picklable objects of all ranks in order, on every rank (control group)."""
        return self._all_gather(obj, self.control_group)

    def save_all_gather(self, obj: Any) -> list[Any]:
        """As all_gather_objects, on the group of the thread that saves."""
        return self._all_gather(obj, self.save_group)

    def _all_gather(self, obj: Any, group: ProcessGroup | None) -> list[Any]:
        if self.world_size == 1:
            return [obj]
        import torch.distributed as dist

        boxes: list[Any] = [None] * self.world_size
        with spans.span(spans.COLLECTIVE):  # nothing in the thread that saves
            dist.all_gather_object(boxes, obj, group=group)
        return boxes

    def open_store(self) -> Any:
        """A connection of its own to the store at which the ranks met (rank 0 holds it). Raises RendezvousError."""
        assert self._meeting is not None, "one rank has no store"
        from torch._C._distributed_c10d import TCPStore

        address, port = self._meeting
        try:
            wait = datetime.timedelta(seconds=_STORE_TIMEOUT_S)
            return TCPStore(address, port, is_master=False, timeout=wait, wait_for_workers=False)
        except RuntimeError as error:
            raise RendezvousError(f"rank {self.rank} lost the store at {address}:{port}: {error}") from error

    def stop(self) -> None:
        """Leave the process groups; may be called twice."""
        self.save_group = self.control_group = None
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def fake_ranks(world_size: int) -> Iterator[Ranks]:
    """Rank 0 of `world_size` ranks that do not exist: process groups whose collectives do nothing, for plans."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a process that has process groups needs no fake ones"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield Ranks(RankInfo(0, world_size, 0, world_size, "python"), "fake", torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def _gloo_group(timeout: datetime.timedelta) -> ProcessGroup:
    import torch.distributed as dist

    group: ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return group


def _device(info: RankInfo) -> torch.device:
    """The GPU of this rank, made current, or the CPU where there is none. UserError for too few GPUs."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # Slurm with --gpus-per-task=1 shows each task its own GPU only, as number 0 (specs/slurm_lab.md 2.4).
    index = 0 if count == 1 and info.launcher == "srun" else info.local_rank
    if index >= count:
        raise UserError(
            f"rank {info.rank} is number {info.local_rank} on its node, but only {count} GPUs are visible; "
            "start at most one rank per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES='' to use the CPU"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
