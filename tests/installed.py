"""Run by the release in an environment that has nothing but the wheel: the optimizers step as their reference says.

python tests/installed.py [--native]     --native: the C extension must be there, as on Linux and macOS
"""

import sys
from importlib.util import find_spec

import torch

import agr_hf
from agr_hf.environment import describe_backends
from agr_hf.optim.registry import optimizer_info

EXTRAS = ("datasets", "diffusers", "matplotlib", "scipy", "sklearn", "timm")


def train(optimizer_of):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    inputs = torch.randn(64, 8)
    targets = inputs.sum(1, keepdim=True)
    optimizer = optimizer_of(model)
    for _ in range(50):
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item(), [param.detach().clone() for param in model.parameters()]


def main():
    found = [name for name in EXTRAS if find_spec(name)]
    assert not found, f"a plain installation brings {found}"
    native = describe_backends()["native"]
    print(f"agr_hf {agr_hf.__version__}, torch {torch.__version__}, native step: {native}")
    assert native is True or "--native" not in sys.argv, native
    for name in agr_hf.list_optimizers():
        loss, weights = train(lambda model, name=name: agr_hf.create_optimizer(name, model, lr=1e-2))
        assert loss < 5, f"{name}: {loss}"  # it begins at 8
        if optimizer_info(name).ours:
            _, others = train(lambda model, name=name: agr_hf.create_optimizer(name, model, lr=1e-2, foreach=True))
            for one, other in zip(weights, others, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        print(f"{name}: loss {loss:.3f}")
    agr_hf.register()
    from transformers import TrainingArguments

    print(TrainingArguments("unused", optim="agr_adamw", report_to="none", use_cpu=True).optim)


if __name__ == "__main__":
    main()
