"""What a sampler measures (energies of the inner loop) reaches the samples' index and the report, whatever the tasks."""

import shutil

import pytest
import torch

from eval_jobs import report, sample
from hpc_gen.sampling.index import read_index
from tests.support import toy_run

ENERGY = (
    "method.variant=energy",
    "method.energy={grad_multiplier: 20.0, step_size: 0.5}",
    "sample.settings={steps: 2, inner_loop: true, inner_steps: 3}",
)


@pytest.fixture(autouse=True)
def _restore_determinism():
    yield
    torch.use_deterministic_algorithms(False)


def test_curves_add_up_over_blocks_and_are_shown(tmp_path):
    run, resolved = toy_run.make_run(tmp_path, *ENERGY)
    made = sample.worker(toy_run.context(run, resolved, tmp_path, "sample"))
    toy_run.do_units(run, made)
    made.finish()
    curves = read_index(run.samples("main")).curves
    change = curves["inner_energy_change"]
    assert change.counts == (40.0,) * 4  # 20 images, two solver steps, after 0 to 3 inner steps
    assert change.sums[0] == 0.0 and change.sums[3] < change.sums[1] < 0.0
    accepted = curves["energy_accept_rate"]
    assert accepted.counts == (120.0,) and 0 < accepted.sums[0] <= 120

    page = report.render(run, resolved)
    assert "Energy along the inner loop" in page and "inner steps" in page
    assert f"{accepted.sums[0] / 120:.4g}, mean of 120" in page

    shutil.rmtree(run.samples("main"))
    shutil.rmtree(run.ledger("sample"))
    for task in (1, 0):
        toy_run.do_units(run, sample.worker(toy_run.context(run, resolved, tmp_path, "sample", task=task, tasks=2)))
    sample.worker(toy_run.context(run, resolved, tmp_path, "sample")).finish()
    assert read_index(run.samples("main")).curves == curves


def test_of_a_sampler_that_measures_nothing_only_its_network_is_counted(tmp_path):
    run, resolved = toy_run.make_run(tmp_path)
    made = sample.worker(toy_run.context(run, resolved, tmp_path, "sample"))
    toy_run.do_units(run, made)
    made.finish()
    index = read_index(run.samples("main"))
    assert set(index.curves) == {"network_evaluations"}
    assert index.curves["network_evaluations"].means() == [2.0]  # two steps, no guidance
    assert "inner loop" not in report.render(run, resolved)
