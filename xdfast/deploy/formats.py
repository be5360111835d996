"""Three formats of one traced graph: written, and loaded again as their users load them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xdfast._optional import require
from xdfast.deploy.errors import cannot
from xdfast.deploy.graph import Graph
from xdfast.errors import nearest

__all__ = ["FORMATS", "Loaded", "check_formats", "load_file", "trace", "write_file"]

#: Format → the end of its file's name.
FORMATS = {"pt2": ".pt2", "onnx": ".onnx", "aoti": ".aoti.pt2"}

#: A protobuf ends at 2 GiB; above this ONNX weights go to a file beside it.
_INLINE_BYTES = 1 << 30


@dataclass(frozen=True)
class Loaded:
    """A file that runs.

    Attributes:
        call: inputs on the device → outputs.
        how: what runs it.
    """

    call: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
    how: str


def check_formats(formats: tuple[str, ...]) -> None:
    """Whether these can be written here; before any work.

    Raises:
        ValueError: an unknown one, or none.
        ImportError: a package is missing; the message has the pip line.
        RuntimeError: AOTInductor without a C++ compiler.
    """
    if not formats:
        raise ValueError(f"formats must name at least one of {', '.join(FORMATS)}")
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"unknown format {name!r}; there are {', '.join(FORMATS)}.{nearest(name, FORMATS)}")
    if "onnx" in formats:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, "deploy", purpose="ONNX files (formats='onnx'), which are checked with onnxruntime")
    if "aoti" in formats:
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:  # an error class of its own
            raise RuntimeError(f"AOTInductor (formats='aoti') needs a C++ compiler, such as g++: {error}") from error


def trace(graph: Graph, device: torch.device) -> Any:
    """The ``torch.export`` program from which all formats are made; batches of any size where the graph's is free.

    Raises:
        ExportError: something in the model cannot be traced.
    """
    module = graph.module.to(device)
    inputs = graph.inputs_for(2, device)  # 1 would be taken for a constant
    shapes = graph.dynamic_shapes if graph.free_batch else None
    try:
        with torch.no_grad():
            program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    except Exception as error:  # dozens of kinds, from torch and from the model
        raise cannot(
            graph.name,
            "torch.export",
            error,
            "A graph holds no Python decisions on values; rewrite that line with torch.where",
        ) from error
    return program


def write_file(name: str, program: Any, graph: Graph, path: Path) -> dict[str, Any]:
    """Writes one format; what has to be known about the file.

    Raises:
        ExportError: the format has no such operator.
    """
    facts = json.dumps({**graph.facts, "inputs": [p.to_dict() for p in graph.inputs]})
    if name == "pt2":
        torch.export.save(program, path, extra_files={"xdfast.json": facts})
        return {}
    if name == "onnx":
        return _write_onnx(program, graph, path, facts)
    from torch._inductor import aoti_compile_and_package

    try:
        with torch.no_grad():
            aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:
        raise cannot(graph.name, "AOTInductor", error, "Leave out formats='aoti', or change the operator") from error
    return {}


def load_file(name: str, path: Path, graph: Graph, device: torch.device) -> Loaded:
    """What its users load: a fresh module, an onnxruntime session, a package."""
    if name == "pt2":
        module = torch.export.load(path).module()

        def run_module(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return _as_tuple(module(*inputs))

        return Loaded(run_module, f"torch.export module on {device.type}")
    if name == "onnx":
        return _load_onnx(path, graph, device)
    from torch._inductor import aoti_load_package

    package: Any = aoti_load_package(str(path))

    def run_package(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return _as_tuple(package(*inputs))

    return Loaded(run_package, f"AOTInductor on {device.type}")


def _write_onnx(program: Any, graph: Graph, path: Path, facts: str) -> dict[str, Any]:
    try:
        with torch.no_grad():
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[port.name for port in graph.inputs],
                output_names=[port.name for port in graph.outputs],
                verbose=False,
            )
    except Exception as error:
        raise cannot(graph.name, "torch.onnx", error, "Leave out formats='onnx', or change the operator") from error
    made.model.metadata_props["xdfast"] = facts
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    made.save(path, external_data=size > _INLINE_BYTES)
    return {"opset": int(made.model.opset_imports.get("", 0)), "external_data": size > _INLINE_BYTES}


def _load_onnx(path: Path, graph: Graph, device: torch.device) -> Loaded:
    ort: Any = require("onnxruntime", "deploy", purpose="running an ONNX file")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as PyTorch beside it
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    providers = [p for p in wanted if p in ort.get_available_providers()] + ["CPUExecutionProvider"]
    session = ort.InferenceSession(str(path), options, providers=providers)
    names = [port.name for port in graph.inputs]
    outputs = [port.name for port in graph.outputs]

    def run(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        feed = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, inputs)}
        return tuple(torch.from_numpy(array).to(device) for array in session.run(outputs, feed))

    used = session.get_providers()[0].removesuffix("ExecutionProvider")
    return Loaded(run, f"onnxruntime {ort.__version__} on {used}")


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
