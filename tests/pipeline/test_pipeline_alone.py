"""One process in a run's folder, until it ends, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from xdfast.pipeline.alone import alone_in

_HOLD = """
import sys, time
from pathlib import Path
from xdfast.pipeline.alone import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        refused = pytest.raises(RuntimeError, match=rf"another process \(number {holder.pid}\) is training in")
        with refused, alone_in(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with alone_in(tmp_path):
        pass
    with alone_in(tmp_path):  # and is free again after a run that ended in order
        pass
