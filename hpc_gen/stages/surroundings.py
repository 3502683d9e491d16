"""What validation, previews and evaluation in training share: the run around them, and the sampler's measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from hpc_gen.config.experiment import Experiment
from hpc_gen.config.loader import Resolved
from hpc_gen.data.table import Table
from hpc_gen.methods.protocol import Curve, Measures, Method
from hpc_gen.runtime.agreement import Shared, shared_poll
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling.generate import Decoder
from hpc_gen.stages.build import open_decoder
from hpc_gen.training import loop


@dataclass(frozen=True)
class Surroundings:
    """What all periodic work is given: the run, its training and its table."""

    run: RunFolder
    resolved: Resolved
    workspace: Path
    job: loop.TrainJob
    table: Table

    @property
    def experiment(self) -> Experiment:
        """The experiment."""
        return self.resolved.experiment

    @property
    def shared(self) -> Shared:
        """Opens a stretch of work in which all ranks look at the stop token."""
        return partial(shared_poll, self.job.stop, self.job.ranks)

    @cached_property
    def decoder(self) -> Decoder | None:
        """What decodes the method's latents, on this rank's device; opened once, previews and evaluation share it."""
        return open_decoder(self.experiment, self.table, self.workspace, self.job.ranks.device)


def scalars(curves: Sequence[Mapping[str, Curve]], prefix: str) -> dict[str, float]:
    """Means of what the sampler measured as one number (accept rates), over all parts, for the row."""
    total: dict[str, Curve] = {}
    for part in curves:
        for name, curve in part.items():
            total[name] = total[name].added(curve) if name in total else curve
    found: dict[str, float] = {}
    for name, curve in sorted(total.items()):
        means = curve.means()
        if len(means) == 1 and means[0] is not None:
            found[f"{prefix}/{name}"] = means[0]
    return found


def measured(method: Method) -> dict[str, Curve]:
    """What the sampler has measured since the last call."""
    return method.take_curves() if isinstance(method, Measures) else {}
