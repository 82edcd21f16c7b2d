"""The ready ImageNet configurations: each parses, and makes the job that it says."""

from dataclasses import replace
from pathlib import Path

import pytest
from timm.models import get_pretrained_cfg

from distpro.console import Console
from distpro.data import MEAN, STD
from distpro.features import Features
from distpro.flags import parse
from distpro.job import Job

CONFIGS = sorted((Path(__file__).parent.parent / "configs/imagenet").glob("*.yaml"))
PAIRS = {
    "resnet34-resnet18": ("resnet34.tv_in1k", "resnet18", "E"),
    "resnet50-mobilenetv1": ("resnet50.tv_in1k", "mobilenetv1_100", "E"),
    "vit_b16-deit_tiny": ("vit_base_patch16_224.augreg2_in21k_ft_in1k", "deit_tiny_patch16_224", "T"),
}


def test_there_is_one_for_each_pair_of_the_paper():
    assert [path.stem for path in CONFIGS] == sorted(PAIRS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_what_the_paper_says(path, photos):
    config = parse(["--config", str(path), "--data", str(photos)])
    assert (config.teacher, config.student, config.transforms) == PAIRS[path.stem]
    assert get_pretrained_cfg(config.teacher).has_weights
    assert config.teacher_pretrained
    assert (config.epochs, config.search_epochs, config.batch_size) == (100, 20, 512)
    assert (config.search_by, config.normalisation, config.val_ema) == ("gradient", "biased-softmax", 0)
    assert (config.lr, config.weight_decay, config.sched) == (0.1, 1e-4, "cosine")
    half = "vit" in path.stem  # that teacher saw images normalised by 0.5
    assert (config.mean, config.std) == (((0.5,) * 3, (0.5,) * 3) if half else (MEAN, STD))
    # without a download, and small enough for three classes of a few images
    small = {"search_samples": None, "image_size": 64, "batch_size": 4, "workers": 0}
    config = replace(config, teacher_pretrained=False, loader="torchvision", **small)
    job = Job(config, Console())
    assert job.methods == ["distpro"]
    assert len(job.pathways) == 15
    for model in (job.teacher, job.network(config.student, "student")):
        reader = Features(model, job.data.shape, pooled=True)
        assert reader.stages == ["stage1", "stage2", "stage3", "stage4", "pooled"]
        if "patch16" in config.student:
            assert reader.indices == [2, 5, 8, 11]
