"""A sweep as a user runs it: real processes, killed and called again, its CSV and table, and mistakes."""

import csv
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from distpro.errors import UserError
from distpro.process import Process
from distpro.report import sweep_figure, sweep_table, write_csv
from distpro.runner import places
from distpro.sweep import Sweep

CONFIGS = Path(__file__).parent.parent / "configs"
ENDS = ("result.json", "process.safetensors")  # of a training, of a search
SMALL = {
    "title": "small",
    "flags": {"teacher": "resnet8", "teacher_checkpoint": "@big", "student": "wrn_10_1", "epochs": 1, "batch_size": 64},
    "teachers": {"big": {"student": "resnet8", "method": "none", "epochs": 2}},
    "searches": {"short": {"search_epochs": 1, "transforms": "A"}},
    "axes": {
        "method": {
            "alone": {"method": "none"},
            "uniform": {"method": "distpro", "process": "uniform", "transforms": "A"},
            "searched": {"method": "distpro", "process": "@short", "transforms": "A"},
            "final": {"method": "distpro", "process": "final:@short", "transforms": "A"},
        },
    },
    "seeds": [0, 1],
    "compare": [["searched", "uniform"]],
}


def written(folder, **changes):
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


def command(*words):
    return [sys.executable, "-m", "distpro.sweep", *map(str, words)]


@pytest.mark.slow
def test_a_sweep_is_killed_and_goes_on(tmp_path):
    config, out = written(tmp_path), tmp_path / "out"
    first = subprocess.Popen(
        command(config, "--output", out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    for line in first.stdout:
        if "alone" in line:  # the teacher and a run of the grid are done, the next is under way
            break
    time.sleep(1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == 130
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name in ENDS}
    assert kept

    again = subprocess.run(command(config, "--output", out), capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{len(kept)} of 11 runs are already done" in again.stdout
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert len(list(out.rglob("process.safetensors"))) == 2  # one search a seed serves two rows
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(row["method"], row["seed"]) for row in rows[:5]] == [
        *(("alone", "0"), ("uniform", "0"), ("searched", "0"), ("final", "0"), ("alone", "1"))
    ]
    searched = next(row for row in rows if row["method"] == "searched")
    facts = Process.load(out / "searches/short/seed-0/process.safetensors").facts
    assert float(searched["search_seconds"]) == facts["seconds"] > 0
    assert float(rows[0]["search_seconds"]) == 0
    assert rows[0]["teacher_top1"] == ""  # alone
    assert float(searched["teacher_top1"]) > 10

    table = subprocess.run(
        command(config, "--table", "--csv", out / "results.csv", "--figure", tmp_path / "cost.svg"),
        capture_output=True,
        text=True,
    )
    assert table.returncode == 0, table.stderr
    assert re.search(r"^\| searched \| \d+\.\d\d ± \d+\.\d\d \|", table.stdout, re.M)
    assert re.search(
        r"searched against uniform: [-+±\N{MINUS SIGN}]\d+\.\d\d ± \d+\.\d\d \(standard error; 95 % .*\), n = 2 seeds",
        table.stdout,
    )
    assert table.stdout in again.stdout  # from the file as from the runs
    assert "<svg" in (tmp_path / "cost.svg").read_text()


ROWS = [
    {
        **{"pair": "a-b", "method": method, "epochs": epochs, "seed": seed, "top1": top1 + seed, "top5": 50.0},
        **{"teacher_top1": 70.0, "train_seconds": 10.0 * epochs, "search_seconds": 5.0 * (method == "searched")},
        **{"device": "X", "commit": "abc", "command": "…"},
    }
    for method, top1 in (("uniform", 20.0), ("searched", 22.0))
    for epochs in (1, 2)
    for seed in (0, 1)
]


def test_nothing_is_finished_yet():
    assert sweep_table([], ("method",)) == "No run is finished yet."


def test_the_table_of_rows(tmp_path):
    axes, compare = ("pair", "method", "epochs"), [("searched", "uniform")]
    table = sweep_table(ROWS, axes, compare)
    assert "| uniform | 1 | 20.50 ± 0.71 | 50.00 ± 0.00 | 2 | 10.0 s |  |" in table
    assert "| searched | 2 | 22.50 ± 0.71 | 50.00 ± 0.00 | 2 | 20.0 s | 5.0 s |" in table
    assert "pair" not in table  # only one
    assert (
        "- searched against uniform at epochs 2: +2.00 ± 0.00 (standard error; 95 % interval +2.00 to +2.00), n"
        in table
    )
    shifted = [{**row, "top1": row["top1"] + 2 * (row["method"] == "searched") * row["seed"]} for row in ROWS]
    told = "+3.00 ± 1.00 (standard error; 95 % interval \N{MINUS SIGN}9.71 to +15.71), n = 2 seeds"  # t = 12.706
    assert told in sweep_table(shifted, axes, compare)
    assert "+2.00, n = 1 seed\n" in sweep_table([row for row in ROWS if row["seed"] == 0], axes, compare)
    assert table.endswith("Times are wall seconds (of one GPU for each run: GPU-seconds) on: X.")
    on_cpu = [{**row, "device": "X, 1 CPU thread"} for row in ROWS]
    assert sweep_table(on_cpu, axes, compare).endswith("Times are wall seconds on: X, 1 CPU thread.")
    write_csv(tmp_path / "rows.csv", ROWS)
    assert sweep_table(tmp_path / "rows.csv", axes, compare) == table
    figure = sweep_figure(ROWS, axes)
    lines = figure.axes[0].get_lines()
    assert {tuple(line.get_xdata()) for line in lines} >= {(10.0, 20.0), (15.0, 25.0)}
    dashed = [line for line in lines if line.get_linestyle() == "--"]
    assert [(line.get_label(), tuple(line.get_xdata())) for line in dashed] == [
        ("searched, without the search", (10.0, 20.0))
    ]


def test_the_legend_has_the_methods_of_every_panel():
    rows = [row | {"pair": {"uniform": "a-b", "searched": "c-d"}[row["method"]]} for row in ROWS]
    (legend,) = sweep_figure(rows, ("pair", "method", "epochs")).legends
    assert [text.get_text() for text in legend.get_texts()] == ["uniform", "searched, without the search", "searched"]


def test_a_figure_that_cannot_be_drawn_is_refused_before_any_run(tmp_path):
    done = subprocess.run(
        command(CONFIGS / "short.yaml", "--output", tmp_path / "out", "--figure", tmp_path / "cost.swg"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "cost.swg': expected an ending such as .svg" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_no_run_would_load_is_refused(tmp_path):
    config = written(tmp_path, flags={"student": "wrn_10_1"}, axes={"method": ["kd", "reviewkd"]}, compare=[])
    done = subprocess.run(
        command(config, "--output", tmp_path / "out", "--teacher-checkpoint", tmp_path / "big.pth"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "names a teacher_checkpoint, so --teacher-checkpoint would do nothing" in done.stderr
    assert "write teacher_checkpoint: big.pth" in done.stderr
    assert not (tmp_path / "out").exists()


def test_where_weights_are_swept_the_figure_is_over_the_weight():
    rows = [{**row, "kd_weight": row["epochs"]} for row in ROWS]
    panel = sweep_figure(rows, ("pair", "method", "kd_weight")).axes[0]
    assert panel.get_xlabel() == "kd_weight"
    assert {tuple(line.get_xdata()) for line in panel.get_lines()} >= {(1.0, 2.0)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"axis": {}}, "small.yaml': 'axis': did you mean 'axes'?"),
        (
            {"axes": {"epochs": 3}},
            "axis 'epochs' must be a list of values of that flag, or labels that each hold flags",
        ),
        ({"axes": {"epohcs": [1]}, "compare": []}, "'epohcs': did you mean 'epochs'"),
        ({"searches": {"shrot": {}}}, "unknown name under searches: 'short': did you mean 'shrot'"),
        ({"compare": [["serched", "uniform"]]}, "unknown method to compare 'serched': did you mean 'searched'"),
        ({"axes": {"epochs": [1]}, "compare": []}, "has every method at once"),
        ({"seeds": 3}, "small.yaml' must be a list of numbers, such as [0, 1, 2]"),
        ({"compare": ["searched", "uniform"]}, "must be a list of pairs of methods"),
        (
            {"axes": {}, "flags": {"student": "wrn_1O_1"}, "compare": []},
            "unknown model 'wrn_1O_1': did you mean 'wrn_1",
        ),
        ({"axes": {"process": ["unifrom"]}, "compare": []}, "unknown process 'unifrom': did you mean 'uniform'?"),
        ({"axes": {}, "flags": {"epochs": 0}, "compare": []}, "--epochs must be 1 or more, got 0"),
        (
            {"axes": {"method": {"kd 1/3": {"method": "kd"}, "kd 1-3": {"method": "kd"}}}, "compare": []},
            "kd 1/3-0 and kd 1-3-0 would share the folder",
        ),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_mistakes(tmp_path, changes, sentence):
    with pytest.raises(UserError) as error:
        Sweep.read(written(tmp_path, **changes), tmp_path / "out").check()
    assert sentence in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_search_for_every_run_needs_no_search_itself(tmp_path):
    flags = {**SMALL["flags"], "method": "distpro", "process": "@short"}
    sweep = Sweep.read(written(tmp_path, flags=flags, axes={"epochs": [1, 2]}, compare=[]), tmp_path / "out")
    assert [run.module for run in sweep.runs].count("distpro.search") == 2  # one a seed


@pytest.mark.parametrize(("given", "names"), [(None, ["0", "1", "0"]), ("5,GPU-ab", ["5", "GPU-ab", "5"])])
def test_runs_share_the_gpus_that_were_given(monkeypatch, given, names):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(3)] == names


def test_a_folder_of_other_flags_is_refused(tmp_path):
    sweep = Sweep.read(written(tmp_path), tmp_path / "out")
    run = sweep.runs[0]
    run.folder.mkdir(parents=True)
    (run.folder / "args.yaml").write_text(yaml.safe_dump({**run.config().plain(), "epochs": 7}))
    with pytest.raises(UserError, match="was started with epochs = 7, not 2:"):
        sweep.check()


def test_a_csv_of_something_else(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="it lacks"):
        sweep_table(tmp_path / "a.csv", ("method",))
    with pytest.raises(UserError, match="no file"):
        sweep_table(tmp_path / "b.csv", ("method",))
    with pytest.raises(UserError, match="lack the axis 'temperature'"):
        sweep_table(ROWS, ("temperature",))


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ready_configuration_is_valid(config, tmp_path):
    sweep = Sweep.read(config, tmp_path)
    sweep.check()
    assert len({run.folder for run in sweep.runs}) == len(sweep.runs)
    for run in sweep.runs:
        assert all(need in {other.folder for other in sweep.runs} for need in run.needs)
        assert "@" not in str(run.flags)
        if run.module == "distpro.search" and {"gradient", "literal"} & {*run.folder.parent.name.split("-")}:
            assert run.config().search_by == "gradient"
