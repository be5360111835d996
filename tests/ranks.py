"""Runs checks in several processes (gloo, CPU). Starting them costs seconds, so one start serves a whole file of checks.

A file of checks holds functions ``check_*()`` that every process calls in turn, with torch.distributed initialised. What
a check raises in some process comes back as text. As a script this file is such a process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path


def names(file: Path) -> list[str]:
    """The checks in a file, in order."""
    return re.findall(r"^def (check_\w+)\(\)", file.read_text(), flags=re.MULTILINE)


def run(file: Path, world: int, folder: Path) -> dict[str, str]:
    """{check: what went wrong, by rank; "" if nothing} of ``world`` processes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, __file__, str(file), str(world), str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(world)
    ]
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=200)[0])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    return {
        name: "".join(
            f"rank {rank} of {world}: {results.get(name, f'did not get here; {outputs[rank][-2000:]}')}\n"
            for rank, results in enumerate(found)
            if results.get(name) != ""
        )
        for name in names(file)
    }


def all_reduce(x):
    """Sum over ranks whose backward is the sum over ranks: torch.distributed.nn.all_reduce, which torch deprecates."""
    import torch
    import torch.distributed as dist

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            y = y.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(y)
            return y

        backward = staticmethod(lambda ctx, grad: Sum.forward(ctx, grad))

    return Sum.apply(x)


def _process(file: Path, world: int, folder: Path, rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", world_size=world, rank=rank, timeout=timedelta(seconds=30)
    )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results: dict[str, str] = {}
    for name in names(file):
        torch.manual_seed(0)
        try:
            getattr(module, name)()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(results))
        if results[name]:
            break  # the other ranks may be elsewhere now
    # No destroy_process_group(): it waits for ranks that are gone.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    _process(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
