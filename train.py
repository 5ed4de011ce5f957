"""The command line of layershed: ``python train.py fit``, and ``python train.py --help`` for the rest."""

import logging
import sys
from pathlib import Path

if __name__ == "__main__":
    # before the imports: bitsandbytes warns at import about a kernel that only 4-bit inference on CPUs needs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from layershed.cli.main import main

    sys.exit(main(quickstart=Path(__file__).parent / "configs" / "quickstart.yaml"))
