"""Bad configurations, files and models: each must be answered in one sentence, and nothing may be written over.

    python benchmarks/bad_input.py

Every case has a folder of its own with a small model, a dropped one, a GGUF file, a checkpoint, a plan and text, and
does some damage to them. The command line runs on it in this process. Passed is what exits with an error code, says
exactly one line on the standard error, which begins with ``error:`` and names what is wrong, shows no traceback, and
leaves every file that was there byte for byte as it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the cases stand beside the tests, which try some of them

from tests.support.bad_input.trial import main

if __name__ == "__main__":
    sys.exit(main())
