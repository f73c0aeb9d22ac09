"""Two processes on the CPU (gloo): a sharded tensor gets the answer of the whole one."""

import tempfile
from functools import partial

import pytest
import torch
import torch.distributed as dist
from oracle import OURS, WITH_AGR, gradients, initial
from ranks import spawn

from agr_hf import AGRAdamW, agr, attach_agr, l1_norms
from agr_hf.integrations.optimizer_states import load_optimizer, loads_older_state, save_optimizer
from agr_hf.optim.registry import OPTIMIZERS

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")
WORLD = 2


def placed(tensor, mesh, i):
    """Shards by rows, by columns, replicas; 33 rows do not divide by 2, and one row leaves a rank empty-handed."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placement = Replicate() if tensor.ndim == 0 or i % 3 == 2 else Shard(min(i % 3, tensor.ndim - 1))
    return distribute_tensor(tensor, mesh, [placement])


def whole_tensors():
    more = [torch.randn(shape, dtype=torch.float64) for shape in ((33, 3), (5, 5), (1, 7))]
    return [*initial(), *more]


def counted_all_reduces(monkey):
    calls = []
    real = dist.all_reduce
    monkey.setattr(dist, "all_reduce", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    return calls


def check_norms_and_psi():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    wholes = whole_tensors()
    shards = [placed(whole, mesh, i) for i, whole in enumerate(wholes)]
    assert any(shard.to_local().numel() == 0 and shard.numel() for shard in shards) == (dist.get_rank() == 1)
    with pytest.MonkeyPatch.context() as monkey:
        calls = counted_all_reduces(monkey)
        norms = l1_norms(shards)
        assert len(calls) == 1
    for whole, norm in zip(wholes, norms, strict=True):
        torch.testing.assert_close(norm, whole.abs().sum(), rtol=1e-14, atol=0)
    for whole, shard in zip(wholes, shards, strict=True):
        out = agr(shard)
        assert out.placements == shard.placements
        torch.testing.assert_close(out.full_tensor(), agr(whole), rtol=1e-13, atol=0)
    # Halves still to be summed: |a| + |b| is not |a + b|.
    mine = torch.tensor([[3.0, -1.0], [1.0, 1.0]]) * (1 if dist.get_rank() == 0 else -0.5)
    partial = DTensor.from_local(mine, mesh, [Partial()])
    assert l1_norms([partial])[0] == 3.0
    torch.testing.assert_close(agr(partial).full_tensor(), agr(torch.tensor([[1.5, -0.5], [0.5, 0.5]])))


def check_steps():
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    for name in OURS:
        for options in ({}, {"max_grad_norm": 1.0}, {"weight_decay": 0.1, "max_grad_norm": 1.0}):
            whole = [torch.nn.Parameter(theta.clone()) for theta in initial()]
            sharded = [torch.nn.Parameter(placed(theta, mesh, i)) for i, theta in enumerate(initial())]
            makers = [OPTIMIZERS[name].cls(params, lr=1e-2, **options) for params in (whole, sharded)]
            for grads in gradients(5):
                for i, (p, q, grad) in enumerate(zip(whole, sharded, grads, strict=True)):
                    p.grad, q.grad = grad.clone(), placed(grad, mesh, i)
                makers[0].step()
                with pytest.MonkeyPatch.context() as monkey:
                    calls = counted_all_reduces(monkey)
                    makers[1].step()
                coupled = options.get("weight_decay") and name in ("agr_adam", "adal")
                needs = options.get("max_grad_norm") or name in WITH_AGR or name == "adal"
                assert len(calls) == (2 if coupled else 1 if needs else 0), (name, options)
            for p, q in zip(whole, sharded, strict=True):
                torch.testing.assert_close(q.detach().full_tensor(), p.detach(), rtol=1e-12, atol=1e-12)


def check_attached():
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    params = [torch.nn.Parameter(placed(theta, mesh, i)) for i, theta in enumerate(initial())]
    optimizer = torch.optim.SGD(params, lr=0.0)
    attach_agr(optimizer)
    (grads,) = gradients(1)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        param.grad = placed(grad.clone(), mesh, i)  # a replica would share the test's memory
    optimizer.step()
    for param, grad in zip(params, grads, strict=True):
        torch.testing.assert_close(param.grad.full_tensor(), agr(grad) if grad.ndim > 1 else grad)


def train_alike(model, alone, x, tolerance):
    """Five clipped steps of a sharded model and of a whole one from the same weights end alike."""
    optimizers = [OPTIMIZERS["agr_adamw"].cls(m.parameters(), lr=1e-2, max_grad_norm=1.0) for m in (model, alone)]
    for _ in range(5):
        for m, optimizer in zip((model, alone), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.detach().full_tensor(), q.detach(), rtol=tolerance, atol=tolerance)


def check_fsdp2():
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.ReLU(), torch.nn.Linear(33, 3)).double()
    alone = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.ReLU(), torch.nn.Linear(33, 3)).double()
    alone.load_state_dict(model.state_dict())
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    train_alike(model, alone, torch.randn(8, 7, dtype=torch.float64), 1e-12)


def laid(tensor, mesh, kind):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = {"rows": Shard(0), "columns": Shard(1), "replicas": Replicate()}
    return tensor.clone() if kind == "whole" else distribute_tensor(tensor.clone(), mesh, [placements[kind]])


def check_states_laid_otherwise():
    """A state saved of shards goes on with any other shards, or with none, and one saved whole with shards."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    theta, *grads = (torch.randn(5, 7, dtype=torch.float64) for _ in range(4))
    kinds = ("whole", "rows", "columns", "replicas")

    def made(cls, kind, start):
        param = torch.nn.Parameter(laid(start, mesh, kind))
        return param, cls([param], lr=1e-2)

    def steps(param, optimizer, kind, some):
        for grad in some:
            param.grad = laid(grad, mesh, kind)
            optimizer.step()
        return param.detach().full_tensor() if kind != "whole" else param.detach()

    for name in OURS:
        cls = OPTIMIZERS[name].cls
        param, optimizer = made(cls, "whole", theta)
        expected = steps(param, optimizer, "whole", grads)
        for saved in kinds:
            param, optimizer = made(cls, saved, theta)
            middle = steps(param, optimizer, saved, grads[:2])
            with tempfile.TemporaryDirectory() as folder:
                save_optimizer(optimizer, folder)
                for loaded in kinds:
                    for from_files in (False, True):
                        param, other = made(cls, loaded, middle)
                        if from_files:
                            load_optimizer(other, folder)
                        else:
                            other.load_state_dict(optimizer.state_dict())
                        ended = steps(param, other, loaded, grads[2:])
                        torch.testing.assert_close(ended, expected, rtol=1e-12, atol=1e-12)


def check_meshes_of_other_ranks():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    params = []
    for ranks in ([0], [1]):
        mesh = DeviceMesh("cpu", ranks)
        param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        param.grad = distribute_tensor(torch.arange(12.0).view(4, 3), mesh, [Shard(0)])
        params.append(param)
    optimizer = OPTIMIZERS["agr_adamw"].cls(params, lr=1e-2)
    optimizer.step()
    mine = params[dist.get_rank()].to_local()
    alone = torch.nn.Parameter(torch.ones(4, 3))
    alone.grad = torch.arange(12.0).view(4, 3)
    OPTIMIZERS["agr_adamw"].cls([alone], lr=1e-2).step()
    assert torch.equal(mine, alone)
    with pytest.raises(RuntimeError, match="not part of"):
        OPTIMIZERS["agr_adamw"].cls(params, max_grad_norm=1.0).step()


def check_two_dimensions():
    """Four processes, sharded data and tensor parallel: FSDP2 over tensor parallelism, and parameters laid any way."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    jumbled = DeviceMesh("cpu", [[3, 1], [0, 2]])
    ways = [(Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(1), Replicate()), (Replicate(), Replicate())]
    torch.manual_seed(0)
    starts = [torch.randn(6, 5, dtype=torch.float64) for _ in ways]
    grads = [[torch.randn(6, 5, dtype=torch.float64) for _ in ways] for _ in range(3)]
    for name in ("agr_adamw", "adal", "agr_adan"):
        whole = [torch.nn.Parameter(start.clone()) for start in starts]
        laid_out = [
            torch.nn.Parameter(distribute_tensor(s.clone(), mesh, way)) for s, way in zip(starts, ways, strict=True)
        ]
        makers = [OPTIMIZERS[name].cls(params, lr=1e-2, max_grad_norm=1.0) for params in (whole, laid_out)]
        for step in grads:
            for p, q, grad, way in zip(whole, laid_out, step, ways, strict=True):
                p.grad, q.grad = grad.clone(), distribute_tensor(grad.clone(), mesh, way)
            makers[0].step()
            with pytest.MonkeyPatch.context() as monkey:
                calls = counted_all_reduces(monkey)
                makers[1].step()
            assert len(calls) == 1  # for both dimensions of the mesh
        for p, q in zip(whole, laid_out, strict=True):
            torch.testing.assert_close(q.detach().full_tensor(), p.detach(), rtol=1e-12, atol=1e-12)

    # Ranks in an order of their own; torch's distribute_tensor itself mistakes their places there.
    whole = [torch.randn(6, 4, dtype=torch.float64) for _ in ways]
    shards = []
    for t, way in zip(whole, ways, strict=True):
        for dim, placement in enumerate(way):
            if placement.is_shard():
                t = t.chunk(2, placement.dim)[jumbled.get_coordinate()[dim]]
        shards.append(DTensor.from_local(t.contiguous(), jumbled, way, run_check=False))
    for norm, t in zip(l1_norms(shards), whole, strict=True):
        torch.testing.assert_close(norm, t.abs().sum(), rtol=1e-14, atol=0)
    # Two meshes of half of the ranks, of two dimensions too, must not be added up.
    half = dist.get_rank() // 2
    mine = [DeviceMesh("cpu", ranks) for ranks in ([[0, 1]], [[2, 3]])][half]
    start = starts[0] * (1 + half)
    norm = l1_norms([distribute_tensor(start, mine, [Shard(0), Shard(1)])])[0]
    torch.testing.assert_close(norm, start.abs().sum(), rtol=1e-14, atol=0)

    def network():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4)).double()

    alone, model = network(), network()
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    # Tensor parallelism adds up halves of a layer's sums.
    train_alike(model, alone, torch.randn(8, 8, dtype=torch.float64), 1e-10)


def trained(model, optimizer, steps):
    """Whole weights of a sharded model after some steps on the same batch."""
    x = torch.linspace(-1, 1, 56, dtype=torch.float64).view(8, 7)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [param.detach().full_tensor() for param in model.parameters()]


def check_distributed_checkpoint():
    """torch's own way to save a sharded run and to go on with it."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    def made():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.ReLU(), torch.nn.Linear(33, 3)).double()
        fully_shard(model)
        # One group with an `agr` for each parameter, as Trainer's are.
        group = {"params": list(model.parameters()), "agr": [True, False, True, False]}
        return model, OPTIMIZERS["agr_adamw"].cls([group], lr=1e-2)

    model, optimizer = made()
    trained(model, optimizer, 2)
    states = get_state_dict(model, optimizer)
    saved = [{key: value.clone() if torch.is_tensor(value) else value for key, value in states[0].items()}, states[1]]
    other, resumed = made()
    set_state_dict(other, resumed, model_state_dict=saved[0], optim_state_dict=saved[1])
    for p, q in zip(trained(other, resumed, 3), trained(model, optimizer, 3), strict=True):
        assert torch.equal(p, q)


def check_states_saved_without_some_options(folder):
    """Shards saved before an option existed, and those of torch's AdamW, go on as the run itself; others are refused."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    def made(cls):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.ReLU(), torch.nn.Linear(33, 3)).double()
        fully_shard(model)
        matrices, biases = ([p for p in model.parameters() if (p.ndim > 1) == kind] for kind in (True, False))
        return model, cls([{"params": matrices}, {"params": biases, "weight_decay": 0.0}], lr=1e-2)

    def load(model, optimizer, name):
        found = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(found, storage_reader=dcp.FileSystemReader(f"{folder}/{name}"), planner=dcp.DefaultLoadPlanner())
        set_optimizer_state_dict(model, optimizer, found["optimizer"])

    kinds = {
        "suspended": (AGRAdamW, ["agr_suspended"]), "step": (AGRAdamW, ["agr_suspended", "agr_step"]),
        "torch": (torch.optim.AdamW, []), "adal": (OPTIMIZERS["adal"].cls, []),
    }  # fmt: skip
    for name, (cls, lacking) in kinds.items():
        model, optimizer = made(cls)
        trained(model, optimizer, 3)
        for group in optimizer.param_groups:
            for key in lacking:
                del group[key]
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(f"{folder}/{name}"))
        other, resumed = made(partial(AGRAdamW, agr_steps=5))
        other.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
        if name == "adal":
            with (
                pytest.raises(ValueError, match="needs exp_avg, exp_avg_sq"),
                loads_older_state(resumed, f"{folder}/{name}"),
            ):
                pass
            assert not resumed.state
            continue
        with loads_older_state(resumed, f"{folder}/{name}"):
            load(other, resumed, name)
        assert "agr_suspended" in resumed.state_dict()["param_groups"][0]
        assert [group["agr_step"] for group in resumed.param_groups] == [3, 3]
        # What the file says counts, and what it lacks is the optimizer's own.
        assert resumed.param_groups[0]["agr_steps"] == (None if cls is AGRAdamW else 5)
        if cls is AGRAdamW:
            for group in optimizer.param_groups:
                group.update({"agr_suspended": False, "agr_step": 3})
            for m, o in ((model, optimizer), (other, resumed)):
                trained(m, o, 3)
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                assert torch.equal(p.to_local(), q.to_local())


def check_gradients_that_not_every_rank_has():
    """What a rank lacks counts as zero: sums of different tensors are never added up, and no rank waits for another."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, rank = init_device_mesh("cpu", (WORLD,)), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    starts, grads = ([torch.randn(6, 4, generator=generator) for _ in range(3)] for _ in range(2))
    owners = [(0,), (1,), (0, 1)]
    for name in OURS:
        for clip in (None, 0.5):
            whole = [torch.nn.Parameter(start.clone()) for start in starts]
            shards = [torch.nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)])) for start in starts]
            alone, laid_out = (OPTIMIZERS[name].cls(params, lr=1e-2, max_grad_norm=clip) for params in (whole, shards))
            for p, q, grad, ranks in zip(whole, shards, grads, owners, strict=True):
                halves = enumerate(grad.chunk(WORLD))
                p.grad = torch.cat([half if r in ranks else torch.zeros_like(half) for r, half in halves])
                q.grad = distribute_tensor(grad.clone(), mesh, [Shard(0)])
                if rank not in ranks:
                    q.grad = None
            alone.step()
            laid_out.step()
            for p, q, start, ranks in zip(whole, shards, starts, owners, strict=True):
                wanted = p.detach() if rank in ranks else start
                torch.testing.assert_close(q.to_local().detach(), wanted.chunk(WORLD)[rank], rtol=1e-5, atol=1e-6)
            if rank == 1:
                laid_out.zero_grad()
            laid_out.step()  # of which one rank has no gradient at all
    whole = grads[0]
    params = [torch.nn.Parameter(distribute_tensor(start, mesh, [Shard(0)])) for start in starts[:2]]
    params[rank].grad = distribute_tensor(whole.clone(), mesh, [Shard(0)])
    attached = torch.optim.SGD(params, lr=1.0)
    attach_agr(attached)
    attached.step()
    mine = whole.chunk(WORLD)[rank]
    torch.testing.assert_close(params[rank].grad.to_local(), mine - mine.abs() / mine.abs().sum() * mine)


def check_gradients_laid_otherwise_than_their_parameters():
    """As tensor parallelism leaves them: whole on each rank, or parts still to be added up, of shards or whole tensors. They
    are laid anew in memory that no `.grad` holds, and that a step must not read after it was given to others."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    starts, *grads = ([torch.randn(60, 40) for _ in range(4)] for _ in range(4))

    def lay_grad(i, grad):
        mine, placement = (grad / WORLD, Partial()) if i % 2 else (grad.clone(), Replicate())
        return DTensor.from_local(mine, mesh, [placement], run_check=False)

    for name in OURS:
        whole = [torch.nn.Parameter(start.clone()) for start in starts]
        laid_out = [
            torch.nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]) if i < 2 else start.clone())
            for i, start in enumerate(starts)
        ]
        optimizers = [OPTIMIZERS[name].cls(params, lr=1e-2) for params in (whole, laid_out)]
        for some in grads:
            for i, (p, q, grad) in enumerate(zip(whole, laid_out, some, strict=True)):
                p.grad, q.grad = grad.clone(), lay_grad(i, grad)
            for optimizer in optimizers:
                optimizer.step()
        for p, q in zip(whole, laid_out, strict=True):
            found = q.detach().full_tensor() if hasattr(q, "full_tensor") else q.detach()
            torch.testing.assert_close(found, p.detach(), rtol=1e-5, atol=1e-6)


def check_ranks_count_steps_alike():
    """A rank without a gradient of a group counts the step where another rank has one, as one process with the whole does,
    so that all of them suspend AGR at the same step; where no rank has one, none does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, rank = init_device_mesh("cpu", (WORLD,)), dist.get_rank()
    torch.manual_seed(0)
    starts, grads = ([torch.randn(6, 4, dtype=torch.float64) for _ in range(3)] for _ in range(2))
    # Of each step, the ranks that have a gradient of the first group (two tensors), and of the second.
    owners = [((0,), (0, 1)), ((0, 1), ()), ((1,), (0,)), ((0,), ()), ((0, 1), (1,)), ((0, 1), (0, 1))]
    for name in WITH_AGR:
        for way in ("own", "clipped", "attached"):
            params = [torch.nn.Parameter(start.clone()) for start in starts]
            shards = [torch.nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)])) for start in starts]
            optimizers = []
            for some in (params, shards):
                groups = [{"params": some[:2]}, {"params": some[2:]}]
                if way == "attached":
                    optimizers.append(torch.optim.SGD(groups, lr=0.1))
                    attach_agr(optimizers[-1], steps=3)
                else:
                    clip = 0.5 if way == "clipped" else None
                    optimizers.append(OPTIMIZERS[name].cls(groups, lr=1e-2, agr_steps=3, max_grad_norm=clip))
            for first, second in owners:
                for p, q, grad, ranks in zip(params, shards, grads, (first, first, second), strict=True):
                    halves = enumerate(grad.chunk(WORLD))
                    whole = torch.cat([half if r in ranks else torch.zeros_like(half) for r, half in halves])
                    p.grad = whole if ranks else None
                    laid_out = distribute_tensor(grad.clone(), mesh, [Shard(0)])  # which all ranks call
                    q.grad = laid_out if rank in ranks else None
                for optimizer in optimizers:
                    optimizer.step()
                counts = [[group["agr_step"] for group in optimizer.param_groups] for optimizer in optimizers]
                assert counts[0] == counts[1]
            assert counts[0] == [6, 4]
    # While AGR is suspended there is no collective, and a group that trains is counted.
    param = torch.nn.Parameter(distribute_tensor(starts[0].clone(), mesh, [Shard(0)]))
    frozen = torch.nn.Parameter(distribute_tensor(starts[0].clone(), mesh, [Shard(0)]), requires_grad=False)
    optimizer = OPTIMIZERS["agr_adamw"].cls([{"params": [param]}, {"params": [frozen]}], agr_steps=3)
    for group in optimizer.param_groups:
        group["agr_suspended"] = True
    laid_out = distribute_tensor(grads[0].clone(), mesh, [Shard(0)])
    param.grad = laid_out if rank == 0 else None
    with pytest.MonkeyPatch.context() as monkey:
        calls = counted_all_reduces(monkey)
        optimizer.step()
        assert not calls
    assert [group["agr_step"] for group in optimizer.param_groups] == [1, 0]


def test_states_saved_without_some_options(tmp_path):
    spawn(partial(check_states_saved_without_some_options, str(tmp_path)), tmp_path)


def test_two_dimensions_of_a_mesh(tmp_path):
    spawn(check_two_dimensions, tmp_path, world=4)


@pytest.mark.parametrize(
    "check",
    [
        check_distributed_checkpoint,
        check_gradients_that_not_every_rank_has,
        check_gradients_laid_otherwise_than_their_parameters,
        check_meshes_of_other_ranks,
        check_ranks_count_steps_alike,
        check_states_laid_otherwise,
        check_norms_and_psi,
        check_steps,
        check_attached,
        check_fsdp2,
    ],
)
def test_sharded_equals_whole(check, tmp_path):
    spawn(check, tmp_path)
