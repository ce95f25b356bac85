"""Published tokenizers, by tiktoken: compared with Hugging Face's `tokenizers`."""

import json
import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers_of_styles import STYLES, make_qwen, make_sentencepiece, make_texts

from minipaged.errors import CheckpointError, InvalidRequest, UnsupportedTokenizer
from minipaged.tokenizer import patterns
from minipaged.tokenizer.bpe import BytePairTokenizer
from minipaged.tokenizer.hf_library import LibraryTokenizer
from minipaged.tokenizer.load import read_tokenizer

TEXTS = make_texts(20_000)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {style: tmp_path_factory.mktemp(style) for style in STYLES}


@pytest.fixture(scope="module")
def judges(folders):
    return {style: make(folders[style]) for style, make in STYLES.items()}


@pytest.fixture(scope="module")
def tokenizers(folders, judges):
    return {style: read_tokenizer(folders[style]) for style in STYLES}


def num_differing(tokenizer, judge, texts, **options) -> int:
    expected = judge.encode_batch(texts, add_special_tokens=True)
    return sum(tokenizer.encode(t) != e.ids for t, e in zip(texts, expected, strict=True))


@pytest.mark.parametrize("style", STYLES)
def test_every_text_has_the_same_tokens(style, tokenizers, judges):
    assert isinstance(tokenizers[style], BytePairTokenizer)
    expected = judges[style].encode_batch(TEXTS)
    for text, encoding in zip(TEXTS, expected, strict=True):
        assert tokenizers[style].encode(text) == encoding.ids, text


@pytest.mark.parametrize("style", STYLES)
def test_text_without_special_tokens_has_the_same_tokens(style, tokenizers, judges):
    judge = judges[style]
    judge.encode_special_tokens = True
    expected = judge.encode_batch(TEXTS[:3_000], add_special_tokens=False)
    judge.encode_special_tokens = False
    for text, encoding in zip(TEXTS, expected, strict=False):
        mere = tokenizers[style].encode(text, add_special_tokens=False, allow_special=False)
        assert mere == encoding.ids, text


@pytest.mark.parametrize("style", STYLES)
def test_decoding_gives_the_same_text(style, tokenizers):
    tokenizer = tokenizers[style]
    for text in TEXTS[:2_000]:
        normal = unicodedata.normalize("NFC", text) if style == "qwen" else text
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == normal


@pytest.mark.parametrize("style", STYLES)
def test_every_id_decodes_to_the_bytes_of_its_token(style, tokenizers, judges):
    tokenizer, judge = tokenizers[style], judges[style]
    assert tokenizer.vocab_size == judge.get_vocab_size()
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
        assert text == judge.decode([token_id], skip_special_tokens=False)


@pytest.mark.parametrize("style", STYLES)
def test_every_vocabulary_entry_that_is_text_encodes_to_itself(style, tokenizers, judges):
    """Or, where it can be no word of a text by itself, to what the other library makes of it."""
    tokenizer, judge = tokenizers[style], judges[style]
    num_themselves = num_text = 0
    for token_id in range(tokenizer.vocab_size):
        try:
            text = tokenizer.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            continue
        encoded = tokenizer.encode(text, add_special_tokens=False)
        assert encoded == judge.encode(text, add_special_tokens=False).ids, text
        num_themselves += encoded == [token_id]
        num_text += 1
    assert num_themselves > 0.98 * num_text > 500


@pytest.mark.parametrize("style", STYLES)
def test_the_pattern_of_another_style_is_detected(style, folders, judges, monkeypatch):
    others = [patterns.GPT2, patterns.SMOLLM, patterns.LLAMA3, patterns.QWEN]
    own = read_tokenizer(folders[style])._encoding._pat_str
    for other in others:
        # Qwen's vocabulary has no token of two digits, so it does not matter how they are cut.
        if other != own and (style, other) != ("qwen", patterns.LLAMA3):
            for module in ("hugging_face.choose_pattern", "hugging_face.GPT2"):
                name = f"minipaged.tokenizer.{module}"
                by_name = other if module.endswith("GPT2") else lambda _, other=other: other
                monkeypatch.setattr(name, by_name)
            wrong = read_tokenizer(folders[style])
            assert num_differing(wrong, judges[style], TEXTS[:1_000]) > 10


def test_accents_need_the_normal_form(folders, judges, monkeypatch):
    monkeypatch.setattr("minipaged.tokenizer.hugging_face._read_normalizer", lambda _: False)
    wrong = read_tokenizer(folders["qwen"])
    assert num_differing(wrong, judges["qwen"], TEXTS[:1_000]) > 10


def test_special_and_ordinary_added_tokens_are_distinguished(tokenizers):
    qwen = tokenizers["qwen"]
    assert set(qwen.special_tokens) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    ids = qwen.encode("<think>a</think><|im_end|>")
    assert len(ids) == 4
    assert qwen.decode(ids, skip_special_tokens=True) == "<think>a</think>"


def test_the_bos_token_is_left_out_on_request(tokenizers):
    for style, begin in (("llama3", "<|begin_of_text|>"), ("opt", "</s>")):
        tokenizer = tokenizers[style]
        assert tokenizer.encode("") == [tokenizer.special_tokens[begin]]
        assert tokenizer.encode("", add_special_tokens=False) == []


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("character", ["a", " ", "\n", "!", "1", "é"])
def test_a_very_long_text_without_spaces_is_encoded_quickly(style, character, tokenizers):
    text = character * 200_000 + "x"
    assert (
        tokenizers[style].decode(tokenizers[style].encode(text), skip_special_tokens=True) == text
    )


def test_too_many_consecutive_spaces_are_refused_in_a_sentence(tokenizers):
    with pytest.raises(InvalidRequest, match=r"3000001 characters .* a million or more spaces"):
        tokenizers["gpt2"].encode(" " * 3_000_000 + "x")


def test_vocab_and_merges_of_qwen_use_its_pattern_and_its_added_tokens(folders, judges, tmp_path):
    described = json.loads((folders["qwen"] / "tokenizer.json").read_text())
    model, added = described["model"], {t["id"]: t for t in described["added_tokens"]}
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = read_tokenizer(tmp_path)
    assert num_differing(tokenizer, judges["qwen"], TEXTS[:3_000]) == 0


# ---- tokenizers that tiktoken cannot express -----------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    return folder, make_sentencepiece(folder)


@pytest.mark.filterwarnings("ignore:a prompt begins with")
def test_a_sentencepiece_tokenizer_uses_the_tokenizers_library(sentencepiece):
    folder, judge = sentencepiece
    tokenizer = read_tokenizer(folder)
    assert isinstance(tokenizer, LibraryTokenizer)
    assert tokenizer.first_ids == [1]
    for text, encoding in zip(TEXTS[:3_000], judge.encode_batch(TEXTS[:3_000]), strict=True):
        assert tokenizer.encode(text) == encoding.ids
        bare = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(bare, skip_special_tokens=True) == judge.decode(bare)


def test_without_the_tokenizers_library_the_message_names_the_extra(sentencepiece, monkeypatch):
    monkeypatch.setattr("minipaged.tokenizer.hf_library.find_spec", lambda name: None)
    with pytest.raises(
        UnsupportedTokenizer, match=r"since .*pip install 'minipaged\[tokenizers\]'"
    ):
        read_tokenizer(sentencepiece[0])


def change(folder, target, **changes):
    """A tokenizer.json with parts replaced; names with two underscores reach into the model."""
    described = json.loads((folder / "tokenizer.json").read_text())
    for name, value in changes.items():
        part = described["model"] if name.startswith("model__") else described
        part[name.removeprefix("model__")] = value
    (target / "tokenizer.json").write_text(json.dumps(described))
    return target


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFD"}]}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"model__byte_fallback": True},
        {"model__end_of_word_suffix": "</w>"},
    ],
    ids=str,
)
def test_tokenizers_beyond_tiktoken_use_the_tokenizers_library(changes, folders, judges, tmp_path):
    tokenizer = read_tokenizer(change(folders["gpt2"], tmp_path, **changes))
    assert isinstance(tokenizer, LibraryTokenizer)
    judge = tokenizer._library
    for text in TEXTS[:200]:
        assert tokenizer.encode(text) == judge.encode(text).ids


@pytest.mark.parametrize("option", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_with_special_rules_use_the_tokenizers_library(option, tmp_path):
    make_qwen(tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    described["added_tokens"][-1][option] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    assert isinstance(read_tokenizer(tmp_path), LibraryTokenizer)


def test_tokens_that_end_every_text_are_left_out_of_a_prompt(folders, tmp_path):
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
        "pair": [],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    tokenizer = read_tokenizer(change(folders["gpt2"], tmp_path, post_processor=template))
    assert tokenizer.encode("a")[-1] != 0
    assert tokenizer.first_ids == []


def added(text: str, token_id: int, **options) -> dict:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": text, "special": True, **plain, **options}


NEXT = 1500  # the first id that GPT-2's vocabulary here does not have
ODD_TOKENS = {
    "overlapping, found in two passes": [
        added("<ab", NEXT, normalized=True),
        added("ab>", NEXT + 1),
    ],
    "one within another, found in two passes": [
        added("<ab", NEXT, normalized=True),
        added("<a", NEXT + 1),
    ],
    "another id in the vocabulary": [added("in", NEXT)],
    "an id of another token": [added("<x>", 300)],
    "one text twice": [added("<x>", NEXT), added("<x>", NEXT + 1)],
}


@pytest.mark.parametrize("case", ODD_TOKENS)
def test_overlapping_added_tokens_use_the_tokenizers_library(case, folders, judges, tmp_path):
    assert judges["gpt2"].get_vocab_size() == NEXT
    listed = json.loads((folders["gpt2"] / "tokenizer.json").read_text())["added_tokens"]
    tokens = [*listed, *ODD_TOKENS[case]]
    tokenizer = read_tokenizer(change(folders["gpt2"], tmp_path, added_tokens=tokens))
    assert isinstance(tokenizer, LibraryTokenizer)


def test_added_tokens_that_cannot_overlap_use_tiktoken(folders, judges, tmp_path):
    listed = json.loads((folders["gpt2"] / "tokenizer.json").read_text())["added_tokens"]
    tokens = [*listed, added("[one]", NEXT, normalized=True), added("<two>", NEXT + 1)]
    folder = change(folders["gpt2"], tmp_path, added_tokens=tokens)
    tokenizer, judge = read_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert isinstance(tokenizer, BytePairTokenizer)
    for text in ("[one]<two>", "<t[one]wo>", "<two>>[[one]", "[on<two>e]"):
        assert tokenizer.encode(text) == judge.encode(text).ids


def opt_folder(folders, target, files: dict):
    """OPT's tokenizer without the last words of its vocabulary; `files` are added to its folder."""
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (target / name).write_bytes((folders["opt"] / name).read_bytes())
    for name, content in files.items():
        before = json.loads((target / name).read_text()) if (target / name).exists() else {}
        (target / name).write_text(json.dumps({**before, **content}))
    return target


def test_a_token_with_a_second_role_is_one_token(folders, judges, tmp_path):
    more = {"additional_special_tokens": ["<unk>"], "mask_token": "<s>"}
    tokenizer = read_tokenizer(opt_folder(folders, tmp_path, {"tokenizer_config.json": more}))
    assert tokenizer.encode("<unk>a<s>")[1::2] == [3, 0]


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": {"<mask>": 5000}},
        {"tokenizer_config.json": {"mask_token": {"content": "<s>", "lstrip": True}}},
        {"tokenizer_config.json": {"add_prefix_space": True}},
    ],
    ids=str,
)
def test_vocab_and_merges_with_unknown_settings_are_refused(files, folders, judges, tmp_path):
    with pytest.raises(UnsupportedTokenizer, match=r"save it as tokenizer\.json"):
        read_tokenizer(opt_folder(folders, tmp_path, files))


def test_windows_line_ends_and_byte_order_marks_are_harmless(folders, judges, tmp_path):
    opt_folder(folders, tmp_path, {})
    merges = tmp_path / "merges.txt"
    merges.write_bytes(b"\xef\xbb\xbf" + merges.read_bytes().replace(b"\n", b"\r\n"))
    tokenizer = read_tokenizer(tmp_path)
    assert num_differing(tokenizer, judges["opt"], TEXTS[:300]) == 0


def make_other(kind: str) -> Tokenizer:
    if kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
        tokenizer.decoder = decoders.WordPiece()
    else:
        tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize("kind", ["WordPiece", "WordLevel"])
def test_a_tokenizer_whose_tokens_are_no_text_is_refused(kind, tmp_path):
    make_other(kind).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedTokenizer, match="neither a byte-level nor a SentencePiece"):
        read_tokenizer(tmp_path)


def test_a_lone_surrogate_becomes_the_replacement_character(sentencepiece, tokenizers):
    for tokenizer in (read_tokenizer(sentencepiece[0]), tokenizers["gpt2"]):
        assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")


# ---- broken files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "is JSON, but not an object"),
        ("{}", 'has no "model"'),
        ('{"model": {"type": "BPE", "vocab": {}}}', "is not a complete tokenizer|cuts text"),
    ],
)
def test_a_broken_file_is_named(text, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr("minipaged.tokenizer.hf_library.find_spec", lambda name: None)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=sentence) as refusal:
        read_tokenizer(tmp_path)
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__vocab": None},
        {"model__merges": None},
        {"model__merges": ["a b c"]},
        {"model__merges": [["a"]]},
        {"model__merges": [3]},
        {"added_tokens": [{"id": 3}]},
        {"post_processor": {"type": "TemplateProcessing"}},
        {"model__vocab": {"a": "b"}},
        {"model__vocab": {"a": -1}},
        {"model__vocab": {"a": 2.5}},
        {"model__vocab": {"a": 2**40}},
        {"model__vocab": {"a": True}},
        {"added_tokens": [{"id": 3, "content": ""}]},
        {"added_tokens": [{"id": 3, "content": "x" * 5000}]},
        {"added_tokens": [{"id": "7", "content": "<x>"}]},
        {"normalizer": "NFC"},
        {"normalizer": [1]},
        {"normalizer": {"type": "Sequence", "normalizers": {"a": 1}}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": 5}},
        {"post_processor": 3},
    ],
    ids=str,
)
def test_a_file_with_one_wrong_section_is_refused(changes, folders, judges, tmp_path):
    with pytest.raises(CheckpointError) as refusal:
        read_tokenizer(change(folders["gpt2"], tmp_path, **changes))
    assert str(tmp_path) in str(refusal.value)


def test_vocab_and_merges_of_an_unknown_class_are_refused(folders, judges, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folders["opt"] / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(UnsupportedTokenizer, match="was made for CLIPTokenizer"):
        read_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version\na b c\n")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="no complete tokenizer"):
        read_tokenizer(tmp_path)


def test_a_folder_with_only_a_sentencepiece_model_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UnsupportedTokenizer, match=r"download tokenizer\.json too"):
        read_tokenizer(tmp_path)
