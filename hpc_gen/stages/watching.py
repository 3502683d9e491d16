"""What watches a training attempt: spans of each rank, and the naming of a rank that the others wait for in vain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hpc_gen.config.experiment import TrainConfig
from hpc_gen.runtime.errors import CollectiveError
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.rank_watch import RankWatch, blamed
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.spans import Recorder

SPANS = "spans"  # folder of their files, below the journal's
DEVICE_SHARE = 0.9  # of the collectives' timeout: before NCCL aborts the process without a word


@contextmanager
def watched(run: RunFolder, config: TrainConfig, ranks: Ranks, attempt: int, journal: Journal) -> Iterator[None]:
    """Inside, spans are recorded, and a collective that fails raises CollectiveError; the journal is told as well."""
    recorder = Recorder(Journal(run, attempt, "train", ranks.rank, below=SPANS), config.spans)
    recorder.start(rank=ranks.rank, world_size=ranks.world_size)

    def note(error: CollectiveError) -> None:
        journal.event("fault", what="collective", detail=str(error), blamed=blamed(error))

    try:
        limit_s = DEVICE_SHARE * config.collective_timeout_s if ranks.device.type == "cuda" else None
        watch = RankWatch.start(ranks, limit_s)
        watch.on_stuck = note
        try:
            with watch.naming():
                yield
        except CollectiveError as error:
            note(error)
            raise
        finally:
            watch.close()
    finally:
        recorder.stop()
