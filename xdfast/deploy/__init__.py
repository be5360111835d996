"""From a student or a policy to files that run without xdfast, each checked against PyTorch; and to the Hugging Face hub.

Names are loaded on first use; nothing optional is imported before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "ExportError": "errors",
    "Exported": "write",
    "Graph": "graph",
    "Parity": "agree",
    "Port": "graph",
    "export_graphs": "write",
    "image_graph": "images",
    "measure_parity": "agree",
    "policy_graphs": "policies",
    "vla_graph": "policies",
}

__all__ = [
    "ExportError",
    "Exported",
    "Graph",
    "Parity",
    "Port",
    "export_graphs",
    "image_graph",
    "measure_parity",
    "policy_graphs",
    "vla_graph",
]

if TYPE_CHECKING:
    from xdfast.deploy.agree import Parity, measure_parity
    from xdfast.deploy.errors import ExportError
    from xdfast.deploy.graph import Graph, Port
    from xdfast.deploy.images import image_graph
    from xdfast.deploy.policies import policy_graphs, vla_graph
    from xdfast.deploy.write import Exported, export_graphs


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'xdfast.deploy' has no attribute {name!r}; there are: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"xdfast.deploy.{_NAMES[name]}"), name)
    globals()[name] = value
    return value
