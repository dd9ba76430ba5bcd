"""`python -m lisa_analysis` is `lisa-analyze`."""

import sys

from lisa_analysis.views.cli import main

sys.exit(main())
