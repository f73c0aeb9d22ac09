"""Train ALBERT from scratch on masked words and sentence order, with any of the package's optimizers, through Trainer.

    python training_scripts/train_albert.py --output_dir runs/albert
    python training_scripts/train_albert.py --recipe agr-albert-authors --optim adamw --output_dir runs/adamw
    torchrun --nproc_per_node 2 training_scripts/train_albert.py --recipe agr-albert \
        --dataset_name Salesforce/wikitext --output_dir runs/wikitext

`--optim` takes agr_hf.list_optimizers() and Trainer's own names. The default text needs no network.
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import (
    AlbertConfig,
    AlbertForPreTraining,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

import agr_hf
from agr_hf.files import replaced_folder
from agr_hf.hub.push import push_finished, take_over_push
from agr_hf.integrations.callbacks import GradientStatistics, SuspendAGR, TrainingTime
from agr_hf.integrations.epochs import EpochOf
from agr_hf.integrations.launch import check_launch
from agr_hf.integrations.trainer import parse_optim_args, save_model, train, trainer_optimizer
from agr_hf.optim.registry import optimizer_info
from agr_hf.tasks import sentence_order as sop
from agr_hf.tasks.recipes import apply_recipe, refuse_data_parallel
from agr_hf.tasks.runs import (
    dataset_of,
    epochs_of,
    evaluation_of,
    gradients_of,
    optimizer_groups,
    refuse_used,
    run_main,
    write_results,
)
from agr_hf.tasks.text import EMBEDDED, default_config, hub_source, load_articles, train_tokenizer

logger = logging.getLogger("train_albert")

# ALBERT paper (arXiv 1909.11942), table 1 and section 4.1: base has 12 layers of 768, 12 heads, embeddings of 128, 30,000
# pieces, n-grams up to 3. Feed-forward 3072 is 4 x hidden, dropout 0 is version 2's (its README). Its length of 512 is that
# of albert-base here; the AGR paper names none, and the other two keep the default.
BASE = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "embedding_size": 128, "vocab_size": 30_000,
}  # fmt: skip
# The AGR authors' script: hidden 64, 6 layers, embeddings of 24. Heads of 16 and feed-forward 4 x hidden are ours.
AUTHORS = {
    "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 256,
    "embedding_size": 24, "vocab_size": 30_000,
}  # fmt: skip
# AGR paper, experiments with ALBERT: WikiText-2, 25 epochs, batch 16 on one GPU, LambdaLR (which Trainer's linear schedule
# is), decays 0, 2e-4, 5e-4, 1e-3 and 1e-2; 5e-4 is AdamW(AGR)'s best (84.47% SOP accuracy). The rate is its script's.
PAPER = {
    "optim": "agr_adamw", "learning_rate": 1e-4, "weight_decay": 5e-4, "num_train_epochs": 25,
    "total_batch_size": 16, "lr_scheduler_type": "linear",
}  # fmt: skip
RECIPES = {
    "agr-albert": {**PAPER, **BASE},
    "agr-albert-authors": {**PAPER, **AUTHORS},
    # ALBERT's own training is LAMB at 1.76e-3 with batches of 4,096, which is not among the optimizers; BERT's Adam
    # (arXiv 1810.04805, appendix A.2) is: rate 1e-4, decay 0.01, linear decay after 1% of the steps, batch 256.
    "albert-base": {
        **BASE, "optim": "adamw", "learning_rate": 1e-4, "weight_decay": 0.01, "warmup_steps": 0.01,
        "total_batch_size": 256, "lr_scheduler_type": "linear", "max_seq_length": 512,
    },
}  # fmt: skip


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "weights and tokenizer to start from"})
    tokenizer_name: str | None = field(default=None, metadata={"help": "folder or Hub id; else trained on the text"})
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 512
    embedding_size: int = 64
    vocab_size: int = field(default=2000, metadata={"help": "of a tokenizer trained here, at most"})


@dataclass
class DataArguments:
    dataset_name: str = field(default=EMBEDDED, metadata={"help": "pydoc-topics, a folder, or a Hub id"})
    dataset_config_name: str | None = None
    train_file: str | None = field(default=None, metadata={"help": ".tokens, .raw, .txt or .parquet"})
    validation_file: str | None = field(default=None, metadata={"help": ".tokens, .raw, .txt or .parquet"})
    max_seq_length: int = 128
    mlm_probability: float = 0.15
    max_ngram: int = field(default=3, metadata={"help": "words that may be masked together"})
    max_train_samples: int | None = None
    max_eval_samples: int | None = None


@dataclass
class RunArguments:
    recipe: str | None = field(default=None, metadata={"help": f"defaults by name: {', '.join(RECIPES)}"})
    suspend_agr_at_epoch: float | None = None
    gradient_statistics_every: int = field(default=100, metadata={"help": "steps; 0 measures nothing"})
    push_training_state: bool = field(default=False, metadata={"help": "with --push_to_hub, so that others can resume"})


def parse_args(argv=None):
    agr_hf.register()
    parser = HfArgumentParser((ModelArguments, DataArguments, RunArguments, TrainingArguments))
    parser.set_defaults(
        optim="agr_adamw", learning_rate=1e-3, per_device_train_batch_size=16, eval_strategy="epoch",
        logging_strategy="epoch", save_total_limit=2, report_to="none",
    )  # fmt: skip
    apply_recipe(parser, RECIPES, argv)
    return parser.parse_args_into_dataclasses(argv)


def main(argv=None):
    model_args, data_args, run_args, args = parse_args(argv)
    level = logging.INFO if args.process_index == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s")
    set_seed(args.seed)
    check_launch(args)
    refuse_data_parallel(args)
    if args.process_index == 0:
        refuse_used(args.output_dir, args.resume_from_checkpoint)
    push = take_over_push(args, run_args.push_training_state)
    # Trainer would remove what the collator needs, for the model's forward does not take it.
    args.remove_unused_columns = False

    if data_args.dataset_name == EMBEDDED and (data_args.train_file is None) != (data_args.validation_file is None):
        raise ValueError(
            "train_file and validation_file go together, or with the dataset_name that the other split is of: one was given"
        )
    config_name = data_args.dataset_config_name
    train_text = load_articles(data_args.train_file or data_args.dataset_name, "train", config_name)
    eval_text = load_articles(data_args.validation_file or data_args.dataset_name, "validation", config_name)
    tokenizer = tokenizer_of(model_args, args, train_text)
    seed = args.seed if args.data_seed is None else args.data_seed
    length = data_args.max_seq_length
    train_data = sop.SentenceChunks(train_text, tokenizer, length, seed).first(data_args.max_train_samples)
    eval_data = sop.SentenceChunks(eval_text, tokenizer, length, dynamic=False)
    eval_pairs = len(eval_data)
    eval_data = eval_data.first(data_args.max_eval_samples)
    collator = sop.PretrainingCollator(tokenizer, data_args.mlm_probability, data_args.max_ngram)

    model = model_of(model_args, tokenizer, length)
    parameters = model.num_parameters()
    logger.info("%s parameters, %s training and %s evaluation pairs of at most %s tokens",
                f"{parameters:,}", f"{len(train_data):,}", f"{len(eval_data):,}", length)  # fmt: skip

    name = str(args.optim.value)
    chosen = {}
    if name in agr_hf.list_optimizers():
        options = parse_optim_args(optimizer_info(name), args.optim_args)
        chosen["optimizer_cls_and_kwargs"] = trainer_optimizer(name, args, **options)
    clock = TrainingTime()
    callbacks = [EpochOf(train_data), clock]
    if run_args.suspend_agr_at_epoch is not None:
        callbacks.append(SuspendAGR(at_epoch=run_args.suspend_agr_at_epoch))
    trainer = Trainer(model, args, collator, train_data, eval_data, processing_class=tokenizer, callbacks=callbacks,
                      compute_metrics=sop.pretraining_metrics, preprocess_logits_for_metrics=sop.keep_predictions,
                      **chosen)  # fmt: skip
    if run_args.gradient_statistics_every:
        GradientStatistics(every=run_args.gradient_statistics_every).attach(trainer)

    train(trainer, args.resume_from_checkpoint)
    metrics = evaluation_of(trainer.evaluate())
    logger.info("masked accuracy %.2f%%, perplexity %.1f, sentence-order accuracy %.2f%%",
                100 * metrics["masked_accuracy"], metrics["perplexity"], 100 * metrics["sop_accuracy"])  # fmt: skip

    save_model(trainer)
    if trainer.is_world_process_zero():
        config = {**asdict(model_args), **asdict(data_args), **asdict(run_args), **args.to_sanitized_dict()}
        config |= {"parameters": parameters, "train_pairs": len(train_data), "eval_pairs": len(eval_data)}
        base = model_args.model_name_or_path
        config["base_model"] = base if base and not Path(base).exists() else None  # a folder here is none of the Hub's
        files = (data_args.train_file, data_args.validation_file)
        write_results(
            args.output_dir,
            script=__file__,
            argv=argv,
            task="albert",
            optimizer=name,
            groups=optimizer_groups(trainer.optimizer),
            seed=args.seed,
            config=config,
            dataset=dataset_of(
                data_args.dataset_name,
                len(train_data),
                files,
                hub_source(data_args.dataset_name),
                split="validation",
                evaluated=len(eval_data),
                complete=len(eval_data) == eval_pairs,
                config=config_name or default_config(data_args.dataset_name),
            ),
            epochs=epochs_of(trainer.state.log_history),
            metrics=metrics,
            seconds=clock.seconds,
            device=args.device,
            gradients=gradients_of(trainer.state.log_history),
        )
        if push:
            push_finished(args.output_dir, **push)
    return metrics


def tokenizer_of(model_args, args, articles):
    """The tokenizer named, or one trained on the text by the first process and kept for the others and for resuming."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    folder = Path(args.output_dir) / "tokenizer"
    with args.main_process_first():
        if args.process_index == 0 and not (args.resume_from_checkpoint and folder.exists()):
            with replaced_folder(folder) as temporary:
                train_tokenizer(articles, model_args.vocab_size).save_pretrained(temporary)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def model_of(model_args, tokenizer, length):
    if model_args.model_name_or_path:
        model = AlbertForPreTraining.from_pretrained(
            model_args.model_name_or_path, trust_remote_code=False, use_safetensors=True
        )
        if length > model.config.max_position_embeddings:
            at_most = model.config.max_position_embeddings
            raise ValueError(f"max_seq_length={length} is more than the model's {at_most} positions; pass at most that")
    else:
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "embedding_size")
        ids = {"pad_token_id": "pad", "bos_token_id": "cls", "eos_token_id": "sep"}
        config = AlbertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=max(length, 512),
            **{size: getattr(model_args, size) for size in sizes},
            **{name: getattr(tokenizer, f"{token}_token_id") for name, token in ids.items()},
        )
        model = AlbertForPreTraining(config)
    # It drops num_items_in_batch: Trainer must divide by the accumulation steps itself (transformers #47688).
    model.accepts_loss_kwargs = False
    return model


if __name__ == "__main__":
    run_main(main)
