"""The configuration of a job in one typed dataclass: its flags, the keys of --config files, the object in Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from distpro.checks import check
from distpro.data import MEAN, STD, default_loader
from distpro.defaults import (
    BY_DISTANCE,
    DEFAULTS,
    FAST,
    FAST_WEIGHTS,
    KD_WEIGHTS,
    PAPER,
    SEARCH,
    SEARCH_EPOCHS,
    SLOW_STUDENTS,
)
from distpro.errors import unknown
from distpro.methods import METHODS
from distpro.models import normalisation, plain_name
from distpro.precision import DTYPES, Precision
from distpro.process import WARM_UP
from distpro.recipe import Recipe

Normalisation = Literal["biased-softmax", "softmax", "biased-l1", "l1", "sigmoid", "stage-softmax"]


@dataclass(frozen=True)
class Config:
    """Distil a student from a teacher. Without flags: digits, every method, in a few minutes on a CPU.

    The defaults of many flags depend on the data set and the networks; `args.yaml` in the output folder has them.
    """

    # --- the pair
    teacher: str | None = None
    """Network of the CIFAR zoo (wrn_40_2; trained: zoo:cifar100/wrn_40_2, see `python -m distpro.zoo`), of
    timm (resnet50, timm:vgg13), or your own (package.module:function)."""
    teacher_checkpoint: Path | None = None
    """Trained weights (.pth, .pt, .safetensors); without weights, the teacher is trained first."""
    teacher_pretrained: bool = False
    """Use timm's pretrained weights."""
    teacher_layers: tuple[str, ...] = ()
    """Submodules whose outputs are the teacher's stages; found automatically for the zoo and timm."""
    teacher_epochs: int | None = None
    """Epochs of the teacher, if it is trained or fine-tuned here."""
    student: str | None = None
    """Network, named as for --teacher."""
    student_layers: tuple[str, ...] = ()
    """Submodules whose outputs are the student's stages."""

    # --- the data
    dataset: str = "digits"
    """digits, cifar10, cifar100 or folder (an ImageFolder)."""
    data: Path | None = None
    """Folder of the data set."""
    image_size: int | None = None
    """Side of the images in pixels; default: the data set's."""
    size_schedule: tuple[int, ...] = ()
    """Image sizes in the distillation, for equal parts of its epochs: 160 192 224. Everything else, evaluation
    included, uses --image-size."""
    mean: tuple[float, float, float] | None = None
    """Mean of the RGB channels, 0 to 1, for normalising the images of a folder; default: the teacher's in timm,
    else ImageNet's."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the RGB channels, likewise."""
    loader: Literal["dali", "torchvision", "synthetic"] | None = None
    """Decoder for the images of a folder; default: dali if installed (pip install 'distpro[dali]'), else
    torchvision. synthetic: one batch of noise instead of a folder, to measure the cost of the networks alone."""
    workers: int | None = None
    """Worker processes (torchvision) or threads (dali) that decode images."""
    train_samples: int | None = None
    """Train on a class-stratified subset of this many training images."""
    eval_split: Literal["test", "validation"] = "test"
    """Evaluate on the test images, or on a fifth of the training images, held out for it."""

    # --- the method
    method: str = "all"
    """Distillation method: none, kd, reviewkd or distpro; all: each in turn, and distpro with uniform weights
    as well."""
    process: str = "search"
    """For distpro: search, uniform, online (learned during the distillation, without a search before it), FILE
    (a saved process), zoo:NAME (an included one) or final:FILE (its last weights throughout)."""
    kd_weight: float | None = None
    """Weight of the feature losses: of each stage in reviewkd; in distpro times the number of pathways, shared out
    by the process. Default: 3 for digits, 6 with --recipe fast on CIFAR; else, while --search-by is distance and
    the process not uniform, 1 on CIFAR and 12 for a folder; else the published value of the pair, or 1."""
    warm_up: float = WARM_UP
    """Fraction of the training over which feature losses ramp up to full weight; 0 for none, as in the paper."""
    reviewkd_weight: float | None = None
    """The --kd-weight of reviewkd, to give each method its own best value."""
    task_loss_weight: float = 0.1
    """Weight of the cross-entropy in kd; 1 in the other methods."""
    distill_loss_weight: float = 0.9
    """Weight of the KL divergence in kd."""
    temperature: float = 4.0
    """Temperature of kd."""
    transforms: str | None = None
    """Blocks from a student's to a teacher's feature map, a pathway per letter. A: linear 1x1. E: 1x1, 3x3.
    B, C: 1x1, attention, one or two 3x3. D: the authors' release. T: for tokens."""
    pathways: Literal["all", "review", "same"] | None = None
    """Pairs of stages. all: every pair; review: the student's at least as deep as the teacher's; same: equally deep."""
    pooled: bool | None = None
    """Use the pooled feature as an additional last stage, as the paper does on ImageNet."""
    logit_pathways: tuple[Literal["KD", "DKD", "DIST", "LSKD"], ...] = ()
    """Additional pathways between logits: KD, decoupled KD, DIST, KD of standardised logits."""
    distance: Literal["hcl", "l2", "l1"] = "hcl"
    """Distance between two feature maps."""

    # --- the training
    recipe: Literal["paper", "fast"] | None = None
    """Set of default values. paper: on CIFAR, the paper's pathways and search; fast: for few epochs."""
    epochs: int | None = None
    """Epochs of the student; default: 3 for digits, 240 for CIFAR, 100 for a folder."""
    max_steps: int | None = None
    """Stop every training after this many steps, to estimate its cost; the schedule stays that of --epochs."""
    batch_size: int | None = None
    """Batch size over all processes; default: 16 for digits, 128 for CIFAR, 256 for a folder."""
    grad_accum_steps: int = 1
    """Micro-batches per step of the distillation, to save memory; a search by gradient takes whole batches."""
    sync_bn: bool = False
    """Compute BN statistics over the batches of all processes (torchrun)."""
    lr: float | None = None
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float | None = None
    """Weight decay of SGD."""
    nesterov: bool = True
    """Use Nesterov momentum."""
    norm_decay: bool | None = None
    """Apply weight decay to biases and normalisations, too."""
    label_smoothing: float | None = None
    """Label smoothing of the cross-entropy."""
    ema: float | None = None
    """Decay of an exponential moving average of the student, which is then the result."""
    alternating_flip: bool = False
    """CIFAR: flip each image in every other epoch instead of at random: two in a row show both sides."""
    sched: Literal["cosine", "step", "onecycle"] | None = None
    """Learning rate. cosine: to 0; onecycle: up for a fifth of the steps, then down to 0; step: times 0.1 after
    5/8, 6/8 and 7/8 of the epochs (1/4, 2/4 and 3/4 in a search by gradient)."""

    # --- the search
    search_epochs: int | None = None
    """Epochs of the search: by distance 2, by trials 4 of each trial; by gradient 3 for digits, 40 for CIFAR, 20 for
    a folder."""
    search_samples: int | None = None
    """Search on a class-stratified subset of this many training images."""
    val_fraction: float | None = None
    """Fraction of the training images held out to validate the process; default: 0.2, online 0.1."""
    search_by: Literal["gradient", "trials", "distance"] | None = None
    """distance, the default: one training with all pathways, then each teacher stage keeps the pathway whose map is
    closest to it on held-out images, weighted by the inverse root of that distance; trials, the default with logit
    pathways: short trainings with some kinds of pathways, usually 8 to 10 of them, decide which to keep; gradient,
    that of --recipe paper: descend the validation loss one step ahead (Eq. 4)."""
    trial_seeds: int = 1
    """Trainings per choice in a search by trials, each of --search-epochs."""
    hypergradient: Literal["exact", "finite-difference"] = "exact"
    """exact: one forward-mode pass of the student; finite-difference: Eq. 5."""
    normalisation: Normalisation | None = None
    """Normalisation of the raw weights in a search by gradient: Table 7's, or a softmax for each teacher stage;
    default: stage-softmax, biased-softmax (Eq. 2) on the digits, with logit pathways and with --recipe paper."""
    tau: float | None = None
    """Drop pathways with a raw weight of at most this in the distillation; default: the given process's, or 0.5."""
    alpha_lr: float = 0.05
    """Adam's learning rate for the raw weights."""
    alpha_first: bool = False
    """Update the raw weights first and take the train step again with the new ones (Algorithm 1, literally)."""
    val_ema: float | None = None
    """Validate a search by gradient at a moving average of the student with this decay, 0: at the student itself
    (Eq. 4); default: 0.98, 0 on the digits and with --recipe paper."""
    alpha_every: int | None = None
    """Update the raw weights only every N steps, with N times the learning rate; default: 1, online 4."""
    literal_xi: bool | None = None
    """Keep the student's learning rate in the gradient that Adam sees (Eq. 4, literally); set by --recipe paper."""

    # --- the run
    seed: int = 0
    """Random seed."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto: a GPU if there is one."""
    amp: bool = False
    """Run the student and the transforms under autocast."""
    amp_dtype: Literal["bfloat16"] = "bfloat16"
    """Type of --amp; bfloat16 needs no loss scaling."""
    channels_last: bool = False
    """Use the channels_last (NHWC) memory format."""
    teacher_precision: Literal["float32", "bfloat16", "float16"] | None = None
    """Run the teacher in this type, with its BN folded; its accuracy is compared with float32 at the start."""
    compile: bool = False
    """Compile the student and the transforms of a distillation (torch.compile); takes a minute or more at first."""
    cuda_graphs: bool | None = None
    """Replay whole steps as CUDA graphs; default: on a GPU, if the step can be captured."""
    threads: int | None = None
    """CPU threads; default: one for digits, whose steps are too small for more."""
    output: Path | None = None
    """Folder of the results; default: output/DATASET-STUDENT-TIME."""
    resume: bool = False
    """Resume the run in --output."""
    dry_run: bool = False
    """Check everything, print every value, defaults included, and exit."""
    config: Path | None = None
    """YAML file whose keys are flags; flags on the command line win."""

    def plain(self) -> dict[str, Any]:
        """Return every value as a YAML and JSON type."""
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


class Filled(Config):
    """A `Config` with every value that a job needs, as returned by `fill`."""

    teacher: str
    teacher_epochs: int
    student: str
    kd_weight: float
    transforms: str
    pathways: Literal["all", "review", "same"]
    pooled: bool
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    sched: Literal["cosine", "step", "onecycle"]
    search_epochs: int
    val_fraction: float
    search_by: Literal["gradient", "trials", "distance"]
    normalisation: Normalisation
    alpha_every: int
    literal_xi: bool
    val_ema: float

    def student_recipe(self, epochs: int | None = None) -> Recipe:
        """Return the recipe of the student's training."""
        return Recipe(
            epochs or self.epochs,
            self.lr,
            self.momentum,
            self.weight_decay,
            self.nesterov,
            self.sched,
            norm_decay=self.norm_decay is not False,
            label_smoothing=self.label_smoothing or 0.0,
            ema=self.ema,
            grad_accum_steps=self.grad_accum_steps,
            max_steps=self.max_steps,
        )

    def search_recipe(self) -> Recipe:
        """Return that of a search by gradient: whole batches, no EMA, and for "step" the paper's 1/4, 2/4, 3/4."""
        return replace(
            self.student_recipe(self.search_epochs), decay_at=(0.25, 0.5, 0.75), grad_accum_steps=1, ema=None
        )

    def precision(self) -> Precision:
        return Precision(
            DTYPES[self.amp_dtype] if self.amp else None,
            self.channels_last,
            DTYPES[self.teacher_precision] if self.teacher_precision else None,
        )


# Flags that the defaults of others are derived from, in this order.
DEFAULTS_DEPEND_ON = (
    "dataset",
    "recipe",
    "teacher",
    "teacher_pretrained",
    "student",
    "process",
    "logit_pathways",
    "search_by",
    "kd_weight",
)


def fill(config: Config) -> Filled:
    """Return the configuration with its defaults filled in; raise a `UserError` if it is invalid."""
    config = _at_home(config)
    filled = _filled(config)
    check(filled)
    return filled


def explicit_values(filled: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a filled configuration, as of `Config.plain`, that are not defaults given the others."""
    kept: dict[str, Any] = {}
    for name in DEFAULTS_DEPEND_ON:
        if filled[name] != _filled(Config(**kept)).plain()[name]:
            kept[name] = filled[name]
    usual = _filled(Config(**kept)).plain()
    return kept | {
        name: value for name, value in filled.items() if name not in DEFAULTS_DEPEND_ON and value != usual.get(name)
    }


def _filled(config: Config) -> Filled:
    if config.dataset not in DEFAULTS:
        raise unknown("dataset", config.dataset, DEFAULTS)
    if config.method not in ("all", *METHODS):
        raise unknown("method", config.method, ("all", *METHODS))
    cifar, online = config.dataset.startswith("cifar"), config.process == "online"
    usual = {
        **SEARCH,
        "val_fraction": 0.2,
        **DEFAULTS[config.dataset],
        **(FAST if config.recipe == "fast" else {}),
        **({"paper": PAPER, "fast": FAST_WEIGHTS}.get(config.recipe or "", {}) if cifar else {}),
    }
    if online:
        usual |= {"search_by": "gradient", "val_fraction": 0.1, "alpha_every": 4}
    elif config.logit_pathways and usual["search_by"] == "distance":
        usual["search_by"] = "trials"  # logits have no map to compare
    search_by = config.search_by or usual["search_by"]
    if search_by in SEARCH_EPOCHS:
        usual |= {"search_epochs": SEARCH_EPOCHS[search_by], **SEARCH}
    if config.logit_pathways:
        usual["normalisation"] = "biased-softmax"  # by stage, logits would have the weight of a stage
    teacher, student = config.teacher or usual["teacher"], config.student or usual["student"]
    if config.dataset == "folder":
        usual |= dict(zip(("mean", "std"), normalisation(teacher) or (MEAN, STD), strict=True))
        usual["loader"] = config.loader or default_loader()
    if cifar and plain_name(student) in SLOW_STUDENTS:
        usual["lr"] = 0.02
    published = KD_WEIGHTS.get((plain_name(teacher), plain_name(student)), 1.0)
    if search_by == "distance" and config.process != "uniform" and config.dataset in BY_DISTANCE:
        usual.setdefault("kd_weight", BY_DISTANCE[config.dataset])
    usual.setdefault("kd_weight", published)
    usual.setdefault("reviewkd_weight", published)
    if config.kd_weight is not None:
        usual["reviewkd_weight"] = config.kd_weight
    return Filled(**usual | {name: value for name, value in vars(config).items() if value is not None})


def _at_home(config: Config) -> Config:
    """Expand ~ in every path; a shell does so only in some places, and YAML never."""
    paths: dict[str, Any] = {k: v.expanduser() for k, v in vars(config).items() if isinstance(v, Path)}
    file = config.process.removeprefix("final:")
    if file.startswith("~"):
        paths["process"] = config.process.removesuffix(file) + str(Path(file).expanduser())
    return replace(config, **paths)
