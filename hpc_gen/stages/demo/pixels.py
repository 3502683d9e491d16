"""The demo on MNIST: images to a report, preempted in the middle, with the proofs in its output.

Every step looks first at what is there already, so a second call repeats nothing.
"""

from __future__ import annotations

from typing import Any

from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.errors import DataError, ExitCode
from hpc_gen.runtime.journal import attempts
from hpc_gen.stages.demo.steps import Demo, checkpoint, config_file, metric_lines, row_at, seen, was_preempted
from hpc_gen.training.checkpoint import manifest

FILE = "mnist16.yaml"
NAME = "demo-mnist16"
TWIN_IMAGES = 6_400  # the stretch over which the preempted run and its undisturbed twin are compared
PREEMPT_AT = 2_560  # images after which the demo has the run preempted
DIGEST_IMAGES = 640
DIGEST_RANKS = (1, 2, 4)
TWIN_RANKS = 2
STAGES = "train,sample,evaluate,report"  # the twin has encoded the table that both train on
DOWNLOADS = (("mnist", ("shards", "fetch", "mnist")), ("inception", ("weights", "fetch", "inception")))


def run(demo: Demo) -> None:
    """The whole demo. Raises HpcGenError."""
    begun = clock.monotonic()
    _download(demo)
    _twin(demo)
    digests = _digests(demo)
    _main_run(demo)
    proofs = {"twin": _compare_with_twin(demo), "digests": digests}
    _summary(demo, proofs, clock.monotonic() - begun)


def _download(demo: Demo) -> None:
    demo.say("== 1. Real images and the network that scores them")
    for _, words in DOWNLOADS:
        demo.command(*words)


def _twin(demo: Demo) -> None:
    demo.say(f"\n== 2. An undisturbed twin: images to shards, then {TWIN_IMAGES} images of training on two ranks")
    if seen(demo.run_folder(f"{NAME}-twin")) >= TWIN_IMAGES:
        demo.say(f"done already: {NAME}-twin stands at {TWIN_IMAGES} images")
        return
    saves = (f"train.save_every={DIGEST_IMAGES}", f"train.keep_every={DIGEST_IMAGES}")  # the early ones serve step 3
    stop = f"train.stop_at_images={TWIN_IMAGES}"
    demo.command("run", str(config_file(FILE)), f"name={NAME}-twin", stop, *saves, "stages=[encode, train]")


def _digests(demo: Demo) -> dict[int, str]:
    demo.say(f"\n== 3. The same order and draws on any number of ranks: {DIGEST_IMAGES} images on 1, 2 and 4")
    found: dict[int, str] = {}
    for ranks in DIGEST_RANKS:
        run = demo.run_folder(f"{NAME}-twin" if ranks == TWIN_RANKS else f"{NAME}-ranks{ranks}")
        if seen(run) >= DIGEST_IMAGES:
            demo.say(f"done already: {run.name} stands at {DIGEST_IMAGES} images")
        else:
            changes = (f"train.stop_at_images={DIGEST_IMAGES}", f"train.ranks={ranks}", "stages=[train]")
            demo.command("run", str(config_file(FILE)), f"name={run.name}", *changes)
        found[ranks] = str(manifest.read(checkpoint(run, DIGEST_IMAGES)).facts["digest"])
    for ranks, digest in found.items():
        demo.say(f"order-and-draws digest after {DIGEST_IMAGES} images on {ranks} rank{'s' * (ranks > 1)}: {digest}")
    if len(set(found.values())) != 1:
        raise DataError(f"the digests differ: {found}; ranks did not see the same samples or draws")
    return found


def _main_run(demo: Demo) -> None:
    run = demo.run_folder(NAME)
    demo.say("\n== 4. The run itself: preempted by a real signal, resumed, sampled, scored, reported")
    if was_preempted(run) or seen(run) > PREEMPT_AT:
        if run.report.is_file():
            demo.say(f"done already: {run.path}; its stages say what they find")
        demo.command("resume", str(run.path), "--stages", STAGES)
        return
    words = ("run", str(config_file(FILE)), "--stages", STAGES)
    process = demo.start(*words)
    while process.poll() is None and (row_at(run) < PREEMPT_AT):
        clock.sleep(0.25)
    if process.poll() is None:
        demo.say(f"-- {row_at(run)} images are logged: preempting now")
        demo.command("preempt", str(run.path))
    demo.expected(process, words, (ExitCode.REQUEUE,))
    demo.say(f"-- preempted: exit code {int(ExitCode.REQUEUE)} (requeue), state saved at {seen(run)} images")
    demo.command("resume", str(run.path), "--stages", STAGES)


def _compare_with_twin(demo: Demo) -> dict[str, Any]:
    """Byte for byte, every file of the two checkpoints; raises DataError when one differs."""
    one, other = (checkpoint(demo.run_folder(f"{NAME}{suffix}"), TWIN_IMAGES) for suffix in ("", "-twin"))
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
    run, twin = demo.run_folder(NAME), proofs["twin"]
    ended = [a for a in attempts(run) if a.stage == "train"]
    demo.say("\n== Summary")
    demo.say(f"train attempts of {run.name}: {len(ended)}, exit codes {[a.exit_code for a in ended]}")
    demo.say(
        f"checkpoint at {TWIN_IMAGES} images: equal to the undisturbed twin's, byte for byte "
        f"({twin['files']} files, {twin['bytes']} bytes, manifest {twin['manifest_sha256'][:16]})"
    )
    digest = next(iter(proofs["digests"].values()))
    demo.say(f"order-and-draws digest of 1, 2 and 4 ranks: {digest} on all")
    for line in metric_lines(run):
        demo.say(line)
    demo.say(f"report: {run.report}")
    demo.say(f"previews: {run.previews}")
    demo.say(f"time of this call: {seconds:.0f} s")
