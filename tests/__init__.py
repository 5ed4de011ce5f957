"""The tests; LAYERSHED_LIGHTNING runs them under Lightning's other name."""

from tests.support.namespaces import begin

begin()
