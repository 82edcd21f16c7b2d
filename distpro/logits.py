"""Losses between the logits of two networks, for use as a method or as a pathway of a process."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distpro.errors import UserError

TEMPERATURE = 4.0  # usual on CIFAR-100


def kd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Hinton et al., 2015: T^2 * KL(teacher || student), both softened by T. Logits `[N, K]`, classes `[N]`."""
    soft, sought = (_full(logits).div(temperature).log_softmax(1) for logits in (student, teacher))
    return temperature**2 * _divergence(soft, sought)


def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float = TEMPERATURE,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Decoupled KD (Zhao et al., 2022, Eq. 7): KL of (target, all others) and KL among the others, weighted separately.

    alpha, beta: the weights of the two; the paper uses alpha 1 and on CIFAR-100 a beta per pair, from 2
        (ResNet56 -> ResNet20) and 6 (WRN-40-2 -> WRN-16-2) to 8.
    """
    if target.ndim != 1:
        raise UserError(f"DKD needs class labels: expected [N], got {list(target.shape)}")
    true = target[:, None]
    others = torch.arange(student.shape[1] - 1, device=student.device).expand(len(student), -1)
    others = others + (others >= true)  # every class but the true one; indexing by a mask would synchronise

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = _full(logits) / temperature
        log = logits.log_softmax(1)
        pair = torch.cat([log.gather(1, true), log.gather(1, others).logsumexp(1, keepdim=True)], 1)
        return pair, logits.gather(1, others).log_softmax(1)

    (student_pair, student_others), (teacher_pair, teacher_others) = parts(student), parts(teacher)
    decoupled = alpha * _divergence(student_pair, teacher_pair) + beta * _divergence(student_others, teacher_others)
    return temperature**2 * decoupled


def dist(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """DIST (Huang et al., 2022): T^2 * (1 - Pearson's r of the probabilities), mean over images plus over classes."""
    p, q = (_full(logits).div(temperature).softmax(1) for logits in (student, teacher))

    def apart(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - F.cosine_similarity(a, b, dim=1).mean()

    return temperature**2 * (apart(p, q) + apart(p.T, q.T))


def standardised(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 2.0) -> Tensor:
    """KD of standardised logits (Sun et al., 2024): each image's are first scaled to mean 0, standard deviation 1."""

    def scores(logits: Tensor) -> Tensor:
        logits = _full(logits)
        return (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True).clamp_min(1e-7)

    return kd(scores(student), scores(teacher), target, temperature)


def _full(logits: Tensor) -> Tensor:
    """Cast to at least float32: probabilities of 100 classes lose too much in 16 bits."""
    return logits.float() if logits.element_size() < 4 else logits


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) of log-probabilities, averaged over the batch."""
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


LOGIT_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "KD": kd,
    "DKD": dkd,
    "DIST": dist,
    "LSKD": standardised,
}
