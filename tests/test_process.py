"""The process: reading it over time, its files, and what does not fit."""

import json

import pytest
import torch
from safetensors.torch import save_file

from distpro.errors import UserError
from distpro.pathways import Pathway, all_pathways
from distpro.process import NORMALISATIONS, Process, normaliser

PATHS = all_pathways(2, 2, "A")


def ramp(tau=None, **options):
    """Pathway k goes straight from k to -k over 11 moments."""
    time = torch.linspace(1, -1, 11)[:, None]
    return Process(time * torch.arange(4.0), PATHS, tau=tau, **options)


def test_linear_in_relative_time_then_normalised():
    process = ramp()
    for fraction in (0.0, 0.3, 0.5, 0.123, 1.0):
        z = torch.arange(4.0) * (1 - 2 * fraction)
        torch.testing.assert_close(process.raw(fraction), z, rtol=1e-5, atol=1e-5)
        want = z.exp() / (z.exp().sum() + torch.e)  # Eq. 2 with g = 1
        torch.testing.assert_close(process.at(fraction), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(process.raw(-1.0), process.raw(0.0))
    assert torch.equal(process.raw(7.0), process.raw(1.0))


def test_what_a_constant_process_keeps_is_told():
    assert repr(Process.keeping([1, 2], PATHS)) == "Process(constant, 2 of 4 pathways: t1-s2-A, t2-s1-A)"
    assert repr(ramp(tau=0.5)).startswith("Process(4 pathways, 11 moments, biased-softmax, tau=0.5, ")


def test_the_same_process_for_any_length_of_training():
    process = ramp()
    short = [process.at(step / 9) for step in range(10)]
    long = [process.at(step / 90) for step in range(91)]
    for step, weights in enumerate(short):
        torch.testing.assert_close(weights, long[step * 10])


def test_clip_drops_at_tau_and_keeps_the_denominator():
    kept, clipped = ramp(), ramp(tau=0.5)
    z = kept.raw(0.25)  # 0, 0.5, 1, 1.5
    assert clipped.at(0.25).tolist() == [0, 0, *kept.at(0.25)[2:].tolist()]
    assert (z[1] - 0.5).abs() < 1e-6
    assert clipped.dropped_fraction() > 0.5
    assert kept.dropped_fraction() == 0
    ends = Process(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), clipped.pathways[:2])  # dropped from the middle on
    assert [ends.dropped_fraction(moments) for moments in (1, 2, 3, 5)] == pytest.approx([0, 1 / 4, 1 / 3, 3 / 10])


def test_table_7_and_a_softmax_for_each_teacher_stage():
    z = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    e = z.exp()
    want = {
        "biased-softmax": e / (e.sum() + torch.e),
        "softmax": e / e.sum(),
        "biased-l1": z / (3.5 + 1),
        "l1": z / 3.5,
        "sigmoid": 1 / (1 + (-z).exp()),
        "none": z,
        "stage-softmax": torch.tensor([e[0] / (e[0] + e[2]), 1, e[2] / (e[0] + e[2])]) / 2,
    }
    assert set(want) == set(NORMALISATIONS)
    paths = [Pathway.parse(name) for name in ("t1-s1-E", "t3-s1-E", "t1-s2-E")]
    for name, value in want.items():
        normalise = normaliser(name, paths, z)
        torch.testing.assert_close(normalise(z), value)
        torch.testing.assert_close(normalise(torch.stack([z, z.flip(0)]))[0], value)
    huge = normaliser("stage-softmax", paths, z)(z * 1e4)
    assert huge.tolist() == [0.5, 0.5, 0]


def test_uniform_constant_and_final():
    uniform = Process.uniform(PATHS)
    assert uniform.at(0.4).tolist() == [0.25] * 4
    assert len(uniform) == 1
    constant = Process.constant(torch.tensor([1.0, 2, 3, 4]), PATHS, normalisation="l1", tau=None)
    torch.testing.assert_close(constant.at(0.9), torch.tensor([0.1, 0.2, 0.3, 0.4]))
    final = ramp().final()
    assert torch.equal(final.at(0.0), ramp().at(1.0))


def test_those_kept_share_the_weight(tmp_path):
    weighted = Process.keeping([3, 0], PATHS, [1e-4, 3.0])
    assert weighted.at(0.3).tolist() == pytest.approx([3.0, 0, 0, 1e-4])
    assert weighted.dropped_fraction() == 0.5
    process = Process.keeping((1, 3), PATHS, facts={"why": "x"})
    assert process.at(0.5).tolist() == [0, pytest.approx(0.5, abs=1e-6), 0, pytest.approx(0.5, abs=1e-6)]
    process.save(tmp_path / "p.safetensors")
    again = Process.load(tmp_path / "p.safetensors")
    assert torch.equal(again.at(0.5), process.at(0.5))
    assert again.facts == {"why": "x"}


def test_save_and_load(tmp_path):
    process = ramp(tau=0.5, normalisation="softmax", facts={"teacher": "wrn_40_2", "epochs": 40})
    process.save(tmp_path / "p.safetensors")
    again = Process.load(tmp_path / "p.safetensors")
    assert torch.equal(again.z, process.z)
    assert (again.pathways, again.normalisation, again.tau) == (PATHS, "softmax", 0.5)
    assert again.facts == process.facts
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_fit_reorders_and_refuses():
    process = ramp()
    backwards = process.reordered(tuple(reversed(PATHS)))
    torch.testing.assert_close(backwards.at(0.2), process.at(0.2).flip(0))
    with pytest.raises(UserError, match=r"4 pathways \(teacher stages 1-2.*this pair has 27.*lacks t1-s1-B"):
        process.reordered(all_pathways(3, 3, "ABC"))
    with pytest.raises(UserError, match="has t1-s1-A, t1-s2-A, t2-s1-A, t2-s2-A besides"):
        process.reordered(())


def damaged(path, kind):
    ramp().save(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:50])
    elif kind == "foreign":
        save_file({"z": torch.zeros(1)}, path)
    elif kind == "newer":
        header = {"format": "distpro.process", "version": "99", "process": "{}"}
        save_file({"z": torch.zeros(1, 1)}, path, metadata=header)
    elif kind == "no names":
        header = {"format": "distpro.process", "version": "1", "process": json.dumps({"tau": 1})}
        save_file({"z": torch.zeros(1, 1)}, path, metadata=header)
    elif kind == "bad name":
        body = {"pathways": ["oops"], "normalisation": "softmax", "tau": None, "facts": {}}
        header = {"format": "distpro.process", "version": "1", "process": json.dumps(body)}
        save_file({"z": torch.zeros(1, 1)}, path, metadata=header)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "cannot be read as a process"),
        ("foreign", "is not a process file"),
        ("newer", "has version 99"),
        ("no names", "cannot be read as a process"),
        ("bad name", "cannot be read as a process"),
    ],
)
def test_damaged_files(tmp_path, kind, words):
    damaged(tmp_path / "p.safetensors", kind)
    with pytest.raises(UserError, match=words):
        Process.load(tmp_path / "p.safetensors")


def test_missing_file_names_the_nearest(tmp_path):
    ramp().save(tmp_path / "process.safetensors")
    with pytest.raises(UserError, match=r"did you mean '.*/process.safetensors'"):
        Process.load(tmp_path / "proces.safetensors")


def test_bad_values():
    with pytest.raises(UserError, match=r"needs z of shape \[T, 4\]"):
        Process(torch.zeros(3, 5), PATHS)
    with pytest.raises(UserError, match="not finite"):
        Process(torch.full((1, 4), torch.nan), PATHS)
    with pytest.raises(UserError, match=r"did you mean .*'softmax'"):
        Process(torch.zeros(1, 4), PATHS, normalisation="sofmax")


def test_names():
    assert Pathway(1, 2, "A").name == "t1-s2-A"
    assert Pathway.parse("t10-s2-B") == Pathway(10, 2, "B")
    assert len(all_pathways(3, 3)) == 27  # CIFAR
    assert len(all_pathways(5, 5, "A", "review")) == 15  # ImageNet
    assert [p.name for p in all_pathways(3, 2, "A", "same")] == ["t1-s1-A", "t2-s2-A"]
    with pytest.raises(UserError, match="unknown transform 'X'"):
        all_pathways(1, 1, "AX")


def test_plot_has_a_panel_for_each_teacher_stage():
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in ramp().plot().axes]
    assert [t for t in titles if t.startswith("Teacher stage")] == ["Teacher stage 1", "Teacher stage 2"]


def test_told_at_fewer_moments_it_is_nearly_the_same():
    """As the zoo keeps a process of thousands of steps."""
    paths = all_pathways(2, 2, "A")
    slow = torch.linspace(0, 1, 401)[:, None] * torch.tensor([1.0, 2.0, -0.5, 0.0]) + 0.6
    process = Process(slow, paths, "biased-softmax", 0.5, {"teacher": "a"})
    few = process.resampled(9)
    assert (len(few), few.facts, few.tau) == (9, process.facts, 0.5)
    for fraction in (0.0, 0.13, 0.5, 0.77, 1.0):
        torch.testing.assert_close(few.raw(fraction), process.raw(fraction))
    assert torch.equal(process.resampled(1).raw(0.9), process.raw(0.0))
