"""``python -m cbam_ext``: what is installed, what was found, and why something is absent.

``python -m cbam_ext plan 8x64x56x56`` tells what would run on a GPU for a tensor of that shape,
``python -m cbam_ext cost`` measures what attention costs in a segmentation model.
"""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
