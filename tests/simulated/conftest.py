"""Every test here runs in a process of its own, as the simulated device cannot be unregistered."""

import os
import pickle
import traceback
import warnings

import pytest

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
    if kind == "skipped":
        pytest.skip(text)
    if kind == "failed":
        pytest.fail(text, pytrace=False)
    return True


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
