"""One flat order for a parameter, its gradient and its state, whatever their memory format."""

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
