"""Telling the `notify` command of an experiment how a stage ended: by the runner, or by a process that has none."""

from __future__ import annotations

import sys

from hpc_gen.config.loader import Resolved
from hpc_gen.runtime import journal
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.notify import notify, outcome
from hpc_gen.runtime.run_folder import RunFolder

RUNNER = "HPC_GEN_RUNNER"
"""Set in processes that the local runner has started: it sees how they end, so they do not tell of it themselves."""


def tell(run: RunFolder, resolved: Resolved, stage: str, code: int, message: str | None = None) -> None:
    """Run the command when it wants to hear of this outcome; its failure is said and journaled, and changes nothing.

    `message` None: the cause that the stage's attempt wrote into the journal.
    """
    config = resolved.experiment.notify
    if config is None or outcome(code) not in config.on:
        return
    attempt = journal.last_attempt(run)
    if attempt is not None and attempt.stage != stage:
        attempt = None  # it ended before it could claim one
    if message is None:
        cause = attempt.cause if attempt is not None else None
        message = cause or f"{stage} ended with code {code}"
    wrong = notify(config.command, run.path, stage, code, message)
    if wrong is None:
        return
    print(f"{stage}: the notification failed: {wrong}", file=sys.stderr, flush=True)
    if attempt is not None:
        book = Journal(run, attempt.number, stage)
        book.event("fault", what="notification failed", detail=wrong)
        book.close()
