"""Every mistake in an experiment is answered with its place, its key, what is allowed and, where there is one, the fix."""

from __future__ import annotations

import textwrap
from typing import Literal

import pytest
from pydantic import Field, model_validator

from hpc_gen.config import loader
from hpc_gen.config.base import PositiveInt, Section
from hpc_gen.config.errors import ConfigError, KeyProblem

GOOD = """\
name: toy
method: {name: energy, width: 8}
data:
  table: tables/toy
  validation_table: tables/toy-validation
encode:
  source: mnist
  image_size: 16
train:
  total_images: 6400
  global_batch: 64
  log_every: 640
  save_every: 1280
  optimizer:
    lr: 1e-3
sample:
  num_images: 128
evaluate:
  reference: {table: tables/toy-validation, rows: 128}
  kid_subset_size: 64
"""


def problems(text: str, *overrides: str) -> list[str]:
    """The sentences with which an experiment is refused."""
    with pytest.raises(ConfigError) as caught:
        loader.loads(textwrap.dedent(text), overrides, "toy.yaml")
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert caught.value.exit_code == 2
    return caught.value.problems


def with_line(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def test_good_is_good() -> None:
    assert loader.loads(GOOD).experiment.train is not None


FILE_CASES = [
    # unknown keys: the nearest in the section, the same word elsewhere, else the known ones
    (
        ("global_batch: 64", "globl_batch: 64"),
        "toy.yaml:11: unknown key 'train.globl_batch'; did you mean 'train.global_batch'?",
    ),
    (("lr: 1e-3", "lr: 1e-3\n  lr: 1"), "toy.yaml:16: unknown key 'train.lr'; did you mean 'train.optimizer.lr'?"),
    (
        ("lr: 1e-3", "lr: 1e-3\n    beta: [0.9, 0.95]"),
        "toy.yaml:16: unknown key 'train.optimizer.beta'; did you mean 'train.optimizer.betas'?",
    ),
    (
        ("  table: tables/toy\n", "  table: tables/toy\n  zzz: 1\n"),
        "toy.yaml:5: unknown key 'data.zzz'; known keys of 'data': feed, workers, stage_to, table, "
        "validation_table, shuffle_shards, prefetch, "
        "class_names, forecast, tokenizer",
    ),
    (("name: toy", "name: toy\ntrian: 1"), "toy.yaml:2: unknown key 'trian'; did you mean 'train'?"),
    # wrong types
    (
        ("total_images: 6400", "total_images: many"),
        "toy.yaml:10: 'train.total_images' must be an integer of at least 1, not 'many' (text)",
    ),
    (
        ("total_images: 6400", "total_images: 6.4e3"),
        "toy.yaml:10: 'train.total_images' must be an integer of at least 1, not 6400.0 (a number); write 6400",
    ),
    (
        ("total_images: 6400", "total_images: '6400'"),
        "toy.yaml:10: 'train.total_images' must be an integer of at least 1, not '6400' (text)",
    ),
    (
        ("total_images: 6400", "total_images: true"),
        "toy.yaml:10: 'train.total_images' must be an integer of at least 1, not true (true or false)",
    ),
    (
        ("total_images: 6400", "total_images:"),
        "toy.yaml:10: 'train.total_images' must be an integer of at least 1, not null (nothing)",
    ),
    (
        ("total_images: 6400", "total_images: 0"),
        "toy.yaml:10: 'train.total_images' must be an integer of at least 1, not 0 (an integer)",
    ),
    (
        ("lr: 1e-3", "lr: .nan"),
        "toy.yaml:15: 'train.optimizer.lr' must be a number of more than 0 or null, not nan (a number)",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  deterministic: 1"),
        "toy.yaml:14: 'train.deterministic' must be true or false, not 1 (an integer)",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  precision: bf61"),
        "toy.yaml:14: 'train.precision' must be one of 'fp32', 'bf16', not 'bf61' (text); did you mean 'bf16'?",
    ),
    (
        ("lr: 1e-3", "lr: 1e-3\n    betas: [0.9]"),
        "toy.yaml:16: 'train.optimizer.betas' must be a list of 2 items, each a number of at least 0 and less than 1, "
        "not [0.9] (a list)",
    ),
    (
        ("lr: 1e-3", "lr: 1e-3\n    betas: [0.9, 0.9, 0.9]"),
        "toy.yaml:16: 'train.optimizer.betas' must be a list of 2 items, each a number of at least 0 and less than 1, "
        "not [0.9, 0.9, 0.9] (a list)",
    ),
    (
        ("image_size: 16", "image_size: 16\n  background: [0, 0, 256]"),
        "toy.yaml:9: 'encode.background.2' must be an integer of at least 0 and at most 255, not 256 (an integer)",
    ),
    (
        ("image_size: 16", "image_size: 16\n  channels: 2"),
        "toy.yaml:9: 'encode.channels' must be one of 1, 3, not 2 (an integer)",
    ),
    (
        ("source: mnist", "source: mnst"),
        "toy.yaml:7: 'encode.source' must be one of 'mnist', 'emoji', 'cifar10', 'folder', 'tar', 'edm_zip', "
        "'parquet', not 'mnst' (text); did you mean 'mnist'?",
    ),
    (
        ("num_images: 128", "num_images: 128\n  checkpoint: newest"),
        "toy.yaml:18: 'sample.checkpoint' must be an integer of at least 0 or 'latest', not 'newest' (text)",
    ),
    (
        ("num_images: 128", "num_images: 128\n  tag: a/b"),
        "toy.yaml:18: 'sample.tag' must be a name of letters, digits, '_', '-' and '.' that begins with a letter or "
        "digit, not 'a/b' (text)",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  ema: {a b: {decay: 0.9}}"),
        "toy.yaml:14: 'train.ema.a b' is not a name that this section allows; use letters, digits, '_' and '-'",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  ema: {fast: 0.9}"),
        "toy.yaml:14: 'train.ema.fast' must be a mapping of keys, not 0.9 (a number)",
    ),
    (
        ("sample:\n  num_images: 128", "sample: [128]"),
        "toy.yaml:16: 'sample' must be a mapping of keys or null, not [128] (a list)",
    ),
    (
        ("kid_subset_size: 64", "kid_subset_size: 64\n  extractor: {sha256: abc}"),
        "toy.yaml:21: 'evaluate.extractor.sha256' must be 64 hexadecimal digits or null, not 'abc' (text)",
    ),
    # required keys
    (
        ("  global_batch: 64\n", ""),
        "toy.yaml:9: key 'train.global_batch' is required: an integer of at least 1 (images per optimizer step over all "
        "ranks)",
    ),
    (("method: {name: energy, width: 8}", "method: {}"), "toy.yaml:2: key 'method.name' is required: the name of a method, "
     "as in 'name: energy'"),
    (("method: {name: energy, width: 8}", "method: {name: 3}"), "toy.yaml:2: key 'method.name' is required: the name of a "
     "method, as in 'name: energy'"),
    # keys that contradict one another
    (
        ("log_every: 640", "log_every: 100"),
        "toy.yaml:12: 'train.log_every' = 100 is not a multiple of 'train.global_batch' = 64; use 64 or 128",
    ),
    (
        ("save_every: 1280", "save_every: 10"),
        "toy.yaml:13: 'train.save_every' = 10 is not a multiple of 'train.global_batch' = 64; use 64",
    ),
    (
        ("total_images: 6400", "total_images: 6401"),
        "toy.yaml:10: 'train.total_images' = 6401 is not a multiple of 'train.global_batch' = 64; use 6400 or 6464",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  stop_at_images: 100"),
        "toy.yaml:14: 'train.stop_at_images' = 100 is not a multiple of 'train.global_batch' = 64; use 64 or 128",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  validate: {every_images: 100, num_images: 8}"),
        "toy.yaml:14: 'train.validate.every_images' = 100 is not a multiple of 'train.global_batch' = 64; use 64 or 128",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  preview:\n    labels: [0]\n    every_images: 65"),
        "toy.yaml:16: 'train.preview.every_images' = 65 is not a multiple of 'train.global_batch' = 64; use 64 or 128",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  keep_every: 1344"),
        "toy.yaml:14: 'train.keep_every' = 1344 is not a multiple of 'train.save_every' = 1280; use 1280 or 2560",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  stop_at_images: 12800"),
        "toy.yaml:14: 'train.stop_at_images' = 12800 is beyond the end of training, 'train.total_images' = 6400; lower it",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  schedule: {warmup_images: 9999}"),
        "toy.yaml:14: 'train.schedule.warmup_images' = 9999 is beyond the end of training, 'train.total_images' = 6400; "
        "lower it",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  time_limit_s: 60"),
        "toy.yaml:14: 'train.time_limit_s' = 60 leaves no time before the save at 'train.save_before_limit_s' = 120; raise "
        "the first or lower the second",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  ranks: 3"),
        "toy.yaml:14: 'train.ranks' = 3 does not divide 'train.global_batch' = 64; choose ranks that do",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  ranks: 2\n  micro_batch: 24"),
        "toy.yaml:15: 'train.micro_batch' * 'train.ranks' = 24 * 2 does not divide 'train.global_batch' = 64; choose a "
        "micro-batch that divides each rank's share of 32",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  micro_batch: 32\n  coupling_group: 12"),
        "toy.yaml:15: 'train.coupling_group' = 12 does not divide 'train.micro_batch' = 32; choose whole groups",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  coupling_group: 12"),
        "toy.yaml:14: 'train.coupling_group' = 12 does not divide each rank's share of the global batch = 64; choose whole "
        "groups",
    ),
    (
        ("lr: 1e-3", "lr: 1e-3\n    blr: 1e-4"),
        "toy.yaml:15: exactly one of 'train.optimizer.lr' and 'train.optimizer.blr' must be given, but both are",
    ),
    (
        ("    lr: 1e-3", "    eps: 1e-6"),
        "toy.yaml:14: exactly one of 'train.optimizer.lr' and 'train.optimizer.blr' must be given, but neither is",
    ),
    (
        ("source: mnist", "source: folder"),
        "toy.yaml:7: 'encode.source' = 'folder' needs 'encode.source_path', the folder of the images",
    ),
    (
        ("num_images: 128", "num_images: 128\n  batch: 65"),
        "toy.yaml:18: 'sample.batch' = 65 is larger than 'sample.block_images' = 64; a batch lies inside one block",
    ),
    (
        ("num_images: 128", "num_images: 128\n  ema: mian"),
        "toy.yaml:18: 'sample.ema' = 'mian' is not an average of 'train.ema' (known: main); name one, or null",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  ema: {}"),
        "toy.yaml:17: 'sample.ema' = 'main' is not an average of 'train.ema' (known: none); name one, or null",
    ),
    (
        ("kid_subset_size: 64", "kid_subset_size: 129"),
        "toy.yaml:20: 'evaluate.kid_subset_size' = 129 exceeds 'evaluate.reference.rows' = 128; lower the first",
    ),
    (
        ("num_images: 128", "num_images: 32"),
        "toy.yaml:20: 'evaluate.kid_subset_size' = 64 exceeds 'sample.num_images' = 32; lower the first",
    ),
    (
        ("kid_subset_size: 64", "kid_subset_size: 64\n  tag: other"),
        "toy.yaml:21: 'evaluate.tag' = 'other' is not the set of samples made here, 'sample.tag' = 'main'; give both the "
        "same",
    ),
    (
        ("kid_subset_size: 64", "kid_subset_size: 64\n  metrics: [fid, kid, fid]"),
        "toy.yaml:21: 'evaluate.metrics' names fid twice; name each once",
    ),
    (
        ("  validation_table: tables/toy-validation\n", "  validation_table: tables/toy\n"),
        "toy.yaml:5: 'data.validation_table' is the training table; name another folder",
    ),
    (
        ("  validation_table: tables/toy-validation\n", ""),
        "toy.yaml:5: 'encode.validation' is true but 'data.validation_table' names no folder; set one, or "
        "encode.validation=false",
    ),
    (
        ("name: toy", "name: toy\nstages: [train, tran]"),
        "toy.yaml:2: stage 'tran' in 'stages' is not configured; configured: encode, train, sample, evaluate, report",
    ),
    (
        ("name: toy", "name: toy\nextra_stages: {bank: {worker: bank}}"),
        "toy.yaml:2: 'extra_stages.bank.worker' must be an entry of the form 'module:name', not 'bank' (text)",
    ),
    (
        ("name: toy", "name: toy\nextra_stages:\n  bank:\n    worker: a:b\n    after: [encod]"),
        "toy.yaml:5: 'extra_stages.bank.after' = ['encod'] cannot be satisfied: a stage is not configured or waits for "
        "this one; configured: encode, train, sample, evaluate, report",
    ),
    (
        ("name: toy", "name: toy\nextra_stages: {train: {worker: 'a:b'}}"),
        "toy.yaml:2: 'extra_stages.train' has the name of a built-in stage; choose another name",
    ),
    # YAML itself
    (
        ("global_batch: 64", "global_batch: 64\n  global_batch: 32"),
        "toy.yaml:12: key 'train.global_batch' is given twice (first at toy.yaml:11); keep one",
    ),
    (("lr: 1e-3", "lr: [1"), "toy.yaml:16: not valid YAML: expected ',' or ']', but got ':'"),
    (
        ("name: toy", "name: toy\n3: x"),
        "toy.yaml:2: the key '3' is not a word; put it in quotes",
    ),
    (
        ("name: toy", "name: toy\n? [a]\n: x"),
        "toy.yaml:2: the key (a list or mapping) is not a word; put it in quotes",
    ),
    (
        ("save_every: 1280", "save_every: 1280\n  ema: {'0.9999': {decay: 0.9999}}"),
        "toy.yaml:14: the key '0.9999' in 'train.ema' is empty or holds a dot, which separates key paths; rename it",
    ),
    (
        ("table: tables/toy\n", "table: !!python/name:os.system x\n"),
        "toy.yaml:4: the value of 'data.table' has the YAML tag 'tag:yaml.org,2002:python/name:os.system', which is not "
        "allowed; write it plainly",
    ),
    (
        ("method: {name: energy, width: 8}", "method: &m {name: energy, inner: *m}"),
        "toy.yaml:2: the anchor at 'method.inner' contains itself; write the value out",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), FILE_CASES, ids=[case[1][:60] for case in FILE_CASES])
def test_mistake_in_the_file(change: tuple[str, str], sentence: str) -> None:
    assert problems(with_line(*change)) == [sentence]


COMMAND_LINE_CASES = [
    ("train.globl_batch=64", "command line: unknown key 'train.globl_batch'; did you mean 'train.global_batch'?"),
    ("train.ranks=two", "command line: 'train.ranks' must be an integer of at least 1, not 'two' (text)"),
    ("train.ranks", "command line: 'train.ranks' is not of the form key.path=value, as in train.optimizer.lr=1e-4"),
    ("=3", "command line: '=3' is not of the form key.path=value, as in train.optimizer.lr=1e-4"),
    (
        "train..ranks=3",
        "command line: 'train..ranks=3' is not of the form key.path=value, as in train.optimizer.lr=1e-4",
    ),
    ("train.ranks=[1", "command line: the value of 'train.ranks' is not valid YAML: '[1'; quote it"),
    ("name.x=3", "command line: 'name.x' reaches into 'name', which is 'toy' and has no keys"),
    (
        "evaluate.metrics.0=fid",
        "command line: 'evaluate.metrics.0' reaches into the list 'evaluate.metrics'; give the whole list, as in "
        "'evaluate.metrics=[...]'",
    ),
    (
        "train.log_every=100",
        "command line: 'train.log_every' = 100 is not a multiple of 'train.global_batch' = 64; use 64 or 128",
    ),
    (
        "sample.settings={a: 1, a: 2}",
        "command line: key 'sample.settings.a' is given twice (first at command line); keep one",
    ),
]


@pytest.mark.parametrize(("override", "sentence"), COMMAND_LINE_CASES, ids=[case[0] for case in COMMAND_LINE_CASES])
def test_mistake_on_the_command_line(override: str, sentence: str) -> None:
    text = GOOD.replace("kid_subset_size: 64", "kid_subset_size: 64\n  metrics: [fid]")
    assert problems(text, override) == [sentence]


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "just words\n"])
def test_file_that_is_no_mapping(text: str) -> None:
    assert problems(text) == [
        "toy.yaml:1: an experiment is a mapping of sections such as 'train:', this file holds something else"
    ]


def test_second_document_is_refused() -> None:
    (sentence,) = problems(GOOD + "---\nname: other\n")
    assert sentence.startswith("toy.yaml:21: not valid YAML: ")


def test_several_mistakes_are_told_at_once() -> None:
    found = problems(with_line("total_images: 6400", "total_images: x"), "train.ranks=y", "seed=-1")
    assert found == [
        "command line: 'seed' must be an integer of at least 0 and less than 9223372036854775808, not -1 (an integer)",
        "toy.yaml:10: 'train.total_images' must be an integer of at least 1, not 'x' (text)",
        "command line: 'train.ranks' must be an integer of at least 1, not 'y' (text)",
    ]


def test_file_that_cannot_be_read(tmp_path) -> None:
    missing = tmp_path / "no.yaml"
    with pytest.raises(ConfigError, match=f"'{missing}' cannot be read: No such file or directory"):
        loader.load(missing)
    binary = tmp_path / "image.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read: not UTF-8 text"):
        loader.load(binary)


class ToyMethod(Section):
    """A method's section."""

    width: PositiveInt
    kind: Literal["tall", "wide"] = "tall"
    scale: tuple[float, float] = (1.0, 2.0)

    @model_validator(mode="after")
    def _even(self) -> ToyMethod:
        if self.width % 2:
            raise KeyProblem("method.width", f"'method.width' = {self.width} is odd; choose an even one")
        if self.width > 100:
            raise ValueError("too wide for a toy")
        return self


class ToySettings(Section):
    """A method's sampler settings."""

    steps: PositiveInt = 50
    guidance: float = Field(default=1.0, ge=0.0)


PREVIEW = "train.preview={every_images: 640, labels: [0], settings: {stps: 3}}"
METHOD_CASES = [
    (["method.widht=8"], "command line: unknown key 'method.widht'; did you mean 'method.width'?"),
    (["method.kind=wid"], "command line: 'method.kind' must be one of 'tall', 'wide', not 'wid' (text); did you mean 'wide'?"),
    (["method={name: energy}"], "command line: key 'method.width' is required: an integer of at least 1"),
    (["method.width=7"], "command line: 'method.width' = 7 is odd; choose an even one"),
    (["method.width=102"], "toy.yaml:2: 'method' is refused: too wide for a toy"),
    (["sample.settings.step=3"], "command line: unknown key 'sample.settings.step'; did you mean 'sample.settings.steps'?"),
    (["sample.settings.guidance=-1"], "command line: 'sample.settings.guidance' must be a number of at least 0, not -1 (an integer)"),
    ([PREVIEW], "command line: unknown key 'train.preview.settings.stps'; did you mean 'train.preview.settings.steps'?"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "sentence"), METHOD_CASES, ids=[case[1][:60] for case in METHOD_CASES])
def test_mistake_in_the_method_section(overrides: list[str], sentence: str) -> None:
    resolved = loader.loads(GOOD, overrides, "toy.yaml")
    with pytest.raises(ConfigError) as caught:
        loader.type_method(resolved, ToyMethod, ToySettings)
    assert str(caught.value) == sentence


def test_mistake_in_the_method_section_of_the_file_names_its_line() -> None:
    resolved = loader.loads(with_line("width: 8", "width: wide"), name="toy.yaml")
    with pytest.raises(ConfigError, match="^toy.yaml:2: 'method.width' must be an integer of at least 1, not 'wide'"):
        loader.type_method(resolved, ToyMethod, ToySettings)
