"""How the contract suite compares compiled code with what it was made from."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery_core.snapshots import TensorValue
from surgery_core.surgery import Surgery
from surgery_core.tensors import owned_tensors


class CountingBackend:
    """A backend for `torch.compile` that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        """Return the code of a graph."""
        self.graphs += 1
        return graph.forward


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Begin without compiled code, and leave none behind."""
    torch.compiler.reset()
    try:
        with warnings.catch_warnings():
            # Compilers warn of much that is no fault of the operation's.
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.compiler.reset()


def disturb_(surgery: Surgery) -> None:
    """Move the parameters that an operation added away from their first values.

    Compiled code that leaves out what has no effect at first would pass unseen.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for item in surgery.replacements:
            for tensor in owned_tensors(item.site.module, item.module).values():
                # Dtypes of one byte have no sums.
                if tensor.is_floating_point() and tensor.itemsize > 1 and _is_parameter(tensor):
                    tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor))


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def results_of(
    model: nn.Module, run: Callable[[], tuple[Tensor, ...]]
) -> dict[str, TensorValue | None]:
    """Return everything that a run comes to: outputs, gradients of a loss, and what it writes.

    Args:
        model: Whose parameters and buffers are looked at; afterwards as before.
        run: Runs it, or a compiled form of it.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        outputs = run()
        trained = [tensor.square().sum() for tensor in outputs if tensor.requires_grad]
        if trained:
            torch.autograd.backward(trained)
        found = {f"output {i}": _value(tensor) for i, tensor in enumerate(outputs)}
        found |= {f"gradient of {name}": _value(tensor.grad) for name, tensor in tensors.items()}
        found |= {f"{name} after the run": _value(tensor) for name, tensor in tensors.items()}
        return found
    finally:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.grad = None
                if not torch.equal(tensor, kept[name]):
                    tensor.copy_(kept[name])


def _value(tensor: Tensor | None) -> TensorValue | None:
    return None if tensor is None else TensorValue(tensor.detach().clone())


def differing(
    expected: Mapping[str, TensorValue | None],
    actual: Mapping[str, TensorValue | None],
    *,
    is_exact: bool = True,
) -> list[str]:
    """Return the names of results that differ.

    Args:
        expected: As `results_of` gives them.
        actual: Likewise.
        is_exact: Otherwise they may differ by the square root of the dtype's precision, relative to
            the largest value.
    """
    return sorted(
        name
        for name in expected.keys() | actual.keys()
        if expected.get(name) != actual.get(name)
        and (is_exact or not _are_close(expected.get(name), actual.get(name)))
    )


def _are_close(expected: TensorValue | None, actual: TensorValue | None) -> bool:
    if expected is None or actual is None:
        return False
    old, new = expected.tensor, actual.tensor
    if not old.is_floating_point() or (old.dtype, old.shape) != (new.dtype, new.shape):
        return False
    largest = old.double().abs().max() * torch.finfo(old.dtype).eps ** 0.5
    return bool((old.double() - new.double()).abs().max() <= largest)
