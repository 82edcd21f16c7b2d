"""The commands as a user types them: what they print, what they leave, and what they say to mistakes."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import distpro.data
import distpro.flags
import distpro.job
import distpro.train
from distpro import Process
from distpro.errors import run_command
from distpro.models import create_model, save_weights
from distpro.pathways import all_pathways

SHORT = [
    "--teacher",
    "resnet8",
    "--student",
    "wrn_10_1",
    "--epochs",
    "1",
    "--search-epochs",
    "1",
    "--teacher-epochs",
    "2",
]
SHORT += ["--batch-size", "64"]


def run(*words, module="distpro.train"):
    return subprocess.run([sys.executable, "-m", module, *map(str, words)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """One short job with every method, as a real process."""
    folder = tmp_path_factory.mktemp("job") / "out"
    done = run(*SHORT, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_job_prints_a_table_and_ends_with_json(job):
    _, done = job
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((job[0] / "result.json").read_text()) == result
    assert set(result["top1"]) == {"none", "kd", "reviewkd", "uniform", "distpro"}
    assert result["teacher_top1"] > 50
    for heading in ("method", "top-1 %", "vs alone", "searched process"):
        assert heading in done.stdout
    assert "teacher resnet8: top-1" in done.stdout
    assert "img/s, " in done.stdout  # plain lines: the output is no terminal
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


def test_the_run_folder(job):
    folder, done = job
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    methods = ("none", "kd", "reviewkd", "uniform", "distpro")
    assert found == {
        *("args.yaml", "summary.csv", "process.safetensors", "report.html", "result.json", "search.pt"),
        *("teacher.safetensors", "teacher/last.pt"),
        *(f"{m}/{file}" for m in methods for file in ("last.pt", "student.safetensors")),
    }
    assert yaml.safe_load((folder / "args.yaml").read_text())["lr"] == 0.05  # what was left out is filled in
    student = load_file(folder / "distpro/student.safetensors")
    assert set(student) == set(create_model("wrn_10_1", 10, 1).state_dict())
    for file in folder.rglob("*.pt"):
        torch.load(file, weights_only=True)
    last = torch.load(folder / "kd/last.pt", weights_only=True)
    assert not any("teacher" in key for key in last["step"])
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    assert [row["method"] for row in rows] == list(methods)
    result = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        assert float(row["test_top1"]) == pytest.approx(result["top1"][row["method"]], abs=1e-2)
    report = (folder / "report.html").read_text()
    for word in ("Teacher stage 1", "searched process", "ReviewKD", "--output"):
        assert word in report
    process = Process.load(folder / "process.safetensors")
    assert process.z.shape == (1438 * 4 // 5 // 64, 16)


def test_a_finished_job_is_not_overwritten_but_resumes(job, capsys):
    folder, done = job
    assert (
        mistake(*SHORT, "--output", folder)
        == f"'{folder}' holds a run already: --resume it, or choose another --output"
    )
    assert "begun with epochs = 1, not 2" in mistake(*SHORT, "--epochs", 2, "--output", folder, "--resume")
    capsys.readouterr()
    again = run(*SHORT, "--output", folder, "--resume")
    assert again.returncode == 0, again.stderr
    first, second = (json.loads(d.stdout.splitlines()[-1]) for d in (done, again))
    assert second["top1"] == first["top1"]


def test_a_part_alone_from_a_saved_process(job, tmp_path):
    folder, _ = job
    config = tmp_path / "c.yaml"
    config.write_text(
        f"pooled: true\nmethod: distpro\nprocess: final:{folder / 'process.safetensors'}\nepochs: 7\nnesterov: false\n"
    )
    words = [*SHORT[:4], "--epochs", 1, "--batch-size", 64, "--teacher-checkpoint", folder / "teacher.safetensors"]
    done = run("--config", config, *words, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    args = yaml.safe_load((tmp_path / "out/args.yaml").read_text())
    assert (args["epochs"], args["nesterov"], args["method"]) == (1, False, "distpro")  # a flag wins over the file
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("args.yaml", "summary.csv", "last.pt", "student.safetensors", "report.html", "result.json")
    }


def test_every_method_gets_its_own_weight(monkeypatch):
    """kd's weight is not that of the feature losses: the baseline would be a straw man."""
    config = distpro.flags.parse(["--kd-weight", "7", "--reviewkd-weight", "5"])
    job = distpro.job.Job(config, distpro.job.Console())
    seen = {}
    monkeypatch.setattr(distpro.job, "distill", lambda *_, method, **options: seen.update({method: options}))
    for method in ("none", "kd", "reviewkd", "distpro"):
        job._fit(job.teacher, method, method)
    weights = {m: {k: v for k, v in o.items() if k.endswith("weight")} for m, o in seen.items()}
    assert weights == {
        "none": {},
        "kd": {"distill_loss_weight": 0.9},
        "reviewkd": {"kd_weight": 5.0},
        "distpro": {"kd_weight": 7.0},
    }


def test_pictures_are_normalised_as_the_teacher_s_weights_want_it(tmp_path):
    words = ["--dataset", "folder", "--teacher", "vit_tiny_patch16_224"]
    assert distpro.flags.parse(words).mean == distpro.data.MEAN
    trained = distpro.flags.parse([*words, "--teacher-pretrained", "--std", "0.1", "0.2", "0.3"])
    assert (trained.mean, trained.std) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    args = tmp_path / "args.yaml"
    args.write_text(yaml.safe_dump(trained.plain()))
    assert distpro.flags.parse(["--config", str(args)]) == replace(trained, config=args)
    assert distpro.flags.parse(["--teacher", "wrn_16_2"]).mean is None  # the digits have their own


def test_search_alone(job, tmp_path):
    folder, _ = job
    words = [*SHORT, "--teacher-checkpoint", folder / "teacher.safetensors", "--output", tmp_path / "out"]
    done = run(*words, module="distpro.search")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told = json.loads(done.stdout.splitlines()[-1])
    assert torch.equal(Process.load(told["process"]).z, Process.load(folder / "process.safetensors").z)
    assert "<svg" in (tmp_path / "out/process.svg").read_text()
    searching = distpro.flags.parse(["--method", "kd", "--process", "uniform"], "distpro.search")
    assert (searching.method, searching.process) == ("distpro", "search")


def mistake(*words):
    """The one sentence that these words of a command line earn; the exit code is checked."""
    from _pytest.monkeypatch import MonkeyPatch

    lines = []
    with MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["distpro.train", *map(str, words)])
        patch.setattr("distpro.errors.print", lambda line, **_: lines.append(line), raising=False)
        with pytest.raises(SystemExit) as left:
            run_command(distpro.train.main)
    assert left.value.code == 2
    assert len(lines) == 1
    return lines[0].removeprefix("distpro: error: ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--teacher", "wrn_40_22x"], "unknown model 'wrn_40_22x': did you mean 'wrn_40_2'"),
        (["--student", "resnet65"], "unknown model 'resnet65': did you mean "),
        (["--dataset", "digit"], "unknown dataset 'digit': did you mean 'digits'?"),
        (["--student-layers", "blok1"], "unknown layer of WideResNet 'blok1': did you mean 'block1'"),
        (["--process", "serch"], "unknown process 'serch': did you mean 'search'?"),
        (["--process", "nowhere.safetensors"], "no process file 'nowhere.safetensors'"),
        (["--dataset", "cifar100"], "needs its folder"),
        (["--dataset", "cifar100", "--data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--dataset", "folder", "--data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--teacher-checkpoint", "none.pth"], "there is no checkpoint 'none.pth'"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--batch-size", "5000"], "5000"),
        (["--val-fraction", "1.5"], "--val-fraction must be above 0 and below 1, got 1.5"),
        (["--kd-weight", "-1"], "--kd-weight must be 0 or more, got -1.0"),
        (["--kd-weight", "nan"], "--kd-weight must be 0 or more, got nan"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--lr", "-0.1"], "--lr must be above 0"),
        (["--label-smoothing", "2"], "--label-smoothing must be between 0 and 1"),
        (["--ema", "1"], "--ema must be 0 or more and below 1"),
        (["--tau", "inf"], "--tau must be a finite number"),
        (["--threads", "0"], "--threads must be 1 or more"),
        (["--momentum", "0"], "--nesterov needs a momentum above 0"),
        (["--size-schedule", "8", "0"], "--size-schedule must be 1 or more, got 0"),
        (["--search-samples", "5000"], "5000 training samples: expected 10 (one a class) to 1438"),
        (["--search-samples", "20", "--batch-size", "64"], "batch size 64 is larger than the 16 pictures"),
        (["--transforms", "AQ"], "unknown transform 'Q'"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--device", "gpu"], "--device gpu cannot be used, expected cpu, cuda or cuda:N"),
        (["--student", "drawn_networks:of_5"], "the student drawn_networks:of_5 tells 5 classes apart, digits has 10"),
        (
            ["--method", "reviewkd", "--student-layers", "block1", "block3"],
            "reviewkd compares stage with stage: the teacher has 4",
        ),
        (["--config", "none.yaml"], "no configuration file 'none.yaml'"),
        (["--student", "no.such.module:net"], "--student no.such.module:net: No module named 'no'"),
        (["--student", "distpro.models:creat_model"], "has no 'creat_model'; did you mean 'create_model'?"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, tmp_path):
    assert sentence in mistake(*words, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_checks_and_tells_every_value(tmp_path, capsys, monkeypatch):
    words = ["distpro.train", "--epochs", "7", "--dry-run", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    distpro.train.main()
    told = yaml.safe_load(capsys.readouterr().out)
    assert told == distpro.flags.parse([*words[1:3], *words[4:]]).plain()
    assert (told["epochs"], told["lr"], told["search_epochs"]) == (7, 0.05, 3)
    assert not (tmp_path / "out").exists()
    assert "larger than" in mistake("--dry-run", "--batch-size", "5000")


def test_resume_needs_a_folder():
    assert mistake("--resume") == "--resume needs the --output folder that it is to go on with"


def test_a_method_that_does_not_fit_the_pair_is_left_out_of_all(capsys):
    arguments = ["--teacher", "resnet8", "--student-layers", "block1", "block3"]
    job = distpro.job.Job(distpro.flags.parse(arguments), distpro.job.Console())
    assert job.methods == ["none", "kd", "uniform", "distpro"]
    assert "reviewkd is left out: reviewkd compares stage with stage" in " ".join(capsys.readouterr().out.split())


def test_mistakes_in_files(tmp_path):
    out = ["--output", tmp_path / "out"]
    torn = tmp_path / "torn.pth"
    torn.write_bytes(b"PK\x03\x04 torn")
    assert str(torn) in mistake("--teacher-checkpoint", torn, *out)
    wide = tmp_path / "wide.safetensors"
    save_weights(create_model("wrn_16_2", 100, 1), wide)
    assert "100 classes" in mistake("--teacher-checkpoint", wide, *out)
    other = tmp_path / "other.safetensors"
    save_weights(create_model("resnet8", 10, 1), other)
    assert "resnet8" in mistake("--teacher-checkpoint", other, *out)
    process = tmp_path / "p.safetensors"
    Process.uniform(all_pathways(3, 3, "AB")).save(process)
    assert "the process is for 18 pathways" in mistake("--process", process, *out)
    config = tmp_path / "c.yaml"
    config.write_text("epoch: 3\n")
    assert f"unknown key in '{config}': 'epoch': did you mean 'epochs'" in mistake("--config", config, *out)
    config.write_text("epochs: [3\n")
    assert "is not YAML" in mistake("--config", config, *out)
    assert not (tmp_path / "out").exists()


def test_unknown_flags_and_values_name_the_nearest():
    for words, near in ((["--epocs", "3"], "--epochs"), (["--method", "reviewk"], "reviewkd")):
        done = run(*words)
        assert done.returncode == 2
        assert near in done.stdout + done.stderr


def test_a_loss_that_is_not_finite(tmp_path):
    said = mistake(*SHORT, "--method", "none", "--lr", "1e30", "--output", tmp_path / "out")
    assert said == "the loss is not finite any more (none, epoch 1): lower --lr or --kd-weight"


def test_a_teacher_near_chance_is_warned_of(tmp_path, capsys):
    untrained = tmp_path / "t.safetensors"
    torch.manual_seed(3)
    save_weights(create_model("resnet8", 10, 1), untrained)
    arguments = [*SHORT, "--method", "kd", "--teacher-checkpoint", str(untrained), "--output", str(tmp_path / "out")]
    distpro.train.train(distpro.flags.parse(arguments))
    assert "is near chance (10.00 %)" in " ".join(capsys.readouterr().out.split())


def test_online_learns_the_process_in_the_distillation(tmp_path):
    words = [*SHORT, "--transforms", "A", "--method", "distpro", "--process", "online", "--epochs", "2"]
    done = run(*words, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["search_seconds"] == 0
    assert result["train_seconds"]["distpro"] > 0
    process = Process.load(tmp_path / "out/process.safetensors")
    steps = 2 * int(0.9 * 1438 // 64)  # a tenth of the pictures judges
    assert process.z.shape == (steps, 16)
    moved = (process.z.diff(dim=0) != 0).any(1)
    assert moved[4::4].all()  # every 4th step by default; at the first the warm-up begins
    assert not any(moved[k::4].any() for k in (1, 2, 3))
    student = load_file(tmp_path / "out/student.safetensors")
    model = create_model("wrn_10_1", 10, 1)
    model.load_state_dict(student)
    assert result["top1"]["distpro"] > 20  # the student that is kept is the one that was trained
    assert "online" in (tmp_path / "out/report.html").read_text()
