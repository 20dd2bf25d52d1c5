"""The report: what it says, what it does where something is missing, and how a browser shows it."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nibabel as nib
import numpy as np
import pytest
from conftest import REPOSITORY, run_tiny
from torch.utils.tensorboard import SummaryWriter

from pipeline.commands.report import main
from pipeline.drawing import class_color
from pipeline.evaluation.scores import score_case, write_scores
from pipeline.reporting.report import choose_cases, choose_classes, write_report
from pipeline.reporting.run_files import SplitScores

NAMES = ["background", "dim", "bright"]
SCALE = {"precision#init_scale": 2.0**22, "amp": True, "amp_dtype": "float16", "device": "cpu"}


@pytest.fixture(scope="module")
def finished_run(dataset: Path) -> Path:
    """A run in float16 with skipped steps, and scores of six cases; of all modules the same."""
    return make_run(dataset)


@functools.cache
def make_run(dataset: Path) -> Path:
    run_dir = dataset.parent / "reported" / "a run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        assert run_tiny(dataset, run_dir, max_epochs=3, **SCALE) == 0
    shutil.rmtree(run_dir / "scores", ignore_errors=True)
    add_scores(run_dir, dataset)
    write_report(run_dir)
    return run_dir


def add_scores(run_dir: Path, dataset: Path) -> None:
    """Scores as a run leaves them: from an exact prediction to shifted ones, one class missed."""
    folder, rows, cases = run_dir / "scores" / "validation_best", [], {}
    folder.mkdir(parents=True)
    for shift, label_file in enumerate(sorted((dataset / "labelsTr").glob("*.nii.gz"))):
        case = label_file.name.removesuffix(".nii.gz")
        image = nib.load(label_file)
        label = np.asarray(image.dataobj)
        pred = np.roll(label, shift, axis=0)
        if shift == 3:
            pred[pred == 2] = 0  # missed
        if shift == 4:
            label, pred = label * (label < 2), pred * (pred < 2)  # absent
        nib.save(nib.Nifti1Image(pred, image.affine), folder / label_file.name)
        paths = {"image": dataset / "imagesTr" / label_file.name, "label": label_file}
        cases[case] = {key: os.path.relpath(path, run_dir) for key, path in paths.items()}
        scored = score_case(pred, label, spacing_mm=(1, 1, 1.5), class_names=NAMES, tolerance_mm=1)
        rows += [{"case_id": case, "person": case, **row} for row in scored]
    write_scores(folder, rows, class_names=NAMES, tolerance_mm=1)
    (folder / "cases.json").write_text(json.dumps(cases))


@pytest.fixture
def html(finished_run: Path) -> str:
    """The run's report."""
    return (finished_run / "report" / "index.html").read_text(encoding="utf-8")


@pytest.fixture
def a_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may spoil, as far from the data as the run."""
    return Path(shutil.copytree(finished_run, finished_run.with_name(tmp_path.name)))


class Tags(HTMLParser):
    """Collects tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def html_of(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def test_report_holds_every_part(html):
    tags = Tags(html)
    parts = {section["id"] for section in tags.of("section")}
    assert parts == {"verdict", "scores", "training", "details"}
    assert {part.get("id") for part in tags.of("details")} == {"precision", "plan", "reproduce"}
    assert len(tags.of("svg")) == 3 + 3  # volumes, Dice, HD95; loss, Dice, loss scale
    assert len(tags.of("img")) == 3 * 3
    assert all(img["alt"] for img in tags.of("img"))
    assert all(svg["aria-label"] for svg in tags.of("svg"))
    for said in ("given", "declared by the dataset", "float16", "4,194,304", "head", "backward"):
        assert said in tags.text
    assert len(html) < 1_000_000


def test_report_begins_with_scores_and_the_median_case(html, finished_run):
    first = html[html.index('<section id="verdict"') : html.index('<section id="scores"')]
    text = " ".join(Tags(first).text.split())
    summary = json.loads((finished_run / "scores/validation_best/summary.json").read_text())
    for found in (summary["over_classes"], *summary["classes"].values()):
        assert "{:.3f}\N{EN DASH}{:.3f}".format(*found["dice"]["interval"]) in text
        assert f"{found['dice']['mean']:.3f}" in text
    assert "Validation cases6 Persons6" in text
    assert "Trained on tiny: 4 training, 2 validation and 0 test cases" in text
    assert "Median case: tiny_005" in text
    assert len(Tags(first).of("img")) == 3
    for value in (1, 2):  # in the table and beside the picture
        assert first.count(f"rgb{class_color(value)}") == 2


@pytest.mark.parametrize("output_dir", [None, "elsewhere/of #1"])
def test_report_links_lead_to_what_exists(a_copy, tmp_path, output_dir):
    page = write_report(a_copy, output_dir and tmp_path / output_dir)
    (a_copy / "models" / "model.pt").unlink()
    links = [link["href"] for link in Tags(page.read_text()).of("a")]
    found = [Path(os.path.normpath(page.parent / unquote(link))) for link in links]
    names = ["models/model.pt", "docs/README.md", "scores/validation_best"]
    assert found == [a_copy / name for name in (*names, "scores/validation_best/metrics.csv")]
    assert html_of(a_copy).count('<a href="') == len(links) - 1


def test_report_shows_equal_weights_once_and_no_constant_curve(a_copy):
    scores = a_copy / "scores"
    shutil.copytree(scores / "validation_best", scores / "validation_last")
    shutil.rmtree(a_copy / "tensorboard")
    with SummaryWriter(str(a_copy / "tensorboard")) as writer:
        for tag in ("train/loss", "weight_update/loss_scale", "weight_update/lr"):
            writer.add_scalar(tag, 1, 1)
            writer.add_scalar(tag, 1, 2)
    html = html_of(a_copy)
    assert "best (also the last) weights" in html
    assert html.count("weights</summary>") == 0
    assert html.count("<svg") == 3 + 1
    table = scores / "validation_last" / "metrics.csv"
    table.write_text(table.read_text().replace("scored,1.0,", "scored,0.9,"))
    assert html_of(a_copy).count("Validation cases, last weights</summary>") == 1


def test_report_judges_by_the_test_cases_and_folds_the_others(a_copy):
    shutil.copytree(a_copy / "scores/validation_best", a_copy / "scores/test_last")
    file = a_copy / "scores/test_last/summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "refused": {"a": "why"}}))
    html = html_of(a_copy)
    assert "Test cases6" in Tags(html).text
    assert '<section id="scores"><h2>Test cases</h2>' in html
    assert "1 more could not be scored" in html[: html.index("<details>")]
    assert html.count("Validation cases, best weights</summary>") == 1


def test_report_names_the_dataset_of_an_earlier_versions_run(a_copy):
    summary = json.loads((a_copy / "summary.json").read_text())
    assert summary.pop("dataset") == "tiny"
    (a_copy / "summary.json").write_text(json.dumps(summary))
    assert "Trained on tiny:" in html_of(a_copy)


def test_report_has_no_script_and_names_no_other_place(html, finished_run, dataset):
    tags = Tags(html)
    policy = next(m for m in tags.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src")
    assert tags.of("script") == []
    for _, attributes in tags.found:
        for key in ("src", "href", "xlink:href", "srcset", "action"):
            assert re.match(r"data:|#|\.\./", attributes.get(key) or "#")
    for place in (dataset, REPOSITORY, Path.home()):
        assert str(place) not in html.replace(str(finished_run), "")


def test_report_tells_how_to_make_the_run_again(html, finished_run, a_copy):
    again = "PYTHONPATH=<repo> python -m pipeline.run configs/train.json"
    assert f"cd '{finished_run}' && {again}" in Tags(html).text  # there is a blank in its name
    summary = json.loads((a_copy / "summary.json").read_text())
    typed = "python -m pipeline.run configs/amp.json --seed 3 < x"
    (a_copy / "summary.json").write_text(json.dumps({**summary, "command": typed}))
    assert typed in Tags(html_of(a_copy)).text


def test_report_escapes_what_data_say(tmp_path):
    evil = '<script>alert(1)</script><img src="x" onerror=alert(2)>&"\'\x1b[2J\u202e'
    names = ["background", evil, "$x_1$", "_hidden"]
    plan = {"class_names": names, "reasons": {evil: evil}, evil: evil}
    summary = {"command": evil, "device_name": evil, "versions": {evil: evil}, "dataset": evil}
    skipped = {"step": 1, "first_module": evil, "non_finite_cases": [evil]}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.json").write_text("{}")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "overflow.jsonl").write_text(json.dumps(skipped) + '\n{"step": 2, torn')
    label = np.zeros((4, 4, 4), int)
    label[1:3, 1:3, 1:3] = 1
    scored = score_case(label, label, spacing_mm=(1, 1, 1), class_names=names, tolerance_mm=1)
    rows = [{"case_id": evil, "person": evil, **row} for row in scored]
    write_scores(tmp_path / "scores" / "test_last", rows, class_names=names, tolerance_mm=1)
    html = html_of(tmp_path)
    tags = Tags(html)
    assert tags.of("script") == tags.of("img") == []
    assert not [a for _, attributes in tags.found for a in attributes if a.startswith("on")]
    assert not {"\x1b", "\u202e"} & {*html}
    assert tags.text.count(evil.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")) >= 8
    assert html.count("$x_1$</text>") == 2  # no formula in the box plots
    assert "_hidden" in tags.text


def test_report_says_what_is_missing(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.json").write_text("{}")
    (tmp_path / "summary.json").write_text('{"torn')
    text = Tags(html_of(tmp_path)).text
    for sentence in ("no scores", "no curves", "has not ended", "no plan.json", "No step was"):
        assert sentence in text


def test_report_says_what_has_no_picture(a_copy):
    file = a_copy / "scores" / "validation_best" / "cases.json"
    file.write_text(file.read_text().replace("imagesTr", "elsewhere"))
    tags = Tags(html_of(a_copy))
    assert tags.text.count("No picture: image, label or prediction of this case is not") == 3
    assert "tiny_004" in tags.text  # the table stays
    assert tags.of("img") == []


def test_command_says_where_the_report_is_or_why_there_is_none(finished_run, a_copy, capsys):
    assert main([str(finished_run)]) == 0
    assert (finished_run / "report" / "index.html").as_uri() in capsys.readouterr().out
    shutil.rmtree(a_copy / "report")
    (a_copy / "report").write_text("a file")
    assert main([str(a_copy)]) == 1
    assert "expected a writable directory" in capsys.readouterr().err
    assert main(["no/such/run"]) == 2
    assert "RUN: expected the directory of a run, found nothing at" in capsys.readouterr().err


def test_chosen_cases_are_the_worst_the_median_and_the_best():
    assert choose_cases([]) == {}
    assert choose_cases(["a"]) == {"a": "Median"}
    assert choose_cases(["a", "b"]) == {"a": "Median", "b": "Best"}
    assert choose_cases([*"abcdef"]) == {"a": "Worst", "c": "Median", "f": "Best"}


def test_chosen_classes_are_all_or_the_lowest_and_the_highest():
    names = [f"class {n}" for n in range(45)]
    for few in (names[:20], names):
        dice = np.random.default_rng(0).permutation(len(few)) / 45
        row = {name: {"dice": value} for name, value in zip(few, dice, strict=True)}
        row[few[3]]["dice"] = np.nan  # in no case
        chosen = choose_classes(SplitScores(Path(), "test", "best", {"a": row}, few, {}))
        ranked = [name for name in np.array(few)[np.argsort(dice)] if name != few[3]]
        assert chosen == (few if len(few) == 20 else ranked[:10] + ranked[-10:])


def test_table_begins_with_the_worst_case_and_names_what_is_not_scored(html):
    table = html[html.index('<div class="scores cases">') :].partition("</table>")[0]
    rows = {
        row.partition("<")[0]: re.findall(r">([^<>]*)</td>", row)
        for row in table.split('<th scope="row">')[1:]
    }
    means = [float(cells[0]) for name, cells in rows.items() if name != "Mean"]
    assert means == sorted(means)
    assert len(means) == 6
    assert "missed 0.000" in rows["tiny_004"]
    assert "absent " in rows["tiny_005"]
    assert rows["tiny_005"][0] == rows["tiny_005"][3]  # the mean of what is defined
    assert float(rows["Mean"][0]) == pytest.approx(np.mean(means), abs=1e-3)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Iterator:
    """Headless Chromium with the run's report; it logs what it complains of."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed here")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    switches = "headless=new no-sandbox disable-gpu no-first-run disable-background-networking"
    for switch in [*switches.split(), f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    driver.get((finished_run / "report" / "index.html").as_uri())
    yield driver
    driver.quit()


def set_size(opened, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def test_page_shows_every_figure_and_complains_of_nothing(opened):
    assert opened.get_log("browser") == []
    sizes = opened.execute_script(
        "return [...document.querySelectorAll('figure > :is(svg, img)')].map(figure => "
        "[figure.clientWidth, figure.clientHeight, 100 * (figure.naturalWidth ?? 1)])"
    )
    assert len(sizes) == 6 + 9
    assert np.min(sizes) > 50


def test_page_fits_a_narrow_window_and_shows_the_median_case_first(opened):
    set_size(opened, 1280, 800)
    foot = "return document.querySelector('.main img').getBoundingClientRect().bottom"
    assert opened.execute_script(foot) < 800
    set_size(opened, 420, 900)
    opened.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
    width = "return document.scrollingElement.scrollWidth"
    assert opened.execute_script(width) <= opened.execute_script("return innerWidth") == 420
    cut = """return [...document.querySelectorAll('table')].filter(table => {
        const part = table.parentElement; part.scrollLeft = 1e6
        return table.getBoundingClientRect().right > part.getBoundingClientRect().right + 1 })"""
    assert opened.execute_script(cut) == []
