"""SentencePiece tokens to text: a text begins without the space that it was encoded with.

The judge is Hugging Face's `tokenizers`.
"""

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minipaged.errors import UnsupportedTokenizer
from minipaged.tokenizer.detokenizer import Detokenizer
from minipaged.tokenizer.hf_library import LibraryTokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
REPLACE = decoders.Replace("\u2581", " ")
LLAMA = [REPLACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
DECODERS = {
    "always": decoders.Metaspace(prepend_scheme="always"),
    "first": decoders.Metaspace(prepend_scheme="first"),
    "never": decoders.Metaspace(prepend_scheme="never"),
    "llama": decoders.Sequence(LLAMA),
    "gemma": decoders.Sequence(LLAMA[:3]),
    "bytes, then words": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
}
TEXT = "Hello world  hello   frog. Hello\nthe frog \u00e9\U0001f600 world"


def train(decoder) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", *BYTES], show_progress=False
    )
    tokenizer.train_from_iterator(["Hello world hello frog the   end  "] * 3, trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][:2]  # bytes are no special tokens
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.decoder = decoder
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


@pytest.fixture(params=DECODERS)
def both(request, tmp_path) -> tuple[LibraryTokenizer, Tokenizer]:
    judge = train(DECODERS[request.param])
    judge.save(str(tmp_path / "tokenizer.json"))
    return LibraryTokenizer(tmp_path / "tokenizer.json"), judge


def test_a_text_and_every_piece_of_it_decode_as_in_the_reference(both):
    tokenizer, judge = both
    token_ids = judge.encode(TEXT).ids
    compared = 0
    for start in range(len(token_ids)):
        for stop in range(start, len(token_ids) + 1):
            for skip in (True, False):
                expected = judge.decode(token_ids[start:stop], skip_special_tokens=skip)
                if "\ufffd" in expected:  # half a character: how many marks is a matter of taste
                    continue
                got = tokenizer.decode(token_ids[start:stop], skip_special_tokens=skip)
                assert got == expected, token_ids[start:stop]
                compared += 1
    assert compared > 300


def test_random_tokens_and_unknown_ids_decode_as_in_the_reference(both):
    tokenizer, judge = both
    rng = random.Random(0)
    spaces = [i for text, i in judge.get_vocab().items() if text.startswith("\u2581")]
    for _ in range(500):
        token_ids = rng.choices([1, 10_000, *spaces], k=rng.randint(0, 4))
        assert tokenizer.decode(token_ids, skip_special_tokens=True) == judge.decode(token_ids)


def test_a_prompt_and_its_streamed_continuation_are_the_whole_text(both):
    tokenizer, judge = both
    token_ids = judge.encode(TEXT).ids
    whole = judge.decode(token_ids)
    for cut in range(len(token_ids)):
        prompt = token_ids[:cut]
        detokenizer = Detokenizer(tokenizer, after=prompt)
        pieces = [*map(detokenizer.add, token_ids[cut:]), detokenizer.finish()]
        if "\ufffd" not in judge.decode(prompt):
            assert judge.decode(prompt) + "".join(pieces) == whole, cut


def test_a_continuation_keeps_its_space_and_a_beginning_does_not(tmp_path):
    judge = train(DECODERS["llama"])
    judge.save(str(tmp_path / "tokenizer.json"))
    tokenizer = LibraryTokenizer(tmp_path / "tokenizer.json")
    world = judge.encode("world", add_special_tokens=False).ids
    for prompt, text in (([], "world"), ([1], "world"), (judge.encode("Hello").ids, " world")):
        detokenizer = Detokenizer(tokenizer, after=prompt)
        assert "".join([*map(detokenizer.add, world), detokenizer.finish()]) == text


@pytest.mark.parametrize(
    "steps",
    [
        [REPLACE, decoders.Fuse(), decoders.Strip(" ", 2, 0)],
        [REPLACE, decoders.Fuse(), decoders.Strip(" ", 1, 1)],
        [REPLACE, decoders.Strip(" ", 1, 0)],
        [decoders.WordPiece()],
    ],
)
def test_an_unknown_decoder_is_refused(steps, tmp_path):
    train(decoders.Sequence(steps)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedTokenizer, match="neither a byte-level nor a SentencePiece"):
        LibraryTokenizer(tmp_path / "tokenizer.json")
