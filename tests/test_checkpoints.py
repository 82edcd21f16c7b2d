"""Checkpoints: every usual form loads whole, or is refused in one sentence."""

import argparse
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distpro.models.checkpoint as checkpoint
from distpro.errors import UserError
from distpro.models import create_model, load_checkpoint, save_weights

SHARED = Path(__file__).parents[2] / "shared" / "data"
RESNET56 = SHARED / "checkpoints" / "cifar100_resnet56.pth"


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    net = create_model("resnet8", 5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    return net


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refused(net, path, says):
    """Loading must fail with one sentence that names the file, and must leave the network as it was."""
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(UserError, match=says) as error:
        load_checkpoint(net, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_saved_weights_come_back(teacher, tmp_path):
    path = tmp_path / "new" / "student.safetensors"
    save_weights(teacher, path)
    net = create_model("resnet8", 5)
    assert not same(net, teacher)
    assert load_checkpoint(net, path) == {}
    assert same(net, teacher)
    assert [p.name for p in path.parent.iterdir()] == ["student.safetensors"]


def test_a_file_is_no_pickle_because_its_header_is_as_long_as_one_begins(teacher, tmp_path):
    path, states = tmp_path / "c.safetensors", teacher.state_dict()
    for padding in range(256):
        save_file(states, path, metadata={"facts": "x" * padding})
        if path.read_bytes()[:1] == b"\x80":
            break
    net = create_model("resnet8", 5)
    assert load_checkpoint(net, path) == {"facts": "x" * padding}
    assert path.read_bytes()[:1] == b"\x80"
    assert same(net, teacher)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_network_saves_and_loads_under_its_own_names(wrap, teacher, tmp_path):
    save_weights(wrap(teacher), tmp_path / "a.safetensors")
    torch.save(wrap(teacher).state_dict(), tmp_path / "b.pth")
    for file in ("a.safetensors", "b.pth"):
        net, wrapped = create_model("resnet8", 5), wrap(create_model("resnet8", 5))
        load_checkpoint(net, tmp_path / file)
        load_checkpoint(wrapped, tmp_path / file)
        assert same(net, teacher)
        assert all(torch.equal(a, b) for a, b in zip(wrapped.parameters(), teacher.parameters(), strict=True))


def test_shared_and_strided_tensors_are_saved_under_every_name(tmp_path):
    def tied():
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        return net

    net = tied()
    net[0].bias.data = torch.arange(6.0)[::2]
    save_weights(net, tmp_path / "tied.safetensors")
    loaded = tied()
    load_checkpoint(loaded, tmp_path / "tied.safetensors")
    assert same(loaded, net)


def test_a_save_that_fails_leaves_the_old_file(teacher, tmp_path, monkeypatch):
    path = tmp_path / "student.safetensors"
    save_weights(teacher, path)
    old = path.read_bytes()

    def disk_full(state, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", disk_full)
    with pytest.raises(UserError, match=r"cannot write '.*student\.safetensors': no space left"):
        save_weights(teacher, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("holder", [None, "model", "state_dict", "model_state_dict", "net", "student", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_the_usual_forms_of_a_checkpoint_load(holder, prefix, teacher, tmp_path):
    state = {prefix + key: value for key, value in teacher.state_dict().items()}
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1).state_dict()
    beside = {"epoch": 3, "best_acc": torch.tensor([61.5]), "optimizer": optimizer, "opt": argparse.Namespace(lr=1)}
    torch.save({**beside, holder: state} if holder else state, tmp_path / "c.pth")
    net = create_model("resnet8", 5)
    assert load_checkpoint(net, tmp_path / "c.pth") == ({"epoch": 3, "best_acc": 61.5} if holder else {})
    assert same(net, teacher)


def test_a_moving_average_is_taken_before_the_weights(teacher, tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(teacher).state_dict()  # as torchvision's scripts save it
    torch.save({"model": create_model("resnet8", 5).state_dict(), "model_ema": averaged}, tmp_path / "c.pth")
    net = create_model("resnet8", 5)
    load_checkpoint(net, tmp_path / "c.pth")
    assert same(net, teacher)


def test_a_checkpoint_older_than_the_batch_count_loads(teacher, tmp_path):
    state = {key: value for key, value in teacher.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pth")
    net = create_model("resnet8", 5)
    load_checkpoint(net, tmp_path / "old.pth")
    assert torch.equal(net.layer3[0].bn2.running_mean, teacher.layer3[0].bn2.running_mean)


def test_a_missing_file_names_its_neighbour(teacher, tmp_path):
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    refused(teacher, tmp_path / "techer.pth", "there is no checkpoint .*did you mean 'teacher.pth'")
    refused(teacher, tmp_path / "no" / "where.pth", "there is no checkpoint")
    refused(teacher, tmp_path, "there is no checkpoint")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 100, -1000])
def test_a_truncated_file_is_refused(suffix, keep, teacher, tmp_path):
    path = tmp_path / f"cut{suffix}"
    if suffix == ".safetensors":
        save_weights(teacher, path)
    else:
        torch.save(teacher.state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    refused(create_model("resnet8", 5), path, "cannot be read, it is damaged or in another format")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_another_kind_is_refused(suffix, teacher, tmp_path):
    path = tmp_path / f"notes{suffix}"
    path.write_text("hello, this is no checkpoint\n" * 20)
    refused(teacher, path, "cannot be read, it is damaged or in another format")


@pytest.mark.parametrize("name", ["page.pth", "page.safetensors"])
def test_a_web_page_is_called_one(name, teacher, tmp_path):
    (tmp_path / name).write_text("\n<!DOCTYPE html><html><body>Sign in to download</body></html>")
    refused(teacher, tmp_path / name, "is a web page: download the file itself")


def test_what_a_file_is_called_does_not_matter(teacher, tmp_path):
    save_weights(teacher, tmp_path / "weights.bin")
    torch.save(teacher.state_dict(), tmp_path / "weights.safetensors")
    for name in ("weights.bin", "weights.safetensors"):
        load_checkpoint(create_model("resnet8", 5), tmp_path / name)


def test_a_plain_pickle_earns_no_advice_to_run_it(teacher, tmp_path):
    (tmp_path / "list.pth").write_bytes(pickle.dumps([1, 2, 3]))
    with pytest.raises(UserError) as told:
        load_checkpoint(teacher, tmp_path / "list.pth")
    assert "weights_only" not in str(told.value)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(teacher, tmp_path):
    trace = tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch '{trace}'",)

    path = tmp_path / "evil.pth"
    torch.save({"model": teacher.state_dict(), "extra": Malicious()}, path)
    refused(create_model("resnet8", 5), path, r"Python objects \(\w+\.system\).*refused: expected tensors only")
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the trap is a real one
    assert trace.exists()


def test_a_whole_pickled_model_is_refused(teacher, tmp_path):
    torch.save(teacher, tmp_path / "model.pth")
    refused(teacher, tmp_path / "model.pth", r"Python objects \(distpro\.models\.resnet\.ResNet\)")


def test_a_file_without_a_state_dict_is_refused(teacher, tmp_path):
    torch.save({"epoch": 3, "weights_of": "nothing"}, tmp_path / "facts.pth")
    refused(teacher, tmp_path / "facts.pth", "holds keys 'epoch' and 1 more: expected a state dict")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    refused(teacher, tmp_path / "list.pth", "holds a list: expected a state dict")


@pytest.mark.parametrize("name", ["resnet8", "MobileNetV2", "ShuffleV1"])
def test_another_number_of_classes_is_said(name, tmp_path):
    torch.save({"model": create_model(name, 100).state_dict()}, tmp_path / "c.pth")
    refused(create_model(name, 10), tmp_path / "c.pth", "has 100 classes, but the data has 10$")


@pytest.mark.parametrize(("stored", "asked"), [("resnet14", "resnet8"), ("wrn_16_1", "resnet8"), ("vgg8", "vgg13")])
def test_another_networks_checkpoint_is_recognised(stored, asked, tmp_path):
    save_weights(create_model(stored, 10, in_chans=1), tmp_path / "c.safetensors")
    refused(create_model(asked, 5), tmp_path / "c.safetensors", f"does not fit {asked}: .*; the file fits '{stored}'$")


def test_other_mismatches_name_what_was_expected_and_found(teacher, tmp_path):
    path = tmp_path / "c.pth"
    state = teacher.state_dict()
    torch.save({**{k: v for k, v in state.items() if k != "fc.bias"}, "fc.bais": state["fc.bias"]}, path)
    refused(create_model("resnet8", 5), path, "expected 'fc.bias', not in the file; found 'fc.bais', not in the model$")
    torch.save({**state, "layer1.0.bn1.weight": torch.ones(7)}, path)
    refused(create_model("resnet8", 5), path, r"'layer1.0.bn1.weight' is \[7\], expected \[16\]$")
    torch.save(create_model("resnet8", 5, in_chans=1).state_dict(), path)
    refused(create_model("resnet8", 5), path, r"'conv1.weight' is \[16, 1, 3, 3\], expected \[16, 3, 3, 3\]")


@pytest.fixture
def resnet56():
    if not RESNET56.exists():
        pytest.skip(f"needs the trained ResNet-56, {RESNET56.name}, which is not part of the repository")
    net = create_model("resnet56", 100)
    net.facts = load_checkpoint(net, RESNET56)
    return net.eval()


def test_a_trained_resnet56_loads(resnet56):
    assert resnet56.facts == {"epoch": 200, "best_acc": 66.41}
    stored = torch.load(RESNET56, weights_only=True)["model"]
    assert list(stored) == list(resnet56.state_dict())
    assert all(torch.equal(stored[key], value) for key, value in resnet56.state_dict().items())


@pytest.mark.slow
def test_a_trained_resnet56_is_as_accurate_as_it_should_be(resnet56):
    """66.41 % top-1 on all 10,000 test images; 66.95 % on the first 20 of each class, which are read here."""
    image = pytest.importorskip("PIL.Image")
    strips = sorted((SHARED / "cifar100" / "test").glob("*.webp"))
    if not strips:
        pytest.skip("needs the CIFAR-100 test images, which are not part of the repository")
    classes = json.loads((SHARED / "cifar100" / "index.json").read_text())["classes"]
    assert [strip.stem[3:] for strip in strips] == classes
    images = np.stack([np.asarray(image.open(strip).convert("RGB")).reshape(-1, 32, 32, 3)[:20] for strip in strips])
    x = torch.from_numpy(images).flatten(0, 1).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([[0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]])[:, :, None, None]
    x = ((x - mean) / std).contiguous(memory_format=torch.channels_last)
    resnet56.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        found = torch.cat([resnet56(part).argmax(1) for part in x.split(200)])
    right = (found == torch.arange(100).repeat_interleave(20)).double().mean().item()
    assert 100 * right == pytest.approx(66.95, abs=0.1)
