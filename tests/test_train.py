"""The commands as a user types them: what they print, what they leave, and what they say to mistakes."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from commands import SHORT, mistake, run
from safetensors.torch import load_file

import distpro.data
import distpro.flags
import distpro.job
import distpro.phases
import distpro.train
from distpro import Process
from distpro.models import create_model, save_weights
from distpro.pathways import all_pathways
from distpro.tasks import Classification, Metrics


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
    assert process.z.shape == (1, 16)
    assert [p.teacher for p, weight in zip(process.pathways, process.at(0), strict=True) if weight] == [1, 2, 3, 4]


def test_a_finished_job_is_not_overwritten_but_resumes(job, capsys):
    folder, done = job
    assert (
        mistake(*SHORT, "--output", folder)
        == f"'{folder}' already contains a run: --resume it, or choose another --output"
    )
    assert "started with epochs = 1, not 2" in mistake(*SHORT, "--epochs", 2, "--output", folder, "--resume")
    capsys.readouterr()
    args = (folder / "args.yaml").read_text()
    (folder / "args.yaml").write_text("epochs: [3\n")
    assert f"'{folder / 'args.yaml'}' is not YAML" in mistake(*SHORT, "--output", folder, "--resume")
    (folder / "args.yaml").write_text(args)
    again = run(*SHORT, "--output", folder, "--resume")
    assert again.returncode == 0, again.stderr
    first, second = (json.loads(d.stdout.splitlines()[-1]) for d in (done, again))
    assert second["top1"] == first["top1"]
    assert yaml.safe_load((folder / "args.yaml").read_text())["resume"] is False  # it is a --config of new runs


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


class Heard(Exception):
    """Ends a phase once what it was asked for is known."""


def test_every_method_gets_its_own_weight(monkeypatch):
    """kd's weight is not that of the feature losses: the baseline would be a straw man."""
    config = distpro.flags.parse(["--kd-weight", "7", "--reviewkd-weight", "5"])
    job = distpro.job.Job(config, distpro.job.Console())
    seen = {}

    def distill(*_, method, **options):
        seen[method] = options
        raise Heard

    monkeypatch.setattr(distpro.phases, "distill", distill)
    for method in ("none", "kd", "reviewkd", "distpro"):
        with pytest.raises(Heard):
            distpro.phases.run_method(job, method)
    weights = {m: {k: v for k, v in o.items() if k.endswith("weight")} for m, o in seen.items()}
    assert weights == {
        "none": {},
        "kd": {"task_loss_weight": 0.1, "distill_loss_weight": 0.9},
        "reviewkd": {"kd_weight": 5.0},
        "distpro": {"kd_weight": 7.0},
    }


def test_uniform_weights_are_trained_once():
    methods = distpro.job.Job(distpro.flags.parse(["--process", "uniform"]), distpro.job.Console()).methods
    assert methods == ["none", "kd", "reviewkd", "distpro"]


def test_the_switches_of_a_gpu_together(tmp_path):
    """As README's ImageNet commands have them, and others that no other test gives a job."""
    words = [*SHORT[:-1], "1", "--max-steps", 3, "--output", tmp_path / "out", "--eval-split", "validation"]
    words += [
        "--amp",
        "--channels-last",
        "--teacher-precision",
        "bfloat16",
        "--sync-bn",
        "--logit-pathways",
        "KD",
        "DIST",
    ]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["measured_on"], len(result["top1"])) == ("validation", 5)
    assert "as it will run, with folded BN in bfloat16: top-1" in done.stdout
    assert {p.transform for p in Process.load(tmp_path / "out/process.safetensors").pathways} == {"E", "KD", "DIST"}


def test_images_are_normalised_as_the_teacher_wants_it(tmp_path):
    words = ["--dataset", "folder", "--teacher", "vit_tiny_patch16_224"]
    assert distpro.flags.parse([*words[:2], "--teacher", "resnet20"]).mean == distpro.data.MEAN
    trained = distpro.flags.parse([*words, "--std", "0.1", "0.2", "0.3"])
    assert (trained.mean, trained.std) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    args = tmp_path / "args.yaml"
    args.write_text(yaml.safe_dump(trained.plain()))
    assert distpro.flags.parse(["--config", str(args)]) == replace(trained, config=args)
    assert distpro.flags.parse(["--teacher", "wrn_16_2"]).mean is None  # the digits have their own


def test_a_trained_teacher_keeps_how_its_images_were_normalised(photos, tmp_path):
    words = ["--dataset", "folder", "--data", photos, "--image-size", "32", "--teacher", "resnet8", "--device", "cpu"]
    words += ["--student", "wrn_10_1", "--batch-size", "4", "--epochs", "1", "--teacher-epochs", "1", "--method", "kd"]
    half = ["--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"]
    done = run(*words, *half, "--output", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    again = [*words, "--teacher-checkpoint", tmp_path / "a/teacher.safetensors", "--dry-run"]
    assert mistake(*again).endswith(
        "teacher.safetensors' was trained on images normalised differently: give --mean 0.5 0.5 0.5 "
        "--std 0.25 0.25 0.25"
    )
    assert run(*again, *half).returncode == 0


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


def test_a_given_process_takes_another_tau(tmp_path):
    z = torch.full((1, 16), 2.0)
    z[0, 3] = 1.0
    Process(z, all_pathways(4, 4, "E"), tau=0.5).save(tmp_path / "p.safetensors")
    words = ["--method", "distpro", "--process", str(tmp_path / "p.safetensors")]
    for more, dropped in (([], []), (["--tau", "1.5"], [3])):
        given = distpro.job.Job(distpro.flags.parse([*words, *more]), distpro.job.Console()).given
        assert (given.at(0.5) == 0).nonzero().flatten().tolist() == dropped


def test_a_search_hears_of_the_weight(monkeypatch):
    heard = {}

    def search(*given, **options):
        heard.update(options, recipe=given[4])
        raise Heard

    monkeypatch.setattr(distpro.phases, "search_by_gradient", search)
    for flags, weight in (([], 3.0), (["--kd-weight", "0"], 0.0)):
        words = ["--method", "distpro", "--search-by", "gradient", "--grad-accum-steps", "2"]
        parsed = distpro.flags.parse([*words, *flags])
        with pytest.raises(Heard):
            distpro.phases.search(distpro.job.Job(parsed, distpro.job.Console()))
        assert heard["kd_weight"] == weight
        assert heard["recipe"].grad_accum_steps == 1  # the distillation's alone
        assert heard["facts"]["dataset"] == "digits"


def test_published_weights_of_other_classes_are_fine_tuned(monkeypatch, photos, capsys):
    make = distpro.job.create_model
    monkeypatch.setattr(distpro.job, "create_model", lambda *a: make(*a[:3], False, *a[4:]))  # no download
    words = ["--dataset", "folder", "--data", str(photos), "--image-size", "32", "--batch-size", "4", "--loader"]
    words += ["torchvision", "--teacher", "resnet18", "--teacher-pretrained", "--teacher-epochs", "2", "--method", "kd"]
    job = distpro.job.Job(distpro.flags.parse([*words, "--student", "resnet18"]), distpro.job.Console())
    assert not job.teacher_ready  # of 1000 classes, the folder has 3
    recipes = []
    monkeypatch.setattr(distpro.phases, "distill", lambda *arguments, **_: recipes.append(arguments[3]))
    monkeypatch.setattr(distpro.phases, "save_weights", lambda *_: None)
    distpro.phases.prepare_teacher(job)
    assert [(r.epochs, r.lr) for r in recipes] == [(2, pytest.approx(0.01))]
    told = " ".join(capsys.readouterr().out.split())
    assert "its published weights are for other classes: fine-tuning the teacher resnet18 first (2 epochs)" in told


def test_online_learns_the_process_in_the_distillation(tmp_path):
    words = [*SHORT, "--transforms", "A", "--method", "distpro", "--process", "online", "--epochs", "2"]
    done = run(*words, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["search_seconds"] == 0
    assert result["train_seconds"]["distpro"] > 0
    process = Process.load(tmp_path / "out/process.safetensors")
    steps = 2 * int(0.9 * 1438 // 64)  # a tenth of the images judges
    assert process.z.shape == (steps, 16)
    moved = (process.z.diff(dim=0) != 0).any(1)
    assert moved[4::4].all()  # every 4th step by default; at the first the warm-up begins
    assert not any(moved[k::4].any() for k in (1, 2, 3))
    student = load_file(tmp_path / "out/student.safetensors")
    model = create_model("wrn_10_1", 10, 1)
    model.load_state_dict(student)
    assert result["top1"]["distpro"] > 20  # the student that is kept is the one that was trained
    assert "online" in (tmp_path / "out/report.html").read_text()


def test_a_job_of_the_zoo_s_networks_does_without_timm():
    """Its import takes a second of every start."""
    program = "import sys, distpro.train; distpro.train.parse([]); sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_teacher_near_chance_is_warned_of(tmp_path, capsys):
    untrained = tmp_path / "t.safetensors"
    torch.manual_seed(3)
    save_weights(create_model("resnet8", 10, 1), untrained)
    arguments = [*SHORT, "--method", "kd", "--teacher-checkpoint", str(untrained), "--output", str(tmp_path / "out")]
    distpro.train.train(distpro.flags.parse(arguments))
    assert "is near chance (10.00 %)" in " ".join(capsys.readouterr().out.split())


def test_half_right_of_two_classes_is_near_chance_and_all_right_is_not():
    job = SimpleNamespace(teacher_ready=True, teacher=None, test=None, data=SimpleNamespace(num_classes=2))
    job.config = SimpleNamespace(teacher="t", eval_split="test", teacher_precision=None)
    for top1, warned in ((52.0, True), (67.5, False)):
        said = []
        job.console = SimpleNamespace(say=lambda line: None, warn=said.append)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Classification, "evaluate", lambda *_, top1=top1: Metrics(top1, 100.0, 1.0))
            distpro.phases.prepare_teacher(job)
        assert bool(said) == warned
