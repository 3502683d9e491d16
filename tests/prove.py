"""200 random kills of a two-rank run, each followed by a resume, against a run that was never killed (`make prove`).

    .venv/bin/python tests/prove.py                         200 kills; below ./prove, where a stopped proof goes on
    .venv/bin/python tests/prove.py --kills 5 --work /tmp/p a quick look

Who is killed, how and when is tests/support/killing.py, from a fixed seed. Every checkpoint that either run commits is
kept and compared by the hash of its manifest, which holds the hash of every file. With all kills done the table is
written to docs/proofs/ with the date, the commit, the hardware and the versions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import experiments  # noqa: E402
import killing  # noqa: E402
import numpy  # noqa: E402
import torch  # noqa: E402

from hpc_gen.runtime import commit  # noqa: E402
from hpc_gen.runtime.progress import Progress  # noqa: E402
from hpc_gen.runtime.run_folder import RunFolder  # noqa: E402
from hpc_gen.stages import run_setup  # noqa: E402

SEED, WINDOW, RANKS = 2026, 128, 2
TABLE = ROOT / "docs" / "proofs" / "resume_kills.md"


def experiment(kills: int) -> str:
    """A run with a window of images for each kill; checkpoints every half window, all of them kept."""
    return f"""
name: prove
seed: 7
method:
  {{name: energy, input: pixels, image_size: 8, channels: 1, patch_size: 4, hidden: 16, depth: 1, heads: 2,
   diffusion_timesteps: 50}}
data: {{table: tables/toy, validation_table: tables/toyval, shuffle_shards: 2}}
train:
  total_images: {(kills + 1) * WINDOW}
  global_batch: 16
  ranks: {RANKS}
  optimizer: {{lr: 1.0e-3}}
  engine: {{bucket_mb: 0.01}}
  ema: {{main: {{decay: 0.9}}}}
  log_every: 16
  save_every: 64
  keep_every: 64
  validate: {{every_images: 512, num_images: 32}}
"""


def make(work: Path, name: str, kills: int) -> RunFolder:
    """A run folder as `hpc-gen run` makes it; one that is there goes on."""
    return run_setup.prepare_run(experiments.resolved(text=experiment(kills)), work, name)


def done_kills(path: Path) -> list[killing.Kill]:
    """The kills of earlier calls; a torn last line is done again."""
    found: list[killing.Kill] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(killing.Kill(**json.loads(line)))
        except ValueError:
            break
    return found


def run_kills(work: Path, kills: int, until: int) -> list[killing.Kill]:
    """The first `until` of the planned kills, those of earlier calls included; then the run comes to its end."""
    record = work / "kills.jsonl"
    found = done_kills(record)
    run = make(work, "killed", kills)
    progress = Progress(until, "prove", "kills", start=len(found))
    for number in range(len(found), until):
        kill = killing.disturb(run, work, work / "killed.log", killing.plan(number, SEED, WINDOW, RANKS))
        problems = killing.broken(run)
        if problems:
            raise SystemExit(f"after kill {number} a checkpoint is not whole: {problems[0]}")
        found.append(kill)
        commit.write_text(record, "".join(json.dumps(each.to_json()) + "\n" for each in found))
        progress.update(number + 1, kind=kill.kind, images_seen=kill.images_seen)
    progress.close()
    killing.finish(run, work, work / "killed.log")
    return found


def rows_of(kills: list[killing.Kill], killed: dict[int, str], undisturbed: dict[int, str]) -> list[list[str]]:
    """One row per kill: what happened, and whether the checkpoint that came next is the undisturbed run's."""
    table: list[list[str]] = []
    reached = 0  # a kill while starting comes before the first row of its attempt
    for kill in kills:
        reached = max(reached, kill.images_seen)
        after = min((images for images in undisturbed if images > reached), default=max(undisturbed))
        ours, theirs = killed.get(after, "absent"), undisturbed[after]
        resumed = "-" if kill.resumed_from is None else str(kill.resumed_from)
        code = "killed" if kill.code is None else str(kill.code)
        verdict = "equal" if ours == theirs else "UNEQUAL"
        seen = kill.images_seen if kill.moment != "starting" else "-"
        facts = [kill.number, kill.attempt or "-", kill.kind, kill.moment, resumed, seen, code, after, ours[:12]]
        table.append([*map(str, facts), verdict])
    return table


def page(rows: list[list[str]], kills: int, equal: bool, identity: str, checkpoints: int) -> str:
    """The page that is kept in docs/."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "unknown")
    lines = [
        f"# {kills} random kills",
        "",
        f"Verdict: **{'equal' if equal else 'UNEQUAL'}**. A run of {RANKS} ranks was killed {kills} times and resumed "
        f"{kills} times. All {checkpoints} checkpoints that it committed, and every row of its history, are those of a run "
        "that was never killed, byte for byte.",
        "",
        f"- date: {datetime.date.today().isoformat()}",
        f"- commit: {git.strip() or 'unknown'}{' with uncommitted changes' if dirty.strip() else ''}",
        f"- hardware: {os.cpu_count()} cores, {cpu.partition(':')[2].strip()}",
        f"- versions: Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}",
        f"- identity of the experiment: {identity}",
        f"- command: `{' '.join(['python', 'tests/prove.py', *sys.argv[1:]])}` (`make prove` makes 200)",
        "",
        "The kinds are drawn from a fixed seed: SIGKILL and SIGTERM, to one rank, to all, to the launcher; while training, "
        "while a checkpoint is being written, while starting. `images seen` is the last row in the journal at the kill; "
        "`code` is what the launcher ended with; an attempt without a number was killed before it claimed one.",
        "",
        "| kill | attempt | kind | moment | resumed from | images seen | code | next checkpoint | its manifest | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run or go on with the proof; 0 when every checkpoint and row is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--until", type=int, default=None, help="end after this many of them, and say so")
    parser.add_argument("--work", type=Path, default=ROOT / "prove", help="where a stopped proof goes on")
    parser.add_argument("--table", type=Path, default=None, help="page to write [docs/proofs, for 200 kills]")
    given = parser.parse_args()
    work = given.work.absolute()
    if not (work / experiments.TABLE).is_dir():
        experiments.make_tables(work)
    undisturbed = make(work, "undisturbed", given.kills)
    killing.finish(undisturbed, work, work / "undisturbed.log")
    kills = run_kills(work, given.kills, min(given.kills, given.until or given.kills))
    killed = RunFolder(work / "runs" / "killed")
    ours, theirs = killing.manifests(killed), killing.manifests(undisturbed)
    # a preempted attempt saves where it stands, so the killed run may hold more checkpoints than the other
    same = all(ours.get(images) == sha for images, sha in theirs.items())
    same = same and experiments.rows(killed) == experiments.rows(undisturbed)
    rows = rows_of(kills, ours, theirs)
    equal = same and all(row[-1] == "equal" for row in rows)
    identity = run_setup.load_run(killed).identity
    target = given.table or (TABLE if given.kills == 200 else None)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(rows, len(kills), equal, identity, len(theirs)))
        print(f"table: {target}")
    for row in rows[-10:]:
        print("  ".join(row))
    print(f"{len(kills)} kills, {len(theirs)} checkpoints: {'equal' if equal else 'UNEQUAL'} to the undisturbed run")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
