"""One typed dataclass is the truth of a job: its flags, the keys of --config files, and the object in Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from distpro.checks import check
from distpro.data import MEAN, STD, default_loader
from distpro.defaults import DEFAULTS, FAST, FAST_WEIGHTS, KD_WEIGHTS, PAPER, SLOW_STUDENTS, TRIAL_EPOCHS
from distpro.errors import unknown
from distpro.methods import METHODS
from distpro.models import normalisation, plain_name
from distpro.precision import DTYPES, Precision
from distpro.process import WARM_UP
from distpro.recipe import Recipe


@dataclass(frozen=True)
class Config:
    """Distil a student from a teacher. Without a flag: digits, every method, in a few minutes on a CPU.

    What is left out takes the value that suits the data set and the pair; `args.yaml` in the output folder says
    which.
    """

    # --- the pair
    teacher: str | None = None
    """Network: of the CIFAR zoo (wrn_40_2), trained (zoo:cifar100/wrn_16_2, see `python -m distpro.zoo`), of timm
    (resnet50, timm:vgg13), or your own (package.module:function)."""
    teacher_checkpoint: Path | None = None
    """Trained weights (.pth, .pt, .safetensors); without them the teacher is trained first."""
    teacher_pretrained: bool = False
    """Take timm's published weights."""
    teacher_layers: tuple[str, ...] = ()
    """Submodules whose outputs are the teacher's stages; found by themselves for the zoo and timm."""
    teacher_epochs: int | None = None
    """Epochs of the teacher, where it is trained here."""
    student: str | None = None
    """Network, named like the teacher."""
    student_layers: tuple[str, ...] = ()
    """Submodules whose outputs are the student's stages."""

    # --- the data
    dataset: str = "digits"
    """digits, cifar10, cifar100 or folder (an ImageFolder)."""
    data: Path | None = None
    """Folder of the data set."""
    image_size: int | None = None
    """Side of the pictures in pixels; the data set's own by default."""
    size_schedule: tuple[int, ...] = ()
    """Sides of the pictures in the distillation, which is divided evenly among them: 160 192 224. All else, top-1 too,
    is at --image-size."""
    mean: tuple[float, float, float] | None = None
    """Of red, green and blue in 0 to 1, by which the pictures of a folder are normalised; what timm says of the
    teacher, else ImageNet's."""
    std: tuple[float, float, float] | None = None
    """The same, of the standard deviation."""
    loader: Literal["dali", "torchvision", "synthetic"] | None = None
    """What decodes the pictures of a folder; dali where it is installed (pip install 'distpro[dali]'). synthetic: one
    batch of noise, no folder is read, to see what the networks alone cost."""
    workers: int | None = None
    """Processes (torchvision) or threads (dali) that decode pictures."""
    train_samples: int | None = None
    """Train on so many of the training pictures only, the same share of every class."""
    eval_split: Literal["test", "validation"] = "test"
    """Measure on the test pictures, or on a fifth of the training pictures, which is then not trained on."""

    # --- the method
    method: str = "all"
    """What the student learns from: none, kd, reviewkd or distpro; all: each in turn, and distpro with uniform weights
    as well."""
    process: str = "search"
    """For distpro: search, uniform, online (learned in the distillation itself, no search before it), FILE (a saved
    process), zoo:NAME (one of ours) or final:FILE (its last weights throughout)."""
    kd_weight: float | None = None
    """Weight of the feature losses: of each stage in reviewkd; in distpro the weights of all pathways together sum to
    it times their number. By default what is published for the pair, else 1, as suits 240 epochs; 6 with --recipe fast
    on CIFAR."""
    warm_up: float = WARM_UP
    """Share of the training over which feature losses grow to their full weight; 0 for none, as the paper has it."""
    reviewkd_weight: float | None = None
    """The same for reviewkd alone, where each method is to have its own best."""
    task_loss_weight: float = 0.1
    """Weight of the cross-entropy in kd; the other methods have 1."""
    distill_loss_weight: float = 0.9
    """Weight of kd's divergence."""
    temperature: float = 4.0
    """Of kd."""
    transforms: str | None = None
    """Blocks between a student's and a teacher's map, one pathway for each letter. A: a linear 1x1. E: 1x1 and 3x3.
    B, C: with an attention, and one or two 3x3. D: that of the authors' release. T: for tokens."""
    pathways: Literal["all", "review", "same"] | None = None
    """all: every pair of stages; review: a student's stage as deep as the teacher's or deeper; same: equally deep."""
    pooled: bool | None = None
    """Read the pooled feature as a last stage, as the paper does on ImageNet."""
    logit_pathways: tuple[Literal["KD", "DKD", "DIST", "LSKD"], ...] = ()
    """Pathways from logits to logits beside those of features: KD, decoupled, DIST, KD of standardised logits."""
    distance: Literal["hcl", "l2", "l1"] = "hcl"
    """Between two maps."""

    # --- the training
    recipe: Literal["paper", "fast"] | None = None
    """What flags are by default. paper: on CIFAR the paper's pathways and search, too; fast: for few epochs."""
    epochs: int | None = None
    """Of the student; 3 for the digits, 240 for CIFAR, 100 for a folder."""
    max_steps: int | None = None
    """End every training after so many steps, to see what it costs; the schedule stays that of the epochs."""
    batch_size: int | None = None
    """Pictures of a step, of all processes together; 16 for the digits, 128 for CIFAR, 256 for a folder."""
    grad_accum_steps: int = 1
    """Parts in which a batch of the distillation passes, for want of memory; a search by gradient takes it whole."""
    sync_bn: bool = False
    """Let BN see the batches of all processes together (torchrun)."""
    lr: float | None = None
    """Learning rate at its highest."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float | None = None
    """Of SGD."""
    nesterov: bool = True
    """Nesterov's momentum."""
    norm_decay: bool | None = None
    """Whether weight decay holds for biases and normalisations too."""
    label_smoothing: float | None = None
    """Of the cross-entropy."""
    ema: float | None = None
    """Keep a moving average of the student with this decay, and let it be the result."""
    alternating_flip: bool = False
    """CIFAR: flip each picture in every other epoch, so that any two show both sides, instead of at random."""
    sched: Literal["cosine", "step", "onecycle"] | None = None
    """cosine to 0; onecycle: up for a fifth of the steps, then down to 0; step: a tenth after 5/8, 6/8 and
    7/8 of the epochs (after 1/4, 2/4, 3/4 in the search)."""

    # --- the search
    search_epochs: int | None = None
    """Epochs of the search; with trials, of each (4)."""
    search_samples: int | None = None
    """Search with so many of the training pictures only, the same share of every class."""
    val_fraction: float | None = None
    """Share of the training pictures that judge the process, and are not trained on meanwhile; 0.2, online 0.1."""
    search_by: Literal["gradient", "trials"] | None = None
    """gradient: of the validation loss one step ahead (Eq. 4); trials: short trainings with some
    kinds of pathways tell which to keep, 8 to 10 of them as a rule."""
    trial_seeds: int = 1
    """With trials: how many trainings judge a choice; each lasts --search-epochs."""
    hypergradient: Literal["exact", "finite-difference"] = "exact"
    """exact: one forward-mode pass of the student; finite-difference: Eq. 5."""
    normalisation: Literal["biased-softmax", "softmax", "biased-l1", "l1", "sigmoid"] = "biased-softmax"
    """Of the raw weights (Table 7), in a search by gradient."""
    tau: float | None = None
    """A pathway whose raw weight is at most this is dropped while distilling; 0.5, or that of the given process."""
    alpha_lr: float = 0.05
    """Learning rate of the raw weights (Adam)."""
    alpha_first: bool = False
    """Move the weights first and take the train step again with the new ones (Algorithm 1, literally)."""
    alpha_every: int | None = None
    """Move the weights at every N-th step only, N times as far; 1, online 4."""
    literal_xi: bool | None = None
    """Leave the student's learning rate in the gradient that Adam sees (Eq. 4, literally); with --recipe paper."""

    # --- the run
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a GPU where there is one."""
    amp: bool = False
    """Autocast the student and the transforms."""
    amp_dtype: Literal["bfloat16"] = "bfloat16"
    """Of --amp; it needs no loss scaling."""
    channels_last: bool = False
    """Keep maps in NHWC order in memory."""
    teacher_precision: Literal["float32", "bfloat16", "float16"] | None = None
    """Run the teacher in this type, its BN folded into its convolutions; checked against float32 at the start."""
    compile: bool = False
    """Compile the student and the transforms of a distillation (torch.compile); it takes a minute or more first."""
    cuda_graphs: bool | None = None
    """Replay whole steps as CUDA graphs; by default on a GPU, where the step can be captured."""
    threads: int | None = None
    """CPU threads; one for the digits, whose steps are too small to share."""
    output: Path | None = None
    """Folder of the results; output/DATASET-STUDENT-TIME by default."""
    resume: bool = False
    """Go on with what --output holds."""
    dry_run: bool = False
    """Check everything, print every value as it would be, and end."""
    config: Path | None = None
    """YAML file whose keys are flags; flags on the command line win."""

    def plain(self) -> dict[str, Any]:
        """Every value as YAML and JSON have it."""
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


class Filled(Config):
    """A configuration of which nothing is left out that a job needs: what `fill` makes of a `Config`."""

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
    search_by: Literal["gradient", "trials"]
    alpha_every: int
    literal_xi: bool

    def student_recipe(self, epochs: int | None = None) -> Recipe:
        """How the student is trained."""
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
        """The same in whole batches over the search's epochs, with the paper's decay at 1/4, 2/4, 3/4 if by steps."""
        return replace(
            self.student_recipe(self.search_epochs), decay_at=(0.25, 0.5, 0.75), grad_accum_steps=1, ema=None
        )

    def precision(self) -> Precision:
        return Precision(
            DTYPES[self.amp_dtype] if self.amp else None,
            self.channels_last,
            DTYPES[self.teacher_precision] if self.teacher_precision else None,
        )


# What the values of other flags are derived from, in this order.
DECIDING = ("dataset", "recipe", "teacher", "teacher_pretrained", "student", "process", "search_by", "kd_weight")


def fill(config: Config) -> Filled:
    """The same configuration with every value that was left out filled in."""
    config = _at_home(config)
    filled = _filled(config)
    check(config, filled)
    return filled


def told(filled: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a filled configuration, as `Config.plain` has them, that do not follow from the others."""
    kept: dict[str, Any] = {}
    for name in DECIDING:
        if filled[name] != _filled(Config(**kept)).plain()[name]:
            kept[name] = filled[name]
    usual = _filled(Config(**kept)).plain()
    return kept | {name: value for name, value in filled.items() if name not in DECIDING and value != usual.get(name)}


def _filled(config: Config) -> Filled:
    if config.dataset not in DEFAULTS:
        raise unknown("dataset", config.dataset, DEFAULTS)
    if config.method not in ("all", *METHODS):
        raise unknown("method", config.method, ("all", *METHODS))
    cifar, online = config.dataset.startswith("cifar"), config.process == "online"
    usual = {
        "literal_xi": False,
        "val_fraction": 0.1 if online else 0.2,
        "alpha_every": 4 if online else 1,
        **DEFAULTS[config.dataset],
        **(FAST if config.recipe == "fast" else {}),
        **({"paper": PAPER, "fast": FAST_WEIGHTS}.get(config.recipe or "", {}) if cifar else {}),
    }
    if online:
        usual["search_by"] = "gradient"
    if (config.search_by or usual["search_by"]) == "trials":
        usual |= {"search_epochs": TRIAL_EPOCHS, "literal_xi": False}
    teacher, student = config.teacher or usual["teacher"], config.student or usual["student"]
    if config.dataset == "folder":
        usual |= dict(zip(("mean", "std"), normalisation(teacher) or (MEAN, STD), strict=True))
        usual["loader"] = config.loader or default_loader()
    if cifar and plain_name(student) in SLOW_STUDENTS:
        usual["lr"] = 0.02
    usual.setdefault("kd_weight", KD_WEIGHTS.get((plain_name(teacher), plain_name(student)), 1.0))
    if config.kd_weight is not None:
        usual["reviewkd_weight"] = config.kd_weight
    usual.setdefault("reviewkd_weight", usual["kd_weight"])
    return Filled(**usual | {name: value for name, value in vars(config).items() if value is not None})


def _at_home(config: Config) -> Config:
    """The same with ~ spelt out in every path; a shell does it in some places only, and YAML never."""
    paths: dict[str, Any] = {k: v.expanduser() for k, v in vars(config).items() if isinstance(v, Path)}
    file = config.process.removeprefix("final:")
    if file.startswith("~"):
        paths["process"] = config.process.removesuffix(file) + str(Path(file).expanduser())
    return replace(config, **paths)
