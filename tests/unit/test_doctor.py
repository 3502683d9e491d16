"""`doctor` believes only a real import, and says what an absence means."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hpc_gen.runtime import doctor


def test_import_is_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good_module.py").write_text("VALUE = 3\n")
    (tmp_path / "broken_module.py").write_text("raise OSError('its extension is missing')\n")
    (tmp_path / "hanging_module.py").write_text("import time; time.sleep(60)\n")
    (tmp_path / "crashing_module.py").write_text("import os; os.abort()\n")
    (tmp_path / "empty_folder").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.import_facts("good_module", "lambda m: {'value': m.VALUE}") == (True, {"value": 3}, "")
    assert doctor.import_facts("broken_module") == (False, {}, "OSError: its extension is missing")
    assert doctor.import_facts("empty_folder") == (
        False,
        {},
        "ImportError: only an empty folder of that name was found",
    )
    works, _, reason = doctor.import_facts("crashing_module")
    assert not works and reason
    monkeypatch.setattr(doctor, "IMPORT_TIMEOUT_S", 0.5)
    assert doctor.import_facts("hanging_module") == (False, {}, "its import took more than 0.5 s")


def test_package_that_is_installed_but_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "half_there.py").write_text("raise ImportError('no libcuda')\n")
    info = tmp_path / "half_there-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: half-there\nVersion: 1.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    check = doctor._package(doctor.Package("half-there", "half_there", "half of it is missing"))
    assert not check.ok and check.detail == "1.0 is installed but fails: ImportError: no libcuda"
    absent = doctor._package(doctor.Package("not-there-at-all", "not_there_at_all", "nothing"))
    assert not absent.ok and absent.detail == "not installed"


def test_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["numpy==0.1", "torch==2; extra == 'x'"])
    assert doctor._versions("numpy").endswith(" (hpc-gen is tested with ==0.1)")


def test_examine_and_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", (doctor.Package("pyyaml", "yaml", "no YAML", True),))
    monkeypatch.setattr(doctor, "PROGRAMS", (doctor.Program("no-such-program", "--version", "nothing"),))
    monkeypatch.setattr(doctor, "LOW_DISK_BYTES", 10**18)
    checks = doctor.examine(tmp_path / "not" / "made" / "yet")
    by_name = {check.name: check for check in checks}
    assert by_name["Python"].detail == f"{sys.version.split()[0]} at {sys.executable}"
    assert by_name["torch"].ok and "gloo" in by_name["torch"].detail
    assert by_name["pyyaml"].ok and not by_name["no-such-program"].ok
    assert not by_name["disk"].ok and doctor.healthy(checks)
    assert json.loads(doctor.to_json(checks))["healthy"] is True
    missing = doctor.Check("packages", "torch", False, "not installed", "nothing can train", required=True)
    assert not doctor.healthy([*checks, missing])


@pytest.mark.parametrize("thing", [*doctor.PACKAGES, *doctor.PROGRAMS])
def test_every_absence_has_a_meaning(thing: doctor.Package | doctor.Program) -> None:
    assert len(thing.meaning) > 10
