"""Train a DDPM with any optimizer of the package, in the shape of diffusers' unconditional_image_generation example.

    python training_scripts/train_ddpm.py --recipe digits --output_dir runs/digits-ddpm
    python training_scripts/train_ddpm.py --recipe digits --optim adamw --output_dir runs/digits-adamw
    accelerate launch training_scripts/train_ddpm.py --recipe agr-ddpm --mixed_precision bf16 --output_dir runs/ddpm
    torchrun --nproc_per_node 2 training_scripts/train_ddpm.py --cpu --train_data train.parquet --output_dir runs/mine

Leaves in --output_dir: a DDPMPipeline with the averaged weights, which `DDIMPipeline.from_pretrained` loads too, grids of
samples as PNG, checkpoints, and results.json.
"""

import copy
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from agr_hf import create_optimizer, list_optimizers
from agr_hf.errors import UserError
from agr_hf.hub.push import check_push, push_finished
from agr_hf.integrations.accelerate import Progress, batches_of_epoch, latest_state, load_checkpoint, save_checkpoint
from agr_hf.integrations.launch import check_launch
from agr_hf.tasks import diffusion
from agr_hf.tasks.arguments import ScriptParser
from agr_hf.tasks.frechet import feature_network, frechet_metrics, inception_metrics, inception_weights
from agr_hf.tasks.images import hub_source
from agr_hf.tasks.recipes import check_counts
from agr_hf.tasks.record import make_record
from agr_hf.tasks.runs import describe_dataset, optimizer_groups, refuse_used, run_main, summarize_gradients
from agr_hf.tasks.unlabelled_images import load_unlabelled_images

# Of diffusers' get_scheduler, those that need nothing but a number of steps.
SCHEDULES = ("constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial")


def argument(default, text=None, repeatable=True):
    """A field with its help; `repeatable` is explained at ScriptParser."""
    return field(default=default, metadata={"help": text, "repeatable": repeatable})


@dataclass
class Arguments:
    output_dir: str = field(metadata={"repeatable": False})
    recipe: str | None = argument(None, "values of a published or a small run; flags win over it")
    dataset_name: str = argument("digits", "digits, cifar10, or any Hub id with images")
    dataset_revision: str | None = argument(None, "of a Hub id; cifar10 and the like are pinned")
    train_data: str | None = argument(None, "a parquet file or a folder of images, in the place of --dataset_name")
    max_train_images: int | None = None
    resolution: int | None = argument(None, "default: the images' own")
    random_flip: bool = False
    unet: Literal[*diffusion.UNETS] = "tiny"
    optim: str = argument("agr_adan", f"one of {', '.join(list_optimizers())}")
    learning_rate: float = 2e-4
    weight_decay: float | None = argument(None, "default: the optimizer's own")
    agr_steps: int | None = argument(None, "suspend AGR after that many steps, for the optimizers that have it")
    lr_scheduler: Literal[*SCHEDULES] = argument("constant_with_warmup", "of diffusers")
    lr_warmup_steps: int = 200
    max_grad_norm: float = argument(1.0, "of the raw gradients, before AGR; 0 for none")
    num_epochs: int = 25
    max_train_steps: int | None = argument(None, "stop after that many optimizer steps")
    train_batch_size: int = argument(128, "of one process")
    gradient_accumulation_steps: int = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    use_ema: bool = True
    ema_decay: float = 0.9999
    checkpointing_steps: int = 500
    resume_from_checkpoint: str | None = argument(None, "a folder, or 'latest'", repeatable=False)
    save_images_epochs: int = 10
    num_grid_samples: int = 64
    ddpm_num_inference_steps: int = argument(100, "steps of DDIM")
    num_eval_samples: int = argument(500, "for the metrics at the end; 0 for none")
    eval_batch_size: int = 250
    # Others' features must not load files or code.
    features: str = argument(
        "pixels", "pixels, timm:MODEL, resnet20:FILE, PACKAGE.MODULE:FACTORY", r"pixels|timm:[\w.\-]+"
    )
    fid: bool = argument(False, "FID and IS with Inception")
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = argument("none", repeatable=False)
    gradient_statistics_every: int = argument(100, "steps; 0 measures nothing")
    push_to_hub: bool = argument(False, repeatable=False)
    hub_model_id: str | None = argument(None, "default: the name of --output_dir", repeatable=False)
    hub_private_repo: bool | None = argument(None, repeatable=False)
    hub_revision: str | None = argument(None, "a branch; default: main", repeatable=False)
    push_training_state: bool = argument(False, "so that others can resume", repeatable=False)
    seed: int = 0
    cpu: bool = False


def make_parser():
    return ScriptParser(Arguments, recipes=diffusion.RECIPES, description=__doc__)


def parse_args(argv=None):
    """The arguments, and those that the command line gave."""
    parser = make_parser()
    (args,), given = parser.parse(argv)
    check_counts(parser, args, "num_epochs", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps",
                 "save_images_epochs", "num_grid_samples", "eval_batch_size")  # fmt: skip
    most = diffusion.ddpm_scheduler().config.num_train_timesteps
    if not 1 <= args.ddpm_num_inference_steps <= most:
        parser.error(
            f"--ddpm_num_inference_steps {args.ddpm_num_inference_steps} is not allowed; it must be 1 to {most}"
        )
    if args.optim not in list_optimizers():
        parser.error(f"--optim {args.optim} is not allowed; it must be one of {', '.join(list_optimizers())}")
    if args.num_eval_samples < 0 or args.num_eval_samples == 1:
        parser.error(
            f"--num_eval_samples {args.num_eval_samples} is not allowed; a distance needs at least 2 samples, and 0 leaves "
            "it out"
        )
    return args, given


def main(argv=None):
    # Here and not above: `run_main` says in a sentence what is missing.
    from diffusers import DDPMPipeline
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    args, given = parse_args(argv)
    output_dir = Path(args.output_dir)
    repo_id = args.hub_model_id or output_dir.resolve().name
    if args.push_to_hub:
        check_push(repo_id, args.hub_revision)
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=str(output_dir),
        # One order of the data, whatever the number of processes.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        # The scheduler counts optimizer steps of the run, not of each process.
        step_scheduler_with_optimizer=False,
    )
    check_launch(accelerator)
    if accelerator.is_main_process:
        refuse_used(output_dir, args.resume_from_checkpoint, latest_state)
    if args.fid:
        inception_weights()  # nobody wants to hear after the training that they are missing
    set_seed(args.seed)
    # One process fetches, the others find it in the cache.
    with accelerator.main_process_first():
        images = load_unlabelled_images(
            args.train_data or args.dataset_name,
            size=args.resolution,
            revision=args.dataset_revision,
            max_images=args.max_train_images,
        )
    # An unknown name fails now, not after the training.
    network = feature_network(args.features, accelerator.device) if args.num_eval_samples else None
    loader = accelerator.prepare(DataLoader(images, args.train_batch_size, shuffle=True, drop_last=True))
    if len(loader) == 0:
        raise UserError(
            f"{len(images)} images do not fill one batch of {args.train_batch_size} for each of "
            f"{accelerator.num_processes} processes; pass a smaller --train_batch_size"
        )

    scheduler = diffusion.ddpm_scheduler()
    model = diffusion.make_unet(args.unet, images.shape[-1], images.shape[1])
    sampled = copy.deepcopy(model).requires_grad_(False).to(accelerator.device)
    # diffusers' EMAModel and not `make_ema`: its decay rises from 0.1 as (1 + n) / (10 + n), so that a short run does not
    # sample from its initial weights, and after 90,000 steps it is the constant of Ho et al.
    ema = EMAModel(model.parameters(), decay=args.ema_decay, foreach=True) if args.use_ema else None
    options = {name: getattr(args, name) for name in ("weight_decay", "agr_steps") if getattr(args, name) is not None}
    optimizer = create_optimizer(args.optim, model, lr=args.learning_rate, **options)
    steps = args.num_epochs * -(-len(loader) // args.gradient_accumulation_steps)
    steps = min(steps, args.max_train_steps or steps)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=steps
    )
    model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    progress, history = Progress(), diffusion.RunHistory(accelerator.device)
    accelerator.register_for_checkpointing(progress, history, *([ema] if ema else []))
    load_checkpoint(accelerator, args.resume_from_checkpoint, output_dir)
    if ema:
        ema.to(accelerator.device)  # a checkpoint is read on the CPU
    if args.report_to != "none":
        left_out = ("output_dir", "report_to")
        config = {key: value for key, value in vars(args).items() if value is not None and key not in left_out}
        accelerator.init_trackers("train_ddpm", config)
    accelerator.print(
        f"{len(images)} images of {tuple(images.shape[1:])}, U-Net {args.unet} with {sampled.num_parameters():,} "
        f"parameters, {args.optim}, {steps} steps of {accelerator.num_processes} x {args.train_batch_size} images"
    )

    def averaged():
        """The network to sample from: the average, or the trained weights without --use_ema."""
        if ema:
            ema.copy_to(sampled.parameters())
        else:
            sampled.load_state_dict(accelerator.unwrap_model(model).state_dict())
        return sampled

    def draw(count, seed):
        return diffusion.sample_images(
            averaged(),
            count,
            steps=args.ddpm_num_inference_steps,
            seed=seed,
            batch_size=args.eval_batch_size,
            accelerator=accelerator,
        )

    def save():
        # One file holds the sum for all processes.
        history.total = accelerator.reduce(history.total, "mean")
        save_checkpoint(accelerator, output_dir, progress.step)

    def log_epoch():
        mean_loss = accelerator.reduce(history.total, "mean").item() / progress.batches
        epoch, rate = progress.epoch + 1, lr_scheduler.get_last_lr()[0]
        history.epochs.append({"epoch": epoch, "step": progress.step, "loss": mean_loss, "seconds": history.seconds})
        accelerator.log({"loss": mean_loss, "learning_rate": rate}, progress.step)
        accelerator.print(f"epoch {epoch}: loss {mean_loss:.4f}, {history.seconds:.0f} s")

    def sample_grid(epoch):
        grid = draw(args.num_grid_samples, args.seed)
        if accelerator.is_main_process:
            diffusion.write_grid(grid, output_dir / "samples" / f"epoch-{epoch:04d}.png")
            diffusion.log_grid(accelerator, grid, progress.step)

    started = time.perf_counter() - history.seconds
    while progress.epoch < args.num_epochs and progress.step < steps:
        model.train()
        for batch in batches_of_epoch(accelerator, loader, progress):
            draws = diffusion.batch_generator(
                args.seed,
                progress.epoch * len(loader) + progress.batches,
                accelerator.process_index,
                accelerator.device,
            )
            with accelerator.accumulate(model):
                loss = diffusion.ddpm_loss(model, scheduler, batch, draws, args.random_flip)
                accelerator.backward(loss)
                if accelerator.sync_gradients and args.max_grad_norm:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                every = args.gradient_statistics_every
                if accelerator.sync_gradients and every and progress.step % every == 0:
                    history.measure(accelerator.unwrap_model(model), optimizer)
                optimizer.step()
                if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    lr_scheduler.step()
                    if ema:
                        ema.step(model.parameters())
                optimizer.zero_grad()
            history.total += loss.detach()
            progress.batches += 1
            if accelerator.sync_gradients:
                progress.step += 1
                if progress.step % args.checkpointing_steps == 0 and progress.step < steps:
                    history.seconds = time.perf_counter() - started
                    save()
                if progress.step == steps:
                    break
        history.seconds = time.perf_counter() - started
        if progress.batches < len(loader):
            break  # --max_train_steps ends within the epoch
        log_epoch()
        progress.epoch, progress.batches = progress.epoch + 1, 0
        history.total.zero_()
        finished = progress.epoch == args.num_epochs or progress.step == steps
        if progress.epoch % args.save_images_epochs == 0 or finished:
            sample_grid(progress.epoch)
        started = time.perf_counter() - history.seconds  # sampling is not training

    save()
    if progress.batches:  # of an epoch that a run with more steps goes on with: in the results, not in the checkpoint
        log_epoch()
        sample_grid(progress.epoch + 1)
    # Another seed than the grids': they are to be looked at during training, and these to be measured once.
    samples = draw(args.num_eval_samples, args.seed + 1) if args.num_eval_samples else None
    accelerator.wait_for_everyone()
    accelerator.end_training()  # what follows takes one process, and may take longer than others would wait
    if accelerator.is_main_process:
        metrics = {"loss": history.epochs[-1]["loss"], "parameters": sampled.num_parameters()}
        DDPMPipeline(averaged(), scheduler).save_pretrained(output_dir)
        if samples is not None:
            cache = output_dir / "statistics"
            metrics |= frechet_metrics(samples, images, network, cache_dir=cache, device=accelerator.device)
            if args.fid:
                metrics |= inception_metrics(samples, images, cache_dir=cache, device=accelerator.device)
        record = make_record(
            script=__file__,
            arguments=given,
            task="ddpm",
            optimizer=args.optim,
            metrics=metrics,
            config=asdict(args),
            epochs=history.epochs,
            dataset=describe_dataset(
                args.dataset_name,
                len(images),
                (args.train_data,),
                hub_source(args.dataset_name, args.dataset_revision),
                split="train",
                evaluated=len(images),
                complete=args.max_train_images is None or len(images) < args.max_train_images,
            ),
            optimizer_groups=optimizer_groups(optimizer),
            gradients=summarize_gradients(history.gradients),
            seed=args.seed,
            seconds=history.seconds,
            device=accelerator.device,
        )
        record.write(output_dir)
        print(", ".join(f"{key} {value:.6g}" for key, value in metrics.items()))
        if args.push_to_hub:
            options = {"private": args.hub_private_repo, "revision": args.hub_revision}
            push_finished(output_dir, repo_id, with_training_state=args.push_training_state, **options)


if __name__ == "__main__":
    run_main(main)
