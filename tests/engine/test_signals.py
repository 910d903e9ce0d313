import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from sfumato.engine.signals import end_with_parent

SCRIPT = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from sfumato.engine.signals import end_with_parent
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=get_context("{method}"), initializer=end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 300).result()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no SIGKILL")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_end_with_the_one_that_started_them(tmp_path, method):
    (tmp_path / "script.py").write_text(SCRIPT.format(method=method))
    parent = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(300):
        if _gone(child):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("it outlived its parent by half a minute")


def test_a_process_without_a_parent_goes_on():
    end_with_parent()


def _gone(pid: int) -> bool:
    """Ended, though perhaps nobody has asked for its exit status yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
