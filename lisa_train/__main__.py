"""`python -m lisa_train` is `lisa-train`."""

import sys

from lisa_train.command.cli import main

sys.exit(main())
