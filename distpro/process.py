"""The process: the weight of each pathway at each moment of a training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distpro.errors import UserError, nearest, unknown
from distpro.files import whole_file
from distpro.pathways import Pathway, same_pathways

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT, VERSION = "distpro.process", 1
TAU = 0.5  # the paper's threshold, section 3.4
DROPPED = -20.0  # z of a pathway that is dropped for good: negligible in a softmax, and below tau

# The fraction of a training over which feature losses ramp up from 0 to full weight: the 20 of 240 epochs of
# ReviewKD's recipe, kept relative so that short trainings reach it. The first gradients of untrained transforms are
# large and meaningless; without the warm-up a student of 6 epochs ended 10 points lower.
WARM_UP = 20 / 240


def warmed(progress: float, share: float = WARM_UP) -> float:
    """Return the warm-up factor of the feature losses, 0 to 1, at `progress` 0 to 1 of a training."""
    return 1.0 if share <= 0 else min(1.0, progress / share)


def _stage_softmax(z: Tensor, same: Tensor) -> Tensor:
    """Return a softmax among the pathways to each teacher stage, over the number of these stages."""
    log_sums = (z[..., None, :] + same.log()).logsumexp(-1)
    return (z - log_sums).exp() / same.sum(-1).reciprocal().sum()


# From z ("alpha tilde", `[..., P]`) to the weights a. The first five are Table 7's; g = 1 is the bias of Eq. 2. In
# "stage-softmax" every teacher stage has the same weight in all; `same` [P, P] is 1 where two pathways have one teacher
# stage. "none" is for weights that are known, not learned: z are the weights.
NORMALISATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "biased-softmax": lambda z, same: torch.cat([z, torch.ones_like(z[..., :1])], -1).softmax(-1)[..., :-1],
    "softmax": lambda z, same: z.softmax(-1),
    "biased-l1": lambda z, same: z / (z.abs().sum(-1, keepdim=True) + 1),
    "l1": lambda z, same: z / z.abs().sum(-1, keepdim=True),
    "sigmoid": lambda z, same: z.sigmoid(),
    "stage-softmax": _stage_softmax,
    "none": lambda z, same: z,
}


def normaliser(name: str, pathways: Sequence[Pathway], like: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function from z `[..., P]` to the weights of these P pathways; z is of the type of `like`."""
    if name not in NORMALISATIONS:
        raise unknown("normalisation", name, NORMALISATIONS)
    if name == "stage-softmax" and any(p.teacher == 0 for p in pathways):
        raise UserError(
            "normalisation stage-softmax gives every teacher stage the same weight, and would give it to logits, too: "
            "take another --normalisation with logit pathways"
        )
    stages = torch.tensor([p.teacher for p in pathways])
    same = (stages[:, None] == stages).to(like)
    return lambda z: NORMALISATIONS[name](z, same)


class Process:
    """The raw weights `z` of P pathways at T moments, evenly spaced over a training, and how to read them.

    z: `[T, P]` float32 on the CPU; T = 1 is a constant process.
    pathways: the P pathways, or their names.
    normalisation: one of `NORMALISATIONS`; Eq. 2 is "biased-softmax".
    tau: while z <= tau, a pathway is dropped: its weight is 0 and nothing is computed, but it still counts in the
        normalisation's denominator. None drops nothing.
    facts: metadata (pair, data, date, ...), JSON.
    """

    def __init__(
        self,
        z: Tensor,
        pathways: Sequence[Pathway | str],
        normalisation: str = "biased-softmax",
        tau: float | None = TAU,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.z = z.detach().to("cpu", torch.float32).reshape(-1, z.shape[-1]).clone()
        self.pathways = tuple(Pathway.parse(p) if isinstance(p, str) else p for p in pathways)
        if self.z.shape[0] == 0 or self.z.shape[1] != len(self.pathways):
            raise UserError(
                f"a process of {len(self.pathways)} pathways needs z of shape [T, {len(self.pathways)}], T >= 1; "
                f"got {list(z.shape)}"
            )
        if not torch.isfinite(self.z).all():
            raise UserError("the process holds values that are not finite")
        self.normalisation = normalisation
        self._normalise = normaliser(normalisation, self.pathways, self.z)
        self.tau = tau
        self.facts = dict(facts or {})

    # -- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def constant(cls, weights: Tensor, pathways: Sequence[Pathway | str], **options: Any) -> Process:
        """Return a process with these raw values `[P]` at every moment."""
        return cls(weights.reshape(1, -1), pathways, **options)

    @classmethod
    def uniform(cls, pathways: Sequence[Pathway | str]) -> Process:
        """Return a process of weight 1 / P for every pathway at every moment: the paper's "equally weighted"."""
        return cls.constant(torch.ones(len(pathways)), pathways, normalisation="softmax")

    @classmethod
    def keeping(
        cls,
        kept: Sequence[int],
        pathways: Sequence[Pathway | str],
        weights: Sequence[float] | None = None,
        **options: Any,
    ) -> Process:
        """Return a constant process of the pathways `kept`, by index, and no others.

        weights: of those kept, positive; if None, they share a sum of 1 evenly.
        """
        if weights is not None:
            z = torch.zeros(len(pathways))
            z[list(kept)] = torch.tensor(weights)
            return cls.constant(z, pathways, normalisation="none", tau=0.0, **options)
        z = torch.full((len(pathways),), DROPPED)
        z[list(kept)] = 1.0
        return cls.constant(z, pathways, normalisation="softmax", **options)

    def final(self) -> Process:
        """Return a process with the last values at every moment: the paper's "use alpha_T"."""
        return Process(self.z[-1:], self.pathways, self.normalisation, self.tau, self.facts)

    def with_tau(self, tau: float) -> Process:
        """Return the process with another tau."""
        return Process(self.z, self.pathways, self.normalisation, tau, self.facts)

    def resampled(self, moments: int) -> Process:
        """Return the process at this many evenly spaced moments; one per epoch keeps a file small."""
        z = torch.stack([self.raw(k / max(1, moments - 1)) for k in range(moments)])
        return Process(z, self.pathways, self.normalisation, self.tau, self.facts)

    # -- reading it ---------------------------------------------------------------------------------------------

    def raw(self, fraction: float) -> Tensor:
        """Return z `[P]` at a moment, 0 (first step) to 1 (last step), linear between the T moments."""
        position = min(max(float(fraction), 0.0), 1.0) * (len(self.z) - 1)
        below = min(int(position), len(self.z) - 1)
        above = min(below + 1, len(self.z) - 1)
        return torch.lerp(self.z[below], self.z[above], position - below)

    def at(self, fraction: float) -> Tensor:
        """Return the weights a `[P]` at a moment: interpolated, then normalised, then 0 where dropped."""
        z = self.raw(fraction)
        weights = self._normalise(z)
        return weights if self.tau is None else weights.where(z > self.tau, torch.zeros(()))

    def dropped_fraction(self, moments: int = 100) -> float:
        """Return the fraction of dropped pathways, averaged over the training."""
        weights = torch.stack([self.at(k / max(1, moments - 1)) for k in range(moments)])
        return (weights == 0).float().mean().item()

    def reordered(self, pathways: Sequence[Pathway]) -> Process:
        """Return the process with its columns in the order of `pathways`; raise a `UserError` if the sets differ."""
        order = same_pathways(self.pathways, pathways, "the process")
        return Process(self.z[:, order], pathways, self.normalisation, self.tau, self.facts)

    def plot(self) -> Figure:
        """Plot the weights over time, one panel per teacher stage (Fig. 6)."""
        from distpro.report import plot_process

        return plot_process(self)

    def __len__(self) -> int:
        return len(self.z)

    def __repr__(self) -> str:
        count = len(self.pathways)
        if len(self) == 1:
            kept = [p.name for p, weight in zip(self.pathways, self.at(0.0), strict=True) if weight]
            return f"Process(constant, {len(kept)} of {count} pathways: {', '.join(kept)})"
        return (
            f"Process({count} pathways, {len(self)} moments, {self.normalisation}, tau={self.tau}, "
            f"{self.dropped_fraction():.0%} dropped)"
        )

    # -- files --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file: z, and a versioned JSON header that names every pathway."""
        header = {
            "pathways": [p.name for p in self.pathways],
            "normalisation": self.normalisation,
            "tau": self.tau,
            "facts": self.facts,
        }
        metadata = {"format": FORMAT, "version": str(VERSION), "process": json.dumps(header)}
        with whole_file(path) as part:
            save_file({"z": self.z}, part, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> Process:
        """Read what `save` wrote; raise a `UserError` that says what is wrong with any other file."""
        path = Path(path)
        if not path.is_file():
            others = [p.name for p in path.parent.glob("*.safetensors")] if path.parent.is_dir() else []
            close = nearest(path.name, others)
            hint = f"; did you mean '{path.parent / close[0]}'?" if close else ""
            raise UserError(f"no process file '{path}': expected a .safetensors file, or zoo:NAME{hint}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise UserError(f"'{path}' is not a process file: its header lacks format = {FORMAT}")
                if int(metadata["version"]) > VERSION:
                    raise UserError(
                        f"'{path}' has version {metadata['version']}, this distpro reads up to {VERSION}: update it"
                    )
                header = json.loads(metadata["process"])
                z = file.get_tensor("z")
            return cls(z, header["pathways"], header["normalisation"], header["tau"], header["facts"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"'{path}' cannot be read as a process: {error}") from error
