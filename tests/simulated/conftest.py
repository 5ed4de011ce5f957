"""Every test here runs in a process of its own, as the simulated device cannot be unregistered.

torch's autograd engine serves only the devices that were known at the first backward pass of its process. If tests
before this one ran such a pass, a test that trains is run by pytest in a process that ran none.
"""

import os
import pickle
import tempfile
import traceback
import warnings
from pathlib import Path

import pytest

from tests.support.forked import start_module
from tests.support.simulated.device import available, install


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if not available:
        pytest.skip("this torch cannot register a device made in Python")
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork of a process with threads; they wait for work
        child = os.fork()
    if not child:
        _run(pyfuncitem.obj, arguments, reading, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    kind, text = pickle.loads(answer) if answer else ("failed", "the process of the test died")
    if kind == "failed" and "device_ready_queues_" in text:
        kind, text = _in_fresh_process(pyfuncitem)
    if kind == "skipped":
        pytest.skip(text)
    if kind == "failed":
        pytest.fail(text, pytrace=False)
    return True


def _in_fresh_process(pyfuncitem):
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.txt"
        words = ["-q", "-p", "no:cacheprovider", "-m", "", pyfuncitem.nodeid]
        process = start_module("pytest", words, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, output)
        process.join()
        return ("passed", "") if process.exitcode == 0 else ("failed", output.read_text())


def _run(function, arguments, reading, writing):
    answer = ("passed", "")
    try:
        os.close(reading)
        install()
        function(**arguments)
    except pytest.skip.Exception as skipped:
        answer = ("skipped", str(skipped))
    except BaseException:
        answer = ("failed", traceback.format_exc())
    finally:
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
