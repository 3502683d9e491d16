"""The one door to time, and its fake."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from hpc_gen.runtime import clock


def test_the_real_clock_tells_the_time() -> None:
    assert abs(clock.now() - time.time()) < 5.0
    before = clock.monotonic()
    clock.sleep(0.01)
    assert 0.01 <= clock.monotonic() - before < 60.0


def test_a_fake_takes_its_place_until_the_block_ends() -> None:
    fake = clock.FakeClock(start=1000.0)
    with pytest.raises(KeyError), clock.use(fake):
        begun = clock.monotonic()
        clock.sleep(3600.0)
        fake.advance(1.0)
        assert (clock.now(), clock.monotonic() - begun) == (4601.0, 3601.0)
        raise KeyError
    assert clock.now() > 1e9


def test_process_start_lies_before_the_first_line_of_python() -> None:
    program = (
        "import time; first = time.time(); time.sleep(0.3)\n"
        "from hpc_gen.runtime import clock\n"
        "print(first - clock.process_start())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.0 <= float(done.stdout) + 0.02 < 30.0  # /proc counts in hundredths of a second
