"""The search by trials: on planted effects, where the truth is known, and as a job."""

import json

import pytest
import torch
from test_train import SHORT, run

import distpro.trials
from distpro import Process, Recipe
from distpro.errors import UserError
from distpro.pathways import all_pathways
from distpro.trials import Trial, chosen, effects, halves, search_by_trials

PATHS = all_pathways(4, 4, "A")
GOOD = {0: 3.0, 5: 2.0, 10: 2.5, 15: 4.0}  # points that a pathway adds; each other one costs 0.2


@pytest.fixture
def planted(monkeypatch):
    """Trainings whose accuracy is known: effects of the pathways, an effect of the seed, noise of 0.5 points."""
    calls = []

    def distill(student, teacher, train, recipe, *, process, test, name, **options):
        kept = process.at(0.5).nonzero().flatten().tolist()
        assert process.at(0.5).sum() == pytest.approx(1, abs=1e-5)
        seed = student
        noise = torch.randn((), generator=torch.Generator().manual_seed(seed * 1000 + sum(1 << p for p in kept)))
        top1 = 30 + 3 * (seed % 5) + sum(GOOD.get(p, -0.2) for p in kept) + 0.5 * float(noise)
        calls.append((tuple(kept), seed))
        return [{"test_top1": top1, "test_loss": 1.0, "seconds": 2.0}]

    monkeypatch.setattr(distpro.trials, "distill", distill)
    return calls


def search(**options):
    return search_by_trials(lambda seed: seed, None, None, None, Recipe(1), PATHS, **options)


def test_planted_pathways_are_found(planted):
    process = search(pairs=12)
    kept = [p for p, w in enumerate(process.at(0.3).tolist()) if w > 0]
    assert kept == sorted(GOOD)
    assert process.at(0.3)[kept].tolist() == pytest.approx([0.25] * 4, abs=1e-5)
    assert process.facts["trials"] == len(planted) == 12 * 2 * 2 + 3 * 2
    assert process.facts["seconds"] == 2.0 * len(planted)
    gain, error = process.facts["points each pathway adds"][0]["t1-s1-A"]
    assert gain == pytest.approx(3.0, abs=4 * error)
    assert 0 < error < 2


def test_where_nothing_helps_all_pathways_stay(planted, monkeypatch):
    """Every pathway adds a point: any half of them is worse than all."""
    monkeypatch.setattr("test_trials.GOOD", dict.fromkeys(range(16), 1.0))
    assert (search(pairs=4).at(0.0) > 0).all()


def test_it_goes_on_where_it_was_killed(planted, tmp_path):
    record = tmp_path / "trials.json"
    whole = search(pairs=3, record=record)
    done = json.loads(record.read_text())
    assert len(done) == len(planted)
    record.write_text(json.dumps(done[:7]))
    planted.clear()
    again = search(pairs=3, record=record)
    assert len(planted) == len(done) - 7
    assert torch.equal(again.z, whole.z)
    assert again.facts == whole.facts


def test_halves_are_even():
    parted = halves(range(15), 6, seed=3)
    assert all(sorted(a + b) == list(range(15)) for a, b in parted)
    assert {len(a) for a, _ in parted} == {7}
    assert len(set(parted)) == 6
    assert parted == halves(range(15), 6, seed=3)


def test_effects_are_the_mean_of_the_differences():
    def trial(kept, top1):
        return Trial(kept, 0, top1, 0.0, 0.0)

    pairs = [(trial((0, 1), 5.0), trial((2, 3), 2.0)), (trial((0, 2), 9.0), trial((1, 3), 4.0))]
    gain, error = effects(pairs, (0, 1, 2, 3))
    assert gain.tolist() == [4.0, -1.0, 1.0, -4.0]
    assert error[0] == pytest.approx(1.0)


def test_one_pathway_is_nothing_to_choose_from(planted):
    with pytest.raises(UserError, match="at least two pathways"):
        search_by_trials(lambda seed: seed, None, None, None, Recipe(1), PATHS[:1])


def test_a_chosen_process_drops_the_rest(tmp_path):
    process = chosen(PATHS, (1, 7))
    assert process.at(0.5).nonzero().flatten().tolist() == [1, 7]
    process.save(tmp_path / "p.safetensors")
    assert torch.equal(Process.load(tmp_path / "p.safetensors").at(0.5), process.at(0.5))


@pytest.mark.slow
def test_as_a_job(tmp_path):
    words = [*SHORT, "--method", "distpro", "--search-by", "trials", "--trial-pairs", "2", "--transforms", "A"]
    done = run(*words, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    process = Process.load(tmp_path / "out/process.safetensors")
    assert process.facts["trials"] == 2 * 2 * 2 + 3 * 2
    assert process.facts["seconds"] > 0
    assert json.loads(done.stdout.splitlines()[-1])["search_seconds"] == process.facts["seconds"]
    assert len(json.loads((tmp_path / "out/trials.json").read_text())) == 14
