"""A user's own run on the Hub: pushed with its training state, and gone on with by the user's script."""

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments, set_seed

import agr_hf
from agr_hf.cli import main
from agr_hf.hub.push import push_run
from agr_hf.integrations.callbacks import RecordRun
from agr_hf.tasks.digits import digits_model, load_digits
from agr_hf.tasks.record import read_record

# As in many scripts, nothing of it can be said on a command line.
SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from test_own_runs import trained
trained({output!r}, epochs=4)
"""


def trained(folder, epochs):
    agr_hf.register()
    set_seed(0)
    model = digits_model(hidden_size=24, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2)
    args = TrainingArguments(
        str(folder), optim="agr_adamw", num_train_epochs=epochs, save_strategy="epoch", eval_strategy="epoch",
        lr_scheduler_type="constant", per_device_train_batch_size=16, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    data = load_digits()
    trainer = Trainer(
        model, args, train_dataset=Subset(data["train"], range(64)), eval_dataset=Subset(data["test"], range(32)),
        callbacks=[RecordRun(dataset="digits")],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()


def test_it_is_pushed_and_resumed_with_the_users_script_alone(hub, logged_in, tmp_path, capsys):
    trained(tmp_path / "run", epochs=2)
    trained(tmp_path / "whole", epochs=4)
    push_run(tmp_path / "run", "lab/own", with_training_state=True, api=hub.api())
    card = ModelCard.load("lab/own")
    assert "--script COPY` trains on" in card.text
    assert "agr-hf reproduce" not in card.text
    assert {"agr-hf", "agr_adamw", "image-classification"} == set(card.data.tags)
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT.format(folder=__file__.rpartition("/")[0], output=str(tmp_path / "elsewhere")))
    capsys.readouterr()
    assert main(["resume", "lab/own", "--output-dir", str(tmp_path / "no")]) == 1
    assert "pass your copy of it as --script" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert main(["reproduce", "lab/own", "--output-dir", str(tmp_path / "no")]) == 1
    assert "is not one of agr_hf's scripts" in capsys.readouterr().err
    assert main(["resume", "lab/own", "--output-dir", str(tmp_path / "more"), "--script", str(script)]) == 0
    whole, more = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "more"))
    assert all(torch.equal(whole[key], more[key]) for key in whole)
    assert len(read_record(tmp_path / "more").epochs) == 4
    assert not (tmp_path / "elsewhere/results.json").exists()
    (tmp_path / "run/results.json").unlink()  # as after a kill
    assert main(["resume", str(tmp_path / "run"), "--script", str(script)]) == 0
    again = load_file(tmp_path / "run/model.safetensors")
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize("script", ["trains.py", None])
def test_a_script_that_trains_nothing_is_said(script, hub, tmp_path, capsys):
    trained(tmp_path / "run", epochs=1)
    path = tmp_path / "mine.py"
    if script:
        path.write_text("print('nothing')")
    assert main(["resume", str(tmp_path / "run"), "--script", str(path)]) == 1
    sentence = "ended without a call of Trainer.train()" if script else "there is no script"
    assert sentence in capsys.readouterr().err
