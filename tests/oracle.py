"""The hypergradient by double backward: slow, independent of distpro's own passes. Tests and benchmarks share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from distpro.features import Features, Teacher
from distpro.pathways import Pathways


def hypergradient(
    student: Features,
    teacher: Teacher,
    pathways: Pathways,
    optimizer: torch.optim.SGD,
    z: Tensor,
    normalise: Callable[[Tensor], Tensor],
    scale: float,
    batch: tuple[Tensor, Tensor],
    val_batch: tuple[Tensor, Tensor],
    averages: Sequence[Tensor] = (),
    keep: float = 0.0,
) -> Tensor:
    """d L_val(theta') / d z `[P]`, differentiating through the optimizer's step itself.

    With `averages`, L_val is measured at keep * averages + (1 - keep) * theta'.

    The SGD update is written out (weight decay, momentum, Nesterov, from the optimizer's buffers of now), the train
    gradient is taken with `create_graph`, and the losses are summed pathway by pathway from the paper's formulas.
    Nothing is moved: parameters, buffers and optimizer state are as before.
    """
    z = z.detach().clone().requires_grad_()
    theta = {n: p.detach().clone().requires_grad_() for n, p in student.named_parameters() if p.requires_grad}
    buffers = {n: b.clone() for n, b in student.named_buffers()}
    x, y = batch
    sought, targets = teacher(x)
    logits, maps = functional_call(student, {**theta, **buffers}, (x,))
    weights = normalise(z)
    loss = F.cross_entropy(logits, y)
    scratch = {n: b.clone() for n, b in pathways.named_buffers()}
    for k, p in enumerate(pathways.pathways):
        if p.teacher == 0:
            loss = loss + scale * weights[k] * logit_loss(p.transform, logits, sought, y)
            continue
        prefix = f"blocks.{p.name}."
        block = pathways.blocks[p.name]
        state = {n.removeprefix(prefix): b for n, b in scratch.items() if n.startswith(prefix)}
        state |= {n: q.detach() for n, q in block.named_parameters()}
        loss = loss + scale * weights[k] * hcl(
            functional_call(block, state, (maps[p.student - 1],)), targets[p.teacher - 1]
        )
    gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True, allow_unused=True)

    moved = {}
    live = dict(student.named_parameters())
    for (name, value), gradient in zip(theta.items(), gradients, strict=True):
        group = next(g for g in optimizer.param_groups if any(q is live[name] for q in g["params"]))
        if gradient is None:
            moved[name] = value
            continue
        step = gradient + group["weight_decay"] * value
        if group["momentum"]:
            kept = optimizer.state[live[name]].get("momentum_buffer")
            buffer = step if kept is None else group["momentum"] * kept + step
            step = step + group["momentum"] * buffer if group["nesterov"] else buffer
        moved[name] = value - group["lr"] * step
    if averages:
        moved = {n: keep * a + (1 - keep) * m for a, (n, m) in zip(averages, moved.items(), strict=True)}
    x_val, y_val = val_batch
    val_logits, _ = functional_call(student, {**moved, **{n: b.clone() for n, b in student.named_buffers()}}, (x_val,))
    return torch.autograd.grad(F.cross_entropy(val_logits, y_val), z)[0]


def logit_loss(kind: str, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    """The losses between logits from their definitions, with probabilities, image by image."""

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum()

    def correlation(a: Tensor, b: Tensor) -> Tensor:
        return torch.corrcoef(torch.stack([a, b]))[0, 1]

    temperature = 2.0 if kind == "LSKD" else 4.0
    if kind == "LSKD":
        student, teacher = (
            torch.stack([(row - row.mean()) / row.var().sqrt() for row in logits]) for logits in (student, teacher)
        )
    students, teachers = ((logits / temperature).exp() for logits in (student, teacher))
    q, p = (e / e.sum(1, keepdim=True) for e in (students, teachers))
    n, classes = p.shape
    total = p.new_zeros(())
    if kind == "DIST":
        total = 2 - sum(correlation(p[i], q[i]) for i in range(n)) / n
        total = total - sum(correlation(p[:, c], q[:, c]) for c in range(classes)) / classes
        return 16 * total
    for i in range(n):
        if kind != "DKD":
            total = total + divergence(p[i], q[i]) / n
            continue
        others = [c for c in range(classes) if c != y[i]]
        rest, rest_q = p[i, others].sum(), q[i, others].sum()
        total = total + divergence(torch.stack([p[i, y[i]], rest]), torch.stack([q[i, y[i]], rest_q])) / n
        total = total + 8 * divergence(p[i, others] / rest, q[i, others] / rest_q) / n
    return temperature**2 * total


def hcl(student: Tensor, teacher: Tensor) -> Tensor:
    """HCL written from its definition: both maps pooled by explicit bins, no pooling operator."""

    def pooled(x: Tensor, level: int) -> Tensor:
        rows = []
        for i in range(level):
            top, bottom = i * x.shape[2] // level, -(-(i + 1) * x.shape[2] // level)
            for j in range(level):
                left, right = j * x.shape[3] // level, -(-(j + 1) * x.shape[3] // level)
                rows.append(x[:, :, top:bottom, left:right].mean((2, 3)))
        return torch.stack(rows)

    total, weight, weights = ((student - teacher) ** 2).mean(), 1.0, 1.0
    for level in (4, 2, 1):
        if level >= student.shape[2]:
            continue
        weight = weight / 2
        total = total + weight * ((pooled(student, level) - pooled(teacher, level)) ** 2).mean()
        weights += weight
    return total / weights
