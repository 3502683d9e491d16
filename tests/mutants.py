"""Seeded mistakes: each is made in a copy of the code, and the tests named for it must turn red there.

    .venv/bin/python tests/mutants.py            all of them (`make mutants`)
    .venv/bin/python tests/mutants.py fsync      those whose name contains a word

A mutant that no test notices ends this program with exit code 1: the tests, not the code, are then to be mended.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("hpc_gen", "shard_tools", "eval_jobs", "slurm", "tests", "job_configs", "pyproject.toml")
TIMEOUT_S = 600


@dataclass(frozen=True)
class Mutant:
    """One mistake: `old` stands exactly once in `file` and becomes `new`; `tests` must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "names of rows that count the images left out",
        "shard_tools/encode.py",
        "[ids[item] for item in items]",
        "[ids[item] for item in output.items(number)[: len(items)]]",
        ("tests/unit/test_row_names.py",),
    ),
    Mutant(
        "names that verify does not look at",
        "hpc_gen/data/table.py",
        "        for names in self.index.names:\n",
        "        for names in ():\n",
        ("tests/unit/test_row_names.py",),
    ),
    Mutant(
        "moments of pieces merged as if all had one mean",
        "hpc_gen/methods/gmem/low_rank.py",
        "moments += wide.T @ wide + torch.outer(apart, apart) * (count * len(wide) / both)",
        "moments += wide.T @ wide",
        ("tests/unit/test_gmem_low_rank.py",),
    ),
    Mutant(
        "a randomised bank without its power iterations",
        "hpc_gen/methods/gmem/low_rank.py",
        "for _ in range(options.power_iterations + 1):",
        "for _ in range(1):",
        ("tests/unit/test_gmem_low_rank.py",),
    ),
    Mutant(
        "a bank that is collected before it is written",
        "shard_tools/bank.py",
        "torch.float32, lambda: _pass(bank))",
        "torch.float32, lambda: [torch.cat(list(_pass(bank)))])",
        ("tests/unit/test_gmem_bank.py",),
    ),
    Mutant(
        "a jackknife that forgets how many groups there are",
        "hpc_gen/metrics/resampling.py",
        "(GROUPS - 1) / GROUPS * np.sum(",
        "1 / GROUPS * np.sum(",
        ("tests/unit/test_resampling.py",),
    ),
    Mutant(
        "a kernel distance with the diagonal",
        "hpc_gen/metrics/kid.py",
        "own = float(within.sum() - within.diagonal().sum()) + ",
        "own = float(within.sum()) + ",
        ("tests/unit/test_kid_prc_isc.py",),
    ),
    Mutant(
        "samples and reference exchanged in precision",
        "hpc_gen/metrics/prc.py",
        "        precision=Share.of(inside),\n        recall=Share.of(torch.cat(recalled)),\n",
        "        precision=Share.of(torch.cat(recalled)),\n        recall=Share.of(inside),\n",
        ("tests/unit/test_kid_prc_isc.py",),
    ),
    Mutant(
        "a cancelled point that is worked on all the same",
        "eval_jobs/sweep.py",
        "                if not self.is_wanted(part.point):\n                    raise _Cancelled\n",
        "",
        ("tests/unit/test_sweep.py",),
    ),
    Mutant(
        "a new grid that is taken for an edited config",
        "hpc_gen/stages/run_setup.py",
        "        if again.identity == resolved.identity:\n",
        "        if again is not None:\n",
        ("tests/unit/test_sweep.py", "-k", "begins_while"),
    ),
    Mutant(
        "images of another point because their block has the same name",
        "eval_jobs/read_once.py",
        "            self._whole.clear()",
        "            pass",
        ("tests/unit/test_evaluate_worker.py", "-k", "same_names"),
    ),
    Mutant(
        "swapped adaLN chunks",
        "hpc_gen/methods/energy/model.py",
        "shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self",
        "scale_msa, shift_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self",
        ("tests/parity/test_golden.py", "-k", "energy-pd"),
    ),
    Mutant(
        "missing fsync",
        "hpc_gen/runtime/commit_stream.py",
        "        ops.fsync(self._descriptor, self.path)\n        self._durable_bytes = self.bytes\n",
        "        self._durable_bytes = self.bytes\n",
        ("tests/unit/test_commit.py", "tests/unit/test_kill_points.py"),
    ),
    Mutant(
        "host buffers that the training still writes to",
        "hpc_gen/training/checkpoint/host.py",
        "        return {name: _in_host(name, value, held) for name, value in share.items()}\n",
        "        return dict(share)\n",
        ("tests/unit/test_checkpoint_host.py",),
    ),
    Mutant(
        "a hole in what a load puts together",
        "hpc_gen/training/checkpoint/stored.py",
        "        if whole is None or filled != math.prod(sizes):\n",
        "        if whole is None:\n",
        ("tests/unit/test_bad_input_sharded.py", "tests/unit/test_checkpoint_pieces.py"),
    ),
    Mutant(
        "a proof that looks at the digest only",
        "hpc_gen/stages/prove_resume.py",
        "found.manifest == peer.manifest)\n",
        "True)\n",
        ("tests/unit/test_prove_resume.py",),
    ),
    Mutant(
        "any width will do",
        "hpc_gen/stages/train.py",
        "    width.check(config, detect(env.snapshot()).world_size)\n",
        "",
        ("tests/unit/test_width.py",),
    ),
    Mutant(
        "unreduced gradient",
        "hpc_gen/training/engines/buckets.py",
        "        self._pending.append(self._ranks.all_reduce_sum_async(self.flats[self._next], self._group))\n",
        "",
        ("tests/distributed/test_exact_resume.py",),
    ),
    Mutant(
        "gradients of blocks are means over ranks",
        "hpc_gen/training/engines/fsdp.py",
        "                module.set_gradient_divide_factor(1.0)\n",
        "",
        ("tests/distributed/test_engines.py", "-k", "computes and fsdp"),
    ),
    Mutant(
        "fused projections split as one",
        "hpc_gen/methods/energy/objective.py",
        'TensorSplit("column", fused=3)',
        'TensorSplit("column")',
        ("tests/distributed/test_engine_matrix.py", "-k", "tp"),
    ),
    Mutant(
        "rank-keyed noise",
        "hpc_gen/data/feed.py",
        "Stream(self._plan.seed, purpose)",
        "Stream(self._plan.seed + self._plan.rank, purpose)",
        ("tests/unit/test_feed.py",),
    ),
    Mutant(
        "EMA of the wrong step",
        "hpc_gen/training/loop.py",
        "            results = _step_all_turns(job, iteration.micro_batches)\n",
        "            job.ema.update(job.engine.trained_roles())\n"
        "            results = _step_all_turns(job, iteration.micro_batches)\n",
        ("tests/unit/test_reference_loop.py",),
    ),
    Mutant(
        "off-by-one resume",
        "hpc_gen/training/loop.py",
        "    feed = job.open_feed(job.state.images_seen, job.state.draw_counter)\n    job.progress.go_on",
        "    skip = job.config.global_batch if job.state.images_seen else 0\n"
        "    job.state.images_seen += skip\n"
        "    feed = job.open_feed(job.state.images_seen, job.state.draw_counter)\n    job.progress.go_on",
        ("tests/distributed/test_exact_resume.py",),
    ),
    Mutant(
        "label shift",
        "hpc_gen/methods/energy/objective.py",
        'draws["t"], batch["labels"]\n',
        'draws["t"], (batch["labels"] + 1) % self.num_classes\n',
        ("tests/unit/test_reference_loop.py",),
    ),
    Mutant(
        "unverified manifest",
        "hpc_gen/training/checkpoint/manifest.py",
        '        elif commit.sha256_file(path) != facts["sha256"]:\n',
        "        elif False:\n",
        ("tests/unit", "tests/distributed/test_exact_resume.py", "-k", "checkpoint or exact_resume"),
    ),
    Mutant(
        "positions without DINO's offset",
        "hpc_gen/tokenizers/dinov2_model.py",
        "OFFSET = 0.1 ",
        "OFFSET = 0.0 ",
        ("tests/parity/test_golden.py", "-k", "dino_tokenizer"),
    ),
    Mutant(
        "snippets that are not mirrored",
        "hpc_gen/tokenizers/dinov2.py",
        "(FLIP, pixels.flip(-1))",
        "(FLIP, pixels)",
        ("tests/unit/test_dinov2.py",),
    ),
    Mutant(
        "shortcut that keeps its input",
        "hpc_gen/tokenizers/vqgan_model.py",
        "return branch + (self.nin_shortcut(branch) if",
        "return branch + (branch if",
        ("tests/parity/test_golden.py", "-k", "vqgan"),
    ),
    Mutant(
        "units done without a claim",
        "hpc_gen/runtime/claims.py",
        "            if not claims.take(unit):\n",
        "            if not claims.take(unit) and False:\n",
        ("tests/unit/test_claims.py",),
    ),
    Mutant(
        "a cancelled job requeues itself",
        "slurm/requeue.py",
        "    if facts.told and not (facts.over_time or facts.preempted):\n",
        "    if False:\n",
        ("tests/unit/test_slurm_requeue.py",),
    ),
    Mutant(
        "srun's code alone decides",
        "slurm/requeue.py",
        "    code = facts.cause\n    if code is None:\n",
        "    code = None\n    if code is None:\n",
        ("tests/unit/test_slurm_requeue.py",),
    ),
    Mutant(
        "an element of an array is requeued by the number of the whole",
        "slurm/batch.py",
        """        'job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"',\n""",
        """        'job=""',\n""",
        ("tests/unit/test_slurm_scripts.py", "-k", "element"),
    ),
    Mutant(
        "all elements of an array of runs work on the first run",
        "slurm/batch.py",
        """'run="${runs[$SLURM_ARRAY_TASK_ID]}"'""",
        """'run="${runs[0]}"'""",
        ("tests/unit/test_slurm_scripts.py", "-k", "own_run"),
    ),
    Mutant(
        "what follows the training of one run waits for those of all",
        "slurm/arrays.py",
        "            last[place] = (array, element)\n",
        "            last[place] = (array, None)\n",
        ("tests/unit/test_slurm_arrays.py", "-k", "trainings"),
    ),
    Mutant(
        "a run is a mount of its own in a container",
        "slurm/batch.py",
        "*([] if within else [str(run)])",
        "str(run)",
        ("tests/unit/test_slurm_scripts.py", "-k", "bound"),
    ),
    Mutant(
        "the batch shell dies of the signal that it is to survive",
        "slurm/batch.py",
        """        "trap 'told=\\"$told TERM\\"' TERM",\n""",
        "",
        ("tests/unit/test_slurm_scripts.py", "-k", "survives"),
    ),
    Mutant(
        "all tasks of an array are submitted again",
        "slurm/graph.py",
        "sorted({place % num_tasks for place in missing}) or [0]",
        "list(range(num_tasks))",
        ("tests/unit/test_slurm_submission.py", "-k", "missing"),
    ),
    Mutant(
        "signals of the start-up are not held back",
        "slurm/hold_signals.py",
        "    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)\n",
        "",
        ("tests/unit/test_slurm_task.py", "-k", "start_up"),
    ),
    Mutant(
        "a coin of its own for the snippet",
        "hpc_gen/methods/gmem/objective.py",
        'drawn_B = draws[coin] if coin in draws else draws["flip"]\n',
        'drawn_B = draws[coin] if coin in draws else 1 - draws["flip"] if coin != "flip" else draws["flip"]\n',
        ("tests/unit/test_gmem.py", "-k", "coin"),
    ),
    Mutant(
        "an encoder that sees no image mirrored",
        "hpc_gen/methods/gmem/objective.py",
        "rows.flip(-1) if column == PIXELS else batch[column + FLIP]",
        "rows if column == PIXELS else batch[column + FLIP]",
        ("tests/unit/test_frozen.py", "-k", "stores"),
    ),
    Mutant(
        "a frozen network that the identity does not know",
        "hpc_gen/stages/origin.py",
        'changes[f"train.frozen.{name}.sha256"] = _frozen_sha256(name, network, workspace)\n',
        "pass\n",
        ("tests/unit/test_frozen.py", "-k", "identity"),
    ),
    Mutant(
        "a preview of the first rows in place of the chosen ones",
        "hpc_gen/sampling/preview.py",
        "rows = self._rows[ids % len(self._rows)] if len(self._rows) else ids % self._table.rows",
        "rows = ids % self._table.rows",
        ("tests/unit/test_preview.py", "-k", "rows"),
    ),
    Mutant(
        "Heun's second slope at the first time",
        "hpc_gen/diffusion/flow_solvers.py",
        "second = velocity(x + step * first, _times(there, x))",
        "second = velocity(x + step * first, _times(here, x))",
        ("tests/unit/test_flow.py",),
    ),
    Mutant(
        "rows of a block by their place in the order",
        "hpc_gen/data/ordered.py",
        "begin, stop = first - self._first, end - self._first\n",
        "begin, stop = first, end\n",
        ("tests/unit/test_ordered.py",),
    ),
    Mutant(
        "the block that follows is not announced",
        "hpc_gen/data/ordered.py",
        "            self._table.announce(self._next[1])\n",
        "",
        ("tests/unit/test_packed.py", "-k", "announced"),
    ),
    Mutant(
        "pictures that arrived are sent again",
        "hpc_gen/runtime/tracking_media.py",
        "        if path.is_dir():\n            commit.remove_tree(path)\n",
        "        pass\n",
        ("tests/unit/test_tracking_rows.py",),
    ),
    Mutant(
        "nobody is preempted where the controller is silent",
        "slurm/steer.py",
        '            commit.write_text(run.preempt_file, "hpc-gen preempt\\n")\n        return True\n',
        "            pass\n        return True\n",
        ("tests/unit/test_slurm_watch.py", "-k", "preempt"),
    ),
    Mutant(
        "official weights of another shape",
        "hpc_gen/methods/official.py",
        "        if flat[name].shape != value.shape:\n",
        "        if flat[name].ndim != value.ndim:\n",
        ("tests/unit/test_gmem.py", "tests/unit/test_energy_weights.py"),
    ),
)


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest in a copy of the project; its exit code and its last line."""
    argv = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    done = subprocess.run(
        argv,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return done.returncode, lines[-1] if lines else "no output"


def copy_project(target: Path) -> None:
    """The packages and tests, without caches."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target / name)


def turns_red(mutant: Mutant) -> bool:
    """Make the mistake in a copy, run its tests, print the verdict."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hpc-gen-mutant-") as folder:
        root = Path(folder)
        copy_project(root)
        path = root / mutant.file
        text = path.read_text()
        found = text.count(mutant.old)
        if found != 1:
            print(
                f"STALE    {mutant.name}: its text stands {found} times in {mutant.file}; update tests/mutants.py",
                flush=True,
            )
            return False
        path.write_text(text.replace(mutant.old, mutant.new))
        code, last = run_tests(root, mutant.tests)
    red = code == 1  # 1 = tests ran and failed; 2..5 = they did not run at all
    seconds = time.monotonic() - begun
    print(f"{'red' if red else 'NOT SEEN':8} {mutant.name} ({seconds:.0f} s): {last}", flush=True)
    return red


def main(words: list[str]) -> int:
    """Run the chosen mutants; 0 when each turned its tests red."""
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    unseen = [m.name for m in chosen if not turns_red(m)]
    print(f"{len(chosen) - len(unseen)} of {len(chosen)} mutants turned the tests red")
    return 1 if unseen or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
