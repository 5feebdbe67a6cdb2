"""What a model costs: parameters, FLOPs, memory for backward, time; alone or beside others.

``python -m cbam_ext cost`` does this for models of smp with and without attention.
"""

from .measure import ROUNDS, compare_costs, measure_cost
from .table import Cost, CostTable

__all__ = ["ROUNDS", "Cost", "CostTable", "compare_costs", "measure_cost"]
