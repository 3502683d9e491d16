"""The comparison engine itself: each rule of golden/README.md from its passing and its failing side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_compare import Produced, compare, first_match, json_differences, tensor_difference
from golden_files import GoldenError

INF, NAN = float("inf"), float("nan")


def close(glob: str = "out.*", rtol: float = 0.0, atol: float = 0.0) -> dict[str, Any]:
    return {"tensors": glob, "rule": "allclose", "rtol": rtol, "atol": atol}


def passes(ours: Any, golden: Any, rule: dict[str, Any]) -> bool:
    return tensor_difference(torch.as_tensor(ours), torch.as_tensor(golden), rule) is None


@pytest.mark.parametrize(
    ("ours", "golden", "rule", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], close(), True),
        ([1.0, 2.5], [1.0, 2.0], close(atol=0.5), True),
        ([1.0, 2.6], [1.0, 2.0], close(atol=0.5), False),
        ([11.0], [10.0], close(rtol=0.1), True),
        ([10.0], [9.0], close(rtol=0.1), False),  # relative to the expected value, not to ours
        ([1.0, 9.0], [1.0, 10.0], {"rule": "max_rel", "tol": 0.1}, True),
        ([2.01, 10.0], [1.0, 10.0], {"rule": "max_rel", "tol": 0.1}, False),
        ([0.0], [0.0], {"rule": "max_rel", "tol": 0.1}, True),
        ([1e-9], [0.0], {"rule": "max_rel", "tol": 0.1}, False),
        ([1, 2], [1, 2], {"rule": "exact"}, True),
        ([1, 2], [1, 3], {"rule": "exact"}, False),
        ([2**53], [2**53 + 1], {"rule": "exact"}, False),  # float64 could not tell these apart
        ([-(2**63)], [2**63 - 1], {"rule": "exact"}, False),
        ([True], [True], {"rule": "exact"}, True),
        ([True], [False], {"rule": "exact"}, False),
        ([0.0] * 9 + [5.0], [0.0] * 10, {"rule": "quantile", "q": 0.8, "atol": 0.0, "max_atol": 5.0}, True),
        ([0.0] * 9 + [5.1], [0.0] * 10, {"rule": "quantile", "q": 0.8, "atol": 0.0, "max_atol": 5.0}, False),
        # Linear interpolation: the 0.5 quantile of the differences 0 and 1 is 0.5.
        ([0.0, 1.0], [0.0, 0.0], {"rule": "quantile", "q": 0.5, "atol": 0.5, "max_atol": 1.0}, True),
        ([0.0, 1.0], [0.0, 0.0], {"rule": "quantile", "q": 0.5, "atol": 0.49, "max_atol": 1.0}, False),
    ],
)
def test_numeric_rules(ours: Any, golden: Any, rule: dict[str, Any], expected: bool) -> None:
    assert passes(ours, golden, rule) is expected


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ([10, 20, 30, 41], True),
        ([10, 20, 31, 41], False),
        ([10, 20, 30, 42], False),
        ([10, 20, 30, 40], True),
    ],
)
def test_uint8(ours: list[int], expected: bool) -> None:
    rule = {"rule": "uint8", "max_levels": 1, "max_fraction": 0.25}
    golden = torch.tensor([10, 20, 30, 40], dtype=torch.uint8)
    assert passes(torch.tensor(ours, dtype=torch.uint8), golden, rule) is expected


def test_uint8_does_not_wrap_and_wants_uint8() -> None:
    rule = {"rule": "uint8", "max_levels": 1, "max_fraction": 1.0}
    low, high = torch.tensor([0], dtype=torch.uint8), torch.tensor([255], dtype=torch.uint8)
    assert not passes(low, high, rule)
    assert not passes(torch.tensor([0]), low, rule)


ALL_RULES = [
    close(rtol=1e9, atol=1e9),
    {"rule": "max_rel", "tol": 1e9},
    {"rule": "exact"},
    {"rule": "quantile", "q": 0.5, "atol": 1e9, "max_atol": 1e9},
]


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: str(rule["rule"]))
class TestInfinityAndNan:
    def test_equal_infinities_pass(self, rule: dict[str, Any]) -> None:
        assert passes([INF, -INF, 1.0], [INF, -INF, 1.0], rule)

    @pytest.mark.parametrize(
        ("ours", "golden"),
        [(INF, -INF), (1.0, INF), (INF, 1.0), (NAN, NAN), (NAN, 1.0), (1.0, NAN), (INF, NAN)],
    )
    def test_others_fail(self, rule: dict[str, Any], ours: float, golden: float) -> None:
        assert not passes([ours, 1.0, 1.0], [golden, 1.0, 1.0], rule)

    def test_an_infinity_widens_no_limit(self, rule: dict[str, Any]) -> None:
        strict = {**rule, **{name: 0.0 for name in ("rtol", "atol", "tol", "max_atol") if name in rule}}
        assert not passes([INF, 1.1], [INF, 1.0], {**strict, "rtol": 1e-3, "tol": 1e-3})

    def test_shapes_must_be_equal(self, rule: dict[str, Any]) -> None:
        assert not passes([[1.0, 1.0]], [1.0, 1.0], rule)
        assert not passes([1.0], 1.0, rule)

    def test_scalars_and_empty_tensors(self, rule: dict[str, Any]) -> None:
        assert passes(1.0, 1.0, rule)
        assert not passes(NAN, 1.0, rule)
        assert passes([], [], rule)


def test_half_precision_is_compared_in_double() -> None:
    ours, golden = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.float16)
    assert passes(ours, golden, {"rule": "exact"})


def test_first_matching_glob_wins_and_star_crosses_dots() -> None:
    rules = [close("out.a.*", atol=1.0), close("out.*", atol=2.0)]
    assert first_match("out.a.b.c", rules) is rules[0]
    assert first_match("out.b", rules) is rules[1]
    assert first_match("out.A.b", rules) is rules[1]  # case sensitive
    assert first_match("OUT.b", rules) is None
    assert first_match("out.a[0].b", [close("out.a[[]0].*")]) is not None


def test_unmatched_outputs_and_gradients_fail_but_inputs_do_not() -> None:
    tensors = {name: torch.zeros(1) for name in ("out.a", "grad.b", "in.c", "param.d")}
    lines = compare(Produced(tensors), tensors, [close("out.z")], {})
    assert [line.split(":")[0] for line in lines] == ["grad.b", "out.a"]


def test_missing_output_fails_and_surplus_does_not() -> None:
    one = torch.zeros(1)
    assert compare(Produced({"out.x": one}), {"out.a": one}, [close()], {}) == ["out.a: not produced by the handler"]
    assert compare(Produced({"out.a": one, "out.x": one}), {"out.a": one}, [close()], {}) == []


def test_info_is_not_checked_and_shields_what_it_matches() -> None:
    rules = [{"tensors": "out.noise", "rule": "info", "why": "not reproducible"}, close()]
    golden = {"out.noise": torch.tensor([NAN]), "out.a": torch.zeros(1)}
    assert compare(Produced({"out.a": torch.zeros(1)}), golden, rules, {}) == []


def test_parameters_are_checked_only_where_a_rule_names_them() -> None:
    golden = {"param.w": torch.ones(1), "out.a": torch.zeros(1)}
    produced = Produced({"param.w": torch.zeros(1), "out.a": torch.zeros(1)})
    assert compare(produced, golden, [close("*")], {}) == []
    assert len(compare(produced, golden, [close("out.*"), {"tensors": "param.*", "rule": "exact"}], {})) == 1


def test_json_rules_are_recursive() -> None:
    record = {"table": {"a": [1.0, {"b": 2.0}], "text": "x"}}
    rules = [{"json": "table", "rule": "allclose", "rtol": 0.0, "atol": 0.1}]
    good = {"a": [1.05, {"b": 1.95}], "text": "x"}
    assert compare(Produced(json={"table": good}), {}, rules, record) == []
    for bad in (
        {"a": [1.2, {"b": 2.0}], "text": "x"},
        {"a": [1.0, {"b": NAN}], "text": "x"},
        {"a": [1.0, {"c": 2.0}], "text": "x"},
        {"a": [1.0], "text": "x"},
        {"a": [1.0, {"b": 2.0}], "text": "y"},
        {"a": [1.0, {"b": 2.0}]},
        {"a": [1.0, {"b": True}], "text": "x"},
        [],
    ):
        assert compare(Produced(json={"table": bad}), {}, rules, record), bad
    assert compare(Produced(), {}, rules, record) == ["json table: not produced by the handler"]


def test_json_paths_are_dotted_globs_and_the_first_rule_wins() -> None:
    record = {"config": {"x": {"u": 1, "v": 2}}}
    rules = [
        {"json": "config.x.u", "rule": "info"},
        {"json": "config.x.*", "rule": "exact"},
    ]
    assert compare(Produced(json={"config.x.v": 2}), {}, rules, record) == []
    assert compare(Produced(json={"config.x.v": 3}), {}, rules, record)
    whole = [{"json": "config*", "rule": "exact"}]
    assert compare(Produced(json={"config": {"x": {"u": 1, "v": 2}}}), {}, whole, record) == []


def test_a_rule_for_a_value_inside_wins_over_a_later_one_for_the_whole() -> None:
    record = {"x": {"u": 1.0, "v": {"w": 2.0}}}
    loose = {"json": "x.v.w", "rule": "allclose", "rtol": 0.0, "atol": 1.0}
    whole = {"json": "x", "rule": "exact"}
    found = {"x": {"u": 1.0, "v": {"w": 2.5}}}
    assert compare(Produced(json=found), {}, [loose, whole], record) == []
    assert compare(Produced(json=found), {}, [whole, loose], record) == ["json x.v.w: " + EXACT_HALF]
    info = {"json": "x.v", "rule": "info"}
    assert compare(Produced(json={"x": {"u": 1.0}}), {}, [info, whole], record) == []
    assert compare(Produced(json={"x": {"u": 1.0, "z": 0}}), {}, [info, whole], record)


EXACT_HALF = "exact broken: 1 of 1 values differ; largest difference 0.5 at [0] (2.5 instead of 2.0)"


@pytest.mark.parametrize(("ours", "golden"), [(1, True), (True, 1), ("1", 1), (None, 0), (1, None), ([1], 1)])
def test_json_types_are_not_mixed(ours: Any, golden: Any) -> None:
    assert json_differences(ours, golden, {"rule": "exact"}, "x")


def test_json_integers_and_floats_are_numbers() -> None:
    assert json_differences(1, 1.0, {"rule": "exact"}, "x") == []


@pytest.mark.parametrize(
    "rule",
    [
        {"tensors": "out.*", "rule": "nearly"},
        {"tensors": "out.*"},
        {"tensors": "out.*", "rule": "allclose", "rtol": 0.1},
        {"tensors": "out.*", "rule": "max_rel", "tol": "small"},
        {"tensors": "out.*", "rule": "max_rel", "tol": -1.0},
        {"tensors": "out.*", "rule": "max_rel", "tol": NAN},
        {"tensors": "out.*", "json": "x", "rule": "exact"},
        {"tensors": ["out.*"], "rule": "exact"},
        {"rule": "exact"},
        {"json": "nowhere", "rule": "exact"},
    ],
)
def test_malformed_rules_are_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(GoldenError):
        compare(Produced({"out.a": torch.zeros(1)}), {"out.a": torch.zeros(1)}, [rule], {"x": 1})


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(GoldenError, match="nothing to compare"):
        compare(Produced(), {"in.x": torch.zeros(1)}, [], {})
