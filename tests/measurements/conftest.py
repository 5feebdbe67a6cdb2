"""Makes ``bench`` importable, from behind an installed package, which is what is measured."""

import sys

from support.packages import CHECKOUT

sys.path.append(str(CHECKOUT))
