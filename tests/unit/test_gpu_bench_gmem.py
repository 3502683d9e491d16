"""The GPU bench of GMem: its plain re-statement is ours in names, shapes, outputs and losses; its page, clock and faults.

The cells themselves run in a process of their own, without pydantic, as on a machine that has torch and numpy alone.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path[:0] = [str(BENCH / "gpu"), str(BENCH)]

import bare  # noqa: E402 - after the path that makes it importable
import gmem_page  # noqa: E402
import gmem_plain  # noqa: E402
import gmem_sides  # noqa: E402
import gmem_step  # noqa: E402

from hpc_gen.config import loader  # noqa: E402
from hpc_gen.methods.gmem.objective import Gmem  # noqa: E402
from hpc_gen.runtime.ranks import Ranks  # noqa: E402

SCRIPT = BENCH / "gpu" / "gmem_step.py"
WITHOUT = "import runpy, sys; sys.modules['pydantic'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
DUMP = """
import json, sys
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "without":
    sys.modules["pydantic"] = None
import bare
stood_in = bare.make_importable()
import gmem_sides as s
setting = s.Setting(s.XL, s.Ranks.start())
section = s.train_section(setting, "fsdp", True).model_dump(mode="json")
print(json.dumps([stood_in, s.identity(setting), s.XL.model_dump(mode="json"), section]))
"""


@pytest.fixture
def sides() -> gmem_sides.Sides:
    return gmem_sides.Sides(gmem_sides.Setting(gmem_sides.TINY, Ranks.start()))


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder)


# -- the two sides --------------------------------------------------------------------------------------------------------


def test_the_plain_network_has_the_official_names_and_shapes() -> None:
    with torch.device("meta"):
        theirs = gmem_plain.PlainDiT(gmem_sides.XL)
    ours = Gmem(gmem_sides.XL).model
    assert {n: tuple(each.shape) for n, each in theirs.state_dict().items()} == {
        n: tuple(each.shape) for n, each in ours.state_dict().items()
    }
    assert sum(p.numel() for p in theirs.parameters()) == 683_120_800  # specs/gmem.md section 1


def test_outputs_and_losses_are_ours(sides: gmem_sides.Sides) -> None:
    """In fp32: velocity, projection and the whole loss of a batch whose flips and masks are drawn."""
    method, plain = sides._method(), sides._plain_network()
    ((columns, draws),), (reference,) = sides.batches("hpc-gen", 4, 1), sides.batches("plain", 4, 1)
    x, t, snippet = reference["x1"], torch.rand(4), reference["snippet"]
    velocity, projected = plain(x, t, snippet)
    wanted, wanted_projection = method.model.with_representations(x, t, snippet)
    torch.testing.assert_close(velocity, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(projected, wanted_projection, rtol=1e-4, atol=1e-5)
    (turn,) = method.turns(0, 0)
    terms = method.objective(turn, columns, draws).terms
    assert set(terms) == {"mse", "cosine", "projection"}
    total = sum(term.weight * term.sum / term.count for term in terms.values())
    torch.testing.assert_close(gmem_plain.loss_of(plain, reference), total, rtol=1e-5, atol=1e-5)


def test_the_experiment_is_the_published_one() -> None:
    """All keys of `method` but the input, and of `train` those that say what a step computes."""
    published = loader.load(bare.ROOT / "job_configs" / "gmem" / "sde_xl.yaml").experiment
    method = {key: value for key, value in published.method.items() if key != "name"}
    assert type(gmem_sides.XL).model_validate({**method, "input": "latents"}) == gmem_sides.XL
    section = gmem_sides.train_section(gmem_sides.Setting(gmem_sides.XL, Ranks.start()), "ddp", False)
    for key in ("precision", "optimizer", "ema", "engine", "deterministic", "threads", "schedule"):
        assert getattr(section, key) == getattr(published.train, key), key
    assert published.train.learning_rate == gmem_sides.RATE == gmem_plain.RATE


def test_without_pydantic_sections_are_the_same(tmp_path: Path) -> None:
    """Defaults, properties and the hash of the config."""
    said = [
        json.loads(python("-c", DUMP, str(SCRIPT.parent), how, folder=tmp_path).stdout) for how in ("with", "without")
    ]
    assert [each[0] for each in said] == [False, True]
    assert said[0][1:] == said[1][1:]


def test_the_stand_in_refuses_strange_and_missing_keys() -> None:
    class Section(bare.BaseModel):
        needed: int
        marked: int = bare.Field(default=3, json_schema_extra={})
        made: dict = bare.Field(default_factory=dict)

    assert Section(needed=1).model_dump() == {"needed": 1, "marked": 3, "made": {}}
    with pytest.raises(TypeError, match=r"has no key \['other'\]"):
        Section(needed=1, other=2)
    with pytest.raises(TypeError, match=r"lacks \['needed'\]"):
        Section()


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_what_an_engine_held_is_given_back(sides: gmem_sides.Sides, engine: str) -> None:
    """Else the second engine would not fit on the GPU beside the first."""
    device = sides.setting.device
    sides._method()
    try:
        sides.setting.ranks.mesh((1,), ("bench",))
        before = {storage.data_ptr() for storage in gmem_sides.storages(device)}
        step = sides.ours(engine, False)
        step(sides.batches("hpc-gen", 2, 1)[0])

        def held() -> int:
            found = {s.data_ptr(): s.nbytes() for s in gmem_sides.storages(device) if s.data_ptr() not in before}
            return sum(each for each in found.values() if each >= 1000)

        assert held() > 2_000_000
        del step
        gmem_sides.release(device, before, smallest=1000)
        assert held() == 0
    finally:
        sides.setting.ranks.stop()


# -- all cells ------------------------------------------------------------------------------------------------------------


def test_it_checks_itself_with_torch_and_numpy_alone(tmp_path: Path) -> None:
    arguments = ["--self-check", "--folder", str(tmp_path / "pages"), "--json", str(tmp_path / "found.json")]
    ran = python("-c", WITHOUT, str(SCRIPT), *arguments, folder=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "first losses agree" in ran.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert {(each["side"], each["engine"], each["compiled"]) for each in found} == {
        (cell.side, cell.engine, cell.compiled) for cell in gmem_step.CELLS
    }
    assert len(found) == 6
    for each in found:
        numbers = each["numbers"]
        assert numbers["images_per_s"] > 0 and numbers["tflops"] > 0, each
        assert numbers["mfu"] is None, "a CPU has no peak here"
        assert (numbers["graphs"] or 0) == (0 if not each["compiled"] else 3 if each["side"] == "plain" else 1), each
    (page,) = (tmp_path / "pages").iterdir()
    text = page.read_text()
    for told in (
        "its numbers mean nothing", "| peak | not known for this device: no MFU |", "bare.py stood in", "| commit |",
        "Command: `python tests/bench/gpu/gmem_step.py --self-check`; identity of the experiment: `",
        "| hpc-gen fsdp compile | 4 |", "plain, two calls, TF32 allowed as in the reference", "First losses agree",
    ):  # fmt: skip
        assert told in text, told
    assert str(tmp_path) not in text


def test_two_ranks_share_the_work(tmp_path: Path) -> None:
    """Under torchrun; one page, by rank 0."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    ran = python(*start, "--self-check", "--only", "ddp", "--batches", "2", "--folder", str(tmp_path), folder=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (page,) = tmp_path.glob("gmem_2x-cpu_*.md")
    assert "torchrun --nproc-per-node 2" in page.read_text() and "| hpc-gen ddp | 2 |" in page.read_text()
    assert ran.stdout.count("first losses agree") == 1


# -- what goes wrong ------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gmem_step.main([])
    assert "--self-check" in capsys.readouterr().err


class Trial:
    """A bench whose cells take no time and tell what they are told to."""

    def __init__(self, outcomes: dict[tuple[str, int], Any], *arguments: str, minutes: float = 10.0) -> None:
        _, given = gmem_step.arguments(["--folder", "unused", *arguments])
        setting = gmem_sides.Setting(gmem_sides.TINY, Ranks.start())
        clock = gmem_step.Clock(minutes, setting.ranks)
        clock._end = gmem_step.time.perf_counter() + 60 * minutes
        self.bench = gmem_step.Bench(given, setting, 1e9, clock, lambda bench: None)
        self.bench._build = lambda sides, cell: abs  # type: ignore[method-assign]
        self.bench._cell = self._cell  # type: ignore[method-assign]
        self.outcomes = outcomes

    def _cell(self, sides: Any, cell: Any, step: Any, size: int) -> dict[str, Any]:
        outcome = self.outcomes.get((cell.name, size))
        if isinstance(outcome, Exception):
            raise outcome
        return {"images_per_s": float(size), "losses": [1.0], **(outcome or {})}

    def told(self) -> list[tuple[str, int, str]]:
        self.bench.run()
        return [(cell.name, cell.batch, cell.told) for cell in self.bench.found]


def test_batches_grow_until_the_memory_is_full_and_compiled_ones_begin_there() -> None:
    full = {
        ("hpc-gen ddp", 64): torch.OutOfMemoryError("x"),
        ("hpc-gen ddp compile", 128): RuntimeError("CUDA out of memory"),
    }
    assert Trial(full, "--only", "hpc-gen ddp", "--batches", "128", "16", "32", "64").told() == [
        ("hpc-gen ddp", 16, ""),
        ("hpc-gen ddp", 32, ""),
        ("hpc-gen ddp", 64, "out of memory"),
        ("hpc-gen ddp compile", 32, ""),
        ("hpc-gen ddp compile", 64, ""),
        ("hpc-gen ddp compile", 128, "out of memory"),
    ]


def test_what_breaks_is_told_and_the_others_run() -> None:
    trial = Trial({("hpc-gen fsdp", 16): AttributeError("no such\nthing")}, "--only", "fsdp", "--batches", "16")
    assert trial.told() == [
        ("hpc-gen fsdp", 16, "failed: AttributeError: no such"),
        ("hpc-gen fsdp compile", 16, ""),
    ]
    assert gmem_step.faults(trial.bench, check=False) == ["hpc-gen fsdp, batch 16: failed: AttributeError: no such"]


def test_samplers_that_break_are_told() -> None:
    trial = Trial({}, "--only", "sampler")
    sides = SimpleNamespace(samplers=lambda images, points: {"hpc-gen": lambda: 1 / 0})
    trial.bench._sample(sides)  # type: ignore[arg-type]
    assert trial.bench.notes == ["The samplers: failed: ZeroDivisionError: division by zero."]


def test_it_begins_nothing_that_would_end_too_late() -> None:
    """Compiled cells are guessed at 90 s, others at 20 s, until one was seen."""
    assert Trial({}, "--only", "ddp", "--batches", "16", minutes=1.0).told() == [
        ("hpc-gen ddp", 16, ""),
        ("plain ddp", 16, ""),
        ("hpc-gen ddp compile", 0, "not run: the time was up"),
        ("plain ddp compile", 0, "not run: the time was up"),
    ]
    none = Trial({}, "--batches", "16", minutes=0.0)
    assert {told for *_, told in none.told()} == {"not run: the time was up"}
    assert none.bench.notes == ["The samplers were not run: the time was up."]


def test_a_sweep_keeps_to_its_share_of_the_time() -> None:
    trial = Trial({}, "--only", "hpc-gen ddp", "--batches", "16", "32")
    trial.bench.clock._longest = {False: 400.0, True: 0.0}  # seconds of a cell, of the 600 that two sweeps have
    assert trial.told() == [
        ("hpc-gen ddp", 16, ""),
        ("hpc-gen ddp", 32, "not run: its share of the time was up"),
        ("hpc-gen ddp compile", 16, ""),
        ("hpc-gen ddp compile", 32, ""),
    ]


def test_losses_that_differ_or_are_not_finite_are_faults() -> None:
    ours, plain = gmem_step.CELLS[0], gmem_step.CELLS[2]

    def of(first: float, second: float, batch: int = 4) -> list[str]:
        found = [
            replace(ours, batch=4, numbers={"losses": [first]}),
            replace(plain, batch=batch, numbers={"losses": [second]}),
        ]
        return gmem_step.faults(SimpleNamespace(found=found), check=False)  # type: ignore[arg-type]

    assert of(1.0, 1.019) == []
    assert len(of(1.0, 1.03)) == 1 and "first losses differ" in of(1.0, 1.03)[0]
    assert of(1.0, 1.03, batch=8) == []
    assert any("losses [nan]" in each for each in of(math.nan, 1.0))


def test_a_cell_that_did_not_run_fails_a_check_alone() -> None:
    bench = SimpleNamespace(found=[replace(gmem_step.CELLS[0], batch=4, told="out of memory")])
    assert gmem_step.faults(bench, check=False) == []  # type: ignore[arg-type]
    assert gmem_step.faults(bench, check=True) == ["hpc-gen ddp, batch 4: out of memory"]  # type: ignore[arg-type]


def test_mfu_stands_on_the_page_of_a_known_device(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial({("hpc-gen ddp", 64): {"mfu": 0.4567, "allocated_gib": 50.04}}, "--only", "ddp", "--batches", "64")
    trial.told()
    monkeypatch.setattr(gmem_page, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    text = gmem_page.page(trial.bench, [], stood_in=False)
    assert "| peak | 989.4 TFLOP/s in dense bf16 |" in text and "45.7% | 50.0 |" in text and "mean nothing" not in text
    assert gmem_page.file_name(trial.bench).startswith("gmem_nvidia-h100-80gb-hbm3_20")
