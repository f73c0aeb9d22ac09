"""Real networks, whose gradients do what synthetic ones do not."""

import pytest
import torch
from oracle import OURS

from agr_hf import create_optimizer

timm = pytest.importorskip("timm", reason="timm is missing: pip install 'agr-hf[train]'")


def losses_of(model, optimizer, steps, format_=torch.contiguous_format):
    images = torch.randn(8, 3, 32, 32).to(memory_format=format_)
    labels = torch.randint(0, 10, (8,))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "nhwc"])
@pytest.mark.parametrize("name", OURS)
def test_resnet18_from_its_own_initialisation_trains_without_nan(name, format_):
    model = timm.create_model("resnet18", num_classes=10).to(memory_format=format_)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    # The trap is there: the residual branches end in a norm of weight zero, so nothing flows back into them.
    dead = [n for n, p in model.named_parameters() if p.ndim == 4 and not p.grad.any()]
    assert len(dead) >= 8
    losses = losses_of(model, create_optimizer(name, model, lr=1e-3), 6, format_)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", OURS)
def test_a_model_survives_the_empty_step_of_distributed_checkpointing(name):
    """torch.distributed.checkpoint calls step() once, with zero gradients and lr 0, to make the state exist."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = timm.create_model("resnet18", num_classes=10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = create_optimizer(name, model, lr=1e-3)
    state = get_optimizer_state_dict(model, optimizer)
    assert set(state["state"]) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert losses_of(model, optimizer, 3)[-1] < 10
    assert all(torch.isfinite(p).all() for p in model.parameters())
