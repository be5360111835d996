"""Hugging Face style VLAs on disk: our own folders, and weights that others published. Nothing in the files is executed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xdfast._optional import require
from xdfast.errors import nearest
from xdfast.models.checkpoint import CheckpointError
from xdfast.models.weights import read_weights, state_dict_misfit
from xdfast.robot.encoder import EncoderSpec
from xdfast.robot.model_files import find_folder, read_spec, write_model
from xdfast.robot.vla.hf import HuggingFaceVLA
from xdfast.robot.vla.hf_decoder import build_decoder, config_of, kept_layers
from xdfast.robot.vla.hf_spec import BINS, HuggingFaceSpec
from xdfast.robot.vla.hf_vision import VisionTower, vision_encoder
from xdfast.robot.vla.students import rebuild_route, route_facts

__all__ = ["load_hf_vla", "load_pretrained", "openvla_state", "save_hf_vla"]

_NAME = "hf_vla"
_TOKENIZER = "tokenizer"

#: OpenVLA's own sentence around an instruction, and the empty token of Llama's vocabulary that follows it.
_OPENVLA_PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
_OPENVLA_EMPTY = (29871, "▁")


# --- our own folders


def save_hf_vla(vla: HuggingFaceVLA, folder: str | Path, *, extra: dict[str, Any] | None = None) -> Path:
    """Writes ``hf_vla.safetensors``, ``hf_vla.json`` and, if there is one, the tokenizer of transformers; a routed model with its
    router.

    Args:
        vla: what to save.
        folder: made if missing.
        extra: JSON-able facts to keep.

    Raises:
        CheckpointError: the files cannot be written.
    """
    own = bool(vla.spec.vocabulary)
    facts = {**(extra or {}), "tokenizer": None if own else _TOKENIZER}
    if hasattr(vla, "xdfast_route"):
        facts["route"] = route_facts(vla)
    folder = write_model(vla, vla.spec.to_dict(), folder, _NAME, facts)
    if not own:
        vla.tokenizer.source.save_pretrained(folder / _TOKENIZER)
    return folder


def load_hf_vla(folder: str | Path, *, tokenizer: Any = None, device: torch.device | str = "cpu") -> HuggingFaceVLA:
    """What :func:`save_hf_vla` wrote, in eval mode and in the precision of the file.

    Args:
        folder: where it is, or the folder around its ``hf_vla/``.
        tokenizer: instead of the one that was saved.
        device: where it is put.

    Raises:
        FileNotFoundError: no such files.
        CheckpointError: damaged files, or weights that do not fit the spec.
    """
    folder = find_folder(folder, _NAME, "Hugging Face VLA")
    spec = read_spec(folder / f"{_NAME}.json", HuggingFaceSpec.from_dict)
    facts = json.loads((folder / f"{_NAME}.json").read_text(encoding="utf-8"))
    if tokenizer is None and facts.get("tokenizer"):
        tokenizer = _tokenizer(folder / facts["tokenizer"])
    vla = _empty(spec, tokenizer)
    if facts.get("route"):
        try:
            rebuild_route(vla, facts["route"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / _NAME}.json is damaged (route: {error}); save the model again") from error
    _assign(vla, read_weights(folder / f"{_NAME}.safetensors"), folder, new=())
    return vla.to(device).eval()


def _empty(spec: HuggingFaceSpec, tokenizer: Any, dtype: torch.dtype | None = None) -> HuggingFaceVLA:
    encoders = [vision_encoder(facts, spec.vision_level)[0] for facts in spec.vision]
    return HuggingFaceVLA(spec, build_decoder(spec.backbone, spec.layers, dtype), VisionTower(encoders), tokenizer)


def _assign(vla: HuggingFaceVLA, state: dict[str, Tensor], source: Path, new: Sequence[str]) -> None:
    """Weights into a model; parameters whose names begin with one of ``new`` may be missing."""
    own = vla.state_dict()
    filled = {name: value for name, value in own.items() if name not in state and name.startswith(tuple(new))}
    try:
        # assigned, not copied: the file's precision is the model's, and what is not in the file (RoPE's fp32) is not rounded
        vla.load_state_dict({**filled, **state}, assign=True)
    except RuntimeError as error:
        raise CheckpointError(state_dict_misfit(type(vla).__name__, str(source), error)) from error


def _tokenizer(folder: Path) -> Any:
    transformers: Any = require("transformers", "vla", purpose="a tokenizer")
    try:
        if (folder / "tokenizer.json").is_file():  # says all, whatever the model type next to it
            return transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer has its own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{folder} holds no tokenizer that transformers can read ({first}); pass tokenizer="
        ) from error


# --- what others published


def load_pretrained(
    source: str | Path,
    *,
    vision: Any = None,
    vision_size: int | None = None,
    vision_pretrained: bool = True,
    tokenizer: Any = None,
    statistics: str | None = None,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> HuggingFaceVLA:
    """A VLA with published weights, from a folder or a name on the hub (safetensors alone; no code of the files runs).

    * a folder of :func:`save_hf_vla`: as it is;
    * OpenVLA's layout (``vision_backbone.*``, ``projector.fc*``, ``language_model.*``): the whole model. ``action_norm``
      becomes its 1 % and 99 % quantiles, ``head="bins"`` unless another is asked for;
    * a causal language model (Llama, Qwen, SmolLM, …): the backbone; ``vision`` says what sees. Projector and head are new and
      have to be trained.

    Args:
        source: folder, or ``"owner/name"``.
        vision: for a language model: what :func:`xdfast.robot.vla.hf_vision.vision_encoder` takes, or a list.
        tokenizer: instead of the one in the files.
        statistics: which of several data sets' statistics OpenVLA acts with.
        dtype: of the weights; default: the file's.
        settings: of :class:`HuggingFaceSpec`; at least ``cameras`` and ``image_size``.

    Raises:
        FileNotFoundError: no such folder or files.
        ConnectionError: a name that could not be fetched.
        CheckpointError: damaged files, or weights that do not fit.
        ValueError: files of another kind of model, or settings that are missing.
    """
    folder = _folder(source)
    if (folder / f"{_NAME}.json").is_file() or (folder / _NAME / f"{_NAME}.json").is_file():
        others = {"vision": vision, "vision_size": vision_size, "statistics": statistics, "dtype": dtype}
        given = [*settings, *(name for name, value in others.items() if value is not None)]
        if given:
            raise ValueError(f"{folder} holds a whole VLA with its settings; leave out {', '.join(given)}")
        return load_hf_vla(folder, tokenizer=tokenizer)
    config = _json(folder / "config.json")
    tokenizer = tokenizer or (None if settings.get("vocabulary") else _tokenizer(folder))
    if "text_config" in config and "timm_model_ids" in config:
        return _openvla(folder, config, tokenizer, statistics, dtype, settings)
    if vision is None:
        raise ValueError(
            f"{folder} holds a {config.get('model_type', 'model')}, not a VLA of a layout known here (OpenVLA's, save_hf_vla's). "
            "As a language backbone it needs vision=, such as 'vit_base_patch16_siglip_224' or a model of transformers"
        )
    sources = vision if isinstance(vision, (list, tuple)) else (vision,)
    level = settings.get("vision_level", -1)
    encoders = [
        vision_encoder(eye, level, image_size=vision_size, pretrained=vision_pretrained and isinstance(eye, str))
        for eye in sources
    ]
    return _language_model(folder, encoders, tokenizer, dtype, settings)


def _folder(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise FileNotFoundError(f"no folder {path}; a name on the hub is 'owner/name'")
    hub: Any = require("huggingface_hub", purpose="weights by name")
    try:
        return Path(hub.snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "tokenizer*"]))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConnectionError(
            f"{source} could not be fetched ({reason}). Connect this machine to the Hugging Face hub, or fetch it where there is a "
            f"connection (`hf download {source} --local-dir FOLDER`) and pass the folder"
        ) from error


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} holds no {file.name}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}); fetch it again") from error


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of ``model.safetensors``, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(f"{folder} holds no model.safetensors (pickled weights are not read)")
        return read_weights(folder / "model.safetensors")
    table = _json(index).get("weight_map", {})
    state: dict[str, Tensor] = {}
    for shard in sorted(set(table.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names {shard!r}, which is outside the folder")
        state.update(read_weights(folder / shard))
    missing = sorted(set(table) - set(state))
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors that its index names, such as {missing[0]}")
    return state


def _openvla(
    folder: Path,
    config: dict[str, Any],
    tokenizer: Any,
    statistics: str | None,
    dtype: torch.dtype | None,
    settings: dict[str, Any],
) -> HuggingFaceVLA:
    backbone = {"model_type": "llama", **config["text_config"]}
    vocabulary = _vocabulary(backbone)
    ranges = _ranges(folder, config.get("norm_stats") or {}, statistics)
    acts = config.get("timm_override_act_layers") or [None] * len(config["timm_model_ids"])
    level = settings.setdefault("vision_level", -2)
    facts = [
        _timm_facts(name, size, act, level)
        for name, size, act in zip(config["timm_model_ids"], config["image_sizes"], acts)
    ]
    empty, piece = _OPENVLA_EMPTY
    knows = hasattr(tokenizer, "convert_ids_to_tokens") and len(tokenizer) > empty
    follows = (empty,) if knows and tokenizer.convert_ids_to_tokens(empty) == piece else ()
    defaults: dict[str, Any] = {
        "head": "bins", "horizon": 1, "proprioception": False, "state_dim": 0, "lower_case": True, "text_length": 48,
        "prompt": _OPENVLA_PROMPT, "suffix": follows, "begin": int(backbone.get("bos_token_id") or 1),
        "last_bin": vocabulary - int(config.get("pad_to_multiple_of") or 0),
    }  # fmt: skip
    if ranges is not None:
        defaults["action_dim"] = len(ranges["q01"])
    merged = {**defaults, **settings}
    merged.setdefault("n_action", merged["horizon"])
    if merged["head"] != "bins":
        merged["last_bin"] = settings.get("last_bin", 0)
    spec = _spec(backbone, facts, merged)
    state = _weights(folder)
    kind = next((value.dtype for name, value in state.items() if name.startswith("language_model.")), None)
    vla = _empty(spec, tokenizer, dtype or kind)
    fresh = ("state_in.", "state_norm.", "action_norm.", "queries") + (() if spec.head == "bins" else ("head.",))
    mapped = openvla_state(state, spec, vla.num_layers)
    known = set(vla.state_dict())
    mapped = {name: value for name, value in mapped.items() if name in known or not name.startswith("vision.")}
    if dtype is not None:
        mapped = {name: value.to(dtype) if value.is_floating_point() else value for name, value in mapped.items()}
    _assign(vla, mapped, folder, new=fresh)
    if ranges is not None:
        _set_ranges(vla, ranges)
    return vla.eval()


def openvla_state(state: dict[str, Tensor], spec: HuggingFaceSpec, layers: int) -> dict[str, Tensor]:
    """OpenVLA's names → those of a :class:`HuggingFaceVLA`.

    ==================================  =====================================================
    OpenVLA                             here
    ==================================  =====================================================
    ``vision_backbone.featurizer.*``    ``vision.encoders.0.encoder.net.*``; LayerScale's
                                        ``scale_factor`` is timm's ``gamma``
    ``…fused_featurizer.*``             ``vision.encoders.1.encoder.net.*``
    ``projector.fc1`` to ``fc3``        the same
    ``language_model.model.norm``       ``norm``
    ``language_model.model.*``          ``layers.model.*``; layers beyond ``layers`` are left out
    ``language_model.lm_head``          ``head.linear``: its rows of the 256 action ids
    ==================================  =====================================================

    Raises:
        CheckpointError: a name of another layout.
    """
    eyes = {"vision_backbone.featurizer.": 0, "vision_backbone.fused_featurizer.": 1}
    made: dict[str, Tensor] = {}
    for name, value in state.items():
        eye = next((prefix for prefix in eyes if name.startswith(prefix)), None)
        if eye is not None:
            inner = name.removeprefix(eye).replace(".scale_factor", ".gamma")
            made[f"vision.encoders.{eyes[eye]}.encoder.net.{inner}"] = value
        elif name.startswith("projector.fc"):
            made[name] = value
        elif name == "language_model.lm_head.weight":
            if spec.head == "bins":
                last = spec.last_bin or len(value)
                made["head.linear.weight"] = value[last - BINS : last].clone()
        elif name.startswith("language_model.model.norm."):
            made[name.removeprefix("language_model.model.")] = value
        elif name.startswith("language_model.model."):
            inner = name.removeprefix("language_model.model.")
            number = inner.split(".")[1] if inner.startswith("layers.") else "-1"
            if int(number) < layers and not inner.endswith("rotary_emb.inv_freq"):
                made[f"layers.model.{inner}"] = value
        else:
            raise CheckpointError(
                f"{name!r} is no name of OpenVLA's layout (vision_backbone.*, projector.fc*, language_model.*)"
            )
    return made


def _vocabulary(backbone: dict[str, Any]) -> int:
    """Ids of a backbone; that of its type where the configuration does not say."""
    transformers: Any = require("transformers", "vla", purpose="a Hugging Face VLA")
    options = {**backbone}
    return int(transformers.AutoConfig.for_model(options.pop("model_type"), **options).vocab_size)


def _timm_facts(name: str, size: int, act: str | None, level: int) -> EncoderSpec:
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no vision encoder {name}.{nearest(architecture, timm.list_models())}")
    cfg: Any = timm.get_pretrained_cfg(name, allow_unregistered=False) or timm.get_pretrained_cfg(architecture)
    options = {"img_size": size} | ({} if act is None else {"act_layer": act})
    return EncoderSpec(architecture, options, size, tuple(cfg.mean), tuple(cfg.std), "none", source=name)


def _spec(backbone: dict[str, Any], vision: Sequence[EncoderSpec], settings: dict[str, Any]) -> HuggingFaceSpec:
    missing = [n for n in ("action_dim", "state_dim", "cameras", "image_size") if n not in settings]
    if missing:
        raise ValueError(f"the files do not tell {', '.join(missing)}; pass {'=, '.join(missing)}=")
    return HuggingFaceSpec(backbone=backbone, vision=tuple(vision), **settings)


def _ranges(folder: Path, stats: dict[str, Any], wanted: str | None) -> dict[str, Any] | None:
    if wanted is None and len(stats) > 1:
        raise ValueError(
            f"{folder} has statistics of {len(stats)} data sets; say with statistics= which it acts in: {', '.join(sorted(stats))}"
        )
    if wanted is not None and wanted not in stats:
        raise ValueError(
            f"{folder} has no statistics {wanted!r}; there are {', '.join(sorted(stats)) or 'none'}.{nearest(wanted, list(stats))}"
        )
    if not stats:
        return None
    return (stats[wanted] if wanted is not None else next(iter(stats.values())))["action"]


def _set_ranges(vla: HuggingFaceVLA, ranges: dict[str, Any]) -> None:
    """Quantiles to [-1, 1]; dimensions that OpenVLA leaves as they are (the gripper) stay."""
    low, high = torch.tensor(ranges["q01"]), torch.tensor(ranges["q99"])
    scaled = torch.tensor(ranges.get("mask", [True] * len(low)), dtype=torch.bool)
    if len(low) != vla.spec.action_dim:
        raise ValueError(f"the statistics are of {len(low)} action dimensions, action_dim is {vla.spec.action_dim}")
    vla.action_norm.fit(torch.where(scaled, low, -1.0), torch.where(scaled, high, 1.0))


def _language_model(
    folder: Path, encoders: list[Any], tokenizer: Any, dtype: torch.dtype | None, settings: dict[str, Any]
) -> HuggingFaceVLA:
    transformers: Any = require("transformers", "vla", purpose="a language backbone")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers cannot read a causal language model from {folder}: {first}") from error
    backbone = config_of(model.config)
    begin = getattr(model.config, "bos_token_id", None)
    settings = {"begin": begin if isinstance(begin, int) else None, **settings}
    spec = _spec(backbone, [facts for _, facts in encoders], settings)
    head = model.get_output_embeddings().weight
    decoder = kept_layers(getattr(model, "model", model), spec.layers)
    vla = HuggingFaceVLA(spec, decoder, VisionTower([encoder for encoder, _ in encoders]), tokenizer)
    if spec.head == "bins":
        last = spec.last_bin or len(head)
        vla.head.linear.weight.data.copy_(head[last - BINS : last].detach())
    return vla.eval()
