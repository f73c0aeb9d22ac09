"""Clipping inside the step against Trainer's and Accelerate's own: the same numbers, and each gradient clipped once."""

import functools
import importlib.util
import itertools
import math
import os
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from small import arguments, losses_of, small_model, trainer_of
from torch import nn
from transformers import Trainer, TrainerCallback

import agr_hf
from agr_hf import AdaL, AGRAdamW, attach_agr
from agr_hf.integrations import private
from agr_hf.integrations.accelerate import clip_grad_norm_
from agr_hf.integrations.clipping import clip_in_step
from agr_hf.integrations.trainer import trainer_optimizer
from agr_hf.optim.flags import unwrapped
from agr_hf.optim.step import StepOptimizer

STEPS = 4
LIMIT = 0.5


@pytest.fixture(autouse=True, scope="module")
def registered():
    agr_hf.register()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Steps of so small a model take less time than threads take to meet."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def clips(monkeypatch):
    return count_clips(monkeypatch)


def count_clips(monkeypatch):
    """How many times gradients were clipped or measured: "in" the optimizer's step, and "before" it."""
    counts = Counter()

    def counted(cls, method, where):
        real = getattr(cls, method)
        monkeypatch.setattr(cls, method, lambda *args, **kwargs: counts.update([where]) or real(*args, **kwargs))

    counted(StepOptimizer, "clip_next_step", "in")
    counted(Accelerator, "clip_grad_norm_", "before")
    return counts


class ClipsItself(Trainer):
    """A trainer with a method of its own keeps Trainer's clipping: here to compare with."""

    def _clip_grad_norm(self, model):
        return super()._clip_grad_norm(model)


def job(folder, cls=Trainer, model=None, callbacks=None, optimizers=(None, None), route=None, **options):
    """A trainer with an epsilon that lets the scale of gradients matter: Adam's steps do not depend on it otherwise."""
    options = {"optim": "agr_adamw", "max_grad_norm": LIMIT, "adam_epsilon": 1e-2, **options}
    args = arguments(folder, max_steps=STEPS, logging_steps=1, **options)
    chosen = {} if route is None else {"optimizer_cls_and_kwargs": trainer_optimizer(route, args)}
    return trainer_of(model or small_model(), args, cls=cls, callbacks=callbacks, optimizers=optimizers, **chosen)


def norms_of(trainer):
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


def weights_of(trainer):
    weights = [param.detach() for param in trainer.model.parameters()]
    return [weight.full_tensor() if hasattr(weight, "full_tensor") else weight.clone() for weight in weights]


def distance(weights, others):
    return max(float((one - other).abs().max()) for one, other in zip(weights, others, strict=True))


def assert_same_training(trainer, other):
    assert losses_of(trainer) == pytest.approx(losses_of(other), abs=1e-6, rel=0)
    norms, of_ranks = norms_of(other), [norms_of(other)] * 2
    if dist.is_initialized():
        dist.all_gather_object(of_ranks, norms)
    if of_ranks[0] != of_ranks[1]:  # transformers 5.10 logs of a sharded norm the part of each rank
        norms = [math.hypot(*parts) for parts in zip(*of_ranks, strict=True)]
    assert norms_of(trainer) == pytest.approx(norms, rel=2e-7, abs=0)
    assert len(norms_of(trainer)) == STEPS
    assert distance(weights_of(trainer), weights_of(other)) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"route": "agr_adamw", "optim": "adamw_torch"},
        {"gradient_accumulation_steps": 2},
        {"optim": "adal"},
        {"optim": "agr_adan", "optim_args": "second_moment=regularized"},
    ],
    ids=["by name", "optimizer_cls_and_kwargs", "accumulation", "adal", "adan"],
)
def test_a_run_is_the_one_that_trainer_clips_itself(options, tmp_path, clips):
    ours = job(tmp_path, **options)
    ours.train()
    assert clips == {"in": STEPS}
    clips.clear()
    own = job(tmp_path, ClipsItself, **options)
    own.train()
    assert clips == {"before": STEPS}
    assert_same_training(ours, own)
    assert min(norms_of(ours)) > LIMIT


def test_clipping_matters_in_these_runs(tmp_path):
    """A comparison of runs that clip nothing would find nothing."""
    clipped, unclipped = (job(tmp_path, max_grad_norm=limit) for limit in (LIMIT, 100.0))
    for trainer in (clipped, unclipped):
        trainer.train()
    assert distance(weights_of(clipped), weights_of(unclipped)) > 1e-4


def test_without_a_limit_the_norm_comes_from_the_step_too(tmp_path, clips):
    ours, own = (job(tmp_path, cls, max_grad_norm=0.0) for cls in (Trainer, ClipsItself))
    ours.train()
    assert clips == {"in": STEPS}
    own.train()
    assert clips == {"in": STEPS, "before": STEPS}
    assert_same_training(ours, own)


def test_training_twice(tmp_path, clips):
    ours, own = (job(tmp_path, cls) for cls in (Trainer, ClipsItself))
    for trainer in (ours, own):
        trainer.train()
        trainer.train()
        assert_same_training(trainer, trainer)
    assert clips == {"in": 2 * STEPS, "before": 2 * STEPS}
    assert_same_training(ours, own)


def test_adapters(tmp_path, clips):
    peft = pytest.importorskip("peft", reason="peft is missing: pip install 'agr-hf[test]'")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    ours, own = (job(tmp_path, cls, peft.get_peft_model(small_model(), config)) for cls in (Trainer, ClipsItself))
    for trainer in (ours, own):
        trainer.train()
    assert clips == {"in": STEPS, "before": STEPS}
    assert_same_training(ours, own)


def test_every_trial_of_a_search(tmp_path, clips):
    pytest.importorskip("optuna", reason="optuna is missing: pip install 'agr-hf[train]'")
    args = arguments(tmp_path, optim="agr_adamw", max_steps=STEPS, logging_steps=1)
    trainer = trainer_of(None, args, model_init=lambda trial: small_model())
    trainer.evaluate = lambda *args, **kwargs: {"eval_loss": 0.0}
    trainer.hyperparameter_search(lambda trial: {}, backend="optuna", n_trials=2, compute_objective=lambda metrics: 0.0)
    assert clips == {"in": 2 * STEPS}
    assert all(math.isfinite(norm) for norm in norms_of(trainer))


@pytest.mark.parametrize(("args_limit", "own_limit"), [(1.0, LIMIT), (LIMIT, 1.0), (0.0, LIMIT)])
def test_with_a_limit_in_optim_args_too_the_smaller_one_clips_and_clips_once(args_limit, own_limit, tmp_path, clips):
    ours = job(tmp_path, max_grad_norm=args_limit, optim_args=f"max_grad_norm={own_limit}")
    ours.train()
    assert clips == {"in": STEPS}
    expected = job(tmp_path, ClipsItself)
    expected.train()
    assert_same_training(ours, expected)


def test_the_norm_of_bfloat16_gradients_is_more_exact_than_trainers(tmp_path):
    measured = []

    class Measures(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            grads = [param.grad.double() for param in kwargs["model"].parameters()]
            measured.append(float(torch.nn.utils.get_total_norm(grads)))

    trainer = job(tmp_path, model=small_model().bfloat16(), callbacks=[Measures()])
    trainer.train()
    assert norms_of(trainer) == pytest.approx(measured, rel=2e-7)
    assert any(norm != float(torch.tensor(norm).bfloat16()) for norm in norms_of(trainer))


# ---- where Trainer's own clipping stays


class MeasuresItself(Trainer):
    def _get_grad_norm(self, model, grad_norm=None):
        return super()._get_grad_norm(model, grad_norm)


def on_the_instance(folder, **options):
    trainer = job(folder, **options)
    trainer._clip_grad_norm = functools.partial(Trainer._clip_grad_norm, trainer)
    return trainer


def with_optimizer(make):
    def made(folder, **options):
        model = small_model()
        return job(folder, model=model, optimizers=(make(model), None), **options)

    return made


def attached(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    attach_agr(optimizer)
    return optimizer


def attached_to_ours(model):
    optimizer = AdaL(model.parameters())
    attach_agr(optimizer)
    return optimizer


def with_a_stranger(model):
    stranger = nn.Parameter(torch.ones(3))
    stranger.grad = torch.ones(3)  # the model's zero_grad leaves it
    return AGRAdamW([*model.parameters(), stranger])


KEPT = {
    "a subclass clips": lambda folder, **options: job(folder, ClipsItself, **options),
    "a subclass measures": lambda folder, **options: job(folder, MeasuresItself, **options),
    "replaced on the instance": on_the_instance,
    "torch": with_optimizer(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)),
    "torch by name": lambda folder, **options: job(folder, optim="adamw_torch", **options),
    "attach_agr": with_optimizer(attached),
    "attach_agr to ours": with_optimizer(attached_to_ours),
    "a parameter in no group": with_optimizer(lambda model: AGRAdamW(list(model.parameters())[1:])),
    "a parameter of no model": with_optimizer(with_a_stranger),
}


@pytest.mark.parametrize("limit", [LIMIT, 0.0])
@pytest.mark.parametrize("kind", list(KEPT))
def test_trainers_own_clipping_stays(kind, limit, tmp_path, clips):
    trainer = KEPT[kind](tmp_path, max_grad_norm=limit)
    trainer.train()
    assert clips == {"before": STEPS}
    assert all(norm > LIMIT for norm in norms_of(trainer))


def test_a_norm_that_somebody_asks_for_in_between_does_not_undo_the_clipping(tmp_path, clips):
    class Asks(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            assert ours._get_grad_norm(kwargs["model"]) > LIMIT

    ours = job(tmp_path, callbacks=[Asks()])
    ours.train()
    assert clips == {"in": STEPS, "before": STEPS}  # those before it are Asks' own, and clip nothing
    own = job(tmp_path, ClipsItself)
    own.train()
    assert_same_training(ours, own)


def test_ours_made_by_hand_clips_in_its_step(tmp_path, clips):
    trainer = with_optimizer(lambda model: AGRAdamW(model.parameters(), lr=1e-3))(tmp_path)
    trainer.train()
    assert clips == {"in": STEPS}


def test_a_subclass_may_read_the_norm_at_once(tmp_path):
    class Reads(Trainer):
        def _clip_grad_norm(self, model):
            return float(super()._clip_grad_norm(model))

    trainer = job(tmp_path, Reads)
    trainer.train()
    assert all(norm > LIMIT for norm in norms_of(trainer))


def fake_accelerator(distributed_type, is_fsdp2=False, scaler=None):
    return SimpleNamespace(
        distributed_type=distributed_type, is_fsdp2=is_fsdp2, scaler=scaler, unscale_gradients=lambda optimizer: None
    )


def test_kinds_of_distribution():
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = AGRAdamW([param])
    kinds = {
        kind for kind in DistributedType if clip_in_step(fake_accelerator(kind), optimizer, [param], 1.0) is not None
    }
    assert kinds == {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    assert clip_in_step(fake_accelerator(DistributedType.FSDP, is_fsdp2=True), optimizer, [param], 1.0) is not None
    unknown_scaler = fake_accelerator(DistributedType.NO, scaler=object())
    assert clip_in_step(unknown_scaler, optimizer, [param], 1.0) is None


# ---- loss scaling


@pytest.mark.parametrize("limit", [LIMIT, 0.0])
def test_a_step_that_the_loss_scaler_skips_leaves_no_request_behind(limit, tmp_path, clips):
    """Trainer's fp16 is for GPUs; its accelerator with a CPU GradScaler is the same code."""
    trainers = []
    for cls in (Trainer, ClipsItself):
        model, backwards = small_model(), itertools.count(1)
        model.classifier.bias.register_hook(lambda grad, n=backwards: grad * (math.inf if next(n) == STEPS else 1.0))
        trainer = job(tmp_path, cls, model, max_grad_norm=limit)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trainer.accelerator.scaler = scaler
        trainer.accelerator.unscale_gradients = lambda _=None, t=trainer, s=scaler: s.unscale_(unwrapped(t.optimizer))
        trainer.train()
        assert trainer.optimizer.step_was_skipped
        assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {STEPS - 1.0}
        trainers.append(trainer)
    assert clips == {"in": STEPS - 1, "before": STEPS}  # as many requests as steps were taken
    norms, own_norms = (norms_of(trainer) for trainer in trainers)
    assert norms[:-1] == pytest.approx(own_norms[:-1], rel=2e-7)
    assert norms[-1] == math.inf
    assert not math.isfinite(own_norms[-1])
    assert distance(*map(weights_of, trainers)) < 1e-6


# ---- what of transformers is relied on


@pytest.fixture
def untouched(monkeypatch):
    """Trainer as transformers has it."""
    for name in private.TRAINER_CLIPPING:
        monkeypatch.setattr(Trainer, name, vars(Trainer)[name].__wrapped__)


def test_registering_again_wraps_nothing_twice():
    agr_hf.register()
    for name in private.TRAINER_CLIPPING:
        assert not hasattr(vars(Trainer)[name].__wrapped__, "__wrapped__")


def test_the_public_route_needs_no_register(untouched, tmp_path, clips):
    job(tmp_path, route="agr_adamw", optim="adamw_torch").train()
    assert clips == {"in": STEPS}


@pytest.mark.parametrize("change", ["missing", "another signature", "of another library", "wrapped by another library"])
def test_a_trainer_that_is_not_the_one_known_clips_itself_and_a_sentence_says_so(
    change, untouched, monkeypatch, tmp_path, clips, caplog
):
    known = Trainer._clip_grad_norm
    if change == "missing":
        monkeypatch.delattr(Trainer, "_clip_grad_norm")
    elif change == "another signature":
        monkeypatch.setitem(private.TRAINER_CLIPPING, "_clip_grad_norm", ["self", "model", "max_norm"])
    elif change == "of another library":
        monkeypatch.setattr(Trainer, "_clip_grad_norm", lambda self, model: known(self, model))
    else:
        monkeypatch.setattr(Trainer, "_clip_grad_norm", functools.wraps(known)(lambda self, model: known(self, model)))
    before = [vars(Trainer).get(name) for name in private.TRAINER_CLIPPING]
    agr_hf.register()
    assert "Trainer clips gradients by itself" in caplog.text
    assert [vars(Trainer).get(name) for name in private.TRAINER_CLIPPING] == before
    if change != "missing":
        job(tmp_path).train()
        assert clips == {"before": STEPS}


def test_a_library_that_wraps_trainers_methods_later_gets_trainers_own_clipping(monkeypatch, tmp_path, clips):
    wrapped = Trainer._clip_grad_norm
    seen = []

    def reads(self, model):
        norm = wrapped(self, model)
        seen.append(float(norm))
        return norm

    monkeypatch.setattr(Trainer, "_clip_grad_norm", reads)
    job(tmp_path).train()
    assert clips == {"before": STEPS}
    assert all(norm > LIMIT for norm in seen)


# ---- Accelerate loops


def accelerate_loop(clip, make=lambda model: AGRAdamW(model.parameters(), lr=1e-2, eps=1e-2), network=None):
    """Four clipped steps; the norms, read after each step, and the weights."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = network or nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 3))
    model, optimizer = accelerator.prepare(model, make(model))
    torch.manual_seed(1 + accelerator.process_index)
    norms = []
    for _ in range(STEPS):
        accelerator.backward(10 * model(torch.randn(8, 7)).square().mean())
        norm = clip(accelerator, optimizer, model.parameters(), LIMIT)
        optimizer.step()
        norms.append(norm.item())
        optimizer.zero_grad()
    return norms, [param.detach().clone() for param in accelerator.unwrap_model(model).parameters()]


def clip_before(accelerator, optimizer, parameters, max_norm):
    return accelerator.clip_grad_norm_(parameters, max_norm)


def test_a_loop_clips_in_the_step_as_accelerate_does_before_it(clips):
    norms, weights = accelerate_loop(clip_grad_norm_)
    assert clips == {"in": STEPS}
    own_norms, own_weights = accelerate_loop(clip_before)
    assert clips == {"in": STEPS, "before": STEPS}
    assert norms == pytest.approx(own_norms, rel=2e-7)
    assert min(norms) > LIMIT
    assert distance(weights, own_weights) < 1e-6


def test_a_loop_with_another_optimizer_or_other_parameters_is_clipped_by_accelerate(clips):
    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=1e-2)

    def half(accelerator, optimizer, parameters, max_norm):
        return clip_grad_norm_(accelerator, optimizer, list(parameters)[:2], max_norm)

    def half_before(accelerator, optimizer, parameters, max_norm):
        return accelerator.clip_grad_norm_(list(parameters)[:2], max_norm)

    for ours, own, make in ((clip_grad_norm_, clip_before, {"make": sgd}), (half, half_before, {})):
        clips.clear()
        norms, weights = accelerate_loop(ours, **make)
        assert clips == {"before": STEPS}
        own_norms, own_weights = accelerate_loop(own, **make)
        assert norms == own_norms
        assert distance(weights, own_weights) == 0


# ---- two processes


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 33), nn.ReLU(), nn.Linear(33, 10))

    def forward(self, pixel_values, labels):
        logits = self.layers(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class TakesTheCPUForAGPU(Trainer):
    """accelerate shards on GPUs alone."""

    def create_accelerator_and_postprocess(self):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


class TakesTheCPUForAGPUAndClipsItself(TakesTheCPUForAGPU, ClipsItself):
    pass


def averaged(folder, own):
    trainer = job(folder, ClipsItself if own else Trainer)
    assert trainer.accelerator.distributed_type == DistributedType.MULTI_CPU
    return trainer


def sharded_by_transformers(folder, own):
    """As `from_pretrained(..., distributed_config=...)` leaves a model."""
    from torch.distributed.fsdp import fully_shard

    model = small_model()
    fully_shard(model)
    model._is_distributed_loading_by_transformers = model._is_fsdp_managed_module = True
    return job(folder, ClipsItself if own else Trainer, model)


def sharded_by_accelerate(folder, own):
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setenv("ACCELERATE_USE_FSDP", "true")
        monkey.setenv("FSDP_VERSION", "2")
        trainer = job(folder, TakesTheCPUForAGPUAndClipsItself if own else TakesTheCPUForAGPU, Network())
    assert trainer.accelerator.is_fsdp2
    return trainer


def check_trainer(folder, clips):
    kinds = [averaged, sharded_by_accelerate]
    if importlib.util.find_spec("transformers.distributed.mixin"):  # older versions of transformers do not shard
        kinds.append(sharded_by_transformers)
    for kind in kinds:
        trainers = []
        for own in (False, True):
            clips.clear()
            trainers.append(kind(folder, own))
            trainers[-1].train()
            assert clips == {"before" if own else "in": STEPS}, (kind, own)
        if kind is not averaged:
            assert all(hasattr(param, "full_tensor") for trainer in trainers for param in trainer.model.parameters())
        assert_same_training(*trainers)


def check_loop(folder, clips):
    AcceleratorState._reset_state(reset_partial_state=True)
    norms, weights = accelerate_loop(clip_grad_norm_)
    assert clips == {"in": STEPS}
    own_norms, own_weights = accelerate_loop(clip_before)
    assert norms == pytest.approx(own_norms, rel=2e-7)
    assert distance(weights, own_weights) < 1e-6


def check_meshes(folder, clips):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    params = {}
    for ranks in ([0], [1], [0, 1]):
        mesh = DeviceMesh("cpu", ranks)
        param = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        param.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
        params[tuple(ranks)] = param
    for chosen, served in (([(0, 1)], True), ([(0,), (0, 1)], False), ([(0,), (1,)], False)):
        parameters = [params[ranks] for ranks in chosen]
        norm = clip_in_step(fake_accelerator(DistributedType.MULTI_CPU), AGRAdamW(parameters), parameters, 1.0)
        assert (norm is not None) == served, chosen


def run_checks(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1")
    # Only for accelerate to find them set: the store is a file.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    agr_hf.register()
    for check in (check_trainer, check_loop, check_meshes):
        with pytest.MonkeyPatch.context() as monkey:
            check(folder, count_clips(monkey))
    dist.destroy_process_group()
    os._exit(0)  # see tests/optim/test_sharded.py


def test_two_processes_averaged_and_sharded(tmp_path):
    torch.multiprocessing.spawn(run_checks, args=(str(tmp_path),), nprocs=2)
