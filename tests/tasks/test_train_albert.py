"""training_scripts/train_albert.py: it learns, reloads, resumes to the bit, takes every optimizer and says what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AlbertForPreTraining, AutoTokenizer, TrainerCallback

from agr_hf import list_optimizers
from agr_hf.integrations.checkpoints import latest_checkpoint
from agr_hf.tasks import trainer_run
from agr_hf.tasks.sentence_order import PretrainingCollator, SentenceChunks
from agr_hf.tasks.text import EMBEDDED, load_articles, train_tokenizer

SCRIPTS = Path(__file__).parents[2] / "training_scripts"
SIZES = "--hidden_size 64 --num_hidden_layers 1 --intermediate_size 128 --embedding_size 64 --max_seq_length 64"
# Of masked accuracy, over naming the most frequent label every time.
MARGIN = 0.03
TINY = "--hidden_size 16 --num_hidden_layers 1 --intermediate_size 32 --embedding_size 8 --num_attention_heads 2"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import train_albert

    return train_albert


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One of 300 pieces for runs that may have any; training it takes longer than they do."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(load_articles(EMBEDDED, "train"), 300).save_pretrained(folder)
    return f"--tokenizer_name {folder}"


def arguments(folder, *words):
    return [
        "--output_dir",
        str(folder),
        "--use_cpu",
        "--disable_tqdm",
        "true",
        *(w for text in words for w in text.split()),
    ]


def parse(script, words):
    """The script's own arguments, those of every run, and Trainer's."""
    return trainer_run.parse_run(script.make_parser(), words)[0]


def test_training_beats_chance_and_the_saved_model_gives_the_same_outputs(script, tmp_path, monkeypatch):
    kept = {}
    trainer_class = trainer_run.Trainer

    def keep(model, *args, **kwargs):
        kept["model"] = model
        return trainer_class(model, *args, **kwargs)

    monkeypatch.setattr(trainer_run, "Trainer", keep)
    words = "--vocab_size 500 --num_train_epochs 5 --learning_rate 3e-3 --warmup_steps 0.1 --save_strategy no"
    metrics = script.main(arguments(tmp_path, SIZES, words))
    # Naming the most frequent label scores 5.5% and this run 11.3%; the deviation over 1,065 masked tokens is 1%.
    assert metrics["masked_accuracy"] > metrics["majority_accuracy"] + MARGIN
    # The training text's frequencies alone give 181, this run 136.
    assert metrics["perplexity"] < 160

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["task"] == "albert"
    assert results["optimizer"] == "agr_adamw"
    assert results["metrics"]["sop_accuracy"] == metrics["sop_accuracy"]
    assert [round(e["epoch"]) for e in results["epochs"]][:5] == [1, 2, 3, 4, 5]
    assert str(tmp_path) not in (tmp_path / "results.json").read_text()

    again = AlbertForPreTraining.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    data = SentenceChunks(load_articles(EMBEDDED, "validation"), tokenizer, 64, dynamic=False)
    batch = PretrainingCollator(tokenizer)([data[i] for i in range(8)])
    with torch.no_grad():
        ours, theirs = kept["model"].eval()(**batch), again(**batch)
    assert torch.equal(ours.prediction_logits, theirs.prediction_logits)
    assert torch.equal(ours.sop_logits, theirs.sop_logits)


def test_a_run_stopped_in_the_middle_of_an_epoch_ends_with_the_bits_of_a_whole_one(script, tmp_path, monkeypatch):
    words = "--vocab_size 300 --num_train_epochs 3 --max_train_samples 96 --max_eval_samples 16 --save_steps 4"

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 10

    def weights(folder):
        return AlbertForPreTraining.from_pretrained(folder).state_dict()

    script.main(arguments(tmp_path / "whole", TINY, words))
    with monkeypatch.context() as patch:
        trainer_class = trainer_run.Trainer

        def stopped(*args, callbacks, **kwargs):
            return trainer_class(*args, callbacks=[*callbacks, Stop()], **kwargs)

        patch.setattr(trainer_run, "Trainer", stopped)
        script.main(arguments(tmp_path / "cut", TINY, words))
    # Six steps an epoch: step 8 is the second of the second epoch. What Trainer saves as it stops would be step 10.
    shutil.rmtree(tmp_path / "cut" / "checkpoint-10", ignore_errors=True)
    assert latest_checkpoint(tmp_path / "cut").name == "checkpoint-8"
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert any(not torch.equal(whole[name], cut[name]) for name in whole)
    script.main(arguments(tmp_path / "cut", TINY, words, "--resume_from_checkpoint latest"))
    resumed = weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_masks_differ_from_epoch_to_epoch_in_training(script, tokenizer, tmp_path, monkeypatch):
    seen = []
    call = PretrainingCollator.pair

    def pair(self, item):
        seen.append(item["key"])
        return call(self, item)

    monkeypatch.setattr(PretrainingCollator, "pair", pair)
    words = "--num_train_epochs 2 --max_train_samples 16 --max_eval_samples 1 --eval_strategy no --seed 7"
    script.main(arguments(tmp_path, TINY, tokenizer, words, "--save_strategy no"))
    assert sorted(key for key in seen if key.startswith("7 ")) == sorted(
        f"7 {e} {i}" for e in range(2) for i in range(16)
    )
    assert [key for key in seen if not key.startswith("7 ")] == ["0 0 0"]


@pytest.mark.parametrize("name", [*list_optimizers(), "adafactor"])
def test_every_optimizer_runs(script, name, tokenizer, tmp_path):
    words = f"--max_steps 2 --max_train_samples 16 --max_eval_samples 4 --optim {name} --save_strategy no"
    metrics = script.main(arguments(tmp_path, TINY, tokenizer, words, "--max_seq_length 32"))
    assert metrics["mlm_loss"] < 7
    assert json.loads((tmp_path / "results.json").read_text())["optimizer"] == name


def test_recipes_are_defaults_that_the_command_line_wins_over(script, tmp_path):
    base = ["--output_dir", str(tmp_path)]
    model, data, _, args = parse(script, [*base, "--recipe", "agr-albert-authors"])
    assert (model.hidden_size, model.num_hidden_layers, model.embedding_size) == (64, 6, 24)
    assert (args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size) == (1e-4, 25, 16)
    assert args.weight_decay in (0, 2e-4, 5e-4, 1e-3, 1e-2)
    explicit = "--weight_decay 0.01 --num_hidden_layers 2 --optim adamw --num_train_epochs 1".split()
    model, data, _, args = parse(script, [*base, "--recipe", "agr-albert", *explicit])
    assert (model.hidden_size, model.num_hidden_layers, args.weight_decay) == (768, 2, 0.01)
    assert (args.optim.value, args.num_train_epochs, args.learning_rate) == ("adamw", 1, 1e-4)
    _, data, _, args = parse(script, [*base, "--recipe", "albert-base"])
    assert (data.max_seq_length, args.optim.value, args.weight_decay) == (512, "adamw", 0.01)
    *_, args = parse(script, [*base, "--recipe", "albert-base", "--lr_milestones", "5"])
    assert (args.lr_scheduler_type, args.warmup_steps) == ("constant", 0)  # the milestones are all the schedule


def test_albert_base_has_the_published_number_of_parameters(script, tmp_path):
    from transformers import AlbertModel

    model, _, _, _ = parse(script, ["--output_dir", str(tmp_path), "--recipe", "albert-base"])

    class Tokenizer:
        pad_token_id, cls_token_id, sep_token_id = 0, 2, 3

        def __len__(self):
            return 30_000

    with torch.device("meta"):
        encoder = AlbertModel(script.make_model(model, Tokenizer(), 512).config)
    # 12M in the ALBERT paper's table 1; 11,683,584 is what albert-base-v2's encoder has.
    assert encoder.num_parameters() == 11_683_584


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--dataset_name nobody/nothing", "could not be had from the Hub"),
        ("--train_file missing.tokens --validation_file x.tokens", "there is no file or folder 'missing.tokens'"),
        ("--train_file wiki.tokens", "train_file and validation_file go together"),
        ("--validation_file wiki.tokens", "train_file and validation_file go together"),
        ("--optim_args steps=3", "agr_adamw has no option steps"),
        ("--max_seq_length 4", "max_length=4 is not allowed; it must be at least 16"),
        ("--max_train_samples 0", "0 samples are not allowed"),
    ],
)
def test_bad_inputs_are_sentences(script, words, sentence, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        script.main(arguments(tmp_path, TINY, tokenizer, words))


def test_an_unknown_recipe_is_answered_with_the_names(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(script, ["--output_dir", str(tmp_path), "--recipe", "albert"])
    assert "agr-albert, agr-albert-authors, albert-base" in capsys.readouterr().err


def test_a_run_resumes_to_the_bit_from_the_last_step_of_an_epoch(script, tokenizer, tmp_path):
    """Trainer evaluates the epoch behind that checkpoint, and the evaluation must not draw the training's numbers."""
    words = f"{tokenizer} --num_train_epochs 2 --max_train_samples 96 --max_eval_samples 16 --save_steps 6"
    script.main(arguments(tmp_path, TINY, words))
    whole = AlbertForPreTraining.from_pretrained(tmp_path).state_dict()
    whole = {name: tensor.clone() for name, tensor in whole.items()}
    script.main(arguments(tmp_path, TINY, words, f"--resume_from_checkpoint {tmp_path / 'checkpoint-6'}"))
    resumed = AlbertForPreTraining.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
