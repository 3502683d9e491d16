"""Keys of previews, validation and evaluation in training, of references and tracking: defaults, mistakes, identity."""

from __future__ import annotations

import pytest
from experiments import TINY, resolved

from hpc_gen.config import loader
from hpc_gen.config.errors import ConfigError

PREVIEW = "train.preview={every_images: 16, labels: [0, cat]}"
VALIDATE = "train.validate={every_images: 16, num_images: 8}"
ONLINE = "train.evaluate={num_images: 64, settings: {steps: 5}}"
EVALUATE = "evaluate={reference: {table: tables/toyval}, kid_subset_size: 64}"


@pytest.mark.parametrize(("section", "given"), [("preview", PREVIEW), ("validate", VALIDATE), ("evaluate", ONLINE)])
def test_an_average_that_is_absent_is_the_first_one(section: str, given: str) -> None:
    """It stands in the resolved config by name, survives a round trip, and null stays the raw weights."""

    def chosen(*more: str) -> object:
        found = resolved(given, EVALUATE, *more)
        again = loader.loads(found.to_yaml())
        assert again.identity == found.identity
        return getattr(again.experiment.train, section).ema

    two = "train.ema={slow: {decay: 0.99}, fast: {decay: 0.5}}"
    assert chosen() == "main"
    assert chosen(two) == "slow"
    assert chosen(two, f"train.{section}.ema=fast") == "fast"
    assert chosen(f"train.{section}.ema=null") is None
    assert chosen("train.ema={}") is None


def test_settings_are_typed_by_the_method() -> None:
    found = resolved(PREVIEW, ONLINE, EVALUATE).experiment.train
    assert found is not None and found.evaluate is not None and found.preview is not None
    assert found.evaluate.settings["steps"] == 5 and "guidance" in found.evaluate.settings
    assert "guidance" in found.preview.settings and found.evaluate.at_end
    with pytest.raises(ConfigError, match="unknown key 'train.evaluate.settings.stpes'; did you mean"):
        resolved(EVALUATE, "train.evaluate={num_images: 64, settings: {stpes: 5}}")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["train.preview={labels: [0]}"], "'train.preview' never happens"),
        (["train.preview={at_images: [8, 12], labels: [0]}"], r"'train.preview.at_images.1' = 12 is not a multiple of"),
        (
            ["train.preview={at_images: [0], labels: [0]}"],
            r"'train.preview.at_images.0' must be an integer of at least 1",
        ),
        (["train.preview={every_images: 8, labels: [1.5]}"], "'train.preview.labels.0' must be an integer or text"),
        (
            [PREVIEW, "train.preview.ema=mian"],
            "'train.preview.ema' = 'mian' is not an average of 'train.ema' .known: main",
        ),
        ([VALIDATE, "train.validate.ema=mian"], "'train.validate.ema' = 'mian' is not an average"),
        ([ONLINE, EVALUATE, "train.evaluate.ema=mian"], "'train.evaluate.ema' = 'mian' is not an average"),
        ([ONLINE], "'train.evaluate' takes metrics, extractor and reference from the section 'evaluate'"),
        ([ONLINE, EVALUATE, "train.evaluate.at_end=false"], "'train.evaluate' never happens"),
        (
            [ONLINE, EVALUATE, "train.evaluate.every_images=12"],
            "'train.evaluate.every_images' = 12 is not a multiple of",
        ),
        ([ONLINE, EVALUATE, "evaluate.kid_subset_size=65"], "'train.evaluate.num_images' = 64 is less than"),
        (["evaluate={reference: {}}"], "'evaluate.reference' names neither 'table' nor 'statistics'"),
        (["evaluate={reference: {statistics: a.npz, rows: 5}}"], "'evaluate.reference.rows' needs"),
        (
            ["evaluate={reference: {table: t, statistics_sha256: " + "ab" * 32 + "}}"],
            "'evaluate.reference.statistics_sha256' needs",
        ),
        (["tracking.loss_term=''"], "'tracking.loss_term' must be text that is not empty"),
    ],
)
def test_mistakes(given: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolved(*given)


def test_what_says_how_work_runs_is_no_part_of_the_identity() -> None:
    base = resolved(EVALUATE)
    for operation in ("tracking.loss_term=mse", "data.class_names=a.txt", "evaluate.reference.statistics=a.npz"):
        assert resolved(EVALUATE, operation).identity == base.identity
    for identity in (PREVIEW, VALIDATE, "train.evaluate={num_images: 64}"):
        assert resolved(EVALUATE, identity).identity != base.identity
    assert loader.loads(TINY).experiment.train.evaluate is None  # type: ignore[union-attr]
