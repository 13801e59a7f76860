"""Run the `musiclm` command as `python -m musiclm_pytorch.cli`."""

import sys

from musiclm_pytorch.cli.app import main

sys.exit(main())
