"""One flat order for tensors that lie in memory alike."""

import pytest
import torch

from agr_hf.optim.layout import Layout

DENSE = {
    "contiguous": lambda: torch.arange(120.0).view(2, 3, 4, 5),
    "channels_last": lambda: torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last 1x1": lambda: torch.arange(6.0).view(2, 3, 1, 1).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.arange(12.0).view(3, 4).t(),
    "permuted": lambda: torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
    "scalar": lambda: torch.tensor(3.0),
    "empty": lambda: torch.zeros(0, 4).t(),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_tensors_are_viewed_not_copied(name):
    """A copy would cost the memory that blocks are there to save."""
    tensor = DENSE[name]()
    view = Layout(tensor).view(tensor)
    assert view is not None
    assert view.data_ptr() == tensor.data_ptr()
    assert view.shape == (tensor.numel(),)
    assert torch.equal(view.sort().values, tensor.flatten().sort().values)


@pytest.mark.parametrize("name", DENSE)
def test_another_order_is_no_view_and_its_copy_is_aligned(name):
    tensor = DENSE[name]()
    layout = Layout(tensor)
    other = tensor.contiguous(memory_format=torch.contiguous_format).clone()
    assert torch.equal(layout.flat(other), layout.view(tensor))
    assert torch.equal(layout.relaid(other), tensor)
    assert layout.view(layout.relaid(other)) is not None
    assert torch.equal(layout.unflatten(layout.flat(other), other), other)


def test_tensors_with_holes_have_no_view():
    holes = torch.arange(20.0).view(4, 5)[:, ::2]
    assert Layout(holes).view(holes) is None
    assert torch.equal(Layout(holes).flat(holes), holes.reshape(-1))
