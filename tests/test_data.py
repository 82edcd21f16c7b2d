"""Data sets: what is read, how it is shuffled, cropped and split, and what is said where that is impossible."""

from collections import Counter

import pytest
import torch
from cifar_files import write_cifar
from drawn import needs_dali, seen

from distpro.data import create_dataset, holdout, with_eval_split
from distpro.data.base import Split
from distpro.data.resident import Augmentation, draw
from distpro.errors import UserError

DALI = pytest.param("folder-dali", marks=needs_dali)


@pytest.fixture(scope="module", params=["digits", "cifar100", "resized", "folder", "folder-workers", DALI])
def split(request, tmp_path_factory, photos) -> Split:
    if request.param == "digits":
        return create_dataset("digits").train.subset(range(300))
    if request.param.startswith("folder"):
        options = {"num_workers": 0 if request.param == "folder" else 2}
        options["loader"] = "dali" if request.param == "folder-dali" else "torchvision"
        return create_dataset("folder", photos, image_size=32, **options).train
    root, _ = write_cifar(tmp_path_factory.mktemp("cifar"), "cifar100", "binary")
    return create_dataset("cifar100", root, image_size=24 if request.param == "resized" else None).train


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


# What every split promises


def test_an_epoch_is_the_same_whatever_was_read_before(split):
    def loader():
        return split.loader(7, shuffle=True, augment=True, seed=3)

    first, second = loader(), loader()
    epochs = [list(first) for _ in range(3)]  # every pass takes the next epoch
    assert len(epochs[0]) == len(first) == -(-len(split) // 7)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    next(iter(second))  # a pass that is left early
    assert same(list(second), epochs[1])
    second.set_epoch(2, start_step=2)
    assert same(list(second), epochs[2][2:])
    second.set_epoch(0, start_step=len(second))
    assert list(second) == []
    assert same(list(second), epochs[1])
    assert torch.equal(state, torch.get_rng_state())  # and it takes nothing from the global generator
    assert seen(epochs[0]) != seen(epochs[1]) != seen(epochs[2])  # cropped anew, not only shuffled anew
    assert not same(list(split.loader(7, shuffle=True, augment=True, seed=4)), epochs[0])
    x, y = epochs[0][0]
    assert (x.dtype, y.dtype, x.is_contiguous()) == (torch.float32, torch.int64, True)


def test_an_epoch_is_every_image_once_with_its_label(split):
    plain = list(split.loader(7, shuffle=False, augment=False))
    assert torch.equal(torch.cat([y for _, y in plain]), split.labels)
    shuffled = list(split.loader(11, shuffle=True, augment=False))
    assert seen(shuffled) == seen(plain)
    assert not torch.equal(torch.cat([y for _, y in shuffled]), split.labels)
    rows = torch.tensor([5, 0, 11])
    assert seen(split.subset(rows).loader(3, shuffle=False, augment=False)) == seen(
        [tuple(torch.cat(parts)[rows] for parts in zip(*plain, strict=True))]
    )
    assert len(split.loader(7, shuffle=True, augment=False, drop_last=True)) == len(split) // 7
    assert {len(y) for _, y in split.loader(7, shuffle=True, augment=True, drop_last=True)} == {7}


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_an_epoch(split, ranks):
    plain = seen(split.loader(7, shuffle=False, augment=False))
    parts = [list(split.loader(2, shuffle=False, augment=False).shard(rank, ranks)) for rank in range(ranks)]
    assert sum(map(seen, parts), Counter()) == plain  # measured exactly: nothing twice, nothing left out
    whole = list(split.loader(2 * ranks, shuffle=True, augment=False, seed=4, drop_last=True))
    loaders = [split.loader(2, shuffle=True, augment=False, seed=4, drop_last=True) for _ in range(ranks)]
    parts = [list(loader.shard(rank, ranks)) for rank, loader in enumerate(loaders)]
    assert [len(part) for part in parts] == [len(loader) for loader in loaders] == [len(whole)] * ranks
    for together, *pieces in zip(whole, *parts, strict=True):
        assert seen([together]) == seen(pieces)


def test_what_no_loader_can_do(split):
    with pytest.raises(UserError, match=f"larger than the {len(split)} images"):
        split.loader(len(split) + 1, shuffle=True, augment=True, drop_last=True)
    with pytest.raises(UserError, match="expected at least 1"):
        split.loader(0, shuffle=True, augment=True)
    with pytest.raises(UserError, match=f"batch size {2 * len(split)} is larger"):
        split.loader(len(split), shuffle=True, augment=True, drop_last=True).shard(0, 2)
    with pytest.raises(UserError, match="rank 2 of 2: expected 0 to 1"):
        split.loader(7, shuffle=True, augment=True).shard(2, 2)
    with pytest.raises(UserError, match="empty subset"):
        split.subset([])
    with pytest.raises(IndexError):
        split.subset([len(split)])
    with pytest.raises(UserError, match="outside an epoch of 1 steps"):
        split.loader(len(split), shuffle=True, augment=True).set_epoch(0, start_step=2)


def test_holdout_is_balanced_and_leaks_nothing():
    data = create_dataset("digits").train
    train, val = holdout(data, 0.25, seed=1)
    counts, held = data.labels.bincount(), val.labels.bincount()
    assert (held - counts * 0.25).abs().max() < 1
    assert (len(train), len(val)) == (len(data) - len(data) // 4, len(data) // 4)
    every, *parts = (seen(part.loader(99, shuffle=False, augment=False)) for part in (data, train, val))
    assert parts[0] + parts[1] == every
    assert not parts[0] & parts[1]  # no two digits are alike, so this tells
    assert torch.equal(holdout(data, 0.25, seed=1)[1].labels, val.labels)
    assert not torch.equal(holdout(data, 0.25, seed=2)[1].labels, val.labels)
    for fraction in (0, 1, 1e-6):
        with pytest.raises(UserError, match="held-out fraction"):
            holdout(data, fraction)


def test_unknown_names_and_numbers():
    with pytest.raises(UserError, match="did you mean 'cifar100'"):
        create_dataset("cifar-100")
    with pytest.raises(UserError, match="at least 1 pixel"):
        create_dataset("digits", image_size=0)
    with pytest.raises(UserError, match="needs its folder"):
        create_dataset("cifar10")


# Images in memory


def test_digits():
    from sklearn.datasets import load_digits

    data = create_dataset("digits")
    assert (data.shape, data.num_classes, len(data.train), len(data.test)) == ((1, 8, 8), 10, 1438, 359)
    loaders = [part.loader(2000, shuffle=False, augment=False) for part in (data.train, data.test)]
    (x, _), (x_test, _) = (next(iter(loader)) for loader in loaders)
    moments = torch.stack([x.mean(), x.std()])  # the constants are those of the train part
    torch.testing.assert_close(moments, torch.tensor([0.0, 1.0]), atol=1e-3, rtol=0)
    raw = torch.cat([x, x_test]).mul(0.3761).add(0.3054).mul(16).round().reshape(-1, 64)
    assert Counter(map(tuple, raw.tolist())) == Counter(map(tuple, load_digits().data.tolist()))
    assert data.test.labels[:9].tolist() == [0, 1, 7, 8, 1, 2, 6, 5, 1]
    assert data.test.labels.bincount().tolist() == [35, 37, 35, 37, 36, 36, 36, 36, 35, 36]
    assert create_dataset("digits", image_size=16).shape == (1, 16, 16)


def test_offsets_and_flips_are_uniform():
    rows, half = torch.zeros(90000, dtype=torch.int64), (0.5,)
    _, *offsets, flip = draw(rows, Augmentation(half, half, padding=4, flip=True), (0, 1, 2))
    for offset in offsets:
        torch.testing.assert_close(offset.bincount() / 10000, torch.ones(9), atol=0.05, rtol=0)
    assert abs(flip.float().mean() - 0.5) < 0.01
    assert abs(torch.corrcoef(torch.stack([*offsets, flip]).float()).fill_diagonal_(0)).max() < 0.02
    _, top, _, flip = draw(rows, create_dataset("digits").train.augmentation, (0, 1, 2))
    assert (top.unique().tolist(), flip.sum()) == ([0, 1, 2], 0)  # a mirrored digit is none


def test_arranged_images_do_not_overlap_and_keep_the_classes_even():
    data = create_dataset("digits")
    small = with_eval_split(data, "validation", 0.25, samples=200)
    assert len(small.train) == 200
    assert len(small.test) == len(data.train) // 4
    counts = small.train.labels.bincount(minlength=10)
    assert counts.max() - counts.min() <= 2
    seen = [{x.numpy().tobytes() for x in part.padded} for part in (small.train, small.test, data.test)]
    everything = {x.numpy().tobytes() for x in data.train.padded}
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] <= everything
    assert with_eval_split(data).train is data.train
    again = with_eval_split(data, "validation", 0.25, samples=200)
    assert torch.equal(again.train.padded, small.train.padded)


@pytest.mark.parametrize("samples", [0, 9, 100000])
def test_arranged_refuses_a_number_that_cannot_be(samples):
    with pytest.raises(UserError, match=f"{samples} training samples: expected 10 "):
        with_eval_split(create_dataset("digits"), samples=samples)


def test_noise_instead_of_images():
    data = create_dataset("folder", loader="synthetic", image_size=16, channels_last=True, dtype=torch.bfloat16)
    assert (data.num_classes, data.shape, len(data.train)) == (1000, (3, 16, 16), 1_281_167)
    train, val = holdout(data.train, 0.2)
    assert len(train) + len(val) == len(data.train)
    loader = val.subset(range(7)).loader(4, shuffle=True, augment=True)
    (x, y), (rest, last) = loader
    assert (x.shape, rest.shape, len(y), len(last)) == ((4, 3, 16, 16), (3, 3, 16, 16), 4, 3)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(rest, x[:3])
    assert len({label.item() for label in y}) > 1
