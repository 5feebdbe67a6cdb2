"""What `examples/placement_study.py` is made of.

``data.py`` reads images and masks, ``runs.py`` trains one model and takes it up again where it was
interrupted, ``statistics.py`` says what a difference is worth, ``report.py`` writes and draws.
"""

from __future__ import annotations


class StudyError(Exception):
    """Something that its user can change, told in one line."""
