"""`python -m lisa_analysis` is `lisa-analyze`."""

import sys

from lisa_analysis.cli import main

sys.exit(main())
