"""What is measured of training beside its numbers: MFU, and a window of steps under torch's profiler.

Nothing here may stop the work: a profiler that fails, or a trace that finds no room on the disk, is said and left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_gen.config.observe import ProfileConfig
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import HpcGenError
from hpc_gen.training.device_peak import mfu


class ProfileWindow:
    """Steps `start` to `start + steps` of an attempt under the profiler; the trace opens in Perfetto or Chrome."""

    def __init__(self, config: ProfileConfig, path: Path, say: Callable[[str], None]) -> None:
        """`path`: the file that appears when the window is over; not there when the attempt ends inside it."""
        self._config, self._path, self._say = config, path, say
        self._steps = 0
        self._profiler: Any = None
        self._over = False
        self._look()

    def step(self) -> None:
        """A step is done."""
        self._steps += 1
        if not self._over:
            self._look()

    def close(self) -> None:
        """The attempt ends: an open window is dropped."""
        if self._profiler is not None and not self._over:
            self._guarded(self._profiler.stop)
            self._say(f"profile: the attempt ended inside the window, after {self._steps} steps; no trace is written")
        self._over = True

    def _look(self) -> None:
        if self._profiler is None and self._steps == self._config.start:
            self._guarded(self._begin)
        elif self._profiler is not None and self._steps == self._config.start + self._config.steps:
            self._guarded(self._end)
            self._over = True

    def _begin(self) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        detailed = self._config.memory
        profiler = profile(activities=activities, record_shapes=detailed, profile_memory=detailed)
        profiler.start()
        self._profiler = profiler

    def _end(self) -> None:
        self._profiler.stop()
        commit.make_folder(self._path.parent)
        staged = commit.staging_path(self._path).with_suffix(".json")
        self._profiler.export_chrome_trace(str(staged))
        commit.commit_file(staged, self._path)
        self._say(f"profile: {self._config.steps} steps are in {self._path}")

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, RuntimeError, HpcGenError) as error:
            self._over = True
            self._say(f"profile: no trace is written ({error}); training goes on")


@dataclass
class Meter:
    """`flops_per_image` and `peak_tflops` of one device: None where not known (yet); `devices`: those of all ranks."""

    flops_per_image: float | None = None
    peak_tflops: float | None = None
    devices: int = 1
    window: ProfileWindow | None = field(default=None)

    def step(self) -> None:
        """A step is done."""
        if self.window is not None:
            self.window.step()

    def close(self) -> None:
        """Training ends."""
        if self.window is not None:
            self.window.close()

    def mfu(self, images: int, seconds: float) -> float | None:
        """Model FLOPs utilisation of an interval: images of all ranks in so many seconds; None where not known."""
        if self.flops_per_image is None or self.peak_tflops is None or not images:
            return None
        return mfu(self.flops_per_image, images, seconds, self.devices, self.peak_tflops)
