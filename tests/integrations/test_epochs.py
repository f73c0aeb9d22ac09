"""What collators and transforms draw is the same in a run that was cut within an epoch; scripts of others as they are."""

import copy
import logging
import random

import numpy
import pytest
import torch
from datasets import Dataset
from small import arguments, same_bits, small_data, small_model, trainer_of
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, default_data_collator, set_seed
from transformers.models.bert import BertTokenizer

import agr_hf
from agr_hf.integrations.random_states import kept_random_states
from agr_hf.integrations.trainer import train
from agr_hf.tasks.digits import load_digits

EPOCH = 8  # steps
CUTS = [4, EPOCH, EPOCH + 4]


@pytest.fixture(autouse=True, scope="module")
def registered():
    agr_hf.register()


def masked_words(folder, tmp_path, **options):
    """The shape of run_mlm.py: a datasets.Dataset, and masks drawn in the collator."""
    words = [f"w{i}" for i in range(60)]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizer(vocab=str(vocabulary))
    draws = random.Random(0)
    rows = [{"input_ids": [draws.randrange(5, 65) for _ in range(draws.randrange(8, 17))]} for _ in range(128)]
    set_seed(0)
    model = BertForMaskedLM(
        BertConfig(vocab_size=65, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )  # with dropout
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, **options.pop("collator", {}))
    return trainer_of(
        model, arguments(folder, **options), train_dataset=Dataset.from_list(rows), data_collator=collator
    )


def cropped_images(folder, tmp_path, **options):
    """The shape of run_image_classification.py: a datasets.Dataset whose transform draws, with three generators."""
    rows = [load_digits()["train"][i] for i in range(128)]
    images, labels = ([row[key].tolist() for row in rows] for key in ("pixel_values", "labels"))
    data = Dataset.from_dict({"image": images, "labels": labels})

    def transform(batch):
        batch["pixel_values"] = []
        for image in torch.tensor(batch.pop("image")):
            x, y, gain = random.randint(-1, 1), int(torch.randint(-1, 2, ())), numpy.random.rand()
            batch["pixel_values"].append(gain * image.roll((x, y), (-2, -1)))
        return batch

    data.set_transform(transform)
    args = arguments(folder, remove_unused_columns=False, **options)
    return trainer_of(small_model(), args, train_dataset=data, data_collator=default_data_collator)


def cut_and_whole(job, tmp_path, cuts, **options):
    options = {"optim": "agr_adamw", "max_steps": 2 * EPOCH + 4, "save_strategy": "steps", "save_steps": 4, **options}
    whole = job(tmp_path / "whole", tmp_path, **options)
    train(whole)
    for step in cuts:
        resumed = job(tmp_path / f"resumed-{step}", tmp_path, **options)
        train(resumed, str(tmp_path / f"whole/checkpoint-{step}"))
        yield whole.model, resumed.model


@pytest.mark.parametrize(("job", "cuts"), [(masked_words, CUTS), (cropped_images, CUTS[-1:])])
def test_a_run_cut_within_an_epoch_draws_what_one_never_stopped_draws(job, cuts, tmp_path):
    for whole, resumed in cut_and_whole(job, tmp_path, cuts):
        assert same_bits(whole, resumed)


@pytest.mark.parametrize("options", [
    {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 6},
    {"train_sampling_strategy": "group_by_length"},
], ids=["workers", "accumulation", "by length"])  # fmt: skip
def test_so_it_does_however_batches_are_loaded(options, tmp_path):
    for whole, resumed in cut_and_whole(masked_words, tmp_path, CUTS[-1:], **options):
        assert same_bits(whole, resumed)


def test_epochs_and_seeds_draw_different_masks(tmp_path):
    class Masks:
        def __init__(self, collator):
            self.collator, self.seen = collator, []

        def __call__(self, rows):
            batch = self.collator(rows)
            order = sorted(range(len(rows)), key=lambda i: rows[i]["input_ids"])
            self.seen.append([batch["labels"][i].tolist() for i in order])
            return batch

    seen = {}
    for seed in (0, 1):
        trainer = masked_words(tmp_path, tmp_path, max_steps=3, per_device_train_batch_size=128, seed=seed)
        trainer.data_collator = masks = Masks(trainer.data_collator)
        train(trainer)
        seen[seed] = [str(labels) for labels in masks.seen[:3]]  # one batch an epoch
    assert len({*seen[0], *seen[1]}) == 6


def test_a_collator_that_draws_nothing_trains_to_the_bits_of_trainer_alone(tmp_path):
    models = []
    for begin in (lambda trainer: trainer.train(), train):
        models.append(small_model())
        begin(trainer_of(models[-1], arguments(tmp_path, optim="agr_adamw")))
    assert same_bits(*models)


def test_a_stream_cut_within_an_epoch_is_warned_of(tmp_path, caplog):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(small_data())

    caplog.set_level(logging.WARNING, logger="agr_hf")
    options = {"optim": "agr_adamw", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    train(trainer_of(small_model(), arguments(tmp_path, **options), train_dataset=Stream()))
    assert not caplog.records
    trainer = trainer_of(small_model(), arguments(tmp_path, **options), train_dataset=Stream())
    train(trainer, str(tmp_path / "checkpoint-3"))
    assert "checkpoint-3, batches are not those of a run never stopped: the data are a stream" in caplog.text


def test_a_collator_with_a_generator_of_its_own_is_warned_of(tmp_path, caplog):
    options = {"optim": "agr_adamw", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "collator": {"seed": 5}}
    train(masked_words(tmp_path, tmp_path, **options))
    assert "never stopped" not in caplog.text
    train(masked_words(tmp_path, tmp_path, **options), str(tmp_path / "checkpoint-2"))
    assert "the collator has a generator of its own; give it no seed" in caplog.text


def test_an_evaluation_draws_nothing_of_the_trainings_generators(tmp_path):
    ends = []
    for evaluates in (False, True):
        set_seed(7)
        draw = lambda _: {"drawn": random.random() + numpy.random.rand() + float(torch.rand(()))}  # noqa: E731
        args = arguments(tmp_path, max_steps=4, eval_strategy="steps" if evaluates else "no", eval_steps=1)
        trainer = trainer_of(small_model(), args, eval_dataset=small_data(8), compute_metrics=draw)
        train(trainer)
        assert evaluates == any("eval_drawn" in entry for entry in trainer.state.log_history)
        ends.append((random.random(), numpy.random.rand(), float(torch.rand(()))))
    assert ends[0] == ends[1]


def test_generators_of_the_devices_that_are_named_are_kept(monkeypatch):
    put = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state of {device}")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: put.append((state, str(device))))
    with kept_random_states([torch.device("cpu"), torch.device("cuda", 1), torch.device("mps")]):
        assert not put
    assert put == [("state of cuda:1", "cuda:1")]


@pytest.mark.gpu
def test_a_devices_generator_is_kept_too():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    expected = torch.rand(3, device=device)
    torch.manual_seed(0)
    with kept_random_states([device]):
        torch.rand(9, device=device)
    assert torch.equal(torch.rand(3, device=device), expected)


def test_the_seeded_data_set_is_the_users_to_whoever_asks_it(tmp_path):
    trainer = masked_words(tmp_path, tmp_path, max_steps=1)
    found = []
    own = trainer.train_dataset

    class Look(type(trainer.callback_handler.callbacks[0])):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            data = train_dataloader.dataset
            found.extend([len(data), data[3], data.column_names, copy.copy(data).features])

    trainer.add_callback(Look())
    train(trainer)
    assert found == [128, own[3], own.column_names, own.features]
