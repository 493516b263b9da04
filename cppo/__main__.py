"""`python -m cppo`, where the script `cppo` is not on the path."""

import sys

from cppo.cli import main

sys.exit(main())
