"""What other libraries and users do to a model before and after a drop: nothing may undo the drop in silence.

    python benchmarks/by_others.py [WORD ...]

Each action is tried on small models of several architectures, with the drop before, between and after its steps. The
result is compared with the zero-weight reference: a copy of the dense model, made before anything happened, whose
dropped branches contribute exactly zero.

- right: the logits are the reference's, the model says what is dropped, layershed saves the same model or refuses, and
  restoring gives the dense model.
- refused: a typed error of layershed, or an error or report of the other library that names the drop.
- wrong: other logits without a word, or a crash in somebody else's code.

Words choose the cases whose name contains all of them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the cases stand beside the tests, which try some of them

from tests.support.by_others.trial import main

if __name__ == "__main__":
    sys.exit(main())
