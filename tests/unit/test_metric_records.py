"""Records of metrics: written and read back, compared only with their like."""

import json
from dataclasses import replace

import pytest

from hpc_gen.metrics.results import MetricFile, MetricRecord, compare, differing_fields, read
from hpc_gen.runtime.errors import DataError, UserError

MEASURE = {
    "extractor": {"name": "inception", "weights_sha256": "aa"},
    "reference": {"table": "tt", "rows": 100},
    "num_images": 50,
    "classes": "balanced",
}


def _record(value: float | None = 10.0, **changes) -> MetricRecord:
    record = MetricRecord("fid", value, None, None, MEASURE, {"run": "a", "checkpoint": {"images_seen": 64}})
    return replace(record, **changes)


def test_write_and_read(tmp_path):
    file = MetricFile("main", "f" * 64, (_record(), _record(None, name="isc", note="not available")))
    path = tmp_path / "metrics" / "main.json"
    file.write(path)
    assert read(path) == file
    assert json.loads(path.read_text())["metrics"][0]["measure"]["extractor"]["weights_sha256"] == "aa"
    assert read(path).get("isc").value is None
    with pytest.raises(UserError, match=r"no 'kid'; they have: fid, isc"):
        file.get("kid")


def test_comparison_is_about_the_subject():
    other = _record(7.0, subject={"run": "b", "checkpoint": {"images_seen": 128}})
    assert compare(_record(), other) == 3.0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"extractor": {"name": "inception", "weights_sha256": "bb"}}, r"extractor\.weights_sha256 is 'aa' .* 'bb'"),
        ({"reference": {"table": "uu", "rows": 100}}, r"reference\.table is 'tt' in one and 'uu' in the other"),
        ({"reference": {"table": "tt", "rows": 99}}, r"reference\.rows is 100 in one and 99"),
        ({"num_images": 60}, r"num_images is 50 in one and 60"),
        ({"classes": "uniform", "num_images": 60}, r"classes is 'balanced' .* \(and 1 more fields\)"),
    ],
)
def test_unlike_records_are_refused_by_the_field(changed, named):
    with pytest.raises(UserError, match=named):
        compare(_record(), _record(measure={**MEASURE, **changed}))


def test_absent_fields_differ():
    fewer = {key: value for key, value in MEASURE.items() if key != "classes"}
    assert differing_fields(MEASURE, fewer) == [("classes", "balanced", None)]


def test_other_metrics_and_missing_values_are_refused():
    with pytest.raises(UserError, match="'fid' and 'kid' are not the same metric"):
        compare(_record(), _record(name="kid"))
    with pytest.raises(UserError, match=r"no value \(extractor has no logits\)"):
        compare(_record(), _record(None, note="extractor has no logits"))


def test_a_metric_is_never_nan():
    with pytest.raises(DataError, match="'fid' came out as nan"):
        _record(float("nan"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}'])
def test_damaged_files_are_named(tmp_path, text):
    path = tmp_path / "main.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"main\.json is not a metrics file"):
        read(path)
    with pytest.raises(UserError, match="run the evaluate stage first"):
        read(tmp_path / "none.json")
