"""The image encoder of a policy: where it comes from, and what its BatchNorm layers become."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from xdfast.errors import nearest
from xdfast.models import FeatureModel, create_model

__all__ = ["NORMS", "EncoderSpec", "build_encoder", "rebuild_encoder"]

log = logging.getLogger("xdfast")

#: What BatchNorm layers become.
NORMS = ("auto", "frozen", "group", "batch")

#: Channels in a group of the GroupNorm that replaces BatchNorm, as in Diffusion Policy.
_GROUP = 16


@dataclass(frozen=True)
class EncoderSpec:
    """Enough to build the encoder again without its weights.

    Attributes:
        architecture: timm's name; empty for a module timm cannot build, which the user has to pass again.
        options: arguments of ``timm.create_model``.
        image_size: its input size in pixels.
        mean, std: normalisation of channels in [0, 1].
        norm: ``"frozen"``, ``"group"`` or ``"batch"``: what became of BatchNorm; ``"none"``: there is none.
        source: what the user asked for, for people to read.
    """

    architecture: str
    options: dict[str, Any]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    norm: str
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EncoderSpec:
        """From :meth:`to_dict`'s values, also after a trip through JSON."""
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def build_encoder(
    source: str | Path | nn.Module,
    *,
    norm: str = "auto",
    image_size: int | None = None,
    pretrained: bool = False,
    options: dict[str, Any] | None = None,
) -> tuple[FeatureModel, EncoderSpec]:
    """An encoder without classifier: images ``[B, 3, S, S]`` in [0, 1] → ``.features`` ``[B, D]``.

    Batches of a policy are small and their frames alike, and the policy is an average over steps (EMA): batch statistics go
    astray. So BatchNorm is replaced.

    Args:
        source: folder of a run (a policy's gives its encoder) or a student, timm name, ``NAME@/path/weights``, or a module.
        norm: ``"frozen"``: BatchNorm becomes a fixed affine map with the statistics it has, for weights that were trained;
            ``"group"``: GroupNorm with 16 channels a group, for weights that were not; ``"batch"``: left as it is;
            ``"auto"``: frozen or group, by whether there are trained weights. Nothing happens to a model without BatchNorm.
        image_size: input size S; default: the model's.
        pretrained: a timm name comes with its published weights.
        options: further arguments of ``timm.create_model``.

    Returns:
        (encoder, spec).

    Raises:
        ValueError: unknown ``norm``; ``"group"`` for trained BatchNorm weights; ``"frozen"`` for untrained ones.
        FileNotFoundError: no such folder or file.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}.{nearest(norm, NORMS)}")
    if isinstance(source, (str, Path)) and (Path(source) / "policy" / "policy.json").is_file():
        return _of_policy(Path(source), norm, image_size)
    if isinstance(source, (str, Path)):
        inner = Path(source) / "student"
        name = str(inner) if (inner / "config.json").is_file() else str(source)
        model = create_model(name, pretrained=pretrained, image_size=image_size, options=options)
        trained = pretrained or "@" in name or Path(name).is_dir() or name.startswith("hf-hub:")
    else:
        name = type(getattr(source, "net", source)).__name__
        model, trained = create_model(source, image_size=image_size), True
    if model.num_classes:
        model.reset_classifier(0)
    batch_norms = _batch_norms(model.net)
    chosen = norm
    if norm == "auto":
        chosen = "frozen" if trained else "group"
    if not batch_norms:
        chosen = "none"
    if chosen == "group" and trained:
        raise ValueError(
            f"norm='group' would throw away what {name} learned with BatchNorm ({batch_norms[0]} and {len(batch_norms) - 1} "
            "more). Use norm='frozen', or distil a student with GroupNorm (recipe xdistill-imagenet-gn)"
        )
    if chosen == "frozen" and not trained:
        raise ValueError(
            f"norm='frozen' needs statistics, and {name} is untrained; use norm='group', or pretrained weights"
        )
    _set_norm(model, chosen)
    if batch_norms:
        log.info("encoder %s: %d BatchNorm layers → %s", name, len(batch_norms), chosen)
    facts: dict[str, Any] = getattr(model.net, "pretrained_cfg", None) or {}
    spec = EncoderSpec(
        architecture=str(facts.get("architecture") or ""),
        options=dict(getattr(model.net, "xdfast_options", {})),
        image_size=model.image_size,
        mean=tuple(model.mean),
        std=tuple(model.std),
        norm=chosen,
        source=name,
    )
    return model, spec


def _of_policy(folder: Path, norm: str, image_size: int | None) -> tuple[FeatureModel, EncoderSpec]:
    """The encoder of a trained policy, for another task or more demonstrations."""
    from xdfast.robot.policy_files import load_policy

    policy = load_policy(folder)
    spec = policy.spec.encoder
    if len(policy.encoders) != 1:
        raise ValueError(f"{folder} has an encoder for each of its cameras; which one is meant cannot be told")
    if norm not in ("auto", spec.norm):
        raise ValueError(f"{folder} was trained with norm={spec.norm!r}; use that, or norm='auto', not {norm!r}")
    if image_size not in (None, spec.image_size):
        raise ValueError(f"{folder} was trained with pictures of {spec.image_size} px in its encoder, got {image_size}")
    encoder: Any = policy.encoders[0]
    return encoder.train(), replace(spec, source=str(folder))


def rebuild_encoder(spec: EncoderSpec) -> FeatureModel:
    """The encoder of a spec with random weights, into which a checkpoint is loaded.

    Raises:
        ValueError: timm cannot build it.
    """
    if not spec.architecture:
        raise ValueError(
            f"the encoder was a module of yours ({spec.source}), which timm cannot build; pass it: "
            "load_policy(folder, encoder=module)"
        )
    model = create_model(
        spec.architecture.partition(".")[0], pretrained=False, image_size=spec.image_size, options=spec.options
    )
    model = FeatureModel(model.net, name=model.name, image_size=spec.image_size, mean=spec.mean, std=spec.std)  # type: ignore[arg-type]
    if model.num_classes:
        model.reset_classifier(0)
    _set_norm(model, spec.norm)
    return model


def _batch_norms(net: nn.Module) -> list[str]:
    return [name for name, part in net.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


def _set_norm(model: FeatureModel, norm: str) -> None:
    if norm == "frozen":
        from timm.layers import freeze_batch_norm_2d

        model.net = freeze_batch_norm_2d(model.net)
    elif norm == "group":
        _to_group_norm(model.net)


def _to_group_norm(net: nn.Module) -> None:
    """Replaces every BatchNorm2d, timm's with an activation included, by GroupNorm."""
    from timm.layers import BatchNormAct2d, GroupNormAct

    for name in _batch_norms(net):
        old: Any = net.get_submodule(name)
        channels = int(old.num_features)
        groups = max(1, channels // _GROUP)
        while channels % groups:
            groups -= 1
        new: Any
        if isinstance(old, BatchNormAct2d):
            new = GroupNormAct(channels, num_groups=groups, eps=old.eps)
            new.drop, new.act = old.drop, old.act
        else:
            new = nn.GroupNorm(groups, channels, eps=old.eps)
        if getattr(old, "weight", None) is not None:  # some are made with a weight of zero
            new.weight.data.copy_(old.weight.data)
            new.bias.data.copy_(old.bias.data)
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, new)
