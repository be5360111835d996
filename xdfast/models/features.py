"""``FeatureModel``: one forward pass gives penultimate features, logits and named taps, each model in its own input space."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdfast.errors import nearest

__all__ = ["FeatureModel", "ModelOutput"]

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_DEFAULT_SIZE = 224


@dataclass
class ModelOutput:
    """What a forward pass gives.

    Attributes:
        features: ``[B, D]`` input of the classifier.
        logits: ``[B, C]``, or None without a classifier.
        taps: name of a sub-module → its output.
    """

    features: Tensor
    logits: Tensor | None
    taps: dict[str, Tensor] = field(default_factory=dict)


class FeatureModel(nn.Module):
    """A model that takes any image and looks at it in its own way: its own size, mean and std.

    Features are what timm gives for ``forward_head(forward_features(x), pre_logits=True)``; of other modules, the input of
    their last ``nn.Linear``, the classifier (of a module without one, its output is the features).

    Args:
        net: a timm model or another module that maps images ``[B, 3, S, S]`` to ``[B, C]``.
        name: for messages and reports; default: the architecture.
        image_size: S in pixels; default: the network's own, 224 if it names none.
        mean, std: normalisation of channels in [0, 1]; default: the network's own, ImageNet's if it names none.
        taps: sub-modules such as ``"layer3"`` or ``"blocks.5"`` whose outputs are returned too.
        frozen: no gradient, always in eval mode (:meth:`train` has no effect), as a teacher should be.
        dtype: precision of the network, such as ``torch.bfloat16``; features and logits then still come as float32.

    Attributes:
        num_features: D.
        num_classes: C; 0 without a classifier.

    Raises:
        ValueError: a tap that does not exist (the nearest are named), or a module that does not give ``[B, C]``.
    """

    net: Any  # an nn.Module; timm's methods on it are looked up at run time
    num_classes: int
    num_features: int
    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        name: str | None = None,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        taps: tuple[str, ...] = (),
        frozen: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        facts: dict[str, Any] = getattr(net, "pretrained_cfg", None) or {}
        self.name = name or facts.get("architecture") or type(net).__name__
        self.image_size = int(image_size or (facts.get("input_size") or (3, _DEFAULT_SIZE))[-1])
        self.mean = tuple(mean or facts.get("mean") or _IMAGENET_MEAN)
        self.std = tuple(std or facts.get("std") or _IMAGENET_STD)
        self.net = net if dtype is None else net.to(dtype)
        self.frozen = frozen
        self._is_timm = all(hasattr(net, part) for part in ("forward_features", "forward_head", "get_classifier"))
        self._captured: dict[str, Tensor] = {}
        for tap in taps:
            self._submodule(tap).register_forward_hook(partial(self._keep, tap))
        self.taps = tuple(taps)
        # Plain arrays in the checkpoint would be in the way of loading it elsewhere: not persistent.
        self.register_buffer("_mean", torch.tensor(self.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).view(1, 3, 1, 1), persistent=False)
        self._classifier_name: str | None = None
        self._watch: Any = None
        if self._is_timm:
            self.num_classes = int(getattr(net, "num_classes", 0) or 0)
            self.num_features = int(getattr(net, "head_hidden_size", None) or self.net.num_features)
        else:
            self._inspect()
        if frozen:
            self.requires_grad_(False)
            self.eval()

    @property
    def classifier(self) -> nn.Module | None:
        """The last layer, which maps features to logits, or None."""
        if not self._is_timm:
            return None if self._classifier_name is None else self.net.get_submodule(self._classifier_name)
        found = self.net.get_classifier()
        if isinstance(found, (tuple, list)):  # distilled DeiT has two
            return nn.ModuleList(found)
        return None if not isinstance(found, nn.Module) or isinstance(found, nn.Identity) else found

    def prepare(self, images: Tensor) -> Tensor:
        """Images as the network wants them.

        Args:
            images: ``[B, 3, H, W]`` uint8 in 0..255, or floating point in [0, 1].

        Returns:
            ``[B, 3, S, S]`` resized (bicubic, antialiased) and normalised, in the network's precision.

        Raises:
            ValueError: not a batch of RGB images.
            TypeError: another dtype.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{self.name}: expected images [B, 3, H, W], got {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif not images.is_floating_point():
            raise TypeError(f"{self.name}: images must be uint8 (0..255) or floating point (0..1), got {images.dtype}")
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(
                images.float(), size=size, mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        weight = next(self.net.parameters(), None)
        dtype = weight.dtype if weight is not None and weight.is_floating_point() else images.dtype
        return ((images - self._mean) / self._std).to(dtype)

    def forward(self, images: Tensor) -> ModelOutput:
        """Runs the network on images as :meth:`prepare` takes them."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            self._captured.clear()
            x = self.prepare(images)
            features, logits = self._run_timm(x) if self._is_timm else self._run_any(x)
            taps = {tap: self._captured[tap] for tap in self.taps}
            self._captured.clear()
        if self.frozen:
            features, logits = features.float(), None if logits is None else logits.float()
        return ModelOutput(features, logits, taps)

    def train(self, mode: bool = True) -> FeatureModel:
        """As in ``nn.Module``; a frozen model stays in eval mode."""
        return super().train(mode and not self.frozen)

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a new, random one for ``num_classes`` classes.

        Raises:
            ValueError: the module has no classifier that could be replaced.
        """
        if self._is_timm:
            weight = next(self.net.parameters())
            self.net.reset_classifier(num_classes)
            self.net.to(weight.device, weight.dtype)
            self.net.num_classes = num_classes
            self.num_features = int(getattr(self.net, "head_hidden_size", None) or self.net.num_features)
        else:
            old = self.classifier
            if not isinstance(old, nn.Linear):
                raise ValueError(
                    f"{self.name} has no nn.Linear classifier to replace; give it one for {num_classes} classes"
                )
            new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None).to(old.weight)
            parent, _, child = str(self._classifier_name).rpartition(".")
            setattr(self.net.get_submodule(parent), child, new)
            self._watch_classifier()
        self.num_classes = num_classes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_captured": {}, "_watch": None}  # activations neither can nor should be copied

    def _run_timm(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        spatial = self.net.forward_features(x)
        features = self.net.forward_head(spatial, pre_logits=True)
        if features.ndim > 2:  # a head that keeps 1×1 maps until after its convolutional classifier
            features = features.flatten(1)
        classifier = self.classifier
        if classifier is None:
            return features, None
        if isinstance(classifier, nn.Linear) and classifier.in_features == features.shape[1]:
            return features, classifier(features)  # the same dropout mask in both
        logits = self.net.forward_head(spatial)
        return features, torch.stack(logits).mean(0) if isinstance(logits, tuple) else logits

    def _run_any(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        output = self.net(x)
        if self._classifier_name is None:
            return output, None
        return self._captured.pop("\0classifier"), output

    def _inspect(self) -> None:
        """Finds the classifier of a module timm did not make: the last Linear, if its output is the module's output."""
        linears = [name for name, module in self.net.named_modules() if isinstance(module, nn.Linear)]
        was_training = self.net.training
        self.net.eval()
        try:
            weight = next(self.net.parameters(), torch.zeros(()))
            probe = torch.zeros(2, 3, self.image_size, self.image_size, device=weight.device, dtype=weight.dtype)
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            handles = [
                self.net.get_submodule(name).register_forward_hook(
                    lambda module, args, output, name=name: seen.__setitem__(name, (args[0], output))
                )
                for name in linears
            ]
            with torch.no_grad():
                output = self.net(probe)
            for handle in handles:
                handle.remove()
        finally:
            self.net.train(was_training)
        if not isinstance(output, Tensor) or output.ndim != 2:
            shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"{self.name} must map images [B, 3, {self.image_size}, {self.image_size}] to a tensor [B, C], got {shown}; "
                "wrap it in a module that pools to [B, C], or pass image_size"
            )
        for name, (given, made) in seen.items():
            if made is output and given.ndim == 2:
                self._classifier_name = name
        if self._classifier_name is None:
            self.num_classes, self.num_features = 0, output.shape[1]
        else:
            self.num_classes, self.num_features = output.shape[1], seen[self._classifier_name][0].shape[1]
            self._watch_classifier()

    def _watch_classifier(self) -> None:
        self._watch = self.classifier.register_forward_pre_hook(self._keep_input)  # type: ignore[union-attr]

    def unwatch(self) -> None:
        """Takes the hook off the network again, which then belongs to nobody."""
        if self._watch is not None:
            self._watch.remove()

    # Bound methods rather than closures: a deep copy (an EMA, a frozen teacher) then fills its own dictionary.
    def _keep(self, tap: str, module: nn.Module, args: Any, output: Any) -> None:
        self._captured[tap] = output

    def _keep_input(self, module: nn.Module, args: Any) -> None:
        self._captured["\0classifier"] = args[0]

    def _submodule(self, name: str) -> nn.Module:
        modules = dict(self.net.named_modules())
        if not name or name not in modules:
            tops = ", ".join(child for child, _ in self.net.named_children())
            raise ValueError(
                f"{self.name} has no sub-module {name!r} to tap.{nearest(name, modules)} At the top there are: {tops}"
            )
        return modules[name]
