"""`python -m musiclm_pytorch.cli` is the `musiclm` command."""

import sys

from musiclm_pytorch.cli.app import main

sys.exit(main())
