"""Feature maps of any network, whose stages and shapes are found automatically."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distpro.errors import UserError
from distpro.folding import close, folded
from distpro.layers import Layers, evaluating
from distpro.precision import PLAIN, Precision
from distpro.transforms import Shape, as_shape

MOST_STAGES = 4


class Output(NamedTuple):
    """A network's output for a batch: logits `[N, K]` and a feature map `[N, C, H, W]` per stage, shallow first."""

    logits: Tensor
    maps: list[Tensor]


class Features(nn.Module):
    """A network that returns an `Output`: its logits and the maps of its stages.

    model: any network with timm's `forward_intermediates` and `forward_head` (every model of timm and of our zoo), or
        any `nn.Module` if `layers` names the submodules to read. One without either has no stages.
    image: the shape `[C, H, W]` of one image, for dry runs that find every stage and shape.
    layers: names of submodules, shallow first. By default the deepest map of each size, for the deepest four sizes;
        if all maps have one size (ViT), four evenly spaced blocks.
    pooled: append the pooled feature as a last stage `[N, C, 1, 1]`, as ReviewKD does.
    maps: False reads the logits alone, from the network's own forward, without stages.

    `shapes` holds `[C, H, W]` of every stage, `stages` their names. The model itself and its state-dict keys do not
    change. For the outputs that a named layer may have, see `distpro.layers.as_map`.
    """

    def __init__(
        self,
        model: nn.Module,
        image: Shape,
        layers: Sequence[str] | None = None,
        pooled: bool = False,
        maps: bool = True,
    ) -> None:
        super().__init__()
        image = as_shape(image)
        self.model = model
        self.pooled = pooled
        self.layers: Layers | None = None
        self.indices: list[int] | None = None
        self._plain_head = False
        if maps:
            _refuse_wrapped(model)
        else:
            layers = None
        self._logits_only = not maps or not (layers or hasattr(model, "forward_intermediates"))
        if layers:
            self.layers = Layers(model, layers)
        elif self._logits_only:
            self.pooled = pooled = False
        elif pooled and not hasattr(model, "get_classifier"):
            raise UserError(f"{type(model).__name__} has no classifier, so there is no pooled feature either")
        probe = self._dry(image)
        if not layers and not self._logits_only:
            found = probe.maps[:-1] if pooled else probe.maps
            self.indices = _stages_of([tuple(m.shape[1:]) for m in found])
            self._plain_head = pooled and self._has_plain_head(image)
            probe = self._dry(image)
            self._same_logits(probe.logits, image)
        self.shapes: list[Shape] = [(m.shape[1], m.shape[2], m.shape[3]) for m in probe.maps]
        self.classes = probe.logits.shape[1]
        self.stages = list(layers or ()) or [f"stage{i}" for i in range(1, len(self.shapes) + 1 - pooled)]
        self.stages += ["pooled"] if pooled else []

    def need_stages(self) -> None:
        """Raise a `UserError` if there are no stages, for methods that read maps."""
        if self._logits_only:
            raise UserError(
                f"{type(self.model).__name__} has no forward_intermediates: name the layers to read, for instance "
                f"{', '.join(name for name, _ in self.model.named_children())}"
            )

    def forward(self, x: Tensor) -> Output:
        return self._read(self.model, x)

    def _read(self, model: Any, x: Tensor) -> Output:
        if self._logits_only:
            return Output(_logits(model, model(x)), [])
        if self.layers is not None:
            output, maps = self.layers.run(model, x)
            if self.pooled:
                maps.append(maps[-1].mean((2, 3), keepdim=True))
            return Output(_logits(model, output), maps)
        final, maps = model.forward_intermediates(x, indices=self.indices)
        if not self.pooled:
            return Output(model.forward_head(final), list(maps))
        feature = model.forward_head(final, pre_logits=True)
        # The whole head runs again only if it must: a BN in it should see each batch once.
        logits = model.get_classifier()(feature) if self._plain_head else model.forward_head(final)
        return Output(logits, [*maps, feature[:, :, None, None]])

    def check(self, image: Shape) -> None:
        """Raise a `UserError` if the network does not run on images `[C, H, W]`."""
        self._dry(image)

    def _dry(self, image: Shape) -> Output:
        """Run one forward in eval mode without gradients; buffers and modes do not change."""
        with self._dry_run(image) as x:
            return self._read(self.model, x)

    def _has_plain_head(self, image: Shape) -> bool:
        """Return whether the head only applies the classifier to the pooled feature.

        It does not if there are two classifiers (distilled ViTs), the head also reads the tokens (VOLO), a norm or a
        dropout comes in between (EfficientViT-M, LCNet), or the classifier is a convolution (DLA).
        """
        model: Any = self.model
        with self._dry_run(image) as x:
            final, _ = model.forward_intermediates(x, indices=self.indices)

            def whole() -> Tensor:
                return model.forward_head(final)

            def plain() -> Tensor:
                return model.get_classifier()(model.forward_head(final, pre_logits=True))

            try:
                if _modules_run(model, plain) != _modules_run(model, whole):
                    return False
                for part in model.modules():  # a dropout acts in training only
                    part.training = not isinstance(part, nn.modules.batchnorm._BatchNorm)
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    logits = plain()
                    torch.manual_seed(0)
                    return close(logits, whole(), 0.001)
            except Exception:  # the classifier is a tuple, a list, or needs another shape
                return False

    def _same_logits(self, logits: Tensor, image: Shape) -> None:
        """Raise a `UserError` if the network's own forward gives other logits than the parts that are read."""
        with self._dry_run(image) as x:
            whole = self.model(x)
            if type(whole) is not Tensor or whole.shape != logits.shape or close(logits, whole, 0.01):
                return  # equal, or not comparable: no plain tensor of logits
            if not close(self.model(x), whole, 0.01):
                return  # a forward that draws random numbers does not even match itself
        raise UserError(
            f"{type(self.model).__name__} gives other logits by its forward than by forward_intermediates and "
            "forward_head, which are used to read its maps: name the layers to read instead"
        )

    @contextmanager
    def _dry_run(self, image: Shape) -> Iterator[Tensor]:
        parameter = next(self.model.parameters(), torch.zeros(()))
        try:
            with evaluating(self), torch.no_grad():
                count = math.prod(image)
                ramp = torch.linspace(-1, 1, count, device=parameter.device)  # zeros would hide a factor
                yield ramp.to(parameter.dtype).view(1, *image)
        except UserError:
            raise
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(
                f"{type(self.model).__name__} does not run on images of shape {list(image)}: {reason}"
            ) from error


class Teacher(Features):
    """A frozen network: always in eval mode and without gradients, even after `train()`.

    precision: of its passes; with `precision.teacher` they run on a copy in that type, with its BN folded. Logits are
        still returned in the input's type, maps as computed.
    """

    def __init__(
        self,
        model: nn.Module,
        image: Shape,
        layers: Sequence[str] | None = None,
        pooled: bool = False,
        precision: Precision = PLAIN,
        maps: bool = True,
    ) -> None:
        super().__init__(model, image, layers, pooled, maps)
        self.precision = precision
        self.train()
        if precision.teacher is not None:
            with self._dry_run(image) as x:
                twin, _ = folded(model, lambda network: self._read(network, x))
            self.model = precision.lay_out(twin.to(precision.teacher))

    def train(self, mode: bool = True) -> Teacher:
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, depth: int | None = None) -> Output:
        """Return maps and logits; with `depth`, run only the first `depth` stages, without logits (`[N, 0]`)."""
        # The user may have called train() on the model itself: its BN statistics would drift unnoticed.
        if self.model.training:
            self.model.eval()
        if self.precision.teacher is None:
            return self._run(x, depth)
        with torch.autocast(x.device.type, enabled=False):
            kind = next(self.model.parameters()).dtype  # `distiller.float()` converts the copy, too
            logits, maps = self._run(x.to(kind), depth)
        return Output(logits.to(x.dtype), maps)

    def ahead(self, x: Tensor, depth: int | None = None) -> Callable[[], Output]:
        """Start a pass, on a GPU in a stream of its own; call the returned function for the output.

        The passes of the two networks are independent, and a small network leaves most of a GPU idle. The teacher's
        stream first waits for all work queued so far, so that it never reuses memory that is still being read.
        """
        if not x.is_cuda:
            output = self(x, depth)
            return lambda: output
        current, beside = torch.cuda.current_stream(x.device), _side_stream(x.device)
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            output = self(x, depth)

        def there() -> Output:
            current.wait_stream(beside)
            return output

        return there

    def _run(self, x: Tensor, depth: int | None) -> Output:
        model: Any = self.model
        if depth is None or depth >= len(self.shapes) or self.indices is None:
            return self._read(model, x)
        maps = model.forward_intermediates(x, indices=self.indices[:depth], stop_early=True, intermediates_only=True)
        return Output(x.new_empty(len(x), 0), list(maps))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _refuse_wrapped(model: nn.Module) -> None:
    """Raise a `UserError` for a wrapper (DDP, torch.compile) that reading the maps would bypass."""
    if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
        raise UserError(f"the network is in a {type(model).__name__}: pass the plain one, and wrap the Distiller")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise UserError(
            f"{type(model).__name__} is compiled, but reading its maps bypasses the compiled forward: give the plain "
            "network (Distiller(..., compile=True) compiles the student)"
        )


def _logits(model: nn.Module, output: Any) -> Tensor:
    """Return an output's logits, which may be its `.logits`; refuse a tuple: each output would need its own loss."""
    logits = output if isinstance(output, tuple) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"{type(model).__name__} gives {found}: expected logits [N, classes]")
    return logits


def same_classes(student: Features, teacher: Features, what: str) -> None:
    """Raise a `UserError` if `what` cannot compare the logits of the two."""
    if student.classes != teacher.classes:
        raise UserError(
            f"{what} compares logits: the teacher has {teacher.classes} classes, the student {student.classes}"
        )


def _modules_run(model: nn.Module, call: Callable[[], Any]) -> set[nn.Module]:
    """Return the submodules with parameters or buffers of their own that `call` runs."""
    run: set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: run.add(module))
        for module in model.modules()
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return run


def _stages_of(shapes: list[tuple[int, ...]]) -> list[int]:
    """Return the indices of the maps `[C, H, W]` that are stages (see `Features`)."""
    last = sorted({shape[1:]: i for i, shape in enumerate(shapes)}.values())
    if len(last) == 1:
        count = min(MOST_STAGES, len(shapes))
        return [round((i + 1) * len(shapes) / count) - 1 for i in range(count)]
    return last[-MOST_STAGES:]
