"""`hpc-gen prove-resume`: the experiment in small, undisturbed and killed at random, shown to be the same training.

Three runs below WORKSPACE/runs: NAME-proof is never disturbed; NAME-proof-killed is killed and resumed on the same
number of ranks, and must commit the same bytes; NAME-proof-resized changes the number of ranks at each resume, and must
see the same rows and draws (the digest in every manifest) and log the same losses within a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc_gen.runtime import commit, journal
from hpc_gen.runtime.errors import DataError, ExitCode, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import prove_kills, run_setup, runner
from hpc_gen.stages.prove_kills import Kill, ProofFailed
from hpc_gen.stages.prove_plan import Proof, lines
from hpc_gen.training.checkpoint import manifest, read

Say = Callable[[str], None]
MARK = "proof"  # key of hashes.json: a run that the next proof may remove
PAGE = "proof.md"


@dataclass(frozen=True)
class Commit:
    """One committed checkpoint, by the journal, or by itself where a kill came before the line."""

    attempt: int
    images_seen: int
    manifest: str
    digest: str


@dataclass
class Disturbed:
    """A killed run: what happened to its attempts, and what it has committed."""

    run: RunFolder
    same_size: bool
    kills: list[tuple[Kill, int]] = field(default_factory=list)  # with the number of ranks
    commits: dict[tuple[int, int], Commit] = field(default_factory=dict)  # by attempt and position

    def note_commits(self) -> None:
        """Take in what was committed up to now; retention removes checkpoints later."""
        for found in commits_of(self.run):
            self.commits.setdefault((found.attempt, found.images_seen), found)


def prove(proof: Proof, workspace: Path, say: Say) -> int:
    """Run the proof and print its table and verdict; returns the exit code: 0 only when all is equal.

    Raises UserError where it cannot run, ProofFailed when an attempt does not get where it must.
    """
    if not Path("/proc/self/stat").exists():
        raise UserError("prove-resume finds the ranks that it kills in /proc, so it needs Linux")
    for line in lines(proof):
        say(line)
    undisturbed = _begin(proof, workspace, "")
    _make_table(proof, undisturbed, say)
    say(f"\n{undisturbed.name}: never disturbed, {_ranks(proof.world_sizes[0])}")
    prove_kills.finish(undisturbed, workspace, undisturbed.logs / "proof.log")
    disturbed = [_disturb(proof, workspace, "-killed", (proof.world_sizes[0],), say)]
    if len(proof.world_sizes) > 1:
        changing = (*proof.world_sizes[1:], proof.world_sizes[0])
        disturbed.append(_disturb(proof, workspace, "-resized", changing, say))
    problems: list[str] = []
    page = [f"# {proof.resolved.experiment.name}", "", *lines(proof), ""]
    for each in disturbed:
        found, text = judge(proof, undisturbed, each)
        problems += found
        page += text
    page += ["", *_verdict(proof, problems)]
    say("\n".join(page[3 + len(lines(proof)) :]))
    commit.write_text(undisturbed.path / PAGE, "\n".join(page) + "\n")
    say(f"written to {undisturbed.path / PAGE}")
    return ExitCode.DATA if problems else ExitCode.DONE


def _begin(proof: Proof, workspace: Path, suffix: str) -> RunFolder:
    """A fresh run folder; what an earlier proof left under the name goes, anything else stays and is refused."""
    run = RunFolder(workspace / "runs" / f"{proof.resolved.experiment.name}{suffix}")
    if run.path.exists():
        if not run.exists() or not run_setup.facts_of(run).get(MARK):
            raise UserError(f"{run.path} is not the run of an earlier proof; choose another name with name=...")
        commit.remove_tree(run.path)
    run_setup.create_run(run, run_setup.accepted(run, proof.resolved, workspace), facts={MARK: True})
    return run


def _make_table(proof: Proof, run: RunFolder, say: Say) -> None:
    """The table must be there, or the experiment must say how it is made."""
    table = run.workspace / proof.resolved.experiment.data.table
    if table.is_dir():
        return
    if not proof.preparing:
        raise UserError(
            f"table {table} is not there and the experiment has no stage before 'train' that would make it; make it "
            "first, or set data.table"
        )
    if code := runner.run_stages(run, proof.preparing, say):
        raise ProofFailed(f"the table could not be made: stages {', '.join(proof.preparing)} ended with code {code}")


def _disturb(proof: Proof, workspace: Path, suffix: str, sizes: Sequence[int], say: Say) -> Disturbed:
    """Kill and resume as often as planned, then let the run end; attempt n has sizes[n] ranks, in turns."""
    found = Disturbed(_begin(proof, workspace, suffix), same_size=len(sizes) == 1)
    say(f"\n{found.run.name}: {proof.kills} kills, {' then '.join(_ranks(size) for size in sizes)}")
    log = found.run.logs / "proof.log"
    for number in range(proof.kills):
        size = sizes[number % len(sizes)]
        plan = prove_kills.plan(number, proof.seed + (not found.same_size), proof.window, size)
        kill = prove_kills.disturb(found.run, workspace, log, plan, [f"train.ranks={size}"])
        found.kills.append((kill, size))
        found.note_commits()
        say(f"  {number + 1}/{proof.kills}  {kill.kind} while {kill.moment}, {_ranks(size)}: {kill.images_seen} images")
        if kill.finished and kill.code != ExitCode.DONE:
            raise ProofFailed(f"an attempt of {found.run.path} ended by itself, with code {kill.code}; see {log}")
        if problems := prove_kills.broken(found.run):
            raise DataError(f"after kill {number + 1} a checkpoint is not whole: {problems[0]}")
    prove_kills.finish(found.run, workspace, log, [f"train.ranks={sizes[proof.kills % len(sizes)]}"])
    found.note_commits()
    return found


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number > 1)}"


def commits_of(run: RunFolder) -> list[Commit]:
    """Every commit that the journal tells of, and those that lie there without a line of it, ascending."""
    found = [
        Commit(event.attempt, int(event.fields["images_seen"]), event.fields["manifest"], event.fields["digest"])
        for event in journal.Reader(run, stage="train", task=0).events()
        if event.kind == "save_committed"
    ]
    known = {each.images_seen for each in found}
    newest = journal.last_attempt(run)
    for info in read.list_checkpoints(run):
        if info.images_seen not in known:  # killed between the rename and the line
            digest = str(manifest.read(info.path).facts.get("digest"))
            attempt = newest.number if newest is not None else 0
            found.append(Commit(attempt, info.images_seen, read.manifest_sha256(info.path), digest))
    return sorted(found, key=lambda each: (each.attempt, each.images_seen))


# ---------------------------------------------------------------- the verdict


def judge(proof: Proof, undisturbed: RunFolder, disturbed: Disturbed) -> tuple[list[str], list[str]]:
    """What differs, a sentence each, and the table of one disturbed run."""
    expected = {each.images_seen: each for each in commits_of(undisturbed)}
    problems: list[str] = []
    verdicts: dict[int, str] = {}
    last: dict[int, Commit] = {}
    for (attempt, images_seen), found in sorted(disturbed.commits.items()):
        peer = expected.get(images_seen)
        equal = peer is None or (found.digest == peer.digest)
        equal = equal and (peer is None or not disturbed.same_size or found.manifest == peer.manifest)
        if not equal:
            problems.append(f"{disturbed.run.name}: the checkpoint at {images_seen} images is another")
            verdicts[attempt] = "UNEQUAL"
        elif peer is not None:  # a preempted attempt saves where it stands: nothing to compare with
            verdicts.setdefault(attempt, "equal bytes" if disturbed.same_size else "equal digest")
        last[attempt] = found
    missing = sorted(set(expected) - {images_seen for _, images_seen in disturbed.commits})
    if missing:
        problems.append(f"{disturbed.run.name}: no checkpoint at {missing[0]} images was ever committed")
    row_problems, largest = _compare_rows(proof, undisturbed, disturbed)
    problems += row_problems
    table = [
        "| attempt | ranks | ended by | resumed from | images_seen | last checkpoint | digest | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kills = {kill.attempt: kill for kill, _ in disturbed.kills if kill.attempt}
    for attempt in journal.attempts(disturbed.run):
        if attempt.stage != "train":
            continue
        killed = kills.get(attempt.number)
        how = f"{killed.kind}, {killed.moment}" if killed is not None else "its end"
        seen = killed.images_seen if killed is not None else proof.images
        begun = "-" if attempt.resumed_from is None else attempt.resumed_from
        saved = last.get(attempt.number)
        place, digest = (saved.images_seen, saved.digest) if saved is not None else ("-", "-")
        verdict = verdicts.get(attempt.number, "-")
        cells = (attempt.number, attempt.world_size, how, begun, seen, place, digest, verdict)
        table.append(f"| {' | '.join(map(str, cells))} |")
    early = sum(not kill.attempt for kill, _ in disturbed.kills)
    title = f"{disturbed.run.name}: {len(disturbed.commits)} checkpoints committed"
    more = [f"Killed before it could claim a number: {early} more."] if early else []
    difference = [] if disturbed.same_size else [f"Largest relative difference of a logged value: {largest:.2g}."]
    return problems, ["", title, "", *table, *more, *difference]


def _compare_rows(proof: Proof, undisturbed: RunFolder, disturbed: Disturbed) -> tuple[list[str], float]:
    """Problems of the history, and the largest relative difference of a logged value."""
    theirs, ours = (journal.history(run) for run in (undisturbed, disturbed.run))
    if [row.images_seen for row in theirs] != [row.images_seen for row in ours]:
        return [f"{disturbed.run.name}: {len(ours)} rows were logged, the undisturbed run has {len(theirs)}"], 0.0
    largest = 0.0
    for peer, row in zip(theirs, ours, strict=True):
        if row.data.keys() != peer.data.keys():
            return [f"{disturbed.run.name}: the row at {row.images_seen} images has other columns"], largest
        for name, value in peer.data.items():
            if row.data[name] == value:
                continue
            off = abs(row.data[name] - value) / max(abs(value), 1e-12)
            largest = max(largest, off)
            if disturbed.same_size or not off <= proof.tolerance:  # a NaN is no equal either
                what = f"'{name}' at {row.images_seen} images is {row.data[name]:.9g}, undisturbed {value:.9g}"
                return [f"{disturbed.run.name}: {what}"], largest
    return [], largest


def _verdict(proof: Proof, problems: list[str]) -> list[str]:
    if problems:
        return ["Verdict: UNEQUAL", *(f"- {problem}" for problem in problems)]
    times = f"{proof.kills} time{'s' * (proof.kills > 1)}"
    told = [
        f"Verdict: equal. Killed {times} and resumed on {_ranks(proof.world_sizes[0])}, the run committed the "
        "checkpoints and logged the rows of the run that was never killed, byte for byte."
    ]
    if len(proof.world_sizes) > 1:
        told.append(
            f"On {', '.join(map(str, proof.world_sizes))} ranks by turns it saw the same rows and draws, and every "
            f"logged value is within {proof.tolerance:g} of the undisturbed run's."
        )
    return told
