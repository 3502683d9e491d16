"""The GPU bench's own copy of the networks is ours: names, shapes, outputs, FLOPs; and it runs on a CPU as typed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from solo import train_config

from hpc_gen.methods.energy.config import EnergyConfig
from hpc_gen.methods.energy.model import PureDiffusion
from hpc_gen.methods.energy.objective import EnergyDiffusion
from hpc_gen.training.fake_step import measure

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu" / "train_step.py"
VARIANTS = pytest.mark.parametrize("variant", ["standard", "energy"])


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_train_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_train_step"] = module
    spec.loader.exec_module(module)
    return module


def config(shape: Any, variant: str) -> EnergyConfig:
    return EnergyConfig(
        variant=variant, input="latents", image_size=8 * shape.side, tokenizer_stride=8, channels=shape.channels,
        patch_size=shape.patch, hidden=shape.width, depth=shape.depth, heads=shape.heads, label_dropout=0.0,
    )  # fmt: skip


@VARIANTS
def test_names_and_shapes_are_those_of_dit_xl(bench: ModuleType, variant: str) -> None:
    with torch.device("meta"):
        theirs = bench.DiT(bench.XL, variant == "energy")
        ours = PureDiffusion(config(bench.XL, variant), bench.CLASSES).dit
    assert {n: tuple(p.shape) for n, p in theirs.named_parameters()} == {
        n: tuple(p.shape) for n, p in ours.named_parameters()
    }
    assert sum(p.numel() for p in theirs.parameters()) > 670e6


@VARIANTS
def test_outputs_are_ours(bench: ModuleType, variant: str) -> None:
    objective = bench.seeded(bench.TINY, variant == "energy")
    ours = PureDiffusion(config(bench.TINY, variant), bench.CLASSES)
    ours.dit.load_state_dict(objective.dit.state_dict())
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([0, 500, 999]), torch.tensor([0, 7, 1000])
    torch.testing.assert_close(objective.dit(x, t, y), ours(x, t, y), rtol=1e-4, atol=1e-6)


@VARIANTS
def test_flops_are_ours(bench: ModuleType, variant: str) -> None:
    method = EnergyDiffusion(config(bench.TINY, variant), bench.CLASSES)
    found = measure(method, {"latents": ("float32", (4, 8, 8)), "labels": ("int64", ())}, train_config(), 2)
    assert bench.flops_per_image(bench.TINY, variant == "energy") == found.flops_per_image


def test_it_checks_itself_without_anything_of_ours(tmp_path: Path) -> None:
    """Copied to a folder of its own, with torch alone to import."""
    script = tmp_path / "train_step.py"
    script.write_text(SCRIPT.read_text())
    assert "hpc_gen" not in {
        line.split()[1].split(".")[0]
        for line in script.read_text().splitlines()
        if line.startswith(("import ", "from "))
    }
    command = [sys.executable, "-P", str(script), "--self-check", "--json", str(tmp_path / "found.json")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "the engines agree" in ran.stdout and ran.stdout.count("refused: torch.compile") == 2


def test_without_a_gpu_it_says_so(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main([])
    assert "--self-check" in capsys.readouterr().err


def test_a_difference_between_engines_fails_the_check(bench: ModuleType) -> None:
    good = {"losses": [1.0, 0.5], "images_per_s": 1.0, "gflop_per_image": 1.0}
    assert bench.check({"standard ddp": good, "standard fsdp": {**good, "losses": [1.0, 0.51]}}) == 1
    assert bench.check({"standard ddp": good, "standard fsdp": good, "energy ddp": "out of memory"}) == 1
    assert bench.check({"standard ddp": {**good, "losses": [float("nan")]}}) == 1
    assert bench.check({"standard ddp": good, "energy ddp compile": "refused: x"}) == 0
