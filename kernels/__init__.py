"""Triton kernels: raw launches, no autograd, no validation, no policy. Installed as ``xdfast.kernels``.

``HAS_TRITON`` says whether Triton can be imported, ``WHY_NOT`` why it cannot (an empty string if it can).
"""

from __future__ import annotations

if __name__ != "xdfast.kernels":
    raise ImportError(
        f"this folder is installed as xdfast.kernels and must not be imported as {__name__!r}: the root of the xdfast "
        "repository is on sys.path (started with `python -m`, `python -c` or from the repository's root). Use "
        "`import xdfast.kernels`, run tests with the `pytest` script, and set PYTHONSAFEPATH=1"
    )

__all__ = ["HAS_TRITON", "WHY_NOT"]


def _probe() -> tuple[bool, str]:
    try:
        import triton
    except Exception as error:  # a triton that does not match the system fails in many ways, not only ImportError
        return False, f"triton cannot be imported ({type(error).__name__}: {error}); torch brings it on Linux x86-64"
    if not hasattr(triton, "jit"):
        return (
            False,
            f"the package named triton at {getattr(triton, '__path__', '?')} is not OpenAI Triton: it has no jit",
        )
    return True, ""


HAS_TRITON, WHY_NOT = _probe()
