"""Text to token ids and back: a character tokenizer of our own, and any transformers tokenizer behind the same interface.

Tokens are the truth: environments decode text from them and never encode sampled text back.
"""

from __future__ import annotations

import json
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"


class Tokenizer(ABC):
    """What an environment needs of a tokenizer.

    Attributes:
        name: says which tokenizer it is, for provenance.
        vocab_size: ids run from 0 to ``vocab_size - 1``.
        eos_ids: ids that end a completion, the first of them the tokenizer's own.
        decodable_V: bool ``(V,)``, False for ids that stand for no text.
    """

    name: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    decodable_V: np.ndarray

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without any special token added."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens written out."""

    def encode_prompt(self, prompt: str, system: str | None = None) -> list[int]:
        """The ids of a prompt as the policy gets it: through the chat template where there is one."""
        return self.encode(f"{system}\n{prompt}" if system else prompt)

    def encode_reply(self, reply: str, after_eos: bool) -> list[int]:
        """The ids that follow a completion when the environment replies and the policy is to go on.

        ``after_eos`` says whether the completion ended itself with an end-of-sequence token.
        """
        return self.encode(reply)

    @abstractmethod
    def to_transformers(self) -> Any:
        """The same tokenizer as a ``transformers`` one, to be saved beside a model."""


class CharTokenizer(Tokenizer):
    """One token a character; id 0 ends the sequence.

    Args:
        characters: the alphabet, in the order of its ids from 1 on. The default is printable ASCII and the newline.

    Raises:
        ValueError: on encoding a character outside the alphabet.

    Example:
        >>> CharTokenizer("ab").encode("abba")
        [1, 2, 2, 1]
    """

    EOS = "<eos>"

    def __init__(self, characters: str = CHARACTERS) -> None:
        if len(set(characters)) != len(characters):
            raise ValueError(f"the alphabet must not repeat a character, got {characters!r}")
        self.name = "characters" if characters == CHARACTERS else f"characters:{characters}"
        self.characters = characters
        self.vocab_size = len(characters) + 1
        self.eos_ids = (0,)
        self.decodable_V = np.ones(self.vocab_size, dtype=bool)
        self._id = {character: i for i, character in enumerate(characters, start=1)}
        self._text = [self.EOS, *characters]

    def encode(self, text: str) -> list[int]:
        try:
            return [self._id[character] for character in text]
        except KeyError as error:
            raise ValueError(
                f"the character {error.args[0]!r} in {text[:60]!r} is not in the character tokenizer's alphabet of "
                f"{len(self.characters)}; take it out or use a model whose tokenizer covers it"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join([self._text[i] for i in ids])

    def to_transformers(self) -> Any:
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend
        from transformers import PreTrainedTokenizerFast

        backend = Backend(models.WordLevel({text: i for i, text in enumerate(self._text)}, unk_token=None))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([AddedToken(self.EOS, normalized=False)])
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token=self.EOS,
            pad_token=self.EOS,
            clean_up_tokenization_spaces=False,
        )


class TransformersTokenizer(Tokenizer):
    """A ``transformers`` tokenizer. Prompts go through its chat template when it has one.

    Args:
        tokenizer: the loaded tokenizer.
        extra_eos_ids: further ids that end a completion, e.g. those of the model's ``generation_config.json``.
        name: for provenance; default ``tokenizer.name_or_path``.

    Raises:
        ValueError: without an end-of-sequence token, or when the chat template rewrites earlier turns, which would
            make the tokens trained on differ from those sampled.
    """

    def __init__(self, tokenizer: Any, extra_eos_ids: Sequence[int] = (), name: str | None = None) -> None:
        self.name = name or tokenizer.name_or_path
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {self.name!r} has no end-of-sequence token, so no completion could ever end; "
                "set eos_token in its tokenizer_config.json"
            )
        self._tokenizer = tokenizer
        self.eos_ids = tuple(dict.fromkeys([tokenizer.eos_token_id, *extra_eos_ids]))
        known_ids = np.fromiter(tokenizer.get_vocab().values(), dtype=np.int64)
        self.vocab_size = int(known_ids.max()) + 1
        self.decodable_V = np.zeros(self.vocab_size, dtype=bool)
        self.decodable_V[known_ids] = True
        unknown = sorted(set(self.eos_ids) - set(known_ids.tolist()))
        if unknown:
            raise ValueError(
                f"the end-of-sequence ids {unknown} are no tokens of {self.name!r}, whose ids go up to "
                f"{self.vocab_size - 1}; mend eos_token_id in its generation_config.json"
            )

    def encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the tokenizers library raises no narrower one
            if type(error) is not Exception:
                raise
            raise ValueError(f"the tokenizer {self.name!r} cannot write {text[:60]!r}: {error}") from error

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def to_transformers(self) -> Any:
        return self._tokenizer

    def encode_prompt(self, prompt: str, system: str | None = None) -> list[int]:
        if self._tokenizer.chat_template is None:
            return [*self._bos, *self.encode(f"{system}\n{prompt}" if system else prompt)]
        return self.encode(self._render(_messages(prompt, system)))

    def encode_reply(self, reply: str, after_eos: bool) -> list[int]:
        if self._tokenizer.chat_template is None:
            return self.encode(reply)
        before = self._render(_messages("?")) + "!"
        text = self._render(
            [*_messages("?"), {"role": "assistant", "content": "!"}, {"role": "user", "content": reply}]
        )
        if not text.startswith(before):
            raise ValueError(
                f"the chat template of {self.name!r} rewrites earlier turns once a reply follows, so sampled tokens "
                "would not be the ones trained on; use a template that only appends"
            )
        ids = self.encode(text[len(before) :])
        # The sampled end token already stands in the context: the template's own must not follow it again.
        return ids[1:] if after_eos and ids and ids[0] in self.eos_ids else ids

    @cached_property
    def _bos(self) -> list[int]:
        """The tokenizer's own beginning-of-sequence token, if it puts one before plain text."""
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and self._tokenizer.encode("a")[:1] == [bos] else []

    def _render(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # templates refuse roles that their model does not know, system above all
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"the chat template of {self.name!r} refuses messages of the roles {roles}: {error}"
            ) from error


def _messages(prompt: str, system: str | None = None) -> list[dict[str, str]]:
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": prompt}]


def load_tokenizer(source: str | Path | Tokenizer | Any | None) -> Tokenizer:
    """The tokenizer named by ``source``: a folder or hub name, a transformers tokenizer, one of ours, or None for characters.

    A folder's ``generation_config.json`` is read for its end-of-sequence ids and for nothing else.

    Raises:
        ValueError: the tokenizer cannot be loaded or has no end-of-sequence token.
    """
    if source is None:
        return CharTokenizer()
    if isinstance(source, Tokenizer):
        return source
    if not isinstance(source, str | Path):
        return TransformersTokenizer(source)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer at {str(source)!r}: {str(error).splitlines()[0]}") from error
    return TransformersTokenizer(tokenizer, _generation_eos_ids(str(source)), name=str(source))


def _generation_eos_ids(source: str) -> list[int]:
    from transformers.utils import cached_file

    path = cached_file(source, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return []
    ids = json.loads(Path(path).read_text()).get("eos_token_id")
    return [ids] if isinstance(ids, int) else list(ids or [])
