"""Several processes give what one gives; one that dies ends the job with a sentence. Real torchrun, real gloo."""

import copy
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from distpro import Recipe, UserError, distill, parallel
from distpro.console import Console
from distpro.features import Features
from distpro.flags import parse
from distpro.job import Job
from distpro.models import create_model, save_weights

HERE = Path(__file__).parent
PATIENCE = 300  # seconds


def torchrun(ranks, *words, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def ended(process, code=0):
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    return out, err


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What tests/ranks.py left: of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, HERE / "ranks.py", folder / "one-"], check=True, timeout=PATIENCE)
    ended(torchrun(2, str(HERE / "ranks.py"), str(folder / "two-")))
    return [torch.load(folder / name) for name in ("one-0", "two-0", "two-1")]


@pytest.mark.parametrize("what", ["exact", "finite-difference", "none", "distpro", "reviewkd", "distances"])
def test_two_processes_are_one(left, what):
    one, *two = (values[what] for values in left)
    for key, value in one.items():
        for other in two:
            torch.testing.assert_close(other[key], value, rtol=1e-9, atol=1e-11, msg=lambda text, k=key: f"{k}: {text}")


def test_a_distiller_in_distributed_data_parallel(left):
    _, *two = left
    for values in two:
        for key, parameter in values["step"].items():
            torch.testing.assert_close(values["ddp"][key], parameter, rtol=1e-9, atol=1e-12)
            assert torch.equal(parameter, two[0]["step"][key])


def test_processes_that_begin_with_networks_of_their_own_are_told(left):
    for rank, values in enumerate(left[1:]):
        assert values["of its own"].startswith(f"rank {rank}: the networks of the 2 processes are not the same")


def test_the_search_moved(left):
    z = left[1]["exact"]["z"]
    assert (z != 1).all()
    torch.testing.assert_close(z, left[1]["finite-difference"]["z"], rtol=1e-3, atol=1e-3)


DIGITS = ["-m", "distpro.train", "--epochs", "2", "--device", "cpu"]


def test_the_main_job_in_two_processes(tmp_path):
    """Search and distillation through the command; one process writes and speaks."""
    words = [*DIGITS, "--method", "distpro", "--search-epochs", "1", "--teacher-epochs", "1", "--output", str(tmp_path)]
    out, _ = ended(torchrun(2, *words))
    result = json.loads(out.splitlines()[-1])
    assert out.count("report:") == 1
    assert result["top1"]["distpro"] > 50
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"args.yaml", "result.json", "summary.csv", "process.safetensors", "student.safetensors", "last.pt"}
    assert not [name for name in names if name.startswith(".")]
    out, _ = ended(torchrun(2, *words, "--resume"))
    assert json.loads(out.splitlines()[-1])["top1"] == result["top1"]
    resumed = subprocess.run(
        [sys.executable, *words, "--resume"], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert resumed.returncode == 2
    assert "saved by 2 processes, this job has 1" in resumed.stderr


def test_a_batch_that_cannot_be_shared():
    _, err = ended(torchrun(2, *DIGITS, "--method", "none", "--batch-size", "15"), code=1)  # the launcher's own code
    assert len(re.findall("distpro: error: --batch-size 15, over all processes, is not divisible", err)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a job in /proc")
def test_a_process_that_dies_ends_the_job(tmp_path):
    job = torchrun(2, *DIGITS, "--method", "none", "--epochs", "500", "--output", str(tmp_path))
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "last.pt").exists():
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(0.2)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    victim = next(
        int(child) for child in children if b"RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes()
    )
    os.kill(victim, signal.SIGKILL)
    _, err = ended(job, code=1)
    assert "SIGKILL" in err or "lost another process" in err
    assert torch.load(tmp_path / "last.pt", weights_only=True)["history"]


def test_processes_that_see_other_files_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "broadcast", lambda value: True)
    with pytest.raises(UserError, match=r"do not see the same '.*last.pt': all ranks need the same output folder"):
        parallel.is_file(tmp_path / "last.pt")


def test_a_world_without_ranks_is_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is set, but RANK or LOCAL_RANK is not: start the processes"):
        parallel.begin(torch.device("cpu"))


def test_every_process_judges_by_as_many_images(monkeypatch):
    """Else the mean over ranks would not be that over images."""
    counts = []
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "world_size", lambda: 2)
        monkeypatch.setattr(parallel, "broadcast", lambda value: value)
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        job = Job(parse(["--batch-size", "64"]), Console())
        counts.append([len(y) for _, y in job.validation_loader(job.data.test.subset(range(41)))])
    assert counts == [[20], [20]]


def test_in_a_process_of_its_own_nothing_happens():
    x = torch.ones(3)
    parallel.all_reduce_mean([x, None])
    assert parallel.all_reduce_sum(x) is x
    assert (parallel.rank(), parallel.world_size(), parallel.is_primary(), parallel.broadcast(7)) == (0, 1, True, 7)
    assert parallel.begin(torch.device("cpu")) == torch.device("cpu")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["resnet8", "MobileNetV2", "mobilenetv3_small_050"])  # timm's hold the activation
def test_synchronised_normalisations_keep_the_keys(name):
    model = create_model(name, 10, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model.eval()(x := torch.randn(2, 3, 32, 32))
    parallel.convert_sync_batchnorm(model)
    assert list(model.state_dict()) == list(before)
    assert any(isinstance(module, parallel.SyncBatchNorm) for module in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda: create_model("mobilenetv3_small_050", 10), (4, 3, 32, 32)),
        (lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, momentum=None), nn.ReLU()), (8, 5)),
        (lambda: nn.BatchNorm2d(3), (4, 3, 5, 5)),
    ],
    ids=["timm", "1d", "alone"],
)
def test_synchronised_over_two_that_hold_the_same(network, shape, monkeypatch):
    torch.manual_seed(0)
    plain = network().double().train()
    x = torch.randn(shape, dtype=torch.float64)
    ours = copy.deepcopy(plain)
    parallel.convert_sync_batchnorm(ours)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel._Mean, "apply", lambda x: x)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-9, atol=1e-9)
    means = [[b for name, b in model.named_buffers() if name.endswith("running_mean")] for model in (ours, plain)]
    for a, b in zip(*means, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_normalisation_with_a_forward_of_its_own_is_refused():
    class Louder(nn.BatchNorm2d):
        def forward(self, x):
            return 3 * super().forward(x)

    with pytest.raises(UserError, match="--sync-bn: the Louder of this network overrides forward"):
        parallel.convert_sync_batchnorm(nn.Sequential(Louder(3)))
    with pytest.raises(UserError, match="--sync-bn: a BN of this network is parametrised"):
        parallel.convert_sync_batchnorm(
            nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(3), "weight", nn.Softplus())
        )


def test_statistics_that_rest_are_not_moved(monkeypatch):
    bn = nn.BatchNorm2d(3)
    parallel.convert_sync_batchnorm(bn)
    bn.track_running_stats = False
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel._Mean, "apply", lambda x: x)
    bn(1 + torch.randn(4, 3, 5, 5))
    assert not bn.running_mean.any()


def test_a_mean_far_above_the_deviation_costs_no_digits(monkeypatch):
    torch.manual_seed(0)
    bn, x = nn.BatchNorm2d(4), 10 + 0.01 * torch.randn(16, 4, 5, 5)
    want = copy.deepcopy(bn).double()(x.double())
    parallel.convert_sync_batchnorm(bn)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel._Mean, "apply", lambda x: x)
    torch.testing.assert_close(bn(x).double(), want, rtol=0, atol=2e-3)  # it was 0.16 by E[x^2] - E[x]^2


def test_what_reads_a_normalisation_still_does():
    reader = Features(create_model("resnet8", 10, 1), (1, 8, 8), ["layer1.0.bn2", "layer2"])
    x = torch.randn(2, 1, 8, 8)
    expected = reader.eval()(x).maps
    parallel.convert_sync_batchnorm(reader)
    for ours, theirs in zip(reader(x).maps, expected, strict=True):
        assert torch.equal(ours, theirs)
    model = reader.model
    del reader
    gc.collect()
    assert not model.get_submodule("layer1.0.bn2")._forward_hooks  # they go with the reader


def test_a_nearly_constant_channel_has_no_negative_variance(monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel._Mean, "apply", lambda x: x)  # two ranks that hold the same
    bn = parallel.SyncBatchNorm(64, eps=1e-12)
    y = bn(12.7 + 1e-4 * torch.randn(32, 64, 8, 8))
    assert y.isfinite().all()
    assert (bn.running_var >= 0).all()


def test_only_the_first_process_serialises_weights(tmp_path, monkeypatch):
    """The others would write them all, for nothing, after every epoch."""
    saved = []
    monkeypatch.setattr(torch, "save", lambda *_: saved.append("checkpoint"))
    monkeypatch.setattr("distpro.models.checkpoint.save_file", lambda *_, **__: saved.append("weights"))

    def train():
        student = create_model("wrn_10_1", 10, 1)
        batches = [(torch.randn(4, 1, 8, 8), torch.arange(4))]
        distill(student, None, batches, Recipe(2), method="none", checkpoint=tmp_path / "last.pt")
        save_weights(student, tmp_path / "student.safetensors")

    train()
    assert saved == ["checkpoint", "checkpoint", "weights"]
    monkeypatch.setattr(parallel, "is_primary", lambda: False)
    train()
    assert len(saved) == 3
