"""The search by trials: on planted effects, where the truth is known, and as a job."""

import json

import pytest
import torch
from commands import SHORT, run

import distpro.trials
from distpro import Process, Recipe
from distpro.errors import UserError
from distpro.models import create_model
from distpro.pathways import Pathway, all_pathways
from distpro.trials import by_depth, search_by_trials, stepwise

PATHS = all_pathways(4, 4, "AB", logits=("KD",))


def same_stage_and_a(p):
    """What the planted trainings like: the same stage, transform A; and KD."""
    good = p.teacher == p.student and p.transform in ("A", "KD")
    return 1.0 if good else -0.3


@pytest.fixture
def planted(monkeypatch):
    """Trainings whose accuracy is known: what each pathway adds, what a seed adds, and noise."""
    calls = []

    def distill(student, teacher, train, recipe, *, process, test, name, **options):
        student = student.seed
        weights = process.at(0.5)
        assert weights.sum() == pytest.approx(1, abs=1e-5)
        kept = weights.nonzero().flatten().tolist()
        assert len(set(weights[kept].tolist())) == 1
        noise = torch.randn((), generator=torch.Generator().manual_seed(student + sum(1 << p for p in kept)))
        top1 = 30 + 3 * student + sum(planted.gain(PATHS[p]) for p in kept) + 0.2 * float(noise)
        calls.append((tuple(kept), student))
        return [{"test_top1": top1, "seconds": 2.0}]

    planted = type("Planted", (), {"calls": calls, "gain": staticmethod(same_stage_and_a)})
    monkeypatch.setattr(distpro.trials, "distill", distill)
    return planted


def network(seed=0):
    model = create_model("wrn_10_1", 10, in_chans=1)
    model.seed = seed
    return model


def search(**options):
    what = {"pooled": True, "transforms": "AB", "logit_pathways": ["KD"]} | options
    batches = [(torch.zeros(2, 1, 8, 8), torch.zeros(2))]
    return search_by_trials(network, network(), batches, batches, Recipe(1), **what)


@pytest.mark.parametrize("seeds", [(0,), (3, 4)])
def test_planted_kinds_are_found(planted, seeds):
    process = search(seeds=seeds, facts={"pair": "x"})
    kept = [PATHS[p].name for p, w in enumerate(process.at(0.3).tolist()) if w > 0]
    assert kept == ["t1-s1-A", "t2-s2-A", "t3-s3-A", "t4-s4-A", "logits-KD"]
    assert process.facts["pair"] == "x"
    assert process.facts["trials"] == len(planted.calls) == len(set(planted.calls))
    assert process.facts["seconds"] == 2.0 * len(planted.calls)
    told = [tuple(choice["kinds"]) for choice in process.facts["top-1 of trials"]]
    assert len(set(told)) == len(told)
    first, *others = process.facts["top-1 of trials"]
    assert len(first["kinds"]) == 5  # all distances, and KD
    assert [o["kinds"] for o in others[:5]] == [[name] for name in dict.fromkeys(map(by_depth, PATHS))]


def test_where_everything_helps_all_pathways_stay(planted):
    planted.gain = lambda p: 1.0
    assert (search().at(0.0) > 0).all()
    assert len(planted.calls) == (1 + 5 + 5) + (2 + 2)  # all, each alone, each left out; all and KD's were run before


def test_where_nothing_matters_it_ends_with_all():
    """Equal numbers are no step ahead: it would go in circles."""
    pair = (Pathway(1, 1, "A"), Pathway(1, 2, "A"))
    for paths in (pair, PATHS):
        kept, worth = stepwise(paths, tuple(range(len(paths))), by_depth, lambda kept: 20.0)
        assert kept == tuple(range(len(paths)))
        assert set(worth.values()) == {20.0}


def test_it_goes_on_where_it_was_killed(planted, tmp_path):
    record = tmp_path / "trials.json"
    whole = search(record=record)
    done = json.loads(record.read_text())
    assert len(done) == len(planted.calls)
    record.write_text(json.dumps(done[:4]))
    planted.calls.clear()
    again = search(record=record)
    assert len(planted.calls) == len(done) - 4
    assert torch.equal(again.z, whole.z)
    assert again.facts == whole.facts


def test_distances():
    told = [by_depth(Pathway(t, s, "A")) for t, s in ((2, 2), (2, 3), (1, 3), (3, 2), (3, 1), (0, 0))]
    assert told == [
        *("same stage", "student one stage deeper", "student deeper", "student shallower", "student shallower"),
        "logits-A",
    ]


def test_one_pathway_is_nothing_to_choose_from(planted, monkeypatch):
    with pytest.raises(UserError, match="at least two pathways"):
        search(transforms="", logit_pathways=["KD"])
    planted.gain = lambda p: 0.0
    monkeypatch.setattr("test_trials.PATHS", (Pathway(0, 0, "KD"), Pathway(0, 0, "DKD")))
    assert len(search(transforms="", logit_pathways=["KD", "DKD"]).pathways) == 2


@pytest.mark.slow
def test_as_a_job(tmp_path):
    words = [*SHORT, "--method", "distpro", "--search-by", "trials", "--transforms", "A"]
    done = run(*words, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    process = Process.load(tmp_path / "out/process.safetensors")
    assert 1 + 4 + 3 <= process.facts["trials"] <= 15  # all, each distance alone, then step by step
    assert json.loads(done.stdout.splitlines()[-1])["search_seconds"] == process.facts["seconds"] > 0
    assert len(json.loads((tmp_path / "out/trials.json").read_text())) == process.facts["trials"]
