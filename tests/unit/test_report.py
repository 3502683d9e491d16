"""The report: one self-contained page from a run folder, whole or half done; charts that say what the rows say."""

import html
import html.parser
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from chromium import KEYBOARD, in_chromium, with_chromium

from eval_jobs import evaluate, report, sample
from eval_jobs.charts import LOG_ABOVE, Mark, Series, label, line_chart, log_ticks, thin, ticks
from hpc_gen.config import loader
from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.journal import Journal
from hpc_gen.sampling.images import grid, png_bytes
from hpc_gen.stages import run_setup
from tests.support import toy_run

START = 1_700_000_000.0


def write_journal(run, images: int = 64, step: int = 8, seconds: float = 10.0) -> None:
    """Two attempts of training, the first preempted half-way and resumed from its last save, then sample units."""
    fake = clock.FakeClock(START)
    with clock.use(fake):
        for attempt, (begin, end) in enumerate(((0, images // 2), (images // 2 - step, images)), start=1):
            journal = Journal(run, attempt, "train")
            journal.event(
                "attempt_start",
                world_size=2,
                rank=0,
                host="node1",
                process_start=fake.now() - 3,
                resumed_from=begin or None,
                identity="x",
            )
            for seen in range(begin + step, end + 1, step):
                fake.advance(seconds)
                journal.event(
                    "interval",
                    images_seen=seen,
                    images=step,
                    productive_s=seconds * 0.9,
                    data_wait_s=seconds * 0.05,
                    save_stall_s=seconds * 0.01,
                    other_s=seconds * 0.02,
                )
                data = {
                    "loss": 1.0 / (1 + seen / step) + 0.05,
                    "mse": 0.5,
                    "learning_rate": 1e-3,
                    "grad_norm": 2.0 + seen % 16,
                }
                if seen % (4 * step) == 0:
                    data["validation/loss"] = data["loss"] * 1.1
                journal.row(seen, data)
                if seen % (2 * step) == 0:
                    journal.event("save_committed", images_seen=seen, bytes=1000, stall_s=0.1, write_s=0.5)
            code, cause = (85, "signal SIGTERM") if attempt == 1 else (0, "done")
            journal.event("attempt_end", exit_code=code, cause=cause, images_seen=end)
            journal.close()
            fake.advance(2 * seconds)
        journal = Journal(run, 3, "sample")
        journal.event("attempt_start", world_size=1, rank=0, process_start=fake.now())
        journal.event("unit_begin", unit="000000")
        fake.advance(seconds)
        journal.event("unit_committed", unit="000000", seconds=seconds, bytes=10)
        journal.event("attempt_end", exit_code=0, cause="done")
        journal.close()


def write_second_set(workspace, run) -> None:
    """Samples and metrics of an earlier checkpoint under another tag, one metric of them measured otherwise."""
    early = ("sample.tag=early", "evaluate.tag=early", "sample.checkpoint=32", "evaluate.kid_subset_size=8")
    resolved = run_setup.typed(loader.loads(toy_run.EXPERIMENT, early))
    toy_run.write_checkpoint(run, resolved, workspace, images_seen=32)
    for stage, factory in (("sample", sample.worker), ("evaluate", evaluate.worker)):
        made = factory(toy_run.context(run, resolved, workspace, stage))
        toy_run.do_units(run, made)
        made.finish()


def write_previews(run) -> None:
    run.previews.mkdir(exist_ok=True)
    for seen in range(8, 97, 8):
        images = torch.full((4, 3, 8, 8), seen * 2, dtype=torch.uint8)
        commit.write_bytes(run.previews / f"{seen:012d}.png", png_bytes(grid(images, 4, scale=4)))


@pytest.fixture(scope="module", autouse=True)
def _restore_determinism():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("workspace")
    run, resolved = toy_run.make_run(workspace)
    for stage, factory in (("sample", sample.worker), ("evaluate", evaluate.worker)):
        made = factory(toy_run.context(run, resolved, workspace, stage))
        toy_run.do_units(run, made)
        made.finish()
    write_second_set(workspace, run)
    write_journal(run)
    write_previews(run)
    made = report.worker(toy_run.context(run, resolved, workspace, "report"))
    assert toy_run.do_units(run, made) == ["page"]
    return workspace, run, resolved, run.report.read_text()


class _Reader(html.parser.HTMLParser):
    """Checks nesting and collects tags, ids and links."""

    VOID = frozenset({"meta", "img", "br", "hr", "input", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def _read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    assert not reader.open
    return reader


def test_page_is_well_formed_and_self_contained(whole):
    page = whole[3]
    reader = _read(page)
    names = {tag for tag, _ in reader.tags}
    assert "script" not in names and "link" not in names and "iframe" not in names
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in reader.tags:
        source = attributes.get("src") or attributes.get("href") or ""
        assert source == "" or source.startswith(("data:image/png;base64,", "#")), source
        assert not source.startswith("#") or source[1:] in ids
        if tag == "img":
            assert attributes["alt"] and attributes["width"] and attributes["height"]
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
        if "scroll" in (attributes.get("class") or "").split():
            assert attributes["tabindex"] == "0" and attributes["aria-label"]
    assert not re.search(r"https?://", page.replace("http://www.w3.org", ""))
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_page_says_what_happened(whole):
    _, run, resolved, page = whole
    assert "64" in page and "of 64 images seen in training" in page
    assert "attempts, interrupted once" in page
    assert "preempted, state saved (signal SIGTERM)" in page
    assert "attempt 2 went on from 24 images" in page
    assert resolved.identity in page and resolved.operation in page
    assert "Frechet distance (FID)" in page and "extractor has no logits" in page
    assert "extractor.name" in page and "subject" not in page
    assert "steps 2" in page and "seed" in page
    assert "goodput" in page and "save stall" in page
    assert page.count('class="bar') == 3
    assert page.count('class="save"') == 5
    assert "global_batch: 8" in page


def test_grid_shows_a_class_per_column(whole):
    assert "Images 0 to 19 of 20; each column is one of the 4 classes" in whole[3]


def test_previews_are_thinned_from_first_to_last(whole):
    page = whole[3]
    assert page.count("Samples after") == 8
    assert "Samples after 8 images" in page and "Samples after 96 images" in page


def test_the_same_run_gives_the_same_page_and_nothing_is_done_again(whole):
    workspace, run, resolved, page = whole
    again = report.worker(toy_run.context(run, resolved, workspace, "report"))
    assert toy_run.do_units(run, again) == []
    idle = Journal(run, 4, "report")
    idle.event("attempt_start", world_size=1, rank=0)
    idle.event("unit_begin", unit="page")
    idle.event("attempt_end", exit_code=0, cause="done")
    idle.close()
    nothing_to_do = Journal(run, 5, "sample")
    nothing_to_do.event("attempt_start", world_size=1, rank=0)
    nothing_to_do.event("attempt_end", exit_code=0, cause="done")
    nothing_to_do.close()
    assert report.render(run, resolved) == page
    more = Journal(run, 6, "evaluate")
    more.event("unit_begin", unit="samples-000000")
    more.close()
    changed = report.worker(toy_run.context(run, resolved, workspace, "report"))
    assert changed.fingerprint() != again.fingerprint()
    (run.journal / "0006_evaluate_0.jsonl").unlink()


def test_a_run_that_has_not_begun_has_a_page(tmp_path):
    run, resolved = toy_run.make_run(tmp_path, checkpoint=False)
    page = report.render(run, resolved)
    _read(page)
    assert "Nothing has run yet." in page
    assert "Sample plan" not in page and "<svg" not in page


def test_names_are_escaped(tmp_path):
    run, resolved = toy_run.make_run(tmp_path, "report.title='<b>a & b</b>'", checkpoint=False)
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in report.render(run, resolved)


def test_damaged_parts_are_named_and_the_rest_is_shown(whole, tmp_path):
    workspace, run, resolved, _ = whole
    path = run.metrics("main")
    content = path.read_text()
    path.write_text("{")
    with (run.journal / "0003_sample_0.jsonl").open("a") as stream:
        stream.write('{"t": 17')
    page = report.render(run, resolved)
    path.write_text(content)
    assert "main.json is not a metrics file" in page
    assert "1 lines of the journal were cut off by kills" in page
    assert "Sample plan" in page


def test_non_finite_losses_make_gaps(tmp_path):
    run, resolved = toy_run.make_run(tmp_path, checkpoint=False)
    journal = Journal(run, 1, "train")
    for seen, loss in ((8, 1.0), (16, math.nan), (24, math.inf), (32, 0.5), (40, 0.4)):
        journal.row(seen, {"loss": loss})
    journal.close()
    page = report.render(run, resolved)
    _read(page)
    path = re.search(r'class="line s0" d="([^"]+)"', page)[1]
    assert path.count("M") == 2
    assert "killed without a word" in page


def test_sets_of_samples_stand_side_by_side(whole):
    page = whole[3]
    assert "main, at 64 images · early, at 32 images" in page
    assert "Grid of 20 generated images of &#39;main&#39;" in page and "images of &#39;early&#39;" in page
    part = page[page.index('id="side"') : page.index('id="metrics"')]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", part, flags=re.DOTALL)
    words = [re.sub(r"<[^>]*>", " ", cell).split() for cell in cells]
    fid = next(i for i, cell in enumerate(words) if cell[:2] == ["Frechet", "distance"])
    left, right, difference = (float(cells[fid + i].split(" ")[0]) for i in (1, 2, 3))
    assert left != right and difference == pytest.approx(right - left, abs=2e-3)
    assert "no difference: &#39;kid&#39; was measured in two ways: settings.subset_size is 8 in one and 10" in part
    assert "no difference: &#39;isc&#39; has no value (not available: extractor has no logits)" in part
    assert "<td>checkpoint images seen</td><td>64</td><td>32</td>" in part and "<td>seed</td>" not in part
    assert part.count("<details") == 1


def test_metrics_over_checkpoints_only_of_what_was_measured_alike(whole):
    part = whole[3][whole[3].index('id="curves"') : whole[3].index('id="training"')]
    assert "Frechet distance (FID) by checkpoint" in part and "Precision by checkpoint" in part
    assert "Kernel distance" not in part  # other subsets
    assert part.count('class="dot s0"') == 2 * part.count("<svg")


def test_any_two_sets_can_be_chosen_by_class_and_number(whole):
    """Without scripts: radio buttons, and styles that show the chosen ones."""
    part = whole[3][whole[3].index('id="any"') : whole[3].index('id="near"')]
    assert part.count('type="radio"') == 4 and part.count(" checked>") == 2
    assert part.count('class="one left') == 2 and part.count('class="one right') == 2
    assert "Images 0, 4, 8, 12, 16 of &#39;main&#39;, a" in part  # the class's name, and its images' numbers


def test_nearest_training_images(whole):
    """By pixels; a copy of a training image is found, with its row, and what was found is kept."""
    from eval_jobs import neighbours
    from hpc_gen.sampling.index import read_index

    workspace, run, resolved, page = whole
    assert "Nearest training images" in page and "32 training images" in page
    index = read_index(run.samples("main"))
    images, where = neighbours._images(run, resolved)
    assert where == "training images" and images.rows == 32
    found = neighbours._search(images.read([7, 30]), images)
    assert [rows[0] for rows in found["rows"]] == [7, 30] and [d[0] for d in found["distances"]] == [0.0, 0.0]
    assert all(
        len(rows) == 3 and distances == sorted(distances) for rows, distances in zip(found["rows"], found["distances"])
    )
    kept = run.report.parent / "neighbours-main.json"
    document = json.loads(kept.read_text())
    assert document["rows"] == neighbours._search(index.read(range(8)), images)["rows"]
    neighbours._SEARCHED.clear()
    assert neighbours._kept(run, index, images) == {"rows": document["rows"], "distances": document["distances"]}
    assert neighbours.file_of(index, run, resolved) == ("neighbours-main.json", kept.read_text())


def test_numbers_lie_beside_the_page(whole):
    folder = whole[1].report.parent
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith(
        "tag,metric,value,std,spread,note,measure.num_images,measure.classes,measure.extractor.name"
    )
    assert len(lines) == 1 + 2 * 6 and lines[1].startswith("main,fid,")
    records = json.loads((folder / "metrics.json").read_text())
    assert {record["tag"] for record in records} == {"main", "early"}
    assert float(lines[1].split(",")[2]) == records[0]["value"]


def test_samples_without_images_have_a_report(tmp_path):
    run, resolved = toy_run.make_run(tmp_path, "sample.output=features", "evaluate.metrics=[fid]")
    for stage, factory in (("sample", sample.worker), ("evaluate", evaluate.worker)):
        made = factory(toy_run.context(run, resolved, tmp_path, stage))
        toy_run.do_units(run, made)
        made.finish()
    page = report.render(run, resolved)
    _read(page)
    assert "Features only: the images were not kept." in page and "What could not be shown" not in page


def test_one_set_of_samples_stands_beside_nothing(tmp_path):
    run, resolved = toy_run.make_run(tmp_path)
    made = sample.worker(toy_run.context(run, resolved, tmp_path, "sample"))
    toy_run.do_units(run, made)
    made.finish()
    page = report.render(run, resolved)
    assert "Side by side" not in page and "Metrics by checkpoint" not in page and "Sample plan" in page
    _read(page)


def test_damaged_images_of_one_set_leave_the_others(whole):
    _, run, resolved, page = whole
    path = next((run.samples("early") / "units").glob("*/000001.png"))
    content = path.read_bytes()
    path.write_bytes(content[:50])
    damaged = report.render(run, resolved)
    path.write_bytes(content)
    _read(damaged)
    assert damaged.count("cannot be read as an image") == 1 and "Side by side" not in damaged
    assert damaged.count("Sample plan") == 1 and page.count("Sample plan") == 2


def test_faults_are_told_in_the_table(tmp_path):
    run, resolved = toy_run.make_run(tmp_path, checkpoint=False)
    journal = Journal(run, 1, "train")
    journal.event("attempt_start", world_size=1, rank=0)
    for number in range(7):
        journal.event("fault", what="preview failed", detail=f"<disk {number} is full>")
    journal.event("rollback", images_seen=24, resumed_from=16)
    journal.event("non_finite", images_seen=24)
    journal.event("save_committed", images_seen=16)
    journal.row(24, {"loss": 1.0})
    journal.close()
    page = report.render(run, resolved)
    _read(page)
    assert "fault: preview failed: &lt;disk 4 is full&gt;" in page and '<td class="right wide">1</td>' in page
    table = page[page.index("<tbody>") :]
    assert "disk 5" not in table and "and 3 more faults" in table and "1 steps were not finite and left out" in table
    assert "rollback: from 24 to 16 images" in page  # marked on the time line


@with_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window_in_chromium(whole, width, tmp_path):
    opened = re.sub("<details([^>]*)>", r"<details\1 open>", whole[3].replace(" open>", ">"))
    assert opened.count("<details") == opened.count(" open>")
    told = in_chromium(opened, width, "told = document.documentElement.scrollWidth", tmp_path)
    assert int(told) <= width


@with_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_everything_is_reached_and_seen_by_keyboard_in_chromium(whole, width, tmp_path):
    told = in_chromium(whole[3], width, KEYBOARD, tmp_path)
    assert told == f"all {whole[3].count('<details')} open and close"


@with_chromium
def test_the_page_is_seen_to_be_without_a_skip_link(whole, tmp_path):
    """The measurement above can fail."""
    assert "no hidden skip link first" in in_chromium(whole[3].replace('class="skip"', ""), 390, KEYBOARD, tmp_path)


# ---------------------------------------------------------------- charts


def test_ticks_are_round_and_cover():
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0.0, 64_000.0, wanted=4) == [0.0, 20_000.0, 40_000.0, 60_000.0]
    assert ticks(-3.0, 3.0) == [-2.0, 0.0, 2.0]
    assert ticks(5.0, 5.0) == [5.0]
    assert log_ticks(0.001, 10.0) == pytest.approx([0.001, 0.01, 0.1, 1.0, 10.0])
    assert log_ticks(0.15, 0.9) == pytest.approx([0.2, 0.5])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (1e-4, "0.0001"),
        (2.5e-5, "2.5e-5"),
        (1500, "1500"),
        (20_000, "20k"),
        (1_200_000, "1.2M"),
    ],
)
def test_labels(value, text):
    assert label(value) == text


def test_thinning_keeps_spikes_and_order():
    points = [(float(i), math.sin(i / 50)) for i in range(10_000)]
    points[5_003] = (5_003.0, 99.0)
    kept = thin(points)
    assert len(kept) <= 402
    assert (5_003.0, 99.0) in kept
    assert kept == sorted(kept)
    assert thin(points[:50]) == points[:50]


def test_chart_is_valid_svg_with_its_words():
    points = [(float(x), 1.0 / x) for x in range(1, 60)]
    svg = line_chart("Loss <a>", "loss", [Series("loss", points)], [Mark(20.0, 'attempt 2 "went" on')])
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"].startswith("Loss <a> over images seen")
    assert "log" in svg  # 1 / 60 to 1 spans more than LOG_ABOVE
    assert LOG_ABOVE < 59
    assert root.find(".//title").text == 'attempt 2 "went" on'
    places = [float(number) for number in re.findall(r"[ML]([\d.]+) ", root.find("path").attrib["d"])]
    assert places == sorted(places)
    assert places[0] >= 52 and places[-1] <= 408


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [0.0, 0.0], [-1.0, 1.0], [1e-9, 2e-9]])
def test_charts_of_flat_and_single_values(values):
    svg = line_chart("x", "y", [Series("x", [(float(i), value) for i, value in enumerate(values)])])
    ElementTree.fromstring(svg)
    assert "nan" not in svg and "inf" not in svg


def test_nothing_finite_no_chart():
    assert line_chart("x", "y", [Series("x", [(1.0, math.nan)])]) == ""
    assert line_chart("x", "y", []) == ""
