"""The search by distance: what it measures, what it keeps, and as a job."""

import copy
import json

import pytest
import torch
from commands import SHORT, run

import distpro.distance_search
from distpro import Distiller, Process, Recipe, search_by_distance
from distpro.distance_search import check_choice, closest, distances, weights
from distpro.errors import UserError
from distpro.models import create_model
from distpro.ops import reference
from distpro.pathways import Pathway, all_pathways

IMAGE = (1, 8, 8)


def pair():
    torch.manual_seed(0)
    return create_model("wrn_10_1", 10, 1), create_model("resnet8", 10, 1)


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *IMAGE, generator=generator), torch.randint(10, (count,), generator=generator)


@pytest.mark.parametrize("distance", ["hcl", "l1"])
def test_distances_are_means_over_images(distance):
    """Measured image by image with the reference, on batches of unequal sizes, in eval mode and leaving no trace."""
    distiller = Distiller(*pair(), image=IMAGE, transforms="AE", pooled=True, distance=distance).train()
    x, y = images(11)
    distiller(x, y, 0.0)  # BN statistics that are not those of a new network
    before = copy.deepcopy(distiller.state_dict())
    found = distances(distiller, [(x[:8], y[:8]), (x[8:], y[8:])])
    assert distiller.training
    for name, value in distiller.state_dict().items():
        assert torch.equal(value, before[name]), name

    distiller.eval()
    measure, paths = reference.DISTANCES[distance], distiller.method.paths
    with torch.no_grad():
        for p, pathway in enumerate(paths.pathways):
            each = []
            for i in range(len(x)):
                student, teacher = distiller.student(x[i : i + 1]), distiller.teacher(x[i : i + 1])
                target = teacher.maps[pathway.teacher - 1]
                made = paths.blocks[pathway.name](student.maps[pathway.student - 1], target.shape[2:])
                each.append(float(measure(made - target)))
            assert float(found[p]) == pytest.approx(sum(each) / len(each), rel=1e-5), pathway.name


def test_the_closest_pathway_of_each_teacher_stage_is_kept():
    paths = all_pathways(3, 3, "AE")
    found = [0.5 + (p.student != {1: 2, 2: 3, 3: 3}[p.teacher]) + 0.1 * (p.transform == "A") for p in paths]
    kept = [
        paths[i].name
        for i in closest(paths, [value * (1 + 99 * p.teacher) for value, p in zip(found, paths, strict=True)])
    ]
    assert kept == ["t1-s2-E", "t2-s3-E", "t3-s3-E"]


def test_what_is_measured_after_the_training_is_kept(monkeypatch):
    """With planted distances: the training is a real one, of uniform weights."""
    student, teacher = pair()
    before = [p.clone() for p in student.parameters()]
    planted = torch.arange(1.0, 10.0).roll(4)  # of t1-s1, t1-s2, ...: 6 7 8 9 1 2 3 4 5

    def measured(distiller, loader):
        assert loader == "validation"
        assert all((p != q).any() for p, q in zip(student.parameters(), before, strict=True))
        assert distiller.method.process.dropped_fraction() == 0
        return planted.double()

    monkeypatch.setattr(distpro.distance_search, "distances", measured)
    monkeypatch.setattr(distpro.distance_search, "image_shape", lambda *_: IMAGE)
    recipe = Recipe(2, lr=0.05, ema=0.9)
    process = search_by_distance(student, teacher, [images(8)], "validation", recipe, transforms="A", facts={"pair": 1})
    kept = {p.name: w for p, w in zip(process.pathways, process.at(0.3).tolist(), strict=True) if w}
    roots = {"t1-s1-A": 6**0.5, "t2-s2-A": 1.0, "t3-s1-A": 3**0.5}
    assert kept == pytest.approx({name: 1 / (3 * root) for name, root in roots.items()})
    assert process.facts.pop("seconds") > 0
    assert process.facts == {
        "pair": 1,
        "distances": dict(zip([p.name for p in process.pathways], planted.tolist(), strict=True)),
    }


def test_a_map_that_is_met_exactly_has_a_finite_weight():
    assert weights([0, 2], [0.0, 5.0, 4.0]) == pytest.approx([1 / (2 * 0.002), 1 / (2 * 2)])
    assert weights([0, 1], [0.0, 0.0]) == [0.5, 0.5]


def test_the_weights_make_the_loss_that_of_the_roots():
    """Of twice their mean, to first order around the measured distances and at every scale of the maps."""
    for scale in (0.1, 1.0, 30.0):
        found = (scale**2 * torch.tensor([0.2, 5.0, 0.7], dtype=torch.float64)).requires_grad_()
        (roots,) = torch.autograd.grad(found.sqrt().sum(), found)
        given = torch.tensor(weights([0, 1, 2], found.tolist()), dtype=torch.float64)
        torch.testing.assert_close(3 * given, 2 * roots)


@pytest.mark.parametrize(
    ("pathways", "sentence"),
    [
        (all_pathways(3, 3, "A", logits=("KD",)), "compares feature maps, and logits-KD has none"),
        ([Pathway(1, 1, "A"), Pathway(2, 2, "A")], "has nothing to choose where each of the teacher's"),
    ],
)
def test_where_distances_decide_nothing_it_is_refused(pathways, sentence):
    with pytest.raises(UserError, match=sentence):
        check_choice(pathways)
    check_choice([Pathway(1, 1, "A"), Pathway(1, 1, "B")])  # two transforms are a choice


@pytest.mark.slow
def test_as_a_job(tmp_path):
    words = [*SHORT, "--method", "distpro", "--search-by", "distance", "--transforms", "AE"]
    words += ["--output", tmp_path / "out"]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    process = Process.load(tmp_path / "out/process.safetensors")
    kept = [p for p, w in zip(process.pathways, process.at(0.5).tolist(), strict=True) if w]
    assert [p.teacher for p in kept] == [1, 2, 3, 4]
    told = process.facts["distances"]
    for p in kept:
        assert told[p.name] == min(told[q.name] for q in process.pathways if q.teacher == p.teacher)
    assert json.loads(done.stdout.splitlines()[-1])["search_seconds"] == process.facts["seconds"] > 0

    (tmp_path / "out/process.safetensors").unlink()  # as if killed after the training of the search
    again = run(*words, "--resume")
    assert again.returncode == 0, again.stderr
    assert "search       epoch" not in again.stdout
    assert Process.load(tmp_path / "out/process.safetensors").facts == process.facts
