"""Fixtures that tests of several rooms use; what they are made of is in tests/support.

Nothing heavy is imported here: the process that hands out the tests to the others reads this file as well, and they
begin only when it has.
"""

import gc
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.support.case_names import case_name
from tests.support.model_types import MODEL_TYPES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# One thread each, here and in the processes that tests start: tensors this small gain nothing from a second one, and
# lose seconds to its waiting where the machine is shared.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    del config
    return case_name(val, argname)


# Their single tests take longest. They begin first: at the end the other process would have nothing to do beside them.
_LONGEST = ("tests/distributed/", "tests/test_wheel.py", "tests/cli/test_eight_bit_optimizer.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``default_cases(n)``, the cases after the n-th are slow; already slow ones do not count."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONGEST))
    met: dict[str, int] = {}
    for item in items:
        mark = item.get_closest_marker("default_cases")
        if mark is None or item.get_closest_marker("slow"):
            continue
        test = item.nodeid.partition("[")[0]
        met[test] = met.get(test, 0) + 1
        if met[test] > mark.args[0]:
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Search for garbage less often, and not among the imported libraries: it takes a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)


# The tests that are about the proof or change what it finds; in all others models of the same structure share one.
_PROVING = ("tests/discovery/", "tests/test_surgery.py")


@pytest.fixture(autouse=True)
def shared_proofs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.node.nodeid.startswith(_PROVING):
        from layershed.discovery import find
        from tests.support.shared_proofs import prove_once

        monkeypatch.setattr(find, "_prove", prove_once)


@pytest.fixture(params=MODEL_TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_model() -> Callable[..., "PreTrainedModel"]:
    from tests.support.models import build_model

    return build_model


@pytest.fixture
def model(model_type: str, make_model: Callable[..., "PreTrainedModel"]) -> "PreTrainedModel":
    return make_model(model_type)


@pytest.fixture
def llama(make_model: Callable[..., "PreTrainedModel"]) -> "PreTrainedModel":
    return make_model("llama")


@pytest.fixture
def tokens() -> "torch.Tensor":
    import torch

    return torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small only wait for each other's threads, the more so on a machine that others use."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def unpainted(monkeypatch):
    """Reports without their pictures, which take most of the time; the alternative texts say what would be painted."""
    from layershed.reporting import html_report

    monkeypatch.setattr(html_report, "inline_svg", lambda _figure, _name: "")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Paragraphs enough for a dozen batches."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(f"{i} plus {i} is {2 * i}, and then some." for i in range(40)), encoding="utf-8")
    return path


@pytest.fixture
def text_data(text_file):
    """Makes the same data module anew: 8 batches an epoch."""
    from layershed.training.text_data import TextData
    from tests.support.runs import TOKENS

    return lambda **kwargs: TextData(
        **{"source": str(text_file), "block_size": TOKENS, "batch_size": 4, "max_tokens": 512, **kwargs}
    )


@pytest.fixture
def make_trainer(tmp_path):
    """A quiet trainer on the CPU; ``name`` is its directory, ``csv`` asks for a CSVLogger there."""
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

    def make(*callbacks, name="run", csv=False, **kwargs):
        folder = tmp_path / name
        settings = {"max_steps": 12, "enable_checkpointing": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
        return pl.Trainer(
            accelerator="cpu",
            logger=CSVLogger(folder, name="", version="") if csv else False,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
            **{**settings, **kwargs},
        )

    return make
