"""Device helpers that several kernels share.

Where several programs make one result, each writes its part and the last one to arrive (an integer counter) adds the
parts in a fixed order: the result does not depend on scheduling, and no program ever waits for another. The parts are
read with ``.cg``: L1 is not coherent between SMs.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["arrive"]


@triton.jit
def arrive(counter_ptr):
    """How many programs came before this one; all writes of this program are visible to whoever comes after it."""
    tl.debug_barrier()  # one thread does the atomic: the writes of the others must be done before it releases them
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
