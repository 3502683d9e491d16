"""Engines on two ranks against ddp, step by step: roles, formats, offload, the guard, plain use, states carried over.

The trials themselves are tests/support/engine_trials.py, run once for all tests here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine_trials
import pytest

SCRIPT = Path(engine_trials.__file__)
pytestmark = pytest.mark.timeout(600)  # the first test waits for all trials


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What each trial found."""
    done = subprocess.run([sys.executable, str(SCRIPT), "2"], capture_output=True, text=True, timeout=560, check=False)
    results: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        results.update(json.loads(line))
    missing = engine_trials.TRIALS.keys() - results.keys()
    assert not missing, f"{sorted(missing)}\n{done.stderr[-3000:]}"
    return results


def named(kind: str) -> list[str]:
    names = [name for name in engine_trials.TRIALS if name.startswith(kind)]
    assert names
    return names


SAME = [name for kind in ("two players", "offload", "checkpointing", "compile", "copies") for name in named(kind)]


@pytest.mark.parametrize("name", SAME)
def test_an_engine_computes_what_ddp_computes(found: dict[str, Any], name: str) -> None:
    """Several roles with a turn that differentiates inside, host memory, recomputed or compiled blocks: to rounding."""
    result = found[name]
    assert "error" not in result, result["error"]
    assert result["begun"] == 0.0  # the same initial values, to the bit, however they lie
    assert result["clipped"] > 0 and result["moved"] > 1e-3  # else this could not fail
    assert result["losses"] < 1e-6 and result["norms"] < 1e-5 and result["state"] < 1e-5, result
    assert result.get("graphs", 1) > 0, "nothing was compiled"


@pytest.mark.parametrize("name", named("bf16"))
def test_bf16_parameters_train_with_fp32_masters(found: dict[str, Any], name: str) -> None:
    """Initial masters are not rounded; losses are those of fp32 to the precision of bf16, and not to the bit."""
    result = found[name]
    assert "error" not in result, result["error"]
    assert result["begun"] == 0.0
    assert 0.0 < result["losses"] < 0.01, result
    assert 0.0 < result["state"] < 0.5 * result["moved"], result


@pytest.mark.parametrize("name", named("half"))
def test_fp16_trains_under_a_loss_scale_that_resumes_with_it(found: dict[str, Any], name: str) -> None:
    """Where the scaled loss overflows, nothing moves and the step counts as not finite."""
    result = found[name]
    assert "error" not in result, result["error"]
    assert result["begun"] == 0.0 and 0.0 < result["losses"] < 0.01, result
    assert 0.0 < result["state"] < 0.5 * result["moved"], result
    assert result["scale"][:2] == [65536.0, 2.0] and result["resumed"] == 0.0, result
    assert result["overflowed"] == [False, False] and result["unmoved"] == 0.0, result


def test_fp16_is_refused_where_there_is_none(found: dict[str, Any]) -> None:
    assert (
        "train.engine.param_dtype = fp16, but deepspeed has no fp16 on this cpu; remove it"
        in found["no half"]["sentence"]
    )


@pytest.mark.parametrize("name", named("guard"))
def test_a_step_that_is_not_finite_or_a_spike_changes_nothing(found: dict[str, Any], name: str) -> None:
    result = found[name]
    assert "error" not in result, result["error"]
    assert result["finite"] == [False] * 6 and result["good"] == [True] * 3
    assert result["moved"] == [0.0] * 3
    assert result["twin"] == 0.0  # a run that never saw them


@pytest.mark.parametrize("name", named("whole"))
def test_outside_of_steps_a_network_is_a_plain_one(found: dict[str, Any], name: str) -> None:
    """Ranks may use it unequally often; averages can be put in; training goes on as if nothing had been."""
    result = found[name]
    assert "error" not in result, result["error"]
    assert result["plain"] and result["outputs"] == 0.0 and result["twin"] == 0.0, result


@pytest.mark.parametrize("name", named("carried"))
def test_any_engine_goes_on_from_the_state_of_any_other(found: dict[str, Any], name: str) -> None:
    result = found[name]
    assert "error" not in result, result["error"]
    assert result["exact"] == 0.0
    assert result["after"] < 1e-5, result
