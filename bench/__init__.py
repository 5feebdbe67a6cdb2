"""Speed of the operator, as ratios measured side by side. Run ``python -m bench --help``."""
