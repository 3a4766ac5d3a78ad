"""What two narrow matrices add to the output of a linear layer, and to its weight; torch alone.

Source:
    Hu et al. 2021, arXiv:2106.09685, sec. 4.1: `W x` becomes `W x + (alpha / r) B A x`. Kalajdzievski
    2023, arXiv:2312.03732: `alpha / sqrt(r)` instead. PEFT computes the same
    (peft/tuners/lora/layer.py, `Linear`, 0.21.2, Apache-2.0).
"""

import torch
from torch import Tensor
from torch.nn import functional


def low_rank_term(x: Tensor, a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """Compute `scaling * B (A x)`.

    Args:
        x: `(..., in_features)`, in any floating-point dtype.
        a: `(r, in_features)`.
        b: `(out_features, r)`.
        scaling: Dimensionless.

    Returns:
        `(..., out_features)`. Exactly zero where `b` is zero, if `A x` is finite.

    Numerics:
        `x` is cast to the dtype of `a`, in which both products are computed, or in that of autocast;
        the factor is applied in that dtype, but at least float32.

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
        >>> low_rank_term(torch.tensor([1.0, 1.0]), a, b, scaling=2.0)
        tensor([ 6.,  0., -6.])
    """
    # PEFT casts the input too: parameters are often wider than the base.
    narrow = functional.linear(x.to(a.dtype), a)
    return wide(functional.linear(narrow, b)) * scaling


def low_rank_delta(a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """Compute `scaling * B A`, which is what the weight would gain.

    Args:
        a: `(r, in_features)`.
        b: `(out_features, r)`.
        scaling: Dimensionless.

    Returns:
        `(out_features, in_features)`, in the parameters' dtype, but at least float32.

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0]])
        >>> low_rank_delta(a, b, scaling=0.5)
        tensor([[0.5000, 1.0000],
                [1.5000, 3.0000]])
    """
    return (wide(b) @ wide(a)) * scaling


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in its dtype, but at least float32."""
    # Factors and sums would be rounded once more each in a narrow dtype.
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
