"""A complete Accelerate loop with the package's optimizers, on scikit-learn's digits.

    python training_scripts/accelerate_loop.py --optim agr_adamw --output_dir runs/digits
    torchrun --nproc_per_node 2 training_scripts/accelerate_loop.py --cpu --optim adal --output_dir runs/digits

What each line is for: accumulation (`accelerator.accumulate`), clipping of complete gradients only (`sync_gradients`), by
the optimizer inside its step (`clip_grad_norm_`), mixed precision (the scaler unscales before clipping, and skips steps
with infinities), EMA of the weights, suspension of AGR, and checkpoints that a kill cannot break.
"""

import argparse
from datetime import timedelta

import torch
from accelerate import Accelerator, DataLoaderConfiguration, InitProcessGroupKwargs
from accelerate.utils import DistributedType, set_seed
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from agr_hf import create_optimizer, list_optimizers
from agr_hf.integrations.accelerate import (
    Progress,
    batches_of_epoch,
    clip_grad_norm_,
    load_checkpoint,
    make_ema,
    save_checkpoint,
)
from agr_hf.integrations.launch import check_launch
from agr_hf.tasks.digits import digits_model, load_digits
from agr_hf.tasks.recipes import check_counts
from agr_hf.tasks.runs import run_main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--optim", choices=list_optimizers(), default="agr_adamw")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--agr_steps", type=int, help="suspend AGR after that many steps")
    parser.add_argument("--num_train_epochs", type=int, default=10)
    parser.add_argument("--per_device_train_batch_size", type=int, default=64)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--ema_decay", type=float, default=0.99)
    parser.add_argument("--save_steps", type=int, default=50)
    parser.add_argument("--resume_from_checkpoint", help="a folder, or 'latest'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--ddp_timeout", type=int, default=1800, help="seconds that a process waits for the others")
    args = parser.parse_args(argv)
    check_counts(parser, args, "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
                 "save_steps", "ddp_timeout")  # fmt: skip
    return args


def main(argv=None):
    args = parse_args(argv)
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # One order of the data, whatever the number of processes.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        # The scheduler counts optimizer steps of the run, not of each process.
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout))],
    )
    check_launch(accelerator)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"this loop averages whole weights, and does not run under {accelerator.distributed_type.value}; start it with "
            "DDP, or train sharded models with Trainer, as train_image_classifier.py does"
        )
    set_seed(args.seed)
    data = load_digits()
    model = digits_model()
    ema = make_ema(model, args.ema_decay).to(accelerator.device)
    options = {} if args.agr_steps is None else {"agr_steps": args.agr_steps}
    loader = DataLoader(data["train"], args.per_device_train_batch_size, shuffle=True, drop_last=True)
    loader = accelerator.prepare(loader)
    steps = args.num_train_epochs * -(-len(loader) // args.gradient_accumulation_steps)
    optimizer = create_optimizer(args.optim, model, lr=args.learning_rate, weight_decay=args.weight_decay, **options)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    # Model and optimizer together: FSDP2 swaps the parameters of both.
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    progress = Progress()
    accelerator.register_for_checkpointing(ema, progress)
    load_checkpoint(accelerator, args.resume_from_checkpoint, args.output_dir)

    loss = None
    while progress.epoch < args.num_train_epochs:
        model.train()
        for batch in batches_of_epoch(accelerator, loader, progress):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    clip_grad_norm_(accelerator, optimizer, model.parameters(), args.max_grad_norm)
                optimizer.step()
                if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                    ema.update_parameters(accelerator.unwrap_model(model))
                optimizer.zero_grad()
            progress.batches += 1
            if accelerator.sync_gradients:
                progress.step += 1
                if progress.step % args.save_steps == 0:
                    save_checkpoint(accelerator, args.output_dir, progress.step)
        progress.epoch, progress.batches = progress.epoch + 1, 0
        if loss is not None:  # resumed behind the last batch of an epoch
            accelerator.print(f"epoch {progress.epoch}: loss {loss.item():.4f}")

    save_checkpoint(accelerator, args.output_dir, progress.step)
    if accelerator.is_main_process:
        test = data["test"]
        for name, trained in (("model", accelerator.unwrap_model(model)), ("ema", ema.module)):
            trained.eval()
            with torch.no_grad():
                predicted = trained(test.pixel_values.to(accelerator.device)).logits.argmax(-1).cpu()
            print(f"{name}: test accuracy {100 * (predicted == test.labels).double().mean():.2f}%")
            trained.save_pretrained(f"{args.output_dir}/{name}")
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
