"""The command `compare`: files that it reads, what it says, what it refuses."""

import csv
import json
import os
import threading
from pathlib import Path

import pytest
from test_statistics import judge, noisy

from pipeline.commands.compare import main
from pipeline.evaluation.comparison import find_direction
from pipeline.evaluation.statistics import BETTER, WORSE

OURS = ["case_id", "person", "class", "status", "dice", "iou", "hd95_mm", "volume_difference_ml"]


# ---- files


def write(path, header, rows, delimiter=","):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(header)
        writer.writerows(rows)
    return str(path)


@pytest.fixture
def ours(tmp_path):
    """Files of three runs per arm, 12 cases and two classes; A has better Dice by 0.05."""
    files = {}
    for name, scores in zip("ab", noisy(40, gap=0.05), strict=True):
        files[name] = [
            write(
                tmp_path / f"{name}{run}.csv",
                OURS,
                [
                    [f"case_{n:03d}", f"p{n // 2}", organ, "scored", dice, dice, 10 * (1 - dice), 0]
                    for n, case in enumerate(table.tolist())
                    for organ, dice in zip(("liver", "spleen"), case, strict=True)
                ],
            )
            for run, table in enumerate(scores)
        ]
    return files


def rows_of(file):
    with open(file, newline="") as opened:
        return list(csv.reader(opened))


def edit(file, change):
    header, *rows = rows_of(file)
    rows = change(rows) or rows
    write(file, header, rows)


def put(file, case, organ, **cells):
    def change(rows):
        for row in rows:
            if (row[0], row[2]) == (case, organ):
                for name, value in cells.items():
                    row[OURS.index(name)] = value

    edit(file, change)


def command(files, *options):
    return main(["--a", *files["a"], "--b", *files["b"], *options])


def compared(files, tmp_path, *options):
    assert command(files, *options, "--output", str(tmp_path / "found.json")) == 0
    return json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)


def refused(files, capsys, *options):
    """Lines of a refusal."""
    assert command(files, *options) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.strip().split("\n")


def test_command_compares_our_files(ours, tmp_path, capsys):
    found = compared(ours, tmp_path)
    said = capsys.readouterr().out
    assert "A is better than B" in said
    assert (found["metric"], found["direction"]) == ("dice", "higher is better")
    assert (found["num_cases"], found["num_persons"]) == (12, 6)
    assert found["num_seeds"] == {"a": 3, "b": 3}
    assert list(found["classes"]) == ["liver", "spleen"]
    a, b = noisy(40, gap=0.05)
    persons = [f"p{n // 2}" for n in range(12)]
    expected = judge(a, b, persons)
    assert found["overall"]["verdict"] == BETTER
    for name in ("interval", "p_value", "difference", "smallest_difference"):
        assert found["overall"][name] == pytest.approx(expected["overall"][name])
        assert found["classes"]["spleen"][name] == pytest.approx(
            expected["classes"]["class_1"][name]
        )


def test_command_says_why_single_runs_are_too_few(ours, capsys):
    assert command({"a": ours["a"][:1], "b": ours["b"][:1]}) == 0
    last = capsys.readouterr().out.strip().split("\n")[-1]
    reason = "1 of at least 2 seeds of A, 1 of at least 2 seeds of B"
    assert last == f"Overall: too few to tell ({reason})."


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("DSC", (True, False)),
        ("Normalized Surface Distance", (True, False)),
        ("hd95_mm", (False, False)),
        ("mean_error", (False, False)),
        ("volume_difference_ml", (False, True)),
        ("false_positives", (False, False)),
    ],
)
def test_direction_goes_by_the_name(metric, expected):
    assert find_direction(metric) == expected


def test_volume_difference_counts_by_its_size(ours, tmp_path):
    for name, size in (("a", 1.0), ("b", 5.0)):
        for number, file in enumerate(ours[name]):
            rows = [[*row[:-1], (-1) ** n * (size + 0.01 * number)] for n, row in
                    enumerate(rows_of(file)[1:])]  # fmt: skip
            write(file, OURS, rows)
    found = compared(ours, tmp_path, "--metric", "volume_difference_ml")
    assert (found["absolute"], found["overall"]["verdict"]) == (True, BETTER)
    assert found["overall"]["difference"] == pytest.approx(-4)


def test_direction_can_be_told(ours, tmp_path):
    assert compared(ours, tmp_path, "--higher_is_better", "false")["overall"]["verdict"] == WORSE
    assert compared(ours, tmp_path, "--metric", "HD95_mm")["overall"]["verdict"] == BETTER


@pytest.mark.parametrize("cell", ["", "NaN", "-inf", "N/A"])
def test_undefined_distance_is_the_worst_however_written(ours, tmp_path, cell):
    for file in ours["a"]:
        for n in range(10):
            put(file, f"case_{n:03d}", "liver", hd95_mm=cell, status="missed", dice="0")
    found = compared(ours, tmp_path, "--metric", "hd95_mm")
    entry = found["classes"]["liver"]
    assert (entry["scale"], entry["verdict"], entry["num_undefined"]["a"]) == ("rank", WORSE, 30)
    assert found["classes"]["spleen"]["scale"] == "difference"


def test_absent_is_best_and_spurious_worst(ours, tmp_path):
    for name, status in (("a", "absent"), ("b", "spurious")):
        for file in ours[name]:
            for n in range(6):
                dice = "" if status == "absent" else "0"
                put(file, f"case_{n:03d}", "liver", hd95_mm="", status=status, dice=dice)
    for metric in ("dice", "hd95_mm"):
        entry = compared(ours, tmp_path, "--metric", metric)["classes"]["liver"]
        assert (entry["scale"], entry["verdict"], entry["num_apart"]) == ("rank", BETTER, 0)
    # in a tool's own file, which has no status
    for file in (*ours["a"], *ours["b"]):
        rows = rows_of(file)
        write(file, [*rows[0][:3], *rows[0][4:]], [[*row[:3], *row[4:]] for row in rows[1:]])
    assert compared(ours, tmp_path)["classes"]["liver"]["verdict"] == BETTER
    entry = compared(ours, tmp_path, "--metric", "hd95_mm")["classes"]["liver"]
    assert (entry["num_apart"], entry["num_cases"]) == (6, 6)


@pytest.mark.parametrize(
    ("header", "delimiter"),
    [(("Case", "Class", "Dice"), ","), (("case", "class", "DICE"), ";")],
)
def test_command_reads_files_of_other_tools(ours, tmp_path, header, delimiter):
    expected = compared(ours, tmp_path, "--group_pattern", r"\d+")
    for file in (*ours["a"], *ours["b"]):
        rows = [[row[4], row[0], row[2]] for row in rows_of(file)[1:]]
        write(file, (header[2], *header[:2]), rows, delimiter)
        with open(file, "rb+") as opened:  # as spreadsheets write it
            content = opened.read()
            opened.seek(0)
            opened.write(b"\xef\xbb\xbf" + content)
    assert compared(ours, tmp_path)["overall"] == expected["overall"]


def test_command_reads_nnunets_summary(ours, tmp_path):
    """As nnU-Net's `compute_metrics_on_folder` writes it."""
    for name in ("a", "b"):
        for file in ours[name]:
            put(file, "case_003", "liver", dice="", status="absent")
    expected = compared(ours, tmp_path, "--group_pattern", r"\d+")
    files = {"a": [], "b": []}
    for name, paths in ours.items():
        for number, path in enumerate(paths):
            cases = {}
            for row in rows_of(path)[1:]:
                dice = float(row[4] or "nan")
                value = {"liver": "1", "spleen": "(1, 2)"}[row[2]]
                cases.setdefault(row[0], {})[value] = {"Dice": dice, "FN": 3, "n_ref": 9}
            summary = tmp_path / f"{name}{number}.json"
            entries = [
                {"metrics": metrics, "prediction_file": f"/data/validation/{case}.nii.gz"}
                for case, metrics in cases.items()
            ]
            summary.write_text(json.dumps({"mean": {}, "metric_per_case": entries}, indent=4))
            files[name].append(str(summary))
    found = compared(files, tmp_path, "--metric", "Dice")
    assert list(found["classes"]) == ["(1, 2)", "1"]
    assert found["overall"] == expected["overall"]
    assert found["classes"]["1"]["num_apart"] == 1


def test_persons_come_from_column_or_pattern(ours, tmp_path):
    assert compared(ours, tmp_path)["num_persons"] == 6
    assert compared(ours, tmp_path, "--group_pattern", r"(\d\d)\d$")["num_persons"] == 2


def test_command_reads_files_without_classes(tmp_path):
    files = {
        arm: [write(tmp_path / f"{arm}.csv", ("case", "dice"), [(n, 0.5) for n in range(9)])]
        for arm in "ab"
    }
    assert list(compared(files, tmp_path)["classes"]) == ["all"]


def test_command_reads_a_pipe(ours, tmp_path):
    expected, pipe = compared(ours, tmp_path)["classes"], tmp_path / "pipe"
    os.mkfifo(pipe)
    content = Path(ours["a"][0]).read_bytes()
    writer = threading.Thread(target=pipe.write_bytes, args=[content], daemon=True)
    writer.start()
    ours["a"][0] = str(pipe)
    assert compared(ours, tmp_path)["classes"] == expected


def test_common_cases_leave_out_the_rest(ours, tmp_path, capsys):
    edit(ours["a"][1], lambda rows: rows[2:])
    edit(ours["b"][0], lambda rows: rows[:-1])
    lines = refused(ours, capsys)
    assert lines[0].startswith(
        f"{ours['a'][1]}: expected the cases and classes of the other files, got no "
        "case_000 (liver), case_000 (spleen)."
    )
    assert "got no case_011 (spleen)" in lines[1]
    assert "--common_cases true" in lines[0]
    found = compared(ours, tmp_path, "--common_cases", "true")
    assert found["notes"] == [
        "Left out, not in every file: case_000 (liver), case_000 (spleen), case_011 (spleen)."
    ]
    assert (found["num_cases"], found["classes"]["spleen"]["num_cases"]) == (11, 10)
    assert "Left out" in capsys.readouterr().out


def test_a_file_in_both_arms_or_copied_is_noted(ours, tmp_path):
    copy = write(tmp_path / "copy.csv", OURS, rows_of(ours["b"][0])[1:])
    found = compared({"a": ours["a"], "b": [*ours["b"], ours["a"][0], copy]}, tmp_path)
    first, second = found["notes"]
    assert first.startswith(f"{ours['a'][0]} has the very scores of {ours['a'][0]}")
    assert second.startswith(f"{copy} has the very scores of {ours['b'][0]}")


# ---- mistakes


MISTAKES = [
    (lambda rows: [*rows, rows[0]], "' in line 26. Correct or remove it."),
    (lambda rows: rows[1].__setitem__(4, "0,8"), "got case_000 spleen: '0,8' in line 3. Correct"),
    (lambda rows: rows[::2], "other files, got no case_000 (spleen), case_001 (spleen), "),
    (lambda rows: rows[3].__setitem__(0, ""), " in line 5."),
    (lambda rows: rows[2].pop() and None, "expected 8 cells in line 4, got 7. Quote"),
]


@pytest.mark.parametrize(("change", "expected"), MISTAKES)
def test_command_refuses_a_file_in_one_line(ours, capsys, change, expected):
    edit(ours["b"][1], change)
    lines = refused(ours, capsys)
    assert len(lines) == 1
    assert lines[0].startswith(f"{ours['b'][1]}: expected ")
    assert expected in lines[0]


def test_command_tells_every_fault(ours, tmp_path, capsys):
    ours["a"][0] = str(tmp_path)
    ours["b"][2] = str(tmp_path / "two.csv")
    (tmp_path / "two.csv").touch()
    first, second = refused(ours, capsys)
    assert first.startswith(f"{tmp_path}: expected a CSV file")
    assert second.startswith(f"{tmp_path / 'two.csv'}: expected ")


@pytest.mark.parametrize("content", [b"", b"case,dice\n", b"\xff\xfe\x00", b'a,b\n"x\x00'])
def test_command_refuses_what_is_no_table(ours, tmp_path, capsys, content):
    path = tmp_path / "odd.csv"
    path.write_bytes(content)
    (line,) = refused({"a": [str(path)], "b": ours["b"]}, capsys)
    assert line.startswith(f"{path}: expected ")


def test_command_names_the_nearest_column(ours, capsys):
    lines = refused(ours, capsys, "--metric", "dicee")
    assert len(lines) == 6
    assert "expected a column 'dicee', got none. Did you mean 'dice'?" in lines[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--confidence", "95"), "argument --confidence: expected 1e-06 to 0.999999, got 95."),
        (("--higher_is_better", "maybe"), "--higher_is_better: expected true or false"),
        (("--group_pattern", "("), "group_pattern: expected a regular expression"),
        (("--output", "/no/such/folder/x.json"), "--json: expected a file to write"),
    ],
)
def test_command_refuses_options_in_one_line(ours, capsys, options, expected):
    lines = refused(ours, capsys, *options)
    assert expected in lines[0]
    assert len(lines) == 1 or lines[0].startswith("command line: ")  # with the usage


def test_command_refuses_cases_that_the_pattern_names_no_person_of(ours, capsys):
    lines = refused(ours, capsys, "--group_pattern", "case_00")
    assert [line.split(":")[0] for line in lines] == ["case_010", "case_011"]
