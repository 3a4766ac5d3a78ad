"""LoRA (Hu et al. 2021, arXiv:2106.09685) for `surgery_core`."""

from surgery_low_rank.functional import low_rank_delta, low_rank_term
from surgery_low_rank.linear import LowRankLinear, Part
from surgery_low_rank.merging import Merge, merge_
from surgery_low_rank.operation import LowRankOperation
from surgery_low_rank.options import LowRankOptions

__version__ = "0.1.0"

__all__ = [
    "LowRankLinear",
    "LowRankOperation",
    "LowRankOptions",
    "Merge",
    "Part",
    "low_rank_delta",
    "low_rank_term",
    "merge_",
]
