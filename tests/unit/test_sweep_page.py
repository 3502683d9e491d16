"""The page of a sweep: one self-contained file, readable on a phone and by keyboard; its CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace

import pytest
import torch
import toy_run
import yaml
from chromium import KEYBOARD, in_chromium, with_chromium

from eval_jobs import report, sweep, sweep_page, sweep_plan, sweep_table
from eval_jobs.charts import Spot, scatter_chart
from hpc_gen.stages import run_setup


@pytest.fixture(scope="module", autouse=True)
def _restore_determinism():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("workspace")
    toy_run.make_run(workspace)
    grid = {
        "name": "grid",
        "run": "toy",
        "axes": {"guidance": [1.0, 2.0], "steps": [1, 2]},
        "points": [{"guidance": 5.0, "steps": 1}],
        "sample": {"num_images": 20, "block_images": 10, "batch": 5},
        "evaluate": {"metrics": ["fid", "kid"]},
    }
    (workspace / "grid.yaml").write_text(yaml.safe_dump(grid))
    found, resolved = sweep_plan.plan(sweep_plan.read_grid(workspace / "grid.yaml"), workspace)
    folder = sweep_plan.apply(found, resolved, workspace)
    resolved = run_setup.load_run(folder)
    empty = report.render(folder, resolved)
    for stage in sweep_plan.STAGES:
        worker = getattr(sweep, stage)(toy_run.context(folder, resolved, workspace, stage))
        toy_run.do_units(folder, worker)
        worker.finish()
    worker = report.worker(toy_run.context(folder, resolved, workspace, "report"))
    assert toy_run.do_units(folder, worker) == ["page"]
    return folder, found, folder.report.read_text(), empty


def test_the_page_says_what_was_found(made):
    _, found, page, empty = made
    assert "5 of 5" in page and "points scored" in page and "0 of 5" in empty and "not scored yet" in empty
    assert page.count('<tr class="best">') == 1 and "Frechet distance (FID) over guidance" in page
    assert "against network evaluations per image" in page and "Frechet distance (FID) over steps" in page
    assert page.count("Images 0 to 9 of the point") == 5 and "singular covariance" in page
    assert "jackknife over 10 random groups of images" in page and "extractor.name" in page
    assert not re.search(r"https?://", page.replace("http://www.w3.org", "")) and "<script" not in page
    assert page.count("<section") == page.count("</section>")


def test_any_two_points_can_be_chosen_by_class_and_number(made):
    _, _, page, empty = made
    part = page[page.index('id="any"') : page.index('id="measured"')]
    assert part.count('type="radio"') == 10 and part.count(" checked>") == 2
    assert "guidance 5, steps 1, at 64 images" in part and "Images 0, 4, 8, 12, 16 of" in part
    assert 'id="any"' not in empty and "more are not shown" not in part


def test_of_many_points_the_best_of_each_checkpoint_are_among_those_to_choose(made):
    """Rows of a table with twenty points: eight are shown, in the order of the grid, one of every checkpoint."""
    folder, found, _, _ = made
    table = sweep_table.table_of(folder, found)
    rows = [
        replace(row, name=f"{row.name}-{c}", keys={**row.keys, "checkpoint": c})
        for c in (64, 128, 256, 512)
        for row in table.rows
    ]
    shown = sweep_page._sets(replace(table, rows=rows), ())
    assert len(shown) == 8
    places = [next(c for c in (64, 128, 256, 512) if f"checkpoint {c}," in one.name) for one in shown]
    assert set(places) == {64, 128, 256, 512} and places == sorted(places)


def test_numbers_beside_the_page(made):
    folder, found, _, _ = made
    rows = list(csv.DictReader(io.StringIO((folder.report.parent / "sweep.csv").read_text())))
    assert [row["point"] for row in rows] == list(found.points)
    assert float(rows[0]["fid"]) > 0 and float(rows[0]["fid_std"]) > 0 and rows[3]["nfe"] == "4.0"
    document = json.loads((folder.report.parent / "sweep.json").read_text())
    assert document["best"] in found.points
    assert float(rows[0]["kid"]) == document["points"][0]["metrics"]["kid"]["value"]


def test_the_same_sweep_has_the_same_page(made):
    folder, _, page, _ = made
    assert report.render(folder, run_setup.load_run(folder)) == page


def test_scatter_charts_bear_odd_points():
    assert scatter_chart("t", "u", "o", []) == "" and scatter_chart("t", "u", "o", [Spot(1.0, float("nan"), "x")]) == ""
    svg = scatter_chart("t", "u", "o", [Spot(0.0, 0.0, "a<b", 0.5, True), Spot(2.0, -1.0, "c", None, True)])
    assert "a&lt;b" in svg and svg.count("<circle") == 2 and 'class="edge"' in svg
    wide = scatter_chart("t", "u", "o", [Spot(1.0, 0.01, "low", 5.0), Spot(1.0, 100.0, "high")])
    assert "log" in wide  # a bar below zero does not break it


@with_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_in_chromium(made, width, tmp_path):
    """Nothing is wider than the window, and everything is reached and seen by keyboard."""
    folder = tmp_path / "width"
    folder.mkdir()
    assert int(in_chromium(made[2], width, "told = document.documentElement.scrollWidth", folder)) <= width
    assert in_chromium(made[2], width, KEYBOARD, tmp_path) == "all 0 open and close"
