"""What is wrong in a job's flags and files is told in one sentence, before anything is trained or written."""

import resource
import signal
import sys
from contextlib import contextmanager
from typing import get_args, get_type_hints

import pytest
import torch
import yaml
from commands import SHORT, mistake, run
from drawn import save

import distpro.env
import distpro.flags
import distpro.job
import distpro.train
from distpro import Process, Recipe, distill
from distpro.config import Config
from distpro.data import LOADERS
from distpro.errors import UserError
from distpro.logits import LOGIT_LOSSES
from distpro.models import create_model, save_weights
from distpro.ops import DISTANCES
from distpro.pathways import DIRECTIONS, all_pathways
from distpro.precision import DTYPES
from distpro.process import NORMALISATIONS
from distpro.recipe import SCHEDULES
from distpro.report import save_figure, write_csv
from distpro.run_folder import check_folder
from distpro.search_step import HYPERGRADIENTS


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
        (["--size-schedule", "8", "0"], "--size-schedule must be 1 or more, got 0"),
        (["--search-samples", "5000"], "5000 training samples: expected 10 (one a class) to 1438"),
        (["--search-samples", "20", "--batch-size", "64"], "batch size 64 is larger than the 16 images"),
        (["--transforms", "AQ"], "unknown transform 'Q'"),
        (["--transforms", "AA"], "a transform is named twice: A A"),
        (["--transforms", ""], "no transform and no logit pathway"),
        (["--tau", "1", "--search-by", "trials"], "--tau only applies to a search by gradient"),
        (["--literal-xi", "True", "--search-by", "trials"], "--literal-xi only applies to a search by gradient"),
        (["--val-ema", "0.9", "--search-by", "trials"], "--val-ema only applies to a search by gradient"),
        (["--tau", "1", "--search-by", "distance"], "--tau only applies to a search by gradient"),
        (["--trial-seeds", "2", "--search-by", "distance"], "--trial-seeds only applies to a search by trials"),
        (["--search-by", "distance", "--logit-pathways", "KD"], "compares feature maps, and logits-KD has none"),
        (
            ["--search-by", "distance", "--pathways", "same"],
            "has nothing to choose where each of the teacher's",
        ),
        (["--val-ema", "1"], "--val-ema must be 0 or more and below 1, got 1.0"),
        (
            ["--normalisation", "stage-softmax", "--logit-pathways", "KD", "--search-by", "gradient"],
            "normalisation stage-softmax gives every teacher stage the same weight",
        ),
        (["--tau", "0.7", "--process", "uniform"], "--tau does nothing with --process uniform"),
        (
            ["--tau", "0.7", "--process", "zoo:cifar100/wrn_16_2-wrn_16_1-distance"],
            "--tau drops pathways by their raw weight, and 'zoo:cifar100/wrn_16_2-wrn_16_1-distance' has none",
        ),
        (["--trial-seeds", "2"], "--trial-seeds only applies to a search by trials"),
        (["--loader", "synthetic"], "data set 'digits' is not read by a loader"),
        (["--method", "reviewk"], "unknown method 'reviewk': did you mean 'reviewkd'"),
        (["--process", "online", "--ema", "0.9"], "--ema is not supported with --process online"),
        (["--process", "online", "--trial-seeds", "3"], "--trial-seeds is not supported with --process online"),
        (["--process", "online", "--search-by", "trials"], "--search-by trials is not supported with --process online"),
        (["--process", "online", "--search-by", "distance"], "--search-by distance is not supported with --process"),
        (["--teacher", "zoo:cifar100/wrn_16_2", "--teacher-pretrained"], "are mutually exclusive"),
        (
            ["--teacher", "drawn_networks:of_5", "--teacher-pretrained"],
            "--teacher-pretrained is only for timm's networks",
        ),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--device", "gpu"], "--device gpu cannot be used, expected cpu, cuda or cuda:N"),
        (["--student", "drawn_networks:of_5"], "the student drawn_networks:of_5 has 5 classes, but digits has 10"),
        (
            ["--method", "reviewkd", "--student-layers", "block1", "block3"],
            "reviewkd compares stage with stage: the teacher has 4",
        ),
        (
            ["--batch-size", "13", "--grad-accum-steps", "8"],
            "--grad-accum-steps 8 leaves less than 2 images to a micro-batch, which BN needs",
        ),
        (["--config", "none.yaml"], "no configuration file 'none.yaml'"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given 2 times: expected one file"),
        (["--student", "no.such.module:net"], "--student no.such.module:net: No module named 'no'"),
        (["--student", "distpro.models:creat_model"], "has no 'creat_model'; did you mean 'create_model'?"),
        (
            ["--student", "drawn_networks:of_width"],
            "--student drawn_networks:of_width needs width: expected a function",
        ),
        (["--student", "drawn_networks:made"], "drawn_networks:made is a WideResNet, expected a function that makes"),
        (["--seed", "9" * 20], "--seed must be 0 to 2^63 - 1"),
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
    assert (told["epochs"], told["lr"], told["search_epochs"]) == (7, 0.05, 2)
    assert not (tmp_path / "out").exists()
    assert "larger than" in mistake("--dry-run", "--batch-size", "5000")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/args.yaml").write_text("")
    assert "already contains a run" in mistake("--dry-run", "--output", tmp_path / "out")
    with pytest.raises(UserError, match=r"--dry-run is only supported by distpro\.train"):
        distpro.flags.parse(["--dry-run"], "distpro.profile")


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_an_output_that_cannot_be_is_told_before_work(words, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/run"):
        assert f"cannot write to '{place}': '{tmp_path}/file' is a file" in mistake(*words, "--output", place)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    assert f"cannot write to '{tmp_path}/new/run': no permission for '{tmp_path}'" in mistake(
        *words, "--output", tmp_path / "new/run"
    )


@contextmanager
def short_of_space():
    """Files may have 1000 bytes, to what writes them a full disk; for a moment, since pytest may write to one, too."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_in_a_sentence(tmp_path):
    process = Process.uniform(all_pathways(4, 4, "ABC"))
    network, batches = create_model("wrn_10_1", 10, in_chans=1), [(torch.zeros(2, 1, 8, 8), torch.zeros(2).long())]
    writers = {
        "process": process.save,
        "student": lambda path: save_weights(network, path),
        "summary": lambda path: write_csv(path, [{"row": i, "of": "many"} for i in range(500)]),
        "figure.svg": lambda path: save_figure(process.plot(), path),
        "last.pt": lambda path: distill(network, None, batches, Recipe(1), method="none", checkpoint=path),
    }
    for name, write in writers.items():
        (tmp_path / name).write_text("the old one")
        says = rf"cannot write '{tmp_path}/{name}'(, where \d+ MB are free)?: \S"
        with pytest.raises(UserError, match=says), short_of_space():
            write(tmp_path / name)
        assert (tmp_path / name).read_text() == "the old one"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(writers)


def test_home_is_spelt_out_wherever_it_stands(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = distpro.flags.parse(["--output=~/a", "--process=final:~/p.safetensors", "--teacher-checkpoint=~/t.pth"])
    assert (config.output, config.process) == (tmp_path / "a", f"final:{tmp_path}/p.safetensors")
    assert config.teacher_checkpoint == tmp_path / "t.pth"


def test_every_spelling_of_a_truth():
    for words, expected in (
        (["--pooled"], True),
        (["--no-pooled"], False),
        (["--pooled", "false"], False),
        (["--pooled=True"], True),
        (["--amp", "--pooled", "True", "--no-amp"], True),
    ):
        config = distpro.flags.parse(words)
        assert (config.pooled, config.amp) == (expected, False)
    assert distpro.flags.parse(["--process=false", "--method", "none"]).process == "false"


def test_help_is_text_without_the_breaks_of_the_source():
    text = " ".join(run("--help").stdout.replace("│", " ").split())
    assert "zoo:NAME (an included one) or final:FILE (its last weights throughout). (default: search)" in text
    assert "--epochs INT Epochs of the student; default: 3 for digits, 240 for CIFAR, 100 for a folder. --" in text


PAIR = ["--dataset", "cifar100", "--teacher", "resnet56", "--student", "resnet20", "--epochs", "20"]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (PAIR, ["--recipe", "fast"]),
        (PAIR, ["--recipe=paper"]),
        (PAIR, ["--kd-weight", "20"]),
        (PAIR, ["--teacher", "wrn_40_2", "--student", "ShuffleV1"]),
        ([*PAIR, "--lr", "0.3", "--search-by", "gradient"], ["--recipe", "fast"]),
        ([], ["--dataset", "cifar100"]),
        (
            ["--dataset", "folder", "--teacher", "vit_tiny_patch16_224", "--teacher-pretrained"],
            ["--teacher", "resnet34"],
        ),
        (PAIR, ["--process", "online"]),
        ([*PAIR, "--process", "online"], ["--seed", "3"]),
        (PAIR, []),
    ],
)
def test_flags_over_a_run_s_args_are_flags_beside_its_flags(first, then, tmp_path):
    """What the old pair or recipe brought is not taken for something that was told."""
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(distpro.flags.parse(first).plain()))
    over = distpro.flags.parse(["--config", str(tmp_path / "args.yaml"), *then]).plain()
    beside = distpro.flags.parse([*first, *then]).plain()
    assert over | {"config": None} == beside


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """What it does not know was not asked of it."""
    config = distpro.flags.parse(["--output", str(tmp_path), "--resume"])
    known = {k: v for k, v in config.plain().items() if k != "task_loss_weight"}
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(known))
    check_folder(tmp_path, config)


def test_classes_without_a_training_image_are_counted(tmp_path, capsys, monkeypatch):
    for i in range(10):
        save(tmp_path / f"images/class{i}/0.png", i, size=(32, 32))
    words = [
        "--dataset",
        "folder",
        "--data",
        str(tmp_path / "images"),
        "--teacher",
        "resnet8",
        "--student",
        "wrn_10_1",
    ]
    words += ["--batch-size", "2", "--device", "cpu", "--method", "none"]
    distpro.job.Job(distpro.flags.parse(words), distpro.job.Console())
    sentence = "2 of 10 classes have no training image"  # a fifth is to test with
    assert sentence in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["distpro.train", *words, "--dry-run"])
    distpro.train.main()
    told = capsys.readouterr()
    assert sentence in told.err
    assert yaml.safe_load(told.out)["student"] == "wrn_10_1"


@pytest.mark.parametrize(
    ("instructions", "slow"),
    [
        (["avx2", "avx512f"], True),
        (["avx2", "avx512_bf16"], False),
        (["asimd"], True),
        (["asimd", "bf16"], False),
        ([], False),
    ],
)
def test_a_cpu_that_emulates_bfloat16_is_named(monkeypatch, capsys, instructions, slow):
    monkeypatch.setattr(distpro.env, "cpu", lambda: {"instructions": instructions})
    for words, told in ((["--amp"], slow), ([], False)):
        distpro.job.Job(distpro.flags.parse([*words, "--device", "cpu"]), distpro.job.Console())
        assert ("no instructions for bfloat16" in capsys.readouterr().out) is told


def test_an_own_function_hears_of_classes_and_channels():
    job = distpro.job.Job(distpro.flags.parse(["--student", "drawn_networks:of_any"]), distpro.job.Console())
    assert job.student_params == sum(p.numel() for p in create_model("wrn_10_1", 10, 1).parameters())


def test_resume_needs_a_folder():
    assert mistake("--resume") == "--resume needs --output, the folder of the run to resume"


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
    torn = create_model("wrn_16_2", 10, 1)
    torn.fc.weight.data[3, 2] = torch.nan
    save_weights(torn, tmp_path / "nan.safetensors")
    assert "nan.safetensors' holds values in 'fc.weight' that are not finite" in mistake(
        "--teacher-checkpoint", tmp_path / "nan.safetensors", *out
    )
    other = tmp_path / "other.safetensors"
    save_weights(create_model("resnet8", 10, 1), other)
    assert "resnet8" in mistake("--teacher-checkpoint", other, *out)
    process = tmp_path / "p.safetensors"
    Process.uniform(all_pathways(3, 3, "AB")).save(process)
    assert "the process is for 18 pathways" in mistake("--process", process, *out)
    config = tmp_path / "c.yaml"
    config.write_text("epoch: 3\n")
    assert f"unknown key in '{config}': 'epoch': did you mean 'epochs'" in mistake("--config", config, *out)
    for text, sentence in (
        ("transforms: [A, B]\n", f"key 'transforms' in '{config}' has several values (A, B): expected one"),
        ("amp: 'yes'\n", f"key 'amp' in '{config}' is 'yes': expected true or false"),
    ):
        config.write_text(text)
        assert sentence in mistake("--config", config, *out)
    config.write_text("epochs: [3\n")
    assert "is not YAML" in mistake("--config", config, *out)
    assert not (tmp_path / "out").exists()


def test_unknown_flags_and_values_name_the_nearest():
    for words, near in ((["--epocs", "3"], "--epochs"), (["--distance", "hc"], "hcl")):
        done = run(*words)
        assert done.returncode == 2
        assert near in done.stdout + done.stderr


def test_a_loss_that_is_not_finite(tmp_path):
    said = mistake(*SHORT, "--method", "none", "--lr", "1e30", "--output", tmp_path / "out")
    assert said == "the loss is no longer finite (none, epoch 1): lower --lr or --kd-weight"


def test_what_a_broken_off_size_schedule_measures_is_said(capsys):
    words = ["--dataset", "folder", "--loader", "synthetic", "--teacher", "resnet8", "--student", "resnet8"]
    distpro.job.Job(
        distpro.flags.parse([*words, "--image-size", "64", "--size-schedule", "32", "64", "--max-steps", "3"]),
        distpro.job.Console(),
    )
    assert "measures the first sizes of --size-schedule alone, here 32" in " ".join(capsys.readouterr().out.split())


def test_every_choice_of_a_flag_is_one_there_is():
    """What can be written down in two places is the same in both."""
    registries = {
        "loader": LOADERS,
        "pathways": DIRECTIONS,
        "logit_pathways": LOGIT_LOSSES,
        "distance": DISTANCES,
        "sched": SCHEDULES,
        "hypergradient": HYPERGRADIENTS,
        "normalisation": set(NORMALISATIONS) - {"none"},  # there is nothing to learn without
        "teacher_precision": DTYPES,
    }
    hints = get_type_hints(Config)
    for name, known in registries.items():
        assert set(words_of(hints[name])) == set(known), name


def words_of(hint):
    """The strings that a type allows."""
    if isinstance(hint, str):
        return [hint]
    return [word for part in get_args(hint) for word in words_of(part)]
