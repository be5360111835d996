"""One process in a run's folder, until it ends, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from xdfast.pipeline.alone import alone_in, turn_in

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


def test_a_turn_is_waited_for_with_a_line_that_names_who_has_it(tmp_path, caplog) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        threading.Timer(1.5, holder.kill).start()
        with caplog.at_level("INFO", "xdfast"), turn_in(tmp_path, "stage 1"):
            assert holder.wait(5) == -signal.SIGKILL  # not entered before
            other = subprocess.run([sys.executable, "-c", _HOLD, str(tmp_path)], capture_output=True, text=True)
            assert "is training in" in other.stderr  # and held while within
    lines = [line for line in caplog.messages if "waiting for it" in line]
    assert len(lines) == 1 and f"number {holder.pid}" in lines[0] and "stage 1" in lines[0]
