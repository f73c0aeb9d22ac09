"""ALBERT's two tasks: masked n-grams of words, and the order of two consecutive segments (arXiv 1909.11942)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from agr_hf.errors import UserError
from agr_hf.integrations.epochs import EpochData
from agr_hf.metrics import metric_path
from agr_hf.tasks.text import Article, split_sentences

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedTokenizerBase

IGNORED = -100  # of torch's cross entropy


class SentenceChunks(EpochData, Dataset[dict[str, Any]]):
    """Runs of consecutive sentences, each within one article and filling the length: what pairs of segments are cut from.

    Sentences are packed greedily until the next would not fit beside [CLS] and two [SEP]. One longer than half of the room
    is cut between words, so that any two fit; one that is left alone at an article's end makes no pair and is dropped.
    ALBERT's shorter sequences (10% of them) are not made.

    Items are `{"ids": [[...], ...], "word_starts": [[...], ...], "key": str}`, a list for each sentence. All randomness of
    an item comes from its key, "seed epoch index": a resumed run meets the same bits.

    Args:
        articles: the text.
        tokenizer: a fast one.
        max_length: tokens of a pair with its special tokens. Default 128.
        seed: of splits, swaps and masks. Default 0.
        dynamic: whether they differ from epoch to epoch; False for evaluation. Default True.

    Raises:
        UserError: max_length is less than 16, the tokenizer is not a fast one, or no article has two sentences.
    """

    def __init__(
        self,
        articles: Iterable[Article],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 128,
        seed: int = 0,
        dynamic: bool = True,
    ) -> None:
        if max_length < 16:
            raise UserError(f"max_length={max_length} is not allowed; it must be at least 16")
        if not tokenizer.is_fast:
            raise UserError(f"{type(tokenizer).__name__} does not say where words begin; pass a fast tokenizer")
        super().__init__()
        self.seed, self.dynamic = seed, dynamic
        room = max_length - 3
        special = set(tokenizer.all_special_ids)
        ids: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        chunks: list[tuple[int, int]] = []
        articles_of_chunks: list[int] = []
        for number, article in enumerate(articles):
            first, used = len(ids), 0
            sentences = [s for paragraph in article.paragraphs for s in split_sentences(paragraph)]
            if not sentences:
                continue
            # verbose=False: sentences longer than the model's length are cut below.
            encoded = tokenizer(sentences, add_special_tokens=False, verbose=False)
            for index, tokens in enumerate(encoded["input_ids"]):
                words = encoded.word_ids(index)
                begins = [i == 0 or words[i] != words[i - 1] for i in range(len(words))]
                for low, high in _pieces(begins, room // 2):
                    if special.issuperset(tokens[low:high]):
                        continue  # nothing in it to mask
                    if used + high - low > room:
                        chunks.append((first, len(ids)))
                        articles_of_chunks.append(number)
                        first, used = len(ids), 0
                    ids.append(np.asarray(tokens[low:high], dtype=np.int32))
                    starts.append(np.asarray([True, *begins[low + 1 : high]], dtype=np.bool_))
                    used += high - low
            if len(ids) - first >= 2:
                chunks.append((first, len(ids)))
                articles_of_chunks.append(number)
        if not chunks:
            raise UserError("the text has no article of two sentences, which pairs are made of; pass a larger text")
        self.chunks = chunks
        self.articles = articles_of_chunks
        # Flat: one array for each sentence would be most of the memory of a large corpus.
        self._ids, self._starts = np.concatenate(ids), np.concatenate(starts)
        self._bounds = np.cumsum([0, *map(len, ids)])

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        first, end = self.chunks[index]
        spans = [(self._bounds[i], self._bounds[i + 1]) for i in range(first, end)]
        return {
            "ids": [self._ids[low:high].tolist() for low, high in spans],
            "word_starts": [self._starts[low:high].tolist() for low, high in spans],
            "key": f"{self.seed} {self.epoch} {index % len(self.chunks)}",
        }

    def first(self, count: int | None) -> SentenceChunks:
        """Keep the first chunks only, all with None. Returns itself.

        Raises:
            UserError: count is less than 1.
        """
        if count is not None and count < 1:
            raise UserError(f"{count} samples are not allowed; give at least 1, or None for all")
        del self.chunks[len(self.chunks) if count is None else count :]
        return self

    def set_epoch(self, epoch: int) -> None:
        """Other splits, swaps and masks from now on, unless `dynamic=False`."""
        if self.dynamic:
            super().set_epoch(epoch)


def _pieces(begins: Sequence[bool], limit: int) -> list[tuple[int, int]]:
    """Cut a sentence into pieces of at most `limit` tokens, between words where there is such a place."""
    pieces = []
    low = 0
    while len(begins) - low > limit:
        high = next((i for i in range(low + limit, low, -1) if begins[i]), low + limit)
        pieces.append((low, high))
        low = high
    return [*pieces, (low, len(begins))] if low < len(begins) else pieces


@dataclass
class PretrainingCollator:
    """Batches for `AlbertForPreTraining` from items of `SentenceChunks`.

    A chunk is cut in two at a sentence, anywhere with equal probability, and the segments swapped half of the time:
    `sentence_order_label` 1 is swapped, as transformers has it. Of the tokens, 15% are predicted: n-grams of whole words, n
    up to 3 with p(n) = (1/n) / sum_k (1/k) (ALBERT, section 4.1), none across the segments' border; 80% of them become
    [MASK], 10% a random ordinary token, 10% stay (BERT, section 3.1). Special tokens, the unknown one among them, are
    neither masked nor drawn.

    Returns a dict of int64 tensors: input_ids, attention_mask, token_type_ids, labels (batch, length) and
    sentence_order_label (batch,). Length is that of the longest pair.

    Args:
        tokenizer: that of the items.
        mlm_probability: share of tokens to predict. Default 0.15.
        max_ngram: words that may be masked together. Default 3.
        swap_probability: default 0.5.

    Raises:
        UserError: a share is not between 0 and 1, max_ngram is less than 1, or the tokenizer lacks a token.
    """

    tokenizer: PreTrainedTokenizerBase
    mlm_probability: float = 0.15
    max_ngram: int = 3
    swap_probability: float = 0.5

    def __post_init__(self) -> None:
        for name in ("mlm_probability", "swap_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)!r} is not allowed; it must be between 0 and 1")
        if self.max_ngram < 1:
            raise UserError(f"max_ngram={self.max_ngram!r} is not allowed; it must be at least 1")
        for name in ("cls_token", "sep_token", "pad_token", "mask_token"):
            if getattr(self.tokenizer, name) is None:
                raise UserError(f"the tokenizer has no {name}; ALBERT needs one")
        self._special = frozenset(self.tokenizer.all_special_ids)
        self._ordinary = [i for i in range(len(self.tokenizer)) if i not in self._special]

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [self.pair(item) for item in items]
        length = max(len(row["input_ids"]) for row in rows)
        fill = {
            "input_ids": self.tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": 0,
            "labels": IGNORED,
        }
        batch = {
            name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
            for name, value in fill.items()
        }
        batch["sentence_order_label"] = torch.tensor([row["sentence_order_label"] for row in rows])
        return batch

    def pair(self, item: dict[str, Any]) -> dict[str, Any]:
        """One row of a batch, without padding."""
        # Python's generator: seeded by text with a hash, and ten times faster than torch's at single draws.
        rng = random.Random(item["key"])
        cut = rng.randrange(1, len(item["ids"]))
        swapped = rng.random() < self.swap_probability
        segments = [range(cut), range(cut, len(item["ids"]))]
        if swapped:
            segments.reverse()
        ids, types = [self.tokenizer.cls_token_id], [0]
        words: list[list[range]] = []  # positions of each word, by segment
        for kind, segment in enumerate(segments):
            words.append([])
            for sentence in segment:
                self._add_words(words[-1], item["ids"][sentence], item["word_starts"][sentence], len(ids))
                ids += item["ids"][sentence]
            ids.append(self.tokenizer.sep_token_id)
            types += [kind] * (len(ids) - len(types))
        labels = [IGNORED] * len(ids)
        for position in masked_positions(words, rng, self.mlm_probability, self.max_ngram):
            labels[position] = ids[position]
            draw = rng.random()
            if draw < 0.8:
                ids[position] = self.tokenizer.mask_token_id
            elif draw < 0.9:
                ids[position] = rng.choice(self._ordinary)
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "token_type_ids": types,
            "labels": labels,
            "sentence_order_label": int(swapped),
        }

    def _add_words(self, words: list[range], ids: list[int], starts: list[bool], offset: int) -> None:
        begins = [i for i, start in enumerate(starts) if start]
        for low, high in zip(begins, [*begins[1:], len(ids)], strict=True):
            if self._special.isdisjoint(ids[low:high]):
                words.append(range(offset + low, offset + high))


def masked_positions(
    segments: Sequence[Sequence[range]], rng: random.Random, probability: float = 0.15, max_ngram: int = 3
) -> list[int]:
    """Positions to predict: n-grams of whole words, until they are `probability` of all tokens (ALBERT's procedure).

    Args:
        segments: the positions of each word, for each segment.
        rng: where randomness comes from.
        probability: share of the words' tokens, rounded; at least one word where it is not 0. Default 0.15.
        max_ngram: words that may be taken together. Default 3.

    Returns:
        Sorted positions. Fewer than the share where no word is short enough for what is left of it.
    """
    words = [word for segment in segments for word in segment]
    if not words or probability == 0:
        return []
    # How many words may be taken together from each on: those that no special token parts, as [SEP] parts segments.
    ahead = [1] * len(words)
    for i in range(len(words) - 2, -1, -1):
        if words[i].stop == words[i + 1].start:
            ahead[i] = ahead[i + 1] + 1
    budget = max(1, round(probability * sum(map(len, words))))
    weights = [1 / n for n in range(1, max_ngram + 1)]
    order = list(range(len(words)))
    rng.shuffle(order)
    taken: set[int] = set()
    chosen: list[int] = []
    for i in order:
        if len(chosen) >= budget:
            break
        possible = min(max_ngram, ahead[i])
        n = rng.choices(range(1, possible + 1), weights[:possible])[0]
        while n and sum(map(len, words[i : i + n])) > budget - len(chosen):
            n -= 1
        if n and taken.isdisjoint(range(i, i + n)):
            taken.update(range(i, i + n))
            chosen += [position for word in words[i : i + n] for position in word]
    if not chosen:
        shortest = min(words, key=len)
        return list(shortest)
    return sorted(chosen)


def keep_predictions(logits: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """For Trainer's `preprocess_logits_for_metrics`: what metrics need of (batch, length, vocabulary) logits.

    Returns:
        Predicted tokens (batch, length) int64, log-probabilities of the labels (batch, length) float32, and predicted
        orders (batch,) int64.
    """
    tokens, orders = logits[:2]
    target = labels[0].clamp(min=0)[..., None]
    log_probability = tokens.float().log_softmax(-1).gather(-1, target)[..., 0]
    return tokens.argmax(-1), log_probability, orders.argmax(-1)


@cache
def _metric(name: str) -> Any:
    import evaluate

    return evaluate.load(metric_path(name), keep_in_memory=True)


def pretraining_metrics(evaluation: EvalPrediction) -> dict[str, float]:
    """For Trainer's `compute_metrics`, after `keep_predictions`: what the modules of `agr_hf.metrics` say.

    Returns:
        masked_accuracy, mlm_loss, perplexity, sop_accuracy, and majority_accuracy: what naming the most frequent label
        every time would score.
    """
    tokens, log_probabilities, orders = tuple(evaluation.predictions)
    labels, order_labels = tuple(evaluation.label_ids)
    masked = labels != IGNORED
    found = _metric("masked_accuracy").compute(
        predictions=tokens[masked], references=labels[masked], log_probabilities=log_probabilities[masked]
    )
    found |= _metric("sop_accuracy").compute(predictions=orders, references=order_labels)
    counts = np.unique(labels[masked], return_counts=True)[1]
    return {**found, "majority_accuracy": float(counts.max() / counts.sum())}
