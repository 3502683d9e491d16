"""Preemption at twelve points, bare and in a container, and every other end of a job, on a real Slurm (`make prove`).

    .venv/bin/python tests/prove_slurm.py                     all cases; below ./prove, where a stopped proof goes on
    .venv/bin/python tests/prove_slurm.py --only 'step|rename' --work /tmp/p      some of them, no page

Needs root on Debian (slurm/lab.py). Cases are tests/support/slurm_cases.py, points tests/support/points/sitecustomize.py.
Results are kept case by case; the page docs/proofs/slurm_preemptions.md is written with what there is, and says so when
cases are missing or failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import scenes  # noqa: E402
import slurm_cases  # noqa: E402
import torch  # noqa: E402
from scenes import Scene  # noqa: E402
from slurm_cases import NARROW, Row  # noqa: E402

from hpc_gen.runtime import commit  # noqa: E402
from hpc_gen.runtime.goodput import CATEGORIES  # noqa: E402
from slurm import containers, lab  # noqa: E402

PAGE = ROOT / "docs" / "proofs" / "slurm_preemptions.md"
IMAGE = ROOT / "build" / "images" / "cpu.sif"


def cases(image: Path | None) -> dict[str, Callable[[Scene, Scene], Row]]:
    """Name -> case, given the scene without and the one with a container."""
    found: dict[str, Callable[[Scene, Scene], Row]] = {}
    for point in scenes.ALL_POINTS:
        found[f"bare {point}"] = lambda bare, inside, p=point: slurm_cases.preempted(bare, p)  # type: ignore[misc]
    for point in scenes.ALL_POINTS if image is not None else ():
        found[f"container {point}"] = lambda bare, inside, p=point: slurm_cases.preempted(inside, p)  # type: ignore[misc]
    for name, event in slurm_cases.EVENTS.items():
        found[name] = lambda bare, inside, e=event: e(bare)  # type: ignore[misc]
    for name, event in slurm_cases.INSIDE.items() if image is not None else ():
        found[f"container {name}"] = lambda bare, inside, e=event: e(inside)  # type: ignore[misc]
    return found


def kept(path: Path) -> dict[str, Row]:
    """Results of earlier calls."""
    if not path.exists():
        return {}
    return {name: Row(**content) for name, content in json.loads(path.read_text()).items()}


def run_all(work: Path, image: Path | None, only: str, record: Path) -> dict[str, Row]:
    """Every case that has no sound result yet; returns all results."""
    found = kept(record)
    wanted = {
        name: case
        for name, case in cases(image).items()
        if re.search(only, name) and not (name in found and found[name].sound)
    }
    if not wanted:
        return found
    place = Path(tempfile.mkdtemp(prefix="hpc-gen-prove-", dir="/tmp"))
    place.chmod(0o755)
    small = place / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)], check=True)
    try:
        base = lab.free_port_base(3, first=21000)
        cluster = lab.start(place / "lab", nodes=3, port_base=base, prefix=f"p{base}n", gpus=0, grace_s=30)
        bare = Scene(cluster, work / "scene", profile={"tasks_per_node": 1})
        inside = Scene(cluster, work / "scene", image, {"tasks_per_node": 1})
        if not bare.run("narrow").checkpoints.is_dir():
            bare.undisturbed("narrow", *NARROW, stages="encode,train")
        for number, (name, case) in enumerate(wanted.items(), 1):
            print(f"[{number}/{len(wanted)}] {name}", flush=True)
            for kind in ("runs", "marks"):  # of cases that are over, or were cut short
                for folder in (work / "scene" / kind).glob("*"):
                    if folder.name != "narrow":
                        shutil.rmtree(folder)
            try:
                found[name] = case(bare, inside)
                print(f"    {'sound' if found[name].sound else 'UNSOUND'}: {found[name]}", flush=True)
            except Exception:
                traceback.print_exc()
                found[name] = Row(name, "-", "-", "-", {}, "the case itself failed", False, False)
                cluster.run(["scancel", "--user=root"], check=False)
            commit.write_json(record, {key: asdict(row) for key, row in found.items()})
    finally:
        lab.stop(place / "lab", purge=True)
        subprocess.run(["umount", str(small)], check=False)
        shutil.rmtree(place, ignore_errors=True)
    return found


def page(found: dict[str, Row], wanted: list[str]) -> str:
    """The page that is kept in docs/."""
    rows = {name: found[name] for name in wanted if name in found}
    sound = sum(row.sound for row in rows.values())
    missing = [name for name in wanted if name not in rows]
    versions = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=False).stdout.strip()
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "unknown")
    total = {name: sum(row.seconds.get(name, 0.0) for row in rows.values()) for name in CATEGORIES}
    held = sum(total.values()) or 1.0
    lines = [
        "# Preemptions and other ends on a real Slurm",
        "",
        f"Verdict: **{sound} of the {len(rows)} cases that were run are sound**"
        + (f"; {len(missing)} of {len(wanted)} were not run: {', '.join(missing)}" if missing else "")
        + ". A case is sound when the run ended in the state named, with the last checkpoint and every row of the undisturbed "
        "run byte for byte, and no unit of a stage was committed twice.",
        "",
        f"- date: {datetime.date.today().isoformat()}, commit {git.strip()[:12] or 'unknown'}",
        f"- hardware: {os.cpu_count()} cores, {cpu.partition(':')[2].strip()}; other work ran on it at the same time",
        f"- versions: {versions}, Python {platform.python_version()}, torch {torch.__version__}",
        "- a training of two nodes with one process each on the lab of `hpc-gen lab`; GraceTime 30 s, KillWait 5 s",
        "",
        "`codes`: what each start of the job ended with (85: saved, to be requeued). `waited`: seconds from the submission of "
        "the preempting job of partition high, which wants every node, to its end; the promise is a start within 5 s once "
        "training has started, on a machine that has a core for each process.",
        "",
        "| case | in | codes | states | waited, s | seen | digest | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        waited = "" if row.waited_s is None else f"{row.waited_s:.1f}"
        facts = [row.name, row.place, row.codes, row.states, waited, row.note, "equal" if row.equal else "UNEQUAL"]
        lines.append(f"| {' | '.join([*facts, 'sound' if row.sound else 'UNSOUND'])} |")
    lines += [
        "",
        "Rank-seconds of all these trainings by the journal; each second that a rank was held is in one column:",
        "",
        f"| {' | '.join(CATEGORIES)} |",
        f"|{'---|' * len(CATEGORIES)}",
        f"| {' | '.join(f'{total[name]:.0f} ({100 * total[name] / held:.0f} %)' for name in CATEGORIES)} |",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run or go on with the proof; 0 when every case is sound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression of names of cases")
    parser.add_argument("--work", type=Path, default=ROOT / "prove" / "slurm", help="where a stopped proof goes on")
    parser.add_argument("--page", type=Path, default=None, help=f"page to write [{PAGE.name}, without --only]")
    given = parser.parse_args()
    reason = lab.why_not()
    if reason is not None:
        print(f"*** THE SLURM CASES ARE NOT PROVED: {reason}", file=sys.stderr)
        return 0
    cannot = containers.why_not(containers.read(containers.CPU))
    if cannot is None and (not IMAGE.exists() or containers.image_problems(IMAGE, containers.CPU)):
        containers.build(containers.CPU, IMAGE, print)
    image = IMAGE if cannot is None else None
    if cannot is not None:
        print(f"*** without containers: {cannot}", file=sys.stderr)
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    found = run_all(work, image, given.only, work / "results.json")
    wanted = list(cases(IMAGE))
    target = given.page or (None if given.only else PAGE)
    if target is not None:
        target.write_text(page(found, wanted))
        print(f"page: {target}")
    bad = [name for name in wanted if re.search(given.only, name) and not (name in found and found[name].sound)]
    print(f"{len(found)} cases, unsound or missing: {', '.join(bad) or 'none'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
