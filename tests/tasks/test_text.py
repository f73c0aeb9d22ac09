"""Text, pairs of segments and masks: statistics over the embedded corpus, and the metrics against hand-computed values."""

import itertools
import math
import random
from pathlib import Path

import evaluate
import pytest
import torch
from datasets import Dataset

from agr_hf.integrations.epochs import EpochOf
from agr_hf.metrics import metric_path
from agr_hf.tasks.sentence_order import (
    PretrainingCollator,
    SentenceChunks,
    keep_predictions,
    masked_positions,
    pretraining_metrics,
)
from agr_hf.tasks.text import (
    EMBEDDED,
    Article,
    load_articles,
    parse_rows,
    parse_wikitext,
    read_sentences,
    split_sentences,
    train_tokenizer,
)

WIKITEXT = """
 = First article =

 One sentence . Another one , of J. C. W. Smith .

 = = A section = =

 where the inductance is
 = 1 henry and capacitance C =
 1 farad .

 = Second ( article ) =

 The end .
"""
# As above without empty lines, as some copies of wiki.test.raw are.
CONDENSED = "\n".join(line for line in WIKITEXT.splitlines() if line.strip())


@pytest.fixture(scope="module")
def articles():
    return load_articles(EMBEDDED, "train")


@pytest.fixture(scope="module")
def tokenizer(articles):
    return train_tokenizer(articles, 1000)


@pytest.fixture(scope="module")
def chunks(articles, tokenizer):
    return SentenceChunks(articles, tokenizer, max_length=64)


@pytest.fixture(scope="module")
def batches(chunks, tokenizer):
    """Four epochs: clean pairs beside masked ones."""
    collator, clean = PretrainingCollator(tokenizer), PretrainingCollator(tokenizer, mlm_probability=0.0)
    found = []
    for epoch in range(4):
        chunks.set_epoch(epoch)
        items = [chunks[i] for i in range(len(chunks))]
        found.append((items, clean(items), collator(items)))
    return found


def within(count, total, probability, sigmas=5):
    return abs(count - total * probability) <= sigmas * math.sqrt(total * probability * (1 - probability))


@pytest.mark.parametrize("text", [WIKITEXT, CONDENSED], ids=["spaced", "condensed"])
def test_wikitext_articles_begin_at_titles_and_not_at_sections_or_formulas(text):
    first, second = parse_wikitext(text.split("\n"))
    assert first.title == "First article"
    assert first.paragraphs == (
        "One sentence . Another one , of J. C. W. Smith .",
        "where the inductance is",
        "= 1 henry and capacitance C =",
        "1 farad .",
    )
    assert second == Article("Second ( article )", ("The end .",))


def test_rows_without_headings_are_an_article_each():
    assert parse_rows(["One.\nTwo.", "", "Three."]) == [
        Article("row 0", ("One.", "Two.")),
        Article("row 2", ("Three.",)),
    ]


@pytest.mark.parametrize(
    ("paragraph", "sentences"),
    [
        ("It is H. americanus . It grows .", ["It is H. americanus .", "It grows ."]),
        ('" Is it ? " He left U.S. Route 2 .', ['" Is it ? "', "He left U.S. Route 2 ."]),
        ('He said . " Yes . " Then left .', ["He said .", '" Yes . "', "Then left ."]),
        ("See e.g. Dr. Smith. Then (stop.) Go!", ["See e.g. Dr. Smith.", "Then (stop.)", "Go!"]),
        ("Yahoo ! is big . <unk> too", ["Yahoo ! is big .", "<unk> too"]),
        ("Version 3.3. Then 2.", ["Version 3.3.", "Then 2."]),
        ("", []),
    ],
)
def test_sentences_end_where_a_reader_says(paragraph, sentences):
    assert split_sentences(paragraph) == sentences


def test_files_folders_and_parquet_give_the_same_articles(tmp_path):
    for name in ("wiki.train.tokens", "wiki.train.raw", "wiki.valid.tokens"):
        (tmp_path / name).write_text(WIKITEXT, encoding="utf-8")
    parquet = tmp_path / "rows" / "train-00000-of-00001.parquet"
    parquet.parent.mkdir()
    Dataset.from_dict({"text": [f"{line}\n" if line else "" for line in WIKITEXT.split("\n")]}).to_parquet(str(parquet))
    expected = parse_wikitext(WIKITEXT.split("\n"))
    for source in (tmp_path, tmp_path / "wiki.train.raw", parquet, parquet.parent):
        assert load_articles(str(source), "train") == expected
    assert load_articles(str(tmp_path), "validation") == expected


def test_held_out_text_is_not_in_the_training_text(articles):
    train = {paragraph for article in articles for paragraph in article.paragraphs}
    held_out = [paragraph for article in load_articles(EMBEDDED, "validation") for paragraph in article.paragraphs]
    assert len(held_out) > 50
    assert not train.intersection(held_out)


def test_wikitext_2_has_sixty_articles_in_every_form():
    folder = Path(__file__).parents[3] / "shared" / "data" / "wikitext-2"
    if not folder.exists():
        pytest.skip("WikiText-2 is not beside this checkout, in ../shared/data/wikitext-2")
    tokens, raw = (load_articles(str(folder / f"wiki.test.{form}"), "test") for form in ("tokens", "raw"))
    # 60 is the number that the data set's authors give for valid and for test.
    assert len(tokens) == len(raw) == len(load_articles(str(folder / "wiki.valid.tokens"), "validation")) == 60
    assert [len(a.paragraphs) for a in tokens] == [len(a.paragraphs) for a in raw]


@pytest.mark.parametrize(
    ("source", "split", "sentence"),
    [
        (
            "nobody/nothing",
            "train",
            "without a network pass --dataset_name pydoc-topics, a folder with wiki.train.tokens",
        ),
        ("Salesforce/wikitext", "train", "could not be had from the Hub .* --train_file"),
        ("missing.tokens", "train", "there is no file or folder 'missing.tokens'; pass a .tokens"),
        (EMBEDDED, "dev", "split 'dev' is not known; it must be one of train, validation, test"),
        ("{tmp}", "train", "has no files of the train split, only wiki.test.tokens; name a file with --train_file"),
        ("{tmp}", "test", "has no articles in its test split; an article begins at a line `= Title =`"),
        ("{tmp}/latin.txt", "train", "'latin.txt' is not UTF-8 text"),
        ("{tmp}/other/train.parquet", "train", "has the columns words, but no column `text`"),
    ],
)
def test_text_that_cannot_be_had_is_a_sentence(source, split, sentence, tmp_path):
    (tmp_path / "wiki.test.tokens").write_text("no heading\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "latin.txt").write_bytes(b"\xe9\xe8")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xe8")
    (tmp_path / "latin.txt").rename(tmp_path / "other" / "latin.txt")
    Dataset.from_dict({"words": ["a"]}).to_parquet(str(tmp_path / "other" / "train.parquet"))
    source = source.replace("{tmp}/latin", "{tmp}/other/latin").format(tmp=tmp_path)
    with pytest.raises(ValueError, match=sentence):
        load_articles(source, split)


def test_a_trained_tokenizer_has_alberts_special_tokens_and_reloads_the_same(articles, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3, 4]
    assert len(tokenizer) <= 1000
    pair = tokenizer("The <unk> class", "it has", return_token_type_ids=True)
    assert pair.tokens()[0] == "[CLS]"
    assert pair.tokens().count("[SEP]") == 2
    assert 1 in pair["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for sentence in list(read_sentences(articles))[:200]:
        assert again(sentence)["input_ids"] == tokenizer(sentence)["input_ids"]
    assert train_tokenizer(articles, 1000).get_vocab() == tokenizer.get_vocab()


def test_no_chunk_crosses_an_article_and_none_exceeds_the_length(tokenizer):
    # Each article of one letter, so that a token tells its article.
    texts = ["ab cd ef. " * 40, "gh ij kl. " * 3, "mn op qr. " * 17, "st uv. Wx!" * 9]
    articles = [Article(str(i), (text.replace(". ", ". A "),)) for i, text in enumerate(texts)]
    chunks = SentenceChunks(articles, tokenizer, max_length=32)
    assert set(chunks.articles) == {0, 1, 2, 3}
    owners = [set(tokenizer(a.paragraphs[0], add_special_tokens=False)["input_ids"]) for a in articles]
    marks = [owner - set().union(*(o for o in owners if o is not owner)) for owner in owners]
    for i in range(len(chunks)):
        tokens = [token for sentence in chunks[i]["ids"] for token in sentence]
        assert len(tokens) <= 29
        assert len(chunks[i]["ids"]) >= 2
        assert {n for n, mark in enumerate(marks) if mark.intersection(tokens)} <= {chunks.articles[i]}


def test_chunks_are_the_articles_sentences_in_order(articles, chunks, tokenizer):
    # All that may be missing is a last sentence that has no other beside it.
    for number in (0, 5, 10):
        tokens = [
            t for s in read_sentences([articles[number]]) for t in tokenizer(s, add_special_tokens=False)["input_ids"]
        ]
        own = [i for i in range(len(chunks)) if chunks.articles[i] == number]
        packed = [token for i in own for sentence in chunks[i]["ids"] for token in sentence]
        assert packed == tokens[: len(packed)]
        assert len(tokens) - len(packed) <= 30
    full = sum(sum(map(len, chunks[i]["ids"])) for i in range(len(chunks))) / (len(chunks) * 61)
    assert full > 0.6  # packed greedily; sentences are up to half of the room


def test_half_of_the_pairs_are_swapped_and_labelled_so(batches, tokenizer):
    swapped = total = 0
    for items, clean, _ in batches:
        for row, item in enumerate(items):
            original = [token for sentence in item["ids"] for token in sentence]
            ids = clean["input_ids"][row][clean["attention_mask"][row] == 1]
            types = clean["token_type_ids"][row][: len(ids)]
            assert ids[0] == tokenizer.cls_token_id
            first, second = ids[types == 0][1:], ids[types == 1]
            assert first[-1] == second[-1] == tokenizer.sep_token_id
            first, second = first[:-1].tolist(), second[:-1].tolist()
            label = int(clean["sentence_order_label"][row])
            assert (second + first if label else first + second) == original
            assert first
            assert second
            swapped, total = swapped + label, total + 1
    assert within(swapped, total, 0.5)


def test_shares_of_masked_random_and_kept_tokens_are_alberts(batches, tokenizer):
    special = torch.tensor(tokenizer.all_special_ids)
    ordinary = chosen = masked = kept = 0
    drawn = []
    for _, clean, batch in batches:
        before, after = clean["input_ids"], batch["input_ids"]
        picked = batch["labels"] != -100
        assert torch.equal(batch["labels"][picked], before[picked])
        assert torch.equal(after[~picked], before[~picked])
        assert not torch.isin(before[picked], special).any()
        ordinary += int((~torch.isin(before, special)).sum())
        chosen += int(picked.sum())
        masked += int((after[picked] == tokenizer.mask_token_id).sum())
        kept += int((after[picked] == before[picked]).sum())
        other = picked & (after != before) & (after != tokenizer.mask_token_id)
        drawn.append(after[other])
    drawn = torch.cat(drawn)
    assert within(chosen, ordinary, 0.15)
    assert within(masked, chosen, 0.8)
    # One random token in about a thousand is the true one.
    assert within(len(drawn), chosen, 0.1)
    assert within(kept, chosen, 0.1)
    assert not torch.isin(drawn, special).any()
    assert drawn.unique().numel() > 500


def test_whole_words_are_masked(batches, tokenizer):
    words_of_more = 0
    for items, clean, batch in batches:
        for row, item in enumerate(items):
            starts = [start for sentence in item["word_starts"] for start in sentence]
            tokens = [token for sentence in item["ids"] for token in sentence]
            picked = batch["labels"][row] != -100
            inner = (clean["attention_mask"][row] == 1) & ~torch.isin(clean["input_ids"][row], torch.tensor([2, 3]))
            types = batch["token_type_ids"][row][inner]
            flags = picked[inner].tolist()
            if clean["sentence_order_label"][row]:
                flags = [f for kind in (1, 0) for f, t in zip(flags, types.tolist(), strict=True) if t == kind]
            assert len(flags) == len(tokens)
            for i, start in enumerate(starts):
                if not start:
                    assert flags[i] == flags[i - 1]
                    words_of_more += flags[i]
    assert words_of_more > 100


def test_lengths_of_ngrams_follow_alberts_distribution():
    # Words of one token, and room for one n-gram only: what is chosen is one draw.
    words = [[range(i, i + 1) for i in range(20)]]
    counts = {1: 0, 2: 0, 3: 0}
    for seed in range(3000):
        chosen = masked_positions(words, random.Random(seed), 0.15, 3)
        runs = [b - a for a, b in itertools.pairwise(chosen)]
        assert len(chosen) == 3
        if runs == [1, 1]:
            counts[3] += 1
    # A trigram is 2/11 of the first draws, times 18/20 for those that fit there; bigram and unigram beside each other or
    # three unigrams side by side add less than 0.09.
    assert 0.12 < counts[3] / 3000 < 0.27
    bigrams = sum(len(masked_positions(words, random.Random(s), 0.1, 2)) == 2 for s in range(100))
    assert bigrams == 100


def test_ngrams_do_not_cross_special_tokens():
    class Longest(random.Random):
        """Starts at the first word, then from the last backwards, and always draws the longest n-gram."""

        def shuffle(self, order):
            order[1:] = order[:0:-1]

        def choices(self, lengths, weights):
            return [lengths[-1]]

    # Room for two words: the first alone, for [SEP] is at 2, then the last; without the gap, the first two.
    gap = [[range(1, 2)], [range(3, 4), range(4, 5), range(5, 6)]]
    assert masked_positions(gap, Longest(), 0.5, 3) == [1, 5]
    assert masked_positions([[range(i, i + 1) for i in range(1, 5)]], Longest(), 0.5, 3) == [1, 2]


def test_words_longer_than_the_share_do_not_leave_a_pair_without_labels():
    assert masked_positions([[range(1, 9), range(9, 13)]], random.Random(0), 0.15, 3) == [9, 10, 11, 12]
    assert masked_positions([[]], random.Random(0)) == []


def test_pairs_depend_on_seed_epoch_and_index_alone(articles, tokenizer):
    collator = PretrainingCollator(tokenizer)

    def batch(seed, epoch, dynamic=True):
        chunks = SentenceChunks(articles[:6], tokenizer, 64, seed, dynamic)
        chunks.set_epoch(epoch)
        torch.manual_seed(random.randrange(10**9))
        return collator([chunks[i] for i in range(8)])["input_ids"]

    torch.testing.assert_close(batch(0, 1), batch(0, 1), rtol=0, atol=0)
    assert not equal(batch(0, 1), batch(0, 2))
    assert not equal(batch(0, 1), batch(1, 1))
    assert equal(batch(0, 1, dynamic=False), batch(0, 2, dynamic=False))


def equal(a, b):
    return a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize(("epoch", "expected"), [(None, 0), (1.0, 1), (1.9999999, 2), (3.5, 3)])
def test_the_callback_tells_the_data_the_epoch_also_in_the_middle_of_one(chunks, epoch, expected):
    from transformers import TrainerState

    EpochOf(chunks).on_epoch_begin(None, TrainerState(epoch=epoch), None)
    assert chunks.epoch == expected


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda a, t: SentenceChunks(a, t, max_length=8), "max_length=8 is not allowed; it must be at least 16"),
        (lambda a, t: SentenceChunks([Article("x", ("One.",))], t), "no article of two sentences"),
        (lambda a, t: SentenceChunks(a, t).first(0), "0 samples are not allowed; give at least 1"),
        (lambda a, t: PretrainingCollator(t, 1.5), "mlm_probability=1.5 is not allowed; it must be between 0 and 1"),
        (lambda a, t: PretrainingCollator(t, max_ngram=0), "max_ngram=0 is not allowed; it must be at least 1"),
        (lambda a, t: train_tokenizer(a, 10), "vocab_size=10 is not allowed; it must be at least 100"),
    ],
)
def test_bad_arguments_are_sentences(make, sentence, articles, tokenizer):
    with pytest.raises(ValueError, match=sentence):
        make(articles, tokenizer)


def test_masked_accuracy_equals_hand_computed_values():
    metric = evaluate.load(metric_path("masked_accuracy"), keep_in_memory=True)
    assert metric.compute(predictions=[5, 7, 9, 1], references=[5, -100, 8, 1]) == {
        "masked_accuracy": pytest.approx(2 / 3)
    }
    found = metric.compute(
        predictions=[5, 7, 9], references=[5, -100, 8], log_probabilities=[math.log(0.5), -70.0, math.log(0.125)]
    )
    # -(ln 1/2 + ln 1/8) / 2 = 2 ln 2
    assert found == {
        "masked_accuracy": 0.5,
        "mlm_loss": pytest.approx(2 * math.log(2)),
        "perplexity": pytest.approx(4.0),
    }
    assert metric.compute(predictions=[1], references=[1], log_probabilities=[-1e4])["perplexity"] == math.inf


def test_sop_accuracy_equals_hand_computed_values():
    metric = evaluate.load(metric_path("sop_accuracy"), keep_in_memory=True)
    found = metric.compute(predictions=[0, 1, 1, 0, 1], references=[0, 1, 0, 0, 1])
    assert found == {
        "sop_accuracy": pytest.approx(0.8),
        "sop_accuracy_ordered": pytest.approx(2 / 3),
        "sop_accuracy_swapped": 1.0,
    }
    assert math.isnan(metric.compute(predictions=[0], references=[0])["sop_accuracy_swapped"])


@pytest.mark.parametrize(
    ("name", "inputs", "sentence"),
    [
        ("sop_accuracy", {"predictions": [2], "references": [1]}, "predictions has 2; orders are 0"),
        ("sop_accuracy", {"predictions": [1], "references": [-1]}, "references has -1; orders are 0"),
        ("masked_accuracy", {"predictions": [2], "references": [-100]}, "no position is masked"),
        (
            "masked_accuracy",
            {"predictions": [2, 2], "references": [2, 1], "log_probabilities": [0.0]},
            "there are 1 log_probabilities for 2 references; give one for each",
        ),
    ],
)
def test_metrics_say_what_is_wrong(name, inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate.load(metric_path(name), keep_in_memory=True).compute(**inputs)


def test_an_unknown_metric_is_answered_with_the_names():
    with pytest.raises(ValueError, match="there is no metric 'sop'; there are .*masked_accuracy.*sop_accuracy"):
        metric_path("sop")


def test_metrics_of_logits_equal_cross_entropy_and_argmax():
    from transformers import EvalPrediction

    logits, orders = torch.randn(3, 5, 11), torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    labels = torch.full((3, 5), -100)
    labels[0, 1], labels[1, 2], labels[2, 4], labels[2, 0] = 4, 4, 4, 9
    logits[0, 1, 4] = logits[2, 0, 9] = 20.0
    logits[1, 2, 4] = logits[2, 4, 4] = -20.0
    order_labels = torch.tensor([0, 1, 1])
    kept = keep_predictions((logits, orders), (labels, order_labels))
    found = pretraining_metrics(EvalPrediction(tuple(k.numpy() for k in kept), (labels.numpy(), order_labels.numpy())))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert found["mlm_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["masked_accuracy"] == 0.5
    assert found["sop_accuracy"] == pytest.approx(2 / 3)
    assert found["majority_accuracy"] == 0.75
