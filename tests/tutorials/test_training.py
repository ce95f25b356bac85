"""The training script: what it teaches, and that what it exports is what the library runs."""

import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from minipaged import LLM, SamplingParams

TRAINING = Path(__file__).parents[2] / "tutorials" / "train_storyteller"
ASSETS = Path(__file__).parents[2] / "minipaged" / "assets" / "storyteller"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(TRAINING))
    yield
    for name in ("bpe", "dense_llama", "windows", "train"):
        sys.modules.pop(name, None)


def test_the_shipped_tokenizer_is_the_one_that_the_script_trains(tmp_path):
    from bpe import save_tokenizer

    save_tokenizer(tmp_path)
    forms = ("storyteller.tiktoken", "tiktoken.json", "tokenizer.json", "tokenizer_config.json")
    for name in forms:
        assert (tmp_path / name).read_bytes() == (ASSETS / name).read_bytes()


def test_every_word_of_the_grammar_is_one_token():
    from bpe import load_tokenizer

    from minipaged.evaluation.stories import ANIMALS, COLOURS, NAMES, PLACES, THINGS

    encoding = load_tokenizer(ASSETS)
    words = {word for place in PLACES for word in place.split()}
    for word in (*NAMES, *ANIMALS, *COLOURS, *THINGS, *words):
        assert len(encoding.encode(f" {word}")) == 1, word


def test_answers_have_full_weight_in_the_loss_and_facts_little():
    from bpe import load_tokenizer
    from windows import FACT_WEIGHT, Windows

    from minipaged.evaluation.stories import KINDS

    encoding = load_tokenizer(ASSETS)
    windows = Windows(encoding, seed=0)
    for _ in range(20):
        window = windows.story(300, 4, dict.fromkeys(KINDS, 1.0), ease=False)
        counted = [t for t, w in zip(window.ids, window.weights, strict=True) if w == 1.0]
        text = encoding.decode(counted)
        assert set(window.weights) <= {0.0, FACT_WEIGHT, 1.0}
        assert text.count("<|endoftext|>") > 5
        assert "Once upon" not in text
        assert "Q:" not in text


def test_an_exported_model_runs_in_the_library_with_the_same_tokens(tmp_path):
    from bpe import load_tokenizer
    from dense_llama import Shape, Storyteller, export, load_model

    for name in ("storyteller.tiktoken", "tiktoken.json"):
        shutil.copy(ASSETS / name, tmp_path)
    encoding = load_tokenizer(tmp_path)
    torch.manual_seed(0)
    shape = Shape(encoding.n_vocab, hidden_size=32, num_hidden_layers=2, head_dim=8)
    model = Storyteller(shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    export(model, encoding, tmp_path)
    ids = encoding.encode("Once upon a time Theo the frog")
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    [output] = LLM(tmp_path).generate([ids], params, use_tqdm=False)
    dense = load_model(tmp_path)
    with torch.inference_mode():
        for _ in range(20):
            ids.append(int(dense(torch.tensor([ids]))[0, -1].argmax()))
    assert output.outputs[0].token_ids == ids[-20:]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_training_can_be_interrupted_and_resumed(tmp_path):
    from bpe import load_tokenizer
    from train import Trainer

    args = Namespace(
        seed=0, work=tmp_path, compile=False, lr=1e-3, settle_steps=1, batch_tokens=256
    )
    encoding = load_tokenizer(ASSETS)
    first = Trainer(args, encoding)
    for _ in range(3):
        first.step()
    first.save()
    second = Trainer(args, encoding)
    assert second.progress == first.progress
    assert second.windows.rng.getstate() == first.windows.rng.getstate()
    before = first.model.state_dict()
    assert all(torch.equal(w, before[name]) for name, w in second.model.state_dict().items())
