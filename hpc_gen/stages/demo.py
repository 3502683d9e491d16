"""`hpc-gen demo`: real images to a report on this machine, preempted in the middle, with the proofs in its output.

The demo types the same commands as a user and reads what they leave behind. Every step looks first at what is there
already, so a second call repeats nothing.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_gen.metrics import results
from hpc_gen.runtime import clock, commit, env
from hpc_gen.runtime.errors import DataError, ExitCode, HpcGenError, UserError
from hpc_gen.runtime.journal import attempts, history
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.training.checkpoint import manifest

CONFIG = Path(__file__).resolve().parents[2] / "job_configs" / "demo" / "mnist16.yaml"
NAME = "demo-mnist16"
TWIN_IMAGES = 6_400  # the stretch over which the preempted run and its undisturbed twin are compared
PREEMPT_AT = 2_560  # images after which the demo has the run preempted
DIGEST_IMAGES = 640
DIGEST_RANKS = (1, 2, 4)
TWIN_RANKS = 2
STAGES = "train,sample,evaluate,report"  # the twin has encoded the table that both train on
DOWNLOADS = (("mnist", ("shards", "fetch", "mnist")), ("inception", ("weights", "fetch", "inception")))

Printer = Callable[[str], None]


@dataclass(frozen=True)
class Demo:
    """One demo in one workspace."""

    workspace: Path
    say: Printer

    def run_folder(self, suffix: str = "") -> RunFolder:
        """The demo's main run, or one of its companions."""
        return RunFolder(self.workspace / "runs" / f"{NAME}{suffix}")

    def command(self, *words: str, expect: Sequence[int] = (ExitCode.DONE,)) -> int:
        """Run `hpc-gen WORDS` as typed, its output passed through. Raises DemoFailed for an unexpected exit code."""
        return self.expected(self.start(*words), words, expect)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Begin a command; the caller waits with `expected`."""
        self.say(f"$ hpc-gen {' '.join(words)}")
        argv = [sys.executable, "-m", "hpc_gen.cli", *words]
        return subprocess.Popen(argv, env=env.child_environment(HPC_GEN_WORKSPACE=str(self.workspace)))

    def expected(self, process: subprocess.Popen[bytes], words: Sequence[str], codes: Sequence[int]) -> int:
        """Wait for a command and check its exit code."""
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # it saves and ends by itself; the demo may be called again
            process.wait()
            raise
        if code not in codes:
            raise DemoFailed(f"`hpc-gen {' '.join(words)}` ended with code {code}; see its message above", code)
        return code


class DemoFailed(HpcGenError):
    """A step of the demo did not do what it must; the exit code is that of the command."""

    def __init__(self, message: str, code: int) -> None:
        """`code`: exit code of the command that failed."""
        super().__init__(message)
        known = {int(member) for member in ExitCode}
        self.exit_code = ExitCode(code) if code in known and code != 0 else ExitCode.BUG


def run_demo(workspace: Path, printer: Printer) -> int:
    """The whole demo; returns an exit code. Raises HpcGenError."""
    if not CONFIG.is_file():
        raise UserError(f"{CONFIG} is missing: the demo runs from a clone of the project; clone it and use `make demo`")
    demo = Demo(workspace.resolve(), printer)
    begun = clock.monotonic()
    _download(demo)
    _twin(demo)
    digests = _digests(demo)
    _main_run(demo)
    proofs = {"twin": _compare_with_twin(demo), "digests": digests}
    _summary(demo, proofs, clock.monotonic() - begun)
    return ExitCode.DONE


def _download(demo: Demo) -> None:
    demo.say("== 1. Real images and the network that scores them")
    for _, words in DOWNLOADS:
        demo.command(*words)


def _twin(demo: Demo) -> None:
    demo.say(f"\n== 2. An undisturbed twin: images to shards, then {TWIN_IMAGES} images of training on two ranks")
    if _seen(demo.run_folder("-twin")) >= TWIN_IMAGES:
        demo.say(f"done already: {NAME}-twin stands at {TWIN_IMAGES} images")
        return
    saves = (f"train.save_every={DIGEST_IMAGES}", f"train.keep_every={DIGEST_IMAGES}")  # the early ones serve step 3
    stop = f"train.stop_at_images={TWIN_IMAGES}"
    demo.command("run", str(CONFIG), f"name={NAME}-twin", stop, *saves, "stages=[encode, train]")


def _digests(demo: Demo) -> dict[int, str]:
    demo.say(f"\n== 3. The same order and draws on any number of ranks: {DIGEST_IMAGES} images on 1, 2 and 4")
    found: dict[int, str] = {}
    for ranks in DIGEST_RANKS:
        run = demo.run_folder("-twin" if ranks == TWIN_RANKS else f"-ranks{ranks}")
        if _seen(run) >= DIGEST_IMAGES:
            demo.say(f"done already: {run.name} stands at {DIGEST_IMAGES} images")
        else:
            changes = (f"train.stop_at_images={DIGEST_IMAGES}", f"train.ranks={ranks}", "stages=[train]")
            demo.command("run", str(CONFIG), f"name={run.name}", *changes)
        found[ranks] = str(manifest.read(_checkpoint(run, DIGEST_IMAGES)).facts["digest"])
    for ranks, digest in found.items():
        demo.say(f"order-and-draws digest after {DIGEST_IMAGES} images on {ranks} rank{'s' * (ranks > 1)}: {digest}")
    if len(set(found.values())) != 1:
        raise DataError(f"the digests differ: {found}; ranks did not see the same samples or draws")
    return found


def _main_run(demo: Demo) -> None:
    run = demo.run_folder()
    demo.say("\n== 4. The run itself: preempted by a real signal, resumed, sampled, scored, reported")
    if _was_preempted(run) or _seen(run) > PREEMPT_AT:
        if run.report.is_file():
            demo.say(f"done already: {run.path}; its stages say what they find")
        demo.command("resume", str(run.path), "--stages", STAGES)
        return
    words = ("run", str(CONFIG), "--stages", STAGES)
    process = demo.start(*words)
    while process.poll() is None and (_row_at(run) < PREEMPT_AT):
        clock.sleep(0.25)
    if process.poll() is None:
        demo.say(f"-- {_row_at(run)} images are logged: preempting now")
        demo.command("preempt", str(run.path))
    demo.expected(process, words, (ExitCode.REQUEUE,))
    demo.say(f"-- preempted: exit code {int(ExitCode.REQUEUE)} (requeue), state saved at {_seen(run)} images")
    demo.command("resume", str(run.path), "--stages", STAGES)


def _compare_with_twin(demo: Demo) -> dict[str, Any]:
    """Byte for byte, every file of the two checkpoints; raises DataError when one differs."""
    one, other = (_checkpoint(demo.run_folder(suffix), TWIN_IMAGES) for suffix in ("", "-twin"))
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        raise DataError(f"{one} and {other} hold different files; resuming was not exact")
    size = 0
    for name in names:
        if (one / name).read_bytes() != (other / name).read_bytes():
            raise DataError(f"{one / name} and {other / name} differ; resuming was not exact")
        size += (one / name).stat().st_size
    return {"files": len(names), "bytes": size, "manifest_sha256": commit.sha256_file(one / manifest.NAME)}


def _summary(demo: Demo, proofs: dict[str, Any], seconds: float) -> None:
    run, twin = demo.run_folder(), proofs["twin"]
    ended = [a for a in attempts(run) if a.stage == "train"]
    demo.say("\n== Summary")
    demo.say(f"train attempts of {run.name}: {len(ended)}, exit codes {[a.exit_code for a in ended]}")
    demo.say(
        f"checkpoint at {TWIN_IMAGES} images: equal to the undisturbed twin's, byte for byte "
        f"({twin['files']} files, {twin['bytes']} bytes, manifest {twin['manifest_sha256'][:16]})"
    )
    digest = next(iter(proofs["digests"].values()))
    demo.say(f"order-and-draws digest of 1, 2 and 4 ranks: {digest} on all")
    for line in _metric_lines(run):
        demo.say(line)
    demo.say(f"report: {run.report}")
    demo.say(f"previews: {run.previews}")
    demo.say(f"time of this call: {seconds:.0f} s")


def _metric_lines(run: RunFolder) -> list[str]:
    path = run.metrics("main")
    lines = [f"metrics ({path}):"]
    for record in results.read(path).records:
        value = "-" if record.value is None else f"{record.value:.4g}"
        lines.append(f"  {record.name}: {value}{f'  ({record.note})' if record.note else ''}")
    return lines


def _checkpoint(run: RunFolder, images_seen: int) -> Path:
    return run.checkpoints / f"{images_seen:012d}"


def _seen(run: RunFolder) -> int:
    """Position of the newest committed checkpoint; -1 when there is none."""
    names = [p.name for p in run.checkpoints.iterdir()] if run.checkpoints.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=-1)


def _row_at(run: RunFolder) -> int:
    """Newest position that the journal has a row of."""
    if not run.exists():
        return -1
    rows = history(run)
    return rows[-1].images_seen if rows else -1


def _was_preempted(run: RunFolder) -> bool:
    return run.exists() and any(a.stage == "train" and a.exit_code == ExitCode.REQUEUE for a in attempts(run))
