"""Scale, bias and norm tuning of LLaMA-Adapter V2 (Gao et al. 2023, arXiv:2304.15010) for `surgery_core`."""

from surgery_scale_shift.functional import scale_and_shift, shift_then_scale
from surgery_scale_shift.linear import ScaledLinear
from surgery_scale_shift.norm import WideNorm
from surgery_scale_shift.operation import ScaleShiftOperation
from surgery_scale_shift.options import ScaleShiftOptions, TunedNormOptions
from surgery_scale_shift.tuned_norm import TunedNormOperation

__version__ = "0.1.0"

__all__ = [
    "ScaleShiftOperation",
    "ScaleShiftOptions",
    "ScaledLinear",
    "TunedNormOperation",
    "TunedNormOptions",
    "WideNorm",
    "scale_and_shift",
    "shift_then_scale",
]
