"""Train ALBERT from scratch on masked words and sentence order, with any of the package's optimizers, through Trainer.

    python training_scripts/train_albert.py --output_dir runs/albert
    python training_scripts/train_albert.py --recipe agr-albert-authors --optim adamw --output_dir runs/adamw
    torchrun --nproc_per_node 2 training_scripts/train_albert.py --recipe agr-albert \
        --dataset_name Salesforce/wikitext --output_dir runs/wikitext

`--optim` takes agr_hf.list_optimizers() and Trainer's own names. The default text needs no network.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AlbertConfig, AlbertForPreTraining, AutoTokenizer

from agr_hf.errors import UserError
from agr_hf.files import replaced_folder
from agr_hf.tasks import sentence_order as sop
from agr_hf.tasks.runs import describe_dataset, run_main
from agr_hf.tasks.text import EMBEDDED, default_config, hub_source, load_articles, train_tokenizer
from agr_hf.tasks.trainer_run import TrainerRun, trainer_parser

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


def make_parser():
    return trainer_parser(__doc__, ModelArguments, DataArguments, recipes=RECIPES, per_device_train_batch_size=16)


def main(argv=None):
    run = TrainerRun(__file__, make_parser(), argv)
    model_args, data_args = run.own
    # Trainer would remove what the collator needs, for the model's forward does not take it.
    run.args.remove_unused_columns = False

    train_text, eval_text = load_texts(data_args)
    tokenizer = load_tokenizer(model_args, run.args, train_text)
    length = data_args.max_seq_length
    train_data = sop.SentenceChunks(train_text, tokenizer, length, run.data_seed).first(data_args.max_train_samples)
    eval_data = sop.SentenceChunks(eval_text, tokenizer, length, dynamic=False)
    eval_pairs = len(eval_data)
    eval_data.first(data_args.max_eval_samples)
    model = make_model(model_args, tokenizer, length)
    logger.info("%s parameters, %s training and %s evaluation pairs of at most %s tokens",
                f"{model.num_parameters():,}", f"{len(train_data):,}", f"{len(eval_data):,}", length)  # fmt: skip

    metrics = run.train(
        model, train_data, eval_data, sop.pretraining_metrics, processing_class=tokenizer,
        data_collator=sop.PretrainingCollator(tokenizer, data_args.mlm_probability, data_args.max_ngram),
        preprocess_logits_for_metrics=sop.keep_predictions,
    )  # fmt: skip
    logger.info("masked accuracy %.2f%%, perplexity %.1f, sentence-order accuracy %.2f%%",
                100 * metrics["masked_accuracy"], metrics["perplexity"], 100 * metrics["sop_accuracy"])  # fmt: skip

    dataset = describe_dataset(
        data_args.dataset_name,
        len(train_data),
        (data_args.train_file, data_args.validation_file),
        hub_source(data_args.dataset_name),
        split="validation",
        evaluated=len(eval_data),
        complete=len(eval_data) == eval_pairs,
        config=data_args.dataset_config_name or default_config(data_args.dataset_name),
    )
    base = model_args.model_name_or_path  # a folder here is none of the Hub's
    run.finish("albert", metrics, dataset, base_model=base if base and not Path(base).exists() else None)
    return metrics


def load_texts(data_args):
    """The articles to train on and to evaluate on."""
    name, config = data_args.dataset_name, data_args.dataset_config_name
    if name == EMBEDDED and (data_args.train_file is None) != (data_args.validation_file is None):
        raise UserError(
            "train_file and validation_file go together, or with the dataset_name that the other split is of: one was given"
        )
    return (
        load_articles(data_args.train_file or name, "train", config),
        load_articles(data_args.validation_file or name, "validation", config),
    )


def load_tokenizer(model_args, args, articles):
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


def make_model(model_args, tokenizer, length):
    if model_args.model_name_or_path:
        model = AlbertForPreTraining.from_pretrained(
            model_args.model_name_or_path, trust_remote_code=False, use_safetensors=True
        )
        if length > model.config.max_position_embeddings:
            at_most = model.config.max_position_embeddings
            raise UserError(f"max_seq_length={length} is more than the model's {at_most} positions; pass at most that")
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
