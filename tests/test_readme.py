"""What the README says is so."""

import re
from dataclasses import fields
from pathlib import Path
from statistics import fmean, stdev

import pytest
from measured import measured
from scipy.special import stdtrit

from distpro import zoo
from distpro.config import Config
from distpro.errors import flag
from distpro.flags import parse
from distpro.sweep import Arguments

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    scope = {}
    exec(code, scope)
    assert (tmp_path / "student.pt").stat().st_size > 1000
    assert scope["process"].at(0.0).count_nonzero() == 3  # one of nine pathways for each of the teacher's stages
    assert scope["losses"]["task"] < 1.0  # it learned: chance is 2.3


def commands():
    block = next(b for b in re.findall(r"```\n(.*?)```", README, re.S) if "--method" in b)
    lines = block.replace("\\\n", " ").splitlines()
    return [line.split("#")[0].split()[3:] for line in lines if line.startswith("python -m distpro.train")]


@pytest.mark.parametrize("words", [c for c in commands() if "--config" not in c], ids=" ".join)
def test_every_flag_shown_is_one(words):
    parse(words)


def test_every_flag_named_anywhere_is_one():
    every = [field for kind in (Config, Arguments) for field in fields(kind)]
    known = {flag(field.name) for field in every}
    known |= {flag(f"no_{field.name}") for field in every if "bool" in field.type}
    known |= {"--help", "--steps", "--trace"}  # distpro.profile has the last two
    known |= {"--nproc-per-node", "--benchmark-only"}  # of torchrun, of pytest
    assert set(re.findall(r"--[a-z][a-z-]*", README)) <= known


def mean(values, spread):
    """As the tables have it; `spread` is "deviation" or "error" (of the mean); one value has none."""
    values = list(values)
    if len(values) == 1:
        return f"{values[0]:.1f}"
    deviation = stdev(values)
    return f"{fmean(values):.1f} ± {deviation if spread == 'deviation' else deviation / len(values) ** 0.5:.1f}"


def difference(ours, theirs):
    return [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]


def with_interval(values):
    """The mean and, of more than one value, Student's 95 % interval."""
    told = f"{fmean(values):.1f}"
    if len(values) > 1:
        half = stdtrit(len(values) - 1, 0.975) * stdev(values) / len(values) ** 0.5
        told += f" ({fmean(values) - half:.1f} to {fmean(values) + half:.1f})"
    return told


def table(title):
    """The cells of the table whose head begins with `title`, a list a line."""
    lines = README[README.index(f"| {title}") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.replace("*", "").strip("|").split("|")] for line in lines]


def label_of(pair):
    """The label in a CSV of a pair such as "ResNet56 (66.4) -> ResNet20"."""
    return "-".join(re.sub(r" \(.*\)", "", network).lower().replace("-", "_") for network in pair.split(" -> "))


def rows_of(pair):
    """The CSV of a pair, and the labels of its rows there."""
    label = label_of(pair)
    return ("short.csv", {}) if label == "resnet56-resnet20" else ("pairs.csv", {"pair": label})


@pytest.mark.parametrize("row", table("CIFAR-100, top-1"), ids=lambda row: row[0])
def test_what_a_search_gains_is_what_was_measured(row):
    pair, alone, *methods, over_uniform, over_reviewkd = row
    name, labels = rows_of(pair)
    assert alone == f"{fmean(measured(name, **labels, method='alone').values()):.1f}"
    found = []
    for method, cell in zip(("uniform", "reviewkd", "searched by distance"), methods, strict=True):
        told, weight = re.fullmatch(r"(.*) \((\d+)\)", cell).groups()
        found.append(measured("distance.csv", pair=label_of(pair), method=f"{method} {weight}"))
        assert told == mean(found[-1].values(), "deviation")
    uniform, reviewkd, searched = found
    assert over_uniform == mean(difference(searched, uniform), "error")
    assert over_reviewkd == mean(difference(searched, reviewkd), "error")


@pytest.mark.parametrize("row", table("CIFAR-100, searched by trials"), ids=lambda row: row[0])
def test_what_a_search_by_trials_gains_is_what_was_measured(row):
    pair, cell, over_uniform, over_reviewkd = row
    name, labels = rows_of(pair)
    told, weight = re.fullmatch(r"(.*) \((\d+)\)", cell).groups()
    method = "searched by trials" if weight == "4" else f"searched by trials {weight}"
    searched = measured(name, **labels, method=method)
    assert told == mean(searched.values(), "deviation")
    others = "6" if label_of(pair) == "resnet56-wrn_16_1" else "20"
    for other, lead in (("uniform", over_uniform), ("reviewkd", over_reviewkd)):
        assert lead == mean(difference(searched, measured(name, **labels, method=f"{other} {others}")), "error")


def test_the_distances_are_those_of_the_zoo():
    distances = zoo.facts("process", "cifar100/wrn_16_2-wrn_16_1-distance")["distances"]
    for stage, (name, *cells) in enumerate(table("distance to | student stage 1"), start=1):
        assert name == f"teacher stage {stage}"
        row = [distances[f"t{stage}-s{student}-E"] for student in range(1, 5)]
        assert cells == [f"{value / min(row):.2f}" for value in row]


def test_what_a_search_by_gradient_gains_is_what_was_measured():
    for pair, uniform, gradient, trials, lead in table("CIFAR-100, top-1, % | uniform | searched by gradient"):
        name, labels = rows_of(pair)
        here = labels or {"pair": "resnet56-resnet20"}
        found = [measured("look-ahead.csv", **here, method=m) for m in ("uniform 20", "averaged, by stage")]
        assert [uniform, gradient] == [mean(one.values(), "deviation") for one in found]
        by_trials = measured(name, **labels, method="searched by trials 6" if labels else "searched by trials")
        assert trials == mean(by_trials.values(), "deviation")
        assert lead == with_interval(difference(found[1], found[0]))


def test_how_the_lead_shrinks_is_what_was_measured():
    for line, method in zip(table("epochs (seeds)"), ("reviewkd 20", "uniform 20"), strict=True):
        for epochs, cell in zip(("6", "12", "24"), line[1:], strict=True):
            ours = measured("figure5-short.csv", method="searched by trials 6", epochs=epochs)
            lead = difference(ours, measured("figure5-short.csv", method=method, epochs=epochs))
            assert cell == with_interval(lead)


def test_the_teacher_from_imagenet_is_what_was_measured():
    rows = {"searched by distance": "searched here", "searched on CIFAR-100 instead": "searched on CIFAR-100"}

    def found(label, column="top1"):
        return measured("tiny-transfer.csv", column, method=rows.get(label, label.lower()))

    def seconds(label):
        return fmean(found(label, "train_seconds").values())

    for label, top1, time in table("20 classes of Tiny-ImageNet |"):
        assert top1.split(" (")[0] == mean(found(label).values(), "deviation")
        assert time == f"{seconds(label) / seconds('uniform'):.2f}"
    text = " ".join(README.split()).replace(" points (", " (")
    lead = with_interval(difference(found("ReviewKD"), found("searched by distance")))
    assert f"ReviewKD, which is {lead} ahead" in text
    lead = with_interval(difference(found("searched on CIFAR-100 instead"), found("uniform")))
    assert f"It is {lead} above uniform" in text


def test_the_digits_are_what_was_measured():
    for label, cell in table("digits, wrn_16_2"):
        top1 = measured("digits.csv", method=re.sub(r" \(.*", "", label)).values()
        assert cell == f"{fmean(top1):.2f} ± {stdev(top1):.2f}"
    for label, *cells in table("weight | 0.3"):
        for weight, cell in zip(("0.3", "1.0", "3.0", "6.0", "12.0"), cells, strict=True):
            top1 = measured("digits-weights.csv", method=label, kd_weight=weight).values()
            assert cell == f"{fmean(top1):.2f}"


def test_what_the_fast_recipe_adds_is_what_was_measured():
    fast = {name: measured("fast-recipe.csv", method=name) for name in ("searched by trials 6", "reviewkd 20")}
    cosine = measured("pairs.csv", pair="wrn_16_2-wrn_16_1", method="searched by trials 6")
    ours, theirs = (mean(top1.values(), "deviation") for top1 in fast.values())
    gain = fmean(difference(fast["searched by trials 6"], cosine))
    text = f"adds {gain:.1f} points: the process of the trials has {ours} with it, ReviewKD {theirs}."
    assert text in " ".join(README.split())
