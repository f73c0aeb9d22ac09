"""One flat order for a parameter, its gradient and its state, whatever their memory format."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Layout:
    """The order in which a tensor's elements lie in memory.

    An elementwise update may walk memory in any order as long as parameter, gradient and state are walked alike.
    Reading them flat in the parameter's own order makes channels_last and transposed tensors as simple as contiguous
    ones, and lets blocks be plain slices.
    """

    __slots__ = ("dims",)

    def __init__(self, tensor: Tensor) -> None:
        # None: contiguous, by far the most frequent. Otherwise the dimensions, slowest in memory first.
        self.dims: tuple[int, ...] | None = None
        if not tensor.is_contiguous():
            strides = tensor.stride()
            self.dims = tuple(sorted(range(tensor.ndim), key=lambda d: -strides[d]))

    def view(self, tensor: Tensor) -> Tensor | None:
        """The tensor as a 1-D view of its memory, or None where its memory has another order or has holes."""
        if self.dims is not None:
            tensor = tensor.permute(self.dims)
        # Not by comparing strides: those of dimensions of size 1 are arbitrary, and 1x1 convolutions are full of them.
        return tensor.view(-1) if tensor.is_contiguous() else None

    def flat(self, tensor: Tensor) -> Tensor:
        """The tensor as 1-D in this order: a view where possible, else a copy."""
        view = self.view(tensor)
        if view is None:
            ordered = tensor if self.dims is None else tensor.permute(self.dims)
            view = ordered.contiguous().view(-1)
        return view

    def unflatten(self, flat: Tensor, like: Tensor) -> Tensor:
        """A 1-D tensor in this order as a view with the shape of `like`."""
        if self.dims is None:
            return flat.view(like.shape)
        inverse = sorted(range(like.ndim), key=self.dims.__getitem__)
        return flat.view([like.shape[d] for d in self.dims]).permute(inverse)

    def relaid(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor whose memory has this order."""
        return self.unflatten(self.flat(tensor).clone(), tensor)


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements along a dimension are one in memory."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def check_no_shared_memory(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise a ValueError where two different parameters hold the same memory: one's update would undo the other's."""
    spans = []
    for tensor in tensors:
        if is_expanded(tensor):
            raise ValueError(
                f"{name}: the elements of a parameter of shape {tuple(tensor.shape)} share memory (it was expanded); give "
                "the optimizer the tensor that was expanded, or a copy (.clone())"
            )
        try:
            start = tensor.data_ptr() if tensor.numel() else 0
        except RuntimeError:  # fake tensors have no memory
            continue
        if start:
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            spans.append((start, start + reach * tensor.element_size(), tensor))
    spans.sort(key=lambda span: span[0])
    open_spans: list[tuple[int, int, Tensor]] = []
    for span in spans:
        open_spans = [other for other in open_spans if other[1] > span[0]]
        for other in open_spans:
            if _overlap(other[2], span[2]):
                raise ValueError(
                    f"{name}: two parameters share memory, of shapes {tuple(other[2].shape)} and {tuple(span[2].shape)}, "
                    "and the update of one would be lost; give the optimizer the one Parameter that both modules use (tie "
                    "weights by `head.weight = embedding.weight`), or a copy"
                )
        open_spans.append(span)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common. Spans alone do not say: columns interleave."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() or a.element_size() != b.element_size():
        return True
    first = min(a.storage_offset(), b.storage_offset())
    taken = torch.zeros(a.untyped_storage().nbytes() // a.element_size() - first, dtype=torch.bool, device="cpu")
    taken.as_strided(a.shape, a.stride(), a.storage_offset() - first).fill_(True)
    return bool(taken.as_strided(b.shape, b.stride(), b.storage_offset() - first).any())
