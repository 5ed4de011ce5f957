"""Small projects in the manner of public ones: the README's two lines alone, then every callback."""

import pytest

from tests.support.projects.every import PROJECTS, trial
from tests.support.projects.project import NAMESPACES

DEFAULT = {
    ("glue", "lightning.pytorch"),
    ("speech", "lightning.pytorch"),
    ("diffusion", "lightning.pytorch"),
    ("gpt", "pytorch_lightning"),
}
CASES = [
    pytest.param(name, namespace, marks=() if (name, namespace) in DEFAULT else pytest.mark.slow)
    for namespace in NAMESPACES
    for name in PROJECTS
]


@pytest.fixture(autouse=True)
def adapters(monkeypatch):
    monkeypatch.setattr("layershed.discovery.registry._REGISTERED", {})


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(("name", "namespace"), CASES)
def test_project_works_with_two_lines_and_with_every_callback(name, namespace, tmp_path, unpainted):
    pytest.importorskip(namespace)
    assert trial(name, namespace, tmp_path) == {"two lines": "", "everything": ""}
