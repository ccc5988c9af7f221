# SPDX-License-Identifier: MIT
"""`python -m lazyd` is `lazyd`."""

import sys

from lazyd.cli import main

sys.exit(main())
