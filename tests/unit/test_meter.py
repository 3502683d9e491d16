"""MFU, peaks by name, the profiler's window, and the memory plan of --dry-run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import experiments
import pytest
from experiments import TINY, Workspace
from typer.testing import CliRunner

from hpc_gen.cli import app
from hpc_gen.config.observe import ProfileConfig
from hpc_gen.runtime.journal import read
from hpc_gen.stages import watching
from hpc_gen.training.device_peak import mfu, peak_of
from hpc_gen.training.meter import Meter, ProfileWindow


def test_mfu_is_work_over_peak() -> None:
    assert mfu(1e12, 100, 2.0, 1, 100.0) == pytest.approx(0.5)
    assert mfu(1e12, 100, 2.0, 4, 100.0) == pytest.approx(0.125)
    assert mfu(1e12, 100, 0.0, 1, 100.0) == 0.0
    assert Meter(flops_per_image=1e12, peak_tflops=100.0, devices=2).mfu(100, 2.0) == pytest.approx(0.25)
    assert Meter(peak_tflops=1.0).mfu(8, 1.0) is None and Meter(flops_per_image=1.0).mfu(8, 1.0) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA GH200 120GB", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 311.8),
        ("Graphics of tomorrow", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


def test_a_window_of_steps(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "profile" / "trace.json"
    window = ProfileWindow(ProfileConfig(start=2, steps=2), path, said.append)
    for step in range(6):
        assert path.exists() == (step >= 4)
        window.step()
    window.close()
    assert len(json.loads(path.read_text())["traceEvents"]) > 0 and len(said) == 1
    assert [each.name for each in path.parent.iterdir()] == ["trace.json"]


def test_a_window_that_is_cut_off_and_one_that_cannot_be_written(tmp_path: Path) -> None:
    said: list[str] = []
    window = ProfileWindow(ProfileConfig(start=0, steps=5), tmp_path / "a" / "trace.json", said.append)
    window.step()
    window.close()
    assert "no trace is written" in said[0] and not (tmp_path / "a").exists()
    (tmp_path / "b").write_text("a file where the folder should be")
    window = ProfileWindow(ProfileConfig(start=0, steps=1), tmp_path / "b" / "trace.json", said.append)
    window.step()
    window.step()
    assert "training goes on" in said[1]


def test_training_with_a_window_and_a_known_peak(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are those of a training without; the journal has FLOPs and MFU, the run folder the trace."""
    monkeypatch.setattr(watching, "_beside", lambda action: action())  # a run so short would be over before it
    plain, watched = workspace.run("plain", text=TINY), workspace.run("watched", text=TINY)
    overrides = ["train.peak_tflops=0.001", "train.profile.start=1", "train.profile.steps=2", "train.spans=each"]
    assert workspace.train(plain) == 0
    assert workspace.train(watched, *overrides, "train.stop_at_images=48") == 0
    monkeypatch.setattr("hpc_gen.stages.train_plan.measure", None)  # the next attempt knows it from the file
    assert workspace.train(watched, *overrides) == 0
    assert experiments.rows(plain) == experiments.rows(watched)
    assert len(list((watched.path / "profile").iterdir())) == 2
    events = read(watched)
    counted, again = [event.fields["flops_per_image"] for event in events if event.kind == "flops"]
    assert counted == json.loads((watched.path / "flops.json").read_text())["step"]["flops_per_image"] > 0
    assert again == counted
    for event in events:
        if event.kind == "interval" and event.fields["images"]:
            fields = event.fields
            seconds = fields["productive_s"] + fields["data_wait_s"] + fields["save_stall_s"]
            assert fields["mfu"] == pytest.approx(counted * fields["images"] / (seconds * 1e9), rel=1e-6)
    assert not any("mfu" in event.fields for event in read(plain))


def test_a_method_that_cannot_be_counted_trains_all_the_same(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*unused: object, **more: object) -> None:
        raise RuntimeError("a tensor without values")

    monkeypatch.setattr("hpc_gen.stages.train_plan.measure", refuses)
    run = workspace.run("odd", text=TINY)
    assert workspace.train(run, "train.peak_tflops=1.0") == 0
    limit = time.monotonic() + 60
    while not (said := [each for each in read(run) if each.fields.get("what") == "FLOPs not counted"]):
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert "a tensor without values" in said[0].fields["detail"]


def test_the_plan_for_many_ranks(tmp_path: Path) -> None:
    """As typed: no table, no GPU, 512 ranks that do not exist."""
    config = tmp_path / "big.yaml"
    text = TINY.replace("diffusion_timesteps: 50", "diffusion_timesteps: 50, num_classes: 4").replace(
        "global_batch: 8", "global_batch: 1024\n  engine: {name: fsdp}"
    )
    for name, images in (("total_images", 96), ("log_every", 16), ("save_every", 16)):
        text = text.replace(f"{name}: {images}", f"{name}: 1024")
    config.write_text(text)
    ran = CliRunner().invoke(app, ["run", str(config), "--dry-run", "--world-size", "512", "-w", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    lines = [line.removeprefix("memory").strip() for line in ran.output.splitlines() if line.startswith("memory")]
    assert lines[0] == "fsdp stage 3 on 512 ranks; bytes of the most loaded one"
    assert [line.split()[0] for line in lines[1:9]] == [
        "parameters", "copies", "gradients", "reduction", "optimizer", "averages", "activations", "together"
    ]  # fmt: skip
    assert "micro-batch of 2 images, 1 per step and rank" in lines[9] and "GFLOP per image" in lines[10]
    assert not (tmp_path / "runs").exists()
    refused = CliRunner().invoke(app, ["run", str(config), "--world-size", "512", "-w", str(tmp_path)])
    assert refused.exit_code != 0 and "--dry-run" in str(refused.exception)
    odd = CliRunner().invoke(app, ["run", str(config), "--dry-run", "--world-size", "3", "-w", str(tmp_path)])
    assert odd.exit_code != 0 and "does not divide" in str(odd.exception)
    unknown = tmp_path / "unknown.yaml"
    unknown.write_text(TINY)
    ran = CliRunner().invoke(app, ["run", str(unknown), "--dry-run", "--world-size", "2", "-w", str(tmp_path)])
    assert ran.exit_code == 0 and "memory      not known yet" in ran.output
