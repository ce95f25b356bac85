"""The names of Hugging Face's tokenizers for the features that exist here.

Unsupported features (padding, truncation, tensors) are refused by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from minipaged.errors import InvalidRequest
from minipaged.tokenizer.byte_letters import spell_bytes
from minipaged.tokenizer.chat_template import Chat, list_chats, read_chat
from minipaged.tokenizer.control_tokens import split_at_control_tokens
from minipaged.utils.not_built import by_name, refuse_not_built
from minipaged.utils.options import shown

NOT_BUILT = by_name({
    "a tokenizer here only turns text into token ids and back": {
        "padding": (False, "do_not_pad"), "truncation": (False, "do_not_truncate"),
        "max_length": None, "pad_to_multiple_of": None, "padding_side": None, "stride": 0,
        "return_tensors": None, "return_token_type_ids": False,
        "return_overflowing_tokens": False, "return_offsets_mapping": False,
        "return_special_tokens_mask": False, "return_length": False,
        "return_assistant_tokens_mask": False, "tokenizer_kwargs": None, "text_pair": None,
        "text_target": None, "is_split_into_words": False, "clean_up_tokenization_spaces": False,
    },
})  # fmt: skip


class BatchEncoding(dict[str, Any]):
    """An encoded text: `encoding["input_ids"]` and `encoding.input_ids` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"an encoding has {', '.join(self)}, but no {name!r}.") from None


class HuggingFaceNames(ABC):
    """The part of a tokenizer that provides the rest under Hugging Face's names."""

    vocabulary: Mapping[int, bytes]
    special_tokens: dict[str, int]
    added_tokens: dict[str, int]
    folder: Path | None = None
    """The checkpoint that it was read from, with the chat template."""
    roles: Mapping[str, str] = {}
    """The text of each token with a role, as in {"eos_token": "</s>"}."""

    @abstractmethod
    def encode(
        self, text: str, *, add_special_tokens: bool = True, allow_special: bool = True
    ) -> list[int]:
        """The tokens of a text."""

    @abstractmethod
    def decode(self, token_ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of some tokens."""

    def __len__(self) -> int:
        """The number of tokens in the vocabulary."""
        return len(self.vocabulary)

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: None = None,
        *,
        add_special_tokens: bool = True,
        **not_built: Any,
    ) -> BatchEncoding:
        """Encode one text, or each of several.

        Returns {"input_ids": ids, "attention_mask": ones}; for several texts, lists of these.
        Raises InvalidRequest if it is not text, InvalidOption for an unsupported parameter.
        """
        refuse_others({"text_pair": text_pair, **not_built})
        if isinstance(text, str):
            return _encoding(self.encode(text, add_special_tokens=add_special_tokens))
        texts: list[Any] = list(text) if isinstance(text, list | tuple) else [text]
        for each in texts:
            if not isinstance(each, str):
                raise InvalidRequest(f"{shown(each)} is not text: give a string or a list of them.")
        return _encoding([self.encode(t, add_special_tokens=add_special_tokens) for t in texts])

    def batch_decode(
        self, sequences: Iterable[Iterable[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """The text of each sequence of tokens."""
        return [self.decode(token_ids, skip_special_tokens) for token_ids in sequences]

    # ---- chats -----------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: Any,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = True,
        *,
        return_dict: bool = True,
        **more: Any,
    ) -> str | list[str] | list[int] | list[list[int]] | BatchEncoding:
        """One conversation or several as text (`tokenize=False`), token ids or an encoding of them.

        The options are those of `read_chat`, with Hugging Face's defaults; `more` is passed to the
        template. Unlike in Hugging Face, special tokens that messages spell out are encoded as
        text unless `sanitize_control_tokens` is False. Raises what `read_chat` and `Chat.render`
        raise.
        """
        refuse_others({name: more.pop(name) for name in NOT_BUILT if name in more})
        if documents is not None:
            more["documents"] = documents
        given = list_chats(conversation)
        chats = [
            read_chat(
                self.folder,
                messages,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=more,
            )
            for messages in given
        ]
        prompts: list[Any] = [chat.render() for chat in chats]
        if tokenize and sanitize_control_tokens:
            prompts = [self.encode_chat(*each) for each in zip(chats, prompts, strict=True)]
        elif tokenize:
            prompts = [self.encode(text, add_special_tokens=False) for text in prompts]
        answer = prompts[0] if given[0] is conversation else prompts
        return _encoding(answer) if tokenize and return_dict else answer

    def encode_chat(self, chat: Chat, text: str) -> list[int]:
        """The tokens of a rendered chat, where only the template's own are control tokens.

        Raises InvalidRequest if the two cannot be distinguished; see control_tokens.py.
        """
        pieces = split_at_control_tokens(chat, text, self.special_tokens)
        if pieces is None:
            return self.encode(text, add_special_tokens=False)
        return self.encode_pieces(pieces)

    def encode_pieces(self, pieces: Sequence[str]) -> list[int]:
        """Encode a text in pieces, of which every second one is a special token."""
        token_ids: list[int] = []
        for number, piece in enumerate(pieces):
            if number % 2:
                token_ids.append(self.special_tokens[piece])
            else:
                token_ids += self.encode(piece, add_special_tokens=False, allow_special=False)
        return token_ids

    # ---- the vocabulary --------------------------------------------------------------------------

    def get_vocab(self) -> dict[str, int]:
        """Maps tokens, as spelt in `tokenizer.json`, to ids."""
        return dict(self._ids)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {self.token_text(token_id): token_id for token_id in self.vocabulary}

    @cached_property
    def _added_texts(self) -> dict[int, str]:
        return {token_id: text for text, token_id in self.added_tokens.items()}

    def token_text(self, token_id: int) -> str:
        """A token of the vocabulary as `tokenizer.json` spells it: GPT-2's letters for bytes."""
        added = self._added_texts.get(token_id)
        return spell_bytes(self.vocabulary[token_id]) if added is None else added

    def convert_ids_to_tokens(
        self, ids: int | Iterable[int], skip_special_tokens: bool = False
    ) -> str | list[str | None] | None:
        """Each token as `tokenizer.json` spells it; None for an id that no token has."""
        skipped = set(self.all_special_ids) if skip_special_tokens else set[int]()
        tokens = [
            self.token_text(i) if i in self.vocabulary else None
            for i in to_list(ids)
            if i not in skipped
        ]
        return next(iter(tokens), None) if isinstance(ids, int) else tokens

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int | None] | None:
        """The ids of tokens as `tokenizer.json` spells them; else that of `unk_token`, or None."""
        if not isinstance(tokens, str):
            return [self._ids.get(token, self.unk_token_id) for token in tokens]
        return self._ids.get(tokens, self.unk_token_id)

    @property
    def all_special_tokens(self) -> list[str]:
        """All tokens that `skip_special_tokens` omits from a text."""
        return list(self.special_tokens)

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids."""
        return list(self.special_tokens.values())

    # ---- tokens by role; None if the checkpoint names none ---------------------------------------

    def _id_of(self, token: str | None) -> int | None:
        if token is None or token in self.added_tokens:
            return self.added_tokens.get(token or "")
        return self._ids.get(token)

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text."""
        return self.roles.get("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Its id."""
        return self._id_of(self.bos_token)

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text, or an answer."""
        return self.roles.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Its id."""
        return self._id_of(self.eos_token)

    @property
    def pad_token(self) -> str | None:
        """The token that pads a batch in other libraries; not used here."""
        return self.roles.get("pad_token")

    @property
    def pad_token_id(self) -> int | None:
        """Its id."""
        return self._id_of(self.pad_token)

    @property
    def unk_token(self) -> str | None:
        """The token for unknown text."""
        return self.roles.get("unk_token")

    @property
    def unk_token_id(self) -> int | None:
        """Its id."""
        return self._id_of(self.unk_token)


def refuse_others(given: Mapping[str, Any]) -> None:
    """Refuse Hugging Face's parameters that would have an effect. Raises InvalidOption."""
    for name, value in given.items():
        refuse_not_built(name, value, NOT_BUILT, ())


def to_list(ids: Any) -> list[int]:
    """One id, or the ids of a list, an array or a tensor."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    return [ids] if isinstance(ids, int) else list(ids)


def _encoding(input_ids: Any) -> BatchEncoding:
    """The ids with a mask of ones, because nothing is padded here."""
    is_batch = bool(input_ids) and isinstance(input_ids[0], list)
    mask = [[1] * len(ids) for ids in input_ids] if is_batch else [1] * len(input_ids)
    return BatchEncoding(input_ids=input_ids, attention_mask=mask)
