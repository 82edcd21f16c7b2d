"""The gradient of the validation loss with respect to the weight of each pathway (Eq. 4 and 5).

One optimizer step from theta gives theta' = theta - xi * d L_train / d theta + (terms without the weights a), so

    d L_val(theta') / d a_p = - w * h_p,    h_p = < d l_p(theta) / d theta , xi * v >,    v = d L_val(theta') / d theta

where w is the scale of the feature losses and l_p the loss of pathway p. `exact` and `finite_difference` return h `[P]`
of a `direction`: xi * v, up to a common factor (xi may differ between parameters).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from distpro.errors import UserError
from distpro.features import Output
from distpro.ops import pathway_dots, perturb
from distpro.pathways import Pathways
from distpro.sgd import SGD
from distpro.tangents import FastTangents

RADIUS = 0.01  # of the finite difference: epsilon = RADIUS / norm(direction), as in DARTS


class Stateless:
    """Calls a module with other values of its trained parameters and leaves its buffers unchanged.

    The passes of the hypergradient must not update the BN statistics, which follow the train pass alone, so each call
    uses a scratch copy of the buffers. It computes in the type of the given parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        self.frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        self.scratch = {name: buffer.clone() for name, buffer in module.named_buffers()}
        # Each attribute that holds a tensor once, even if its module has two names: torch's own tie_weights would swap
        # such an attribute twice, and then restore the swapped-in tensor.
        first = {id(tensor): name for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
        self.places = {
            f"{owner}.{name}" if owner else name: first[id(tensor)]
            for owner, part in module.named_modules()
            for name, tensor in [*part._parameters.items(), *part._buffers.items()]
            if tensor is not None
        }

    def __call__(self, parameters: Sequence[Tensor], *inputs: Any) -> Any:
        for name, buffer in self.module.named_buffers():
            self.scratch[name].copy_(buffer)
        values = {n: _cast(t, parameters[0].dtype) for n, t in (self.frozen | self.scratch).items()}
        values |= zip(self.names, parameters, strict=True)
        lent = {place: values[name] for place, name in self.places.items()}
        return functional_call(self.module, lent, inputs, tie_weights=False)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def step_sizes(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[float]:
    """Return xi of each parameter: the factor of its gradient in the optimizer's next step.

    That is lr for SGD with momentum mu, and lr * (1 + mu) with Nesterov; what the momentum buffer and the weight decay
    add does not depend on the gradient.
    """
    if type(optimizer) not in (torch.optim.SGD, SGD):
        raise UserError(
            f"the search differentiates through the step of torch.optim.SGD; got {type(optimizer).__name__}"
        )
    sizes = {}
    for group in optimizer.param_groups:
        if group["dampening"] or group["maximize"]:
            raise UserError("the search needs SGD without dampening and maximize")
        xi = float(group["lr"]) * (1 + group["momentum"] if group["nesterov"] else 1)
        sizes.update({id(parameter): xi for parameter in group["params"]})
    return [sizes[id(parameter)] for parameter in parameters]


@torch.no_grad()
def exact(
    student: Stateless,
    theta: Sequence[Tensor],
    direction: Sequence[Tensor],
    x: Tensor,
    gradients: Sequence[Tensor | None],
    factors: Tensor,
    student_stage: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return h `[P]` from one forward-mode pass of the student alone; no transform is run again.

    l_p depends on theta only through the student's map F_j it starts from, so h_p = < d l_p / d F_j , J_j xi v >.

    student: the `Features` of the student; theta, direction: one tensor per parameter.
    x: the train batch `[N, C, H, W]`.
    gradients: of the train loss at each pathway's own alias of F_j (`Pathways.sources`): factor_p * d l_p / d F_j;
        None if F_j depends on no trained parameter: h_p = 0.
    factors: `[P]`, those in `gradients`, w * a_p; where one is 0, nothing can be recovered and h_p = 0.
    student_stage: j of each pathway, from 1; 0 if l_p depends on theta through the logits.
    dtype: of the pass; that of theta by default. Everything is cast: autocast has no forward mode on a CPU.

    Forward mode treats a custom op without a forward rule as constant: keep such ops out of the student. It passes
    through `torch.no_grad()`, where backward stops: a student must `detach` what it treats as constant.
    """
    # fused attention has no forward mode
    with forward_ad.dual_level(), FastTangents(), sdpa_kernel(SDPBackend.MATH):
        dtype = dtype or theta[0].dtype
        duals = [forward_ad.make_dual(p.to(dtype), d.to(dtype)) for p, d in zip(theta, direction, strict=True)]
        output = student(duals, x.to(dtype))
        tangents = [forward_ad.unpack_dual(m).tangent for m in (output.logits, *output.maps)]
    reached = [(g, j) for g, j in zip(gradients, student_stage, strict=True) if g is not None]
    if not reached:
        raise UserError("no pathway starts from a map that depends on what is trained of the student")
    stages = {j for _, j in reached}
    missing = [j for j in stages if tangents[j] is None]
    if missing:
        raise UserError(f"no forward derivative reaches the student's stage {missing[0]}: use finite-difference")
    types = {g.dtype for g, _ in reached}
    common = types.pop() if len(types) == 1 else torch.float32  # autocast leaves some maps in float32
    cast = {j: tangents[j].to(common) for j in stages}
    dots = pathway_dots([g.to(common) for g, _ in reached], [cast[j] for _, j in reached])
    if len(reached) < len(gradients):
        each = iter(dots.unbind())
        dots = torch.stack([dots.new_zeros(()) if g is None else next(each) for g in gradients])
    return torch.where(factors == 0, 0, dots / factors)


@torch.no_grad()
def finite_difference(
    student: Stateless,
    pathways: Stateless,
    theta: Sequence[Tensor],
    phi: Sequence[Tensor],
    direction: Sequence[Tensor],
    x: Tensor,
    teacher: Output,
    target: Tensor,
    radius: float,
) -> Tensor:
    """Return h `[P]` of Eq. 5: central differences of the losses at theta +- epsilon * direction.

    epsilon = radius / norm(direction). phi, the parameters of the transforms, is held fixed. h is zero if the direction
    is, and NaN if it is not finite.
    """
    plus, minus, epsilon = perturb(theta, direction, radius)
    module = pathways.module
    assert isinstance(module, Pathways)

    def losses(shifted: Sequence[Tensor]) -> Tensor:
        with torch.random.fork_rng([x.device] if x.is_cuda else []):  # the same dropout in both passes
            return pathways(phi, module.sources(student(shifted, x)), teacher, target, x.new_ones(len(module)))[1]

    difference = losses(plus) - losses(minus)
    return torch.where(epsilon == 0, 0, difference / (2 * epsilon))


def through_normalisation(h: Tensor, z: Tensor, normalise: Any, scale: Tensor | float) -> Tensor:
    """Return d L_val / d z `[P]` from h: -w h through the Jacobian of the normalisation.

    For the biased softmax: -w * a_p * (h_p - sum_q a_q h_q).
    """
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(normalise(z), z, -scale * h)[0]
