"""Experiments: YAML round trips, overrides, sources, hashes, stages, and what the keys mean."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hpc_gen.config import describe, loader, yaml_tree
from hpc_gen.config.base import PositiveInt, Section, is_operation
from hpc_gen.config.errors import ConfigError
from hpc_gen.config.experiment import Experiment
from hpc_gen.config.train import TrainConfig

TOY = """\
name: toy
method:
  name: energy
  width: 8
data:
  table: tables/toy
train:
  total_images: 6_400
  global_batch: 64
  log_every: 640
  save_every: 1280
  optimizer:
    blr: 1e-4
sample:
  num_images: 128
"""


class ToyMethod(Section):
    """A method's section."""

    width: PositiveInt
    depth: PositiveInt = 2


class ToySettings(Section):
    """A method's sampler settings."""

    steps: PositiveInt = 50


def toy(*overrides: str) -> loader.Resolved:
    return loader.loads(TOY, overrides, "toy.yaml")


# ---------------------------------------------------------------- reading


def test_numbers_and_words_follow_yaml_1_2() -> None:
    text = "a: 1e-4\nb: off\nc: 0o17\nd: 0x1F\ne: 1_000\nf: 12:30\ng: 2026-01-01\nh: ~\ni: -.inf\nj: yes\nk: 1.\nl: '1'\nm: True\n"
    value, sources = yaml_tree.parse(text, "f")
    assert value == {
        "a": 1e-4, "b": "off", "c": 15, "d": 31, "e": 1000, "f": "12:30", "g": "2026-01-01", "h": None,
        "i": -math.inf, "j": "yes", "k": 1.0, "l": "1", "m": True,
    }  # fmt: skip
    assert sources["a"] == "f:1" and sources["m"] == "f:13"


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(
        ["1e-4", "off", "null", "0x1F", "1_000", "~", "", "- a", "a: b", "#x", "2026-01-01", ".5", "1e400", "True"]
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abcdefgh_-0123456789", min_size=1), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(plain_values | st.text("\x85\u2028\u2029\ufeff \n\t\\\"'#:-a0", max_size=8))
@example("\x85")  # line breaks of Unicode that PyYAML once wrote plainly and read back as a space
@example("a\u2028b\u2029")
def test_what_is_dumped_is_read_back(value: object) -> None:
    text = yaml_tree.dump({"key": value})
    try:
        found, _ = yaml_tree.parse(text, "f")
    except ConfigError as error:
        # YAML has no way to write some control characters; refusing is fine, changing a value is not
        assert "not valid YAML" in str(error)
        return
    assert found == {"key": value}


def test_sources_name_file_line_and_command_line() -> None:
    found = toy("train.schedule.kind=cosine", "train.global_batch=128", "seed=3")
    assert found.sources["train.total_images"] == "toy.yaml:8"
    assert found.sources["train.optimizer.blr"] == "toy.yaml:13"
    assert found.sources["train.schedule.kind"] == "command line"
    assert found.sources["train.global_batch"] == "command line"
    assert found.sources["train"] == "toy.yaml:7"
    assert "train.keep_last" not in found.sources


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.optimizer.betas=[0.5, 0.9]", "train.optimizer.betas", [0.5, 0.9]),
        ("train.ema={fast: {decay: 0.5}, main: {decay: 0.9}}", "train.ema.fast.decay", 0.5),
        ("train.validate=null", "train.validate", None),
        ("sample.settings.steps=250", "sample.settings.steps", 250),
        ("sample.settings.respacing='250'", "sample.settings.respacing", "250"),
        ("report.title=a = b", "report.title", "a = b"),
        ("report.title=", "report.title", ""),
        ("train.optimizer={lr: 1e-4}", "train.optimizer.blr", None),
    ],
)
def test_overrides(override: str, key: str, value: object) -> None:
    assert loader.flat(toy(override))[key] == value


def test_overrides_replace_whole_sections_and_make_absent_ones() -> None:
    assert toy("train=null", "sample=null").experiment.train is None
    found = toy("data.validation_table=v", "train.validate.every_images=640", "train.validate.num_images=64")
    assert found.experiment.train is not None and found.experiment.train.validate is not None
    assert found.experiment.train.validate.num_images == 64


def test_experiment_is_frozen() -> None:
    experiment = toy().experiment
    with pytest.raises(ValidationError):
        experiment.seed = 3  # type: ignore[misc]


# ---------------------------------------------------------------- hashes


def test_resolved_yaml_has_the_same_hashes() -> None:
    first = loader.type_method(toy(), ToyMethod, ToySettings)
    again = loader.loads(first.to_yaml(), name="config.yaml")
    assert (again.identity, again.operation) == (first.identity, first.operation)
    assert loader.type_method(again, ToyMethod, ToySettings).identity == first.identity
    assert loader.diff(first, again) == []


def test_identity_is_pinned() -> None:
    """A changed default or meaning changes the identity of every experiment: it must not happen unseen."""
    assert toy().identity == PINNED_IDENTITY
    assert len(toy().operation) == 64


PINNED_IDENTITY = "9d77e3573f8acc2af6b38882fa24a4cb25d1c376441eb0a0918e61374cbacd73"


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("seed=1", "identity"),
        ("train.threads=2", "identity"),
        ("train.global_batch=128", "identity"),
        ("train.optimizer.blr=2e-4", "identity"),
        ("train.ema.main.decay=0.5", "identity"),
        ("sample.batch=32", "identity"),
        ("sample.settings.steps=3", "identity"),
        ("method.width=4", "identity"),
        ("data.shuffle_shards=2", "identity"),
        ("name=other", "operation"),
        ("train.ranks=4", "operation"),
        ("train.save_every=640", "operation"),
        ("train.stop_at_images=640", "operation"),
        ("train.keep_last=9", "operation"),
        ("sample.tasks=9", "operation"),
        ("data.table=elsewhere", "operation"),
        ("tracking.wandb=offline", "operation"),
        ("stages=[train]", "operation"),
    ],
)
def test_which_hash_a_key_belongs_to(override: str, what: str) -> None:
    base, changed = toy(), toy(override)
    differ = {name for name in ("identity", "operation") if getattr(base, name) != getattr(changed, name)}
    assert differ == {what}


def test_tasks_of_an_extra_stage_are_operation() -> None:
    one, two = (toy(f"extra_stages.x={{worker: 'a:b', tasks: {n}}}") for n in (1, 2))
    assert one.identity == two.identity and one.operation != two.operation
    assert one.identity != toy().identity


def test_method_pass_fills_defaults_into_the_identity() -> None:
    untyped = toy("train.preview={every_images: 640, labels: [1]}")
    typed = loader.type_method(untyped, ToyMethod, ToySettings)
    assert typed.experiment.method == {"name": "energy", "width": 8, "depth": 2}
    assert typed.experiment.sample is not None and typed.experiment.sample.settings == {"steps": 50}
    assert typed.experiment.train is not None and typed.experiment.train.preview is not None
    assert typed.experiment.train.preview.settings == {"steps": 50}
    given = loader.type_method(toy("method.depth=2", "sample.settings.steps=50"), ToyMethod, ToySettings)
    assert given.identity == loader.type_method(toy(), ToyMethod, ToySettings).identity
    assert given.identity != toy().identity


def test_identity_of_sections() -> None:
    sections = ("seed", "method", "data", "train")
    assert toy("sample.seed=4").identity_of(*sections) == toy().identity_of(*sections)
    assert toy("train.optimizer.blr=1").identity_of(*sections) != toy().identity_of(*sections)


def test_diff_and_changes() -> None:
    changed = loader.with_changes(toy(), {"train.stop_at_images": 640, "name": "twin"})
    assert loader.diff(toy(), changed) == [("name", "toy", "twin"), ("train.stop_at_images", None, 640)]
    assert changed.identity == toy().identity
    with pytest.raises(ConfigError, match="'train.stop_at_images' = 100 is not a multiple"):
        loader.with_changes(toy(), {"train.stop_at_images": 100})


# ---------------------------------------------------------------- meaning


def test_learning_rate_end_and_micro_batch() -> None:
    train = toy("train.stop_at_images=640").experiment.train
    assert train is not None
    assert train.learning_rate == pytest.approx(1e-4 * 64 / 256)
    assert (train.end_images, train.micro_batch_for(4)) == (640, 16)
    absolute = TrainConfig(
        total_images=64, global_batch=64, micro_batch=8, log_every=64, save_every=64, optimizer={"lr": 0.5}
    )
    assert (absolute.learning_rate, absolute.end_images, absolute.micro_batch_for(4)) == (0.5, 64, 8)


def test_stage_order() -> None:
    assert toy().experiment.stage_order() == ["train", "sample", "report"]
    assert toy("stages=[sample]").experiment.stage_order() == ["sample"]
    full = toy(
        "encode={source: mnist, image_size: 16, validation: false}",
        "extra_stages={late: {worker: 'a:b', after: [bank, train]}, bank: {worker: 'a:b', after: [encode]},"
        " second: {worker: 'a:b', after: [encode]}, first: {worker: 'a:b'}}",
    ).experiment
    assert full.stage_order() == ["first", "encode", "bank", "second", "train", "late", "sample", "report"]


def test_schema_says_what_every_key_means() -> None:
    facts = {fact.key: fact for fact in loader.key_facts()}
    assert facts["train.global_batch"].allowed == "an integer of at least 1"
    assert facts["train.global_batch"].default == "required"
    assert facts["train.ema"].default == "{main: {decay: 0.9999}}"
    assert facts["train.ema.NAME.decay"].allowed == "a number of at least 0 and less than 1"
    assert facts["train.ranks"].operation and not facts["train.threads"].operation
    mute = [key for key, fact in facts.items() if not fact.meaning and "a mapping" not in fact.allowed]
    assert mute == []
    schema = loader.schema()
    assert schema["$defs"]["TrainConfig"]["properties"]["ranks"]["operation"] is True
    json.dumps(schema)


def test_operation_marks_stand_on_leaves_only() -> None:
    """A section is never marked as a whole: a key added to it later would silently leave the identity."""

    def walk(model: type[Section]) -> None:
        for field in model.model_fields.values():
            section = describe.section_of(field.annotation)
            if section is not None:
                assert not is_operation(field)
                walk(section)

    walk(Experiment)


def test_config_imports_no_torch() -> None:
    code = "import sys; import hpc_gen.config.loader; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- the shipped experiments

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = sorted(REPOSITORY.glob("job_configs/*/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_experiment(path: Path) -> None:
    from hpc_gen.stages.run_setup import typed

    resolved = typed(loader.load(path))
    stem = path.stem.replace("_", "-")  # files are named like modules, runs like folders
    assert resolved.experiment.name in (stem, f"{path.parent.name}-{stem}")
    comment = path.read_text().split("\nname:")[0]
    command = f"hpc-gen run {path.relative_to(REPOSITORY)}"
    assert command in comment and "time:" in comment.lower() and "result:" in comment.lower()
    assert yaml.safe_load(path.read_text())["method"]["name"] == resolved.experiment.method["name"]


def test_there_are_demo_experiments() -> None:
    assert {path.stem for path in SHIPPED} >= {"mnist16", "emoji32"}


def test_a_section_of_operation_keys_changes_no_identity() -> None:
    told = toy("notify.command=[notify-send, done]")
    assert told.identity == toy().identity and told.operation != toy().operation
