"""Methods by name: what is registered can be imported, and a wrong name ends in one sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny_method
from pydantic import BaseModel, ValidationError

from hpc_gen.methods import registry
from hpc_gen.methods.registry import MethodEntry
from hpc_gen.runtime.errors import ExitCode, UserError


@pytest.mark.parametrize("name", sorted(registry.METHODS))
def test_every_registered_method_has_an_entry(name: str) -> None:
    found = registry.entry(name)
    assert issubclass(found.config, BaseModel) and issubclass(found.settings, BaseModel)
    for model in (found.config, found.settings):  # else a mistyped key of the section would pass unnoticed
        assert model.model_config.get("extra") == "forbid", f"{name}: {model.__name__}"
        assert model.model_config.get("frozen"), f"{name}: {model.__name__}"


def test_an_own_method_is_named_by_module_and_attribute() -> None:
    assert registry.entry("tiny_method:ENTRY") is tiny_method.ENTRY


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("enrgy", r"^unknown method 'enrgy' \(did you mean 'energy'\?\); known methods: .*energy"),
        ("zzz", "^unknown method 'zzz'; known methods: .*energy"),
        (
            "no_such_module:ENTRY",
            "^method 'no_such_module:ENTRY' cannot be imported .*No module named 'no_such_module'",
        ),
        ("tiny_method:ENTRIES", "^method 'tiny_method:ENTRIES' cannot be imported .*no attribute 'ENTRIES'"),
        (":ENTRY", "^method ':ENTRY' cannot be imported .*check the path"),
        (".tiny_method:ENTRY", "^method '.tiny_method:ENTRY' cannot be imported .*check the path"),
        ("tiny_method:", "^method 'tiny_method:' cannot be imported .*check the path"),
        ("tiny_method:TinyMethod", "^'tiny_method:TinyMethod' is a type, not a MethodEntry"),
    ],
)
def test_a_wrong_name_is_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as info:
        registry.entry(name)
    assert info.value.exit_code == ExitCode.USER
    assert "\n" not in str(info.value)


def test_typed_config_leaves_the_name_out_and_fills_in_defaults() -> None:
    found, config = registry.typed_config({"name": "tiny_method:ENTRY", "bad_at": [8]})
    assert isinstance(found, MethodEntry)
    assert config == tiny_method.Config(bad_at=(8,), bad_from=None)
    with pytest.raises(ValidationError, match="bad_form"):
        registry.typed_config({"name": "tiny_method:ENTRY", "bad_form": 8})


def test_typing_a_config_needs_no_torch() -> None:
    """`hpc-gen config show` and --dry-run stay quick: a second, not ten."""
    code = (
        "import sys; from hpc_gen.methods import registry; "
        "registry.METHODS; assert 'torch' not in sys.modules, 'the registry imports torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
