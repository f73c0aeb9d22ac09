"""Text for ALBERT: articles from WikiText, from other documents, or from Python itself; sentences; a tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agr_hf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The corpus that needs no network: the reference texts behind Python's help(), 40,000 words of English prose.
EMBEDDED = "pydoc-topics"
# Hub data sets by id: the configuration and the commit that they are read at.
PINNED = {"Salesforce/wikitext": ("wikitext-2-v1", "b08601e04326c79dfdd32d625aee71d232d685c3")}
# What files of a split are called: WikiText's own names and those of datasets.
SPLITS = {"train": ("train",), "validation": ("valid", "validation"), "test": ("test",)}
TEXT_SUFFIXES = (".tokens", ".raw", ".txt")

# One equals sign on each side is an article, more are its sections.
HEADING = re.compile(r"= (?!= )(.+)(?<! =) =")
SECTION = re.compile(r"= = .+ = =")

CLOSING = ")]}\"'”’»"
OPENING = "([{\"'“‘«"
ENDS = f".!?={CLOSING}"
# Words that end with a dot within a sentence; the last are initials, as in "J. C. W.", "U.S." and "e.g.".
ABBREVIATION = re.compile(
    "mr|mrs|ms|dr|prof|st|gen|col|lt|sgt|capt|rev|hon|jr|sr|no|vs|vol|fig|pp|ed|eds|cf|approx|ca|inc|corp|ltd|co|bros|mt|ft"
    r"|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|[^\W\d](\.[^\W\d])*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Article:
    """A title and paragraphs, each of one line; headings of sections are not among them."""

    title: str
    paragraphs: tuple[str, ...]


def parse_wikitext(lines: Iterable[str]) -> list[Article]:
    """Articles of WikiText, from the lines of its files or the rows of its parquet files.

    An article begins at a `= Title =` line with a single equals sign on each side. Formulas cut into lines look the same
    ("= 1 henry and capacitance C ="), so there must be empty lines (or the file's ends) around it; in a file without empty
    lines, the line before must end as a sentence or heading does, or the next begin with a capital. Section headings are
    left out, for they would tell which of two segments comes first, and so is text before the first article.
    """
    stripped = [line.strip() for line in lines]
    spaced = any(not line for line in stripped[:-1])  # a file's last line is often empty
    articles: list[tuple[str, list[str]]] = []
    for index, line in enumerate(stripped):
        before = stripped[index - 1] if index else ""
        after = stripped[index + 1] if index + 1 < len(stripped) else ""
        heading = HEADING.fullmatch(line)
        if heading and not (before or after if spaced else before and not (before[-1] in ENDS or after[:1].isupper())):
            articles.append((heading[1], []))
        elif line and articles and not SECTION.fullmatch(line):
            articles[-1][1].append(line)
    return [Article(title, tuple(paragraphs)) for title, paragraphs in articles if paragraphs]


def parse_rows(rows: Sequence[str]) -> list[Article]:
    """Articles of a `text` column: WikiText's where rows are its headings, else one for each row, a paragraph for a line."""
    articles = parse_wikitext(rows)
    if articles:
        return articles
    documents = [tuple(line.strip() for line in row.splitlines() if line.strip()) for row in rows]
    return [Article(f"row {index}", lines) for index, lines in enumerate(documents) if lines]


def embedded_articles() -> list[Article]:
    """`pydoc_data.topics` of the running Python: an article a topic, longest first; the same text occurs only once.

    Topics contain each other ("specialnames" has "attribute-access" in it), so that what is held out would otherwise be
    in the training text too. Only paragraphs that end as sentences do are kept: no grammar, code or headings.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    articles = []
    for title, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = []
        for block in re.split(r"\n\s*\n", text):
            paragraph = " ".join(block.split())
            if paragraph not in seen and _is_prose(paragraph):
                seen.add(paragraph)
                paragraphs.append(paragraph)
        if paragraphs:
            articles.append(Article(title, tuple(paragraphs)))
    return articles


def _is_prose(paragraph: str) -> bool:
    ends = paragraph.endswith((".", "!", "?", ":"))
    return ends and len(paragraph.split()) >= 5 and "::=" not in paragraph and not paragraph.startswith(">>>")


def load_articles(source: str, split: str, config: str | None = None) -> list[Article]:
    """Articles of one split of a corpus.

    Args:
        source: "pydoc-topics", the text embedded in Python, of which every eighth article is held out ("validation" and
            "test" are the same); a `.tokens`, `.raw`, `.txt` or `.parquet` file, which is the split; a folder of such
            files, named as WikiText's (`wiki.train.tokens`) or as those of datasets (`train.parquet`,
            `train-00000-of-00001.parquet`); or a data set of the Hub with a `text` column, such as
            "Salesforce/wikitext".
        split: "train", "validation" or "test".
        config: of the Hub's data set. Default: what `PINNED` says.

    Raises:
        UserError: no such split, file or data set, or it has no articles; the message says what to pass.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not known; it must be one of {', '.join(SPLITS)}")
    if source == EMBEDDED:
        articles = embedded_articles()
        return [a for i, a in enumerate(articles) if (i % 8 == 3) == (split != "train")]
    path = Path(source)
    if path.is_dir():
        articles = [article for file in _find_files(path, split) for article in _read(file)]
    elif path.is_file():
        articles = _read(path)
    elif path.is_absolute() or path.suffix in (*TEXT_SUFFIXES, ".parquet"):
        raise UserError(
            f"there is no file or folder {source!r}; pass a {', '.join(TEXT_SUFFIXES)} or .parquet file, or a folder of them"
        )
    else:
        articles = parse_rows(_from_hub(source, split, config))
    if not articles:
        raise UserError(
            f"{source!r} has no articles in its {split} split; an article begins at a line `= Title =` of its own, or is a "
            "row of the column `text`"
        )
    return articles


def _find_files(folder: Path, split: str) -> list[Path]:
    files = sorted(f for f in folder.iterdir() if f.suffix in (*TEXT_SUFFIXES, ".parquet"))
    for suffix in (".tokens", ".raw", ".txt", ".parquet"):
        # One kind of file only: .tokens and .raw hold the same articles.
        found = [
            f for f in files if f.suffix == suffix and any(n in re.split(r"[.\-_]", f.name) for n in SPLITS[split])
        ]
        if found:
            return found
    there = ", ".join(f.name for f in files) or "no text or parquet file"
    raise UserError(
        f"{folder.name!r} has no files of the {split} split, only {there}; name a file with --train_file or "
        "--validation_file"
    )


def _read(path: Path) -> list[Article]:
    if path.suffix == ".parquet":
        from datasets import Dataset

        data = Dataset.from_parquet(str(path), keep_in_memory=True)
        return parse_rows(_column(data, path.name))
    if path.suffix not in TEXT_SUFFIXES:
        raise UserError(f"{path.name!r} is not read; pass a {', '.join(TEXT_SUFFIXES)} or .parquet file")
    try:
        # Not splitlines(): it also breaks at the form feeds and Unicode separators within paragraphs.
        return parse_wikitext(path.read_text(encoding="utf-8").split("\n"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name!r} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def hub_source(name: str) -> tuple[str, str] | None:
    """Hub id and revision that a name is pinned to, or None."""
    return (name, PINNED[name][1]) if name in PINNED else None


def default_config(name: str) -> str | None:
    """The configuration that a Hub data set is read with where none is given, or None."""
    return PINNED[name][0] if name in PINNED else None


def _from_hub(name: str, split: str, config: str | None) -> Sequence[str]:
    from datasets import load_dataset

    _, revision = PINNED.get(name, (None, None))
    try:
        data = load_dataset(name, config or default_config(name), split=split, revision=revision)
    except (OSError, ValueError) as error:  # ConnectionError and DatasetNotFoundError are OSErrors
        raise UserError(
            f"the data set {name!r} could not be had from the Hub ({type(error).__name__}) and is no local file or folder; "
            f"without a network pass --dataset_name {EMBEDDED}, a folder with wiki.train.tokens and wiki.valid.tokens, or "
            "--train_file and --validation_file"
        ) from error
    return _column(data, name)


def _column(data: Any, name: str) -> Sequence[str]:
    if "text" not in data.column_names:
        raise UserError(f"{name!r} has the columns {', '.join(data.column_names)}, but no column `text`")
    return data["text"][:]


def split_sentences(paragraph: str) -> list[str]:
    """Sentences of a paragraph, by rule.

    A sentence ends at a word that ends with `.`, `!` or `?`, closing quotes and brackets after it included, unless the next
    word begins in lower case or the word is an `ABBREVIATION` ("Dr.", "J.", "U.S."). WikiText's full stops stand alone
    between spaces, and are taken as such.

    >>> split_sentences('It is H. americanus . " Is it ? " He left U.S. Route 2 .')
    ['It is H. americanus .', '" Is it ? "', 'He left U.S. Route 2 .']
    """
    words = paragraph.split()
    sentences: list[str] = []
    start = quotes = 0
    ended = False
    for index, word in enumerate(words):
        # A quotation mark with spaces around it closes where an odd number came before.
        closes = word in CLOSING and (word != '"' or quotes % 2 == 1)
        if ended and not closes and not word.lstrip(OPENING)[:1].islower():
            sentences.append(" ".join(words[start:index]))
            start, quotes = index, 0
        ended = (ended and closes) or _ends_sentence(word)
        quotes += word.count('"')
    if start < len(words):
        sentences.append(" ".join(words[start:]))
    return sentences


def _ends_sentence(word: str) -> bool:
    bare = word.rstrip(CLOSING)
    if bare.endswith("."):
        return not ABBREVIATION.fullmatch(bare.rstrip(".").lstrip(OPENING))
    return bare.endswith(("!", "?"))


def read_sentences(articles: Iterable[Article]) -> Iterator[str]:
    """All sentences of all articles."""
    for article in articles:
        for paragraph in article.paragraphs:
            yield from split_sentences(paragraph)


def train_tokenizer(articles: Iterable[Article], vocab_size: int = 30_000) -> PreTrainedTokenizerBase:
    """ALBERT's tokenizer (Unigram, lower case, `[CLS] [SEP] <pad> <unk> [MASK]`) trained on articles.

    Args:
        articles: the training text.
        vocab_size: at most; a small corpus gives fewer. Default 30,000, ALBERT's.

    Raises:
        UserError: vocab_size is less than 100, or too small for the characters of the text.
    """
    from tokenizers import trainers
    from transformers import AlbertTokenizer

    if vocab_size < 100:
        raise UserError(f"vocab_size={vocab_size} is not allowed; it must be at least 100")
    empty = AlbertTokenizer()
    special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    # WikiText's <unk> is the special token; the trainer would make pieces of its letters.
    lines = (sentence.replace("<unk>", " ") for sentence in read_sentences(articles))
    empty.backend_tokenizer.train_from_iterator(lines, trainer)
    pieces = json.loads(empty.backend_tokenizer.to_str())["model"]["vocab"]
    learned = [(piece, score) for piece, score in pieces if piece not in special]
    # The trainer sums in an order that differs from run to run, and gives rare characters made-up scores below all others
    # in such an order. Rounded, with one score for those, and sorted, the same text gives the same ids.
    lowest = min((score for piece, score in learned if len(piece) > 1), default=0.0)
    learned = sorted(
        ((piece, round(max(score, lowest), 6)) for piece, score in learned), key=lambda entry: (-entry[1], entry[0])
    )
    return AlbertTokenizer(vocab=[(token, 0.0) for token in special] + learned)
