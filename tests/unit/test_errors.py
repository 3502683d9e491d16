"""Exit codes and the nearest valid name."""

from __future__ import annotations

import pytest

from hpc_gen.runtime import errors
from hpc_gen.runtime.errors import ExitCode, StopRequested, nearest, reason
from hpc_gen.runtime.stop import Cause, Stop


def test_exit_codes_are_those_batch_scripts_know() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "DONE": 0,
        "USER": 2,
        "DATA": 64,
        "BUG": 70,
        "DIVERGED": 75,
        "REQUEUE": 85,
        "REQUEUE_ELSEWHERE": 86,
        "STOPPED": 87,
    }


@pytest.mark.parametrize(
    ("name", "code", "is_value_error"),
    [
        ("HpcGenError", 70, False),
        ("UserError", 2, True),
        ("DataError", 64, True),
        ("CheckpointError", 64, True),
        ("DivergedError", 75, False),
        ("FencedError", 87, False),
        ("RendezvousError", 86, False),
    ],
)
def test_each_error_ends_with_its_code(name: str, code: int, is_value_error: bool) -> None:
    error = getattr(errors, name)("what, where, fix")
    assert error.exit_code == code and isinstance(error, ValueError) is is_value_error
    assert isinstance(error, errors.HpcGenError) and str(error) == "what, where, fix"


def test_a_stop_carries_its_code() -> None:
    error = StopRequested(Stop(Cause.STOPPED, "file STOP"))
    assert (error.exit_code, str(error)) == (87, "stop requested: file STOP")
    assert StopRequested(Stop(Cause.TIME_LIMIT, "time limit")).exit_code == 85
    assert StopRequested.exit_code == ExitCode.BUG  # the class is untouched by its instances


def test_the_reason_of_a_library_is_one_short_line() -> None:
    assert reason(OSError(2, "No such file or directory")) == "[Errno 2] No such file or directory"
    assert reason(ValueError("first line.\nsecond")) == "first line" and reason(EOFError()) == "EOFError"
    assert reason(ValueError("x" * 999)) == "x" * 300 + " ..."


def test_nearest_names_one_or_none() -> None:
    assert nearest("globl_batch", ["global_batch", "micro_batch"]) == " (did you mean 'global_batch'?)"
    assert nearest("zzz", ["global_batch"]) == ""
    assert nearest("x", []) == ""
