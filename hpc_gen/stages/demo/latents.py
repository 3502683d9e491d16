"""The demo in latents: a KL autoencoder is trained on emoji, encodes them, and energy diffusion learns its latents.

The diffusion run is killed in the middle (every process of it, with SIGKILL) and resumed; its samples descend on the
energy after every solver step. Every step looks first at what is there already, so a second call repeats nothing.
"""

from __future__ import annotations

from pathlib import Path

from hpc_gen.methods.protocol import Curve
from hpc_gen.runtime import clock
from hpc_gen.runtime.errors import DataError
from hpc_gen.runtime.journal import attempts
from hpc_gen.sampling.index import read_index
from hpc_gen.stages.demo.steps import Demo, config_file, metric_lines

TOKENIZER_FILE, TOKENIZER_NAME = "emoji32_vae.yaml", "demo-emoji32-vae"
FILE, NAME = "emoji32_latent.yaml", "demo-emoji32-latent"
WEIGHTS = Path("runs") / TOKENIZER_NAME / "exports" / "autoencoder.safetensors"  # as FILE names them
STAGES = "encode,train,sample,evaluate,report"


def run(demo: Demo) -> None:
    """The whole demo. Raises HpcGenError."""
    begun = clock.monotonic()
    demo.say("== 1. Real images and the network that scores them")
    demo.command("shards", "fetch", "emoji")
    demo.command("weights", "fetch", "inception")
    make_tokenizer(demo)
    _diffusion(demo)
    _summary(demo, clock.monotonic() - begun)


def make_tokenizer(demo: Demo) -> None:
    """The trained autoencoder as a file; nothing is done where it is there."""
    demo.say("\n== 2. A KL autoencoder: images to shards, training on two ranks, its weights to a file")
    demo.command("run", str(config_file(TOKENIZER_FILE)))
    if (demo.workspace / WEIGHTS).is_file():
        demo.say(f"done already: {WEIGHTS}")
    else:
        demo.command("weights", "export", TOKENIZER_NAME, "--to", str(WEIGHTS))


def _diffusion(demo: Demo) -> None:
    demo.say("\n== 3. Energy diffusion on its latents: killed, resumed, sampled with the inner loop, scored, reported")
    demo.killed_and_resumed(FILE, NAME, STAGES)


def _summary(demo: Demo, seconds: float) -> None:
    run = demo.run_folder(NAME)
    trained = [a for a in attempts(run) if a.stage == "train"]
    demo.say("\n== Summary")
    demo.say(
        f"train attempts of {NAME}: {len(trained)}, exit codes {[a.exit_code for a in trained]} (None: killed), "
        f"the last went on from {trained[-1].resumed_from or 0} images"
    )
    curves = read_index(run.samples("main")).curves
    for line in _energy_lines(curves.get("inner_energy_change"), curves.get("energy_accept_rate")):
        demo.say(line)
    for line in metric_lines(run):
        demo.say(line)
    demo.say(f"report: {run.report}")
    demo.say(f"time of this call: {seconds:.0f} s")


def _energy_lines(change: Curve | None, rate: Curve | None) -> list[str]:
    """The energy along the inner loop; raises DataError when it does not go down."""
    means = [value for value in change.means() if value is not None] if change is not None else []
    if rate is None or len(means) < 2 or min(means[1:]) >= 0:
        raise DataError(f"the inner loop did not lower the energy: mean change per inner step {means}")
    shown = ", ".join(f"{value:.3g}" for value in means)
    return [
        f"energy along the inner loop, less its start: {shown}",
        f"inner steps accepted: {rate.sums[0] / rate.counts[0]:.1%} of {rate.counts[0]:,.0f}",
    ]
