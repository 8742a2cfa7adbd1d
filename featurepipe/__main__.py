"""``python -m featurepipe``."""

import sys

from featurepipe.cli import main

sys.exit(main())
