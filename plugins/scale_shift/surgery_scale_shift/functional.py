"""What a scale and a bias do to the input or the output of a linear layer; torch alone.

Source:
    Gao et al. 2023, arXiv:2304.15010, eq. 1: `y = W x` becomes `y = s (W x + b)`. litgpt computes the
    same (litgpt/adapter_v2.py, `AdapterV2Linear`, 0.4.13 to 0.5.13, Apache-2.0). The authors' own code
    has `y = W (s x) + b`: a scale for each input feature, and the bias as it is (OpenGVLab/LLaMA-Adapter,
    llama_adapter_v2_chat65b/llama/model.py, `forward_linear_with_scale_and_bias`, GPL-3.0, from which
    only the formula is taken). The difference is known: issue 36 there, where an author answers that
    both "result into the same performance".
"""

from torch import Tensor


def shift_then_scale(output: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Compute `scale * (output + bias)`, the form of the paper and of litgpt.

    Args:
        output: `(..., out_features)`, of the linear layer.
        scale: `(out_features,)`, dimensionless.
        bias: `(out_features,)`, in units of the output.

    Returns:
        Shape and dtype of `output`.

    Numerics:
        In the widest of the three dtypes, and rounded once. Exact where scale and bias are one and
        zero; with minus zero for a bias not even the sign of a zero changes.

    Example:
        >>> import torch
        >>> shift_then_scale(
        ...     torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), torch.tensor([0.5, 1.0])
        ... )
        tensor([1.5000, 9.0000])
    """
    return (scale * (output + bias)).to(output.dtype)


def scale_and_shift(
    values: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Compute `scale * values + bias`; None leaves that step out.

    The scale alone on the input of a linear layer, and the bias alone on its output, are the form of
    the authors' code. Both on the output are a weighted sum of several such layers.

    Args:
        values: `(..., features)`.
        scale: `(features,)`, dimensionless.
        bias: `(features,)`, in units of the values.

    Returns:
        Shape and dtype of `values`.

    Numerics:
        As `shift_then_scale`.
    """
    found = values if scale is None else scale * values
    return (found if bias is None else found + bias).to(values.dtype)
