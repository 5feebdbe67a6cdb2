"""What :mod:`cbam_ext.conversion` consists of."""
