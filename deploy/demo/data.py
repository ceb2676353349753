"""The corpus: this Python's own standard library, as documents, as chat examples, and as a tokenizer trained on them.

Chosen because every CPython carries it (so the run needs no download), it is large enough for a model of this size, and
its licence is known. It knows nothing of the model.
"""

import ast
import hashlib
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL_TOKENS = [BOS, EOS, PAD, USER, ASSISTANT]  # ids 0..4, as DeepSeek's first three

# Tables and fixtures rather than code; lib2to3 also holds files that are wrong on purpose.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "lib2to3", "encodings", "pydoc_data", "__pycache__"}
HELD_OUT_PER_MILLE = 15
MAX_CHAT_ANSWER_CHARS = 2400  # about 700 tokens: answers should end within a window

# A line break takes the indentation after it along; words may contain underscores; digits go in threes.
SPLIT = r"[\r\n]+[ \t]*| ?[\p{L}_]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|[ \t]+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '" + ASSISTANT + "' + (message['content'] or '') + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


class Document(NamedTuple):
    path: str  # relative to the standard library
    text: str
    held_out: bool


def load_documents() -> list[Document]:
    """Every readable .py file, sorted by path. Held-out ones are chosen by a hash, so the same on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if EXCLUDED_FOLDERS & set(path.parts):
            continue
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            digest = hashlib.sha256(path.as_posix().encode()).digest()
            held_out = int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_MILLE
            documents.append(Document(path.as_posix(), text, held_out))
    return documents


def compute_chat_examples(documents: list[Document], seed: int) -> list[tuple[str, str]]:
    """(user, assistant) pairs: a function described in one of a few phrasings, and its source."""
    rng = random.Random(seed)
    examples = []
    for document in documents:
        in_tests = document.path.startswith("test/") or "/test" in document.path
        for function in _functions(document.text):
            described = ast.get_docstring(function) is not None
            # Test methods are many and alike: keep a few, so that ordinary functions dominate.
            if in_tests and rng.random() > (0.3 if described else 0.06):
                continue
            source = _source_of(function, document.text)
            if source is not None:
                examples.append((_phrase(function, rng), source))
    rng.shuffle(examples)
    return examples


def _functions(text: str) -> Iterator[ast.FunctionDef]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old files
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node


def _source_of(function: ast.FunctionDef, text: str) -> str | None:
    lines = text.splitlines()[function.lineno - 1 : function.end_lineno]
    source = textwrap.dedent("\n".join(lines)).strip()
    return source if 40 < len(source) < MAX_CHAT_ANSWER_CHARS and source.startswith("def ") else None


def _phrase(function: ast.FunctionDef, rng: random.Random) -> str:
    signature = f"{function.name}({', '.join(argument.arg for argument in function.args.args)})"
    docstring = (ast.get_docstring(function) or "").strip()
    summary = docstring.split("\n\n")[0].replace("\n", " ").strip().rstrip(".")
    if not 8 < len(summary) < 200:
        return rng.choice(
            [
                f"Write a Python function `{signature}`.",
                f"def {signature}:",
                f"Implement `{signature}` in Python.",
                f"Write a function called {function.name}.",
            ]
        )
    return rng.choice(
        [
            f"Write a Python function `{signature}`: {summary}.",
            f"Write a Python function `{signature}` that does the following: {summary}.",
            f'def {signature}:\n    """{summary}."""',
            f"{summary}. Name the function `{function.name}`.",
            f"Write a function: {summary}.",
        ]
    )


def format_chat(user: str, assistant: str) -> str:
    """One whole conversation as the chat template renders it."""
    return f"{BOS}{USER}{user}{ASSISTANT}{assistant}{EOS}"


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE that puts BOS in front, like the published models' tokenizers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
            ),
        ]
    )
    return tokenizer


class Corpus(NamedTuple):
    tokenizer: Tokenizer
    documents: list[np.ndarray]  # uint16 token ids, each BOS .. EOS
    chats: list[np.ndarray]  # the same, as conversations
    held_out: list[Document]


def load_corpus(vocab_size: int, seed: int, tokenizer: Tokenizer | None) -> Corpus:
    """Read, train the tokenizer on the training files only unless one is given, and tokenise once."""
    documents = load_documents()
    training = [document for document in documents if not document.held_out]
    if tokenizer is None:
        tokenizer = train_tokenizer((document.text for document in training), vocab_size)

    def encode(texts: list[str]) -> list[np.ndarray]:
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, dtype=np.uint16) for one in encoded]

    chats = [format_chat(user, assistant) for user, assistant in compute_chat_examples(training, seed)]
    return Corpus(
        tokenizer,
        encode([BOS + document.text + EOS for document in training]),
        encode(chats),
        [document for document in documents if document.held_out],
    )


GOLDEN = (5**0.5 - 1) / 2


class Stream:
    """Endless windows of shuffled documents laid end to end, cut without regard to borders.

    Starts follow multiples of the golden ratio: neighbours in a batch come from far apart, whatever the window length,
    and any number of windows covers the corpus evenly. Consecutive windows would make a batch of one file."""

    def __init__(self, documents: list[np.ndarray], seed: int):
        order = np.random.default_rng(seed).permutation(len(documents))
        self.tokens = np.concatenate([documents[index] for index in order])
        self.num_taken = 0

    def take_(self, length: int) -> np.ndarray:
        """The next window of length + 2 tokens, two for the targets."""
        self.num_taken += 1
        start = int(self.num_taken * GOLDEN % 1.0 * (len(self.tokens) - length - 2))
        return self.tokens[start : start + length + 2]
