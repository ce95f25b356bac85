"""The embedded model: it answers from its context, the same whatever happens to its blocks."""

from itertools import pairwise

import pytest

from minipaged import LLM, Parts, SamplingParams
from minipaged.evaluation.stories import KINDS, prompt, tell

GREEDY = SamplingParams(temperature=0.0, max_tokens=32)
STORY = "Once upon a time Theo the frog put the white key in the meadow."
QUESTION = f"{STORY}\nQ: What did Theo do with the key?\nA:"


def questions_of(num_facts: int, num_stories: int, seed: int = 10**6):
    """One question of each kind about each of these stories, their facts taken in turn."""
    for number in range(num_stories):
        story = tell(num_facts, seed=seed + number)
        for index, kind in enumerate(KINDS):
            fact = (7 * number + 3 * index) % num_facts
            [question] = [q for q in story.questions if (q.kind, q.fact_index) == (kind, fact)]
            yield prompt(story, question), question


def recall(llm: LLM, num_facts: int, num_stories: int) -> float:
    asked = list(questions_of(num_facts, num_stories))
    outputs = llm.generate([text for text, _ in asked], GREEDY, use_tqdm=False)
    right = [
        question.is_answered_by(output.outputs[0].text)
        and output.outputs[0].finish_reason == "stop"
        for output, (_, question) in zip(outputs, asked, strict=True)
    ]
    return sum(right) / len(right)


@pytest.mark.parametrize(("num_facts", "aim"), [(8, 0.95), (24, 0.85)])
def test_the_model_answers_questions_about_unseen_stories(num_facts, aim):
    assert recall(LLM("storyteller"), num_facts, num_stories=30) >= aim


def test_transformers_answers_the_same_from_the_same_folder():
    import torch
    import transformers

    llm = LLM("storyteller")
    model = transformers.AutoModelForCausalLM.from_pretrained(llm.folder, dtype=torch.float32)
    model.eval()
    prompts = [text for text, _ in questions_of(24, num_stories=4)]
    for output in llm.generate(prompts, GREEDY, use_tqdm=False):
        ids = torch.tensor([output.prompt_token_ids])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        assert output.outputs[0].token_ids == expected[0, ids.shape[1] :].tolist()


def test_mixed_up_blocks_change_the_answers():
    """The proof that its answers come from the cache, and from the right place in it."""
    from minipaged.attention.backend import BACKENDS

    def shuffled(q, k_cache, v_cache, batch, scale):
        batch.block_tables[:] = batch.block_tables.flip(0)
        return BACKENDS["reference"].paged_attention(q, k_cache, v_cache, batch, scale)

    assert recall(LLM("storyteller", parts=Parts(paged_attention=shuffled)), 8, 10) < 0.5


def test_text_ends_before_a_stop_string_that_spans_several_tokens():
    llm = LLM("storyteller")
    [whole] = llm.generate(QUESTION, GREEDY, use_tqdm=False)
    text = whole.outputs[0].text
    assert text == " Theo the frog put the white key in the meadow."
    params = SamplingParams(temperature=0.0, max_tokens=32, stop=["og put the wh", "zebra"])
    [stopped] = llm.generate(QUESTION, params, use_tqdm=False)
    assert stopped.outputs[0].text == " Theo the fr"
    assert stopped.outputs[0].stop_reason == "og put the wh"


def test_text_held_back_for_a_stop_string_is_shown_when_the_tokens_run_out():
    def text(**more):
        params = SamplingParams(temperature=0.0, max_tokens=3, **more)
        return LLM("storyteller").generate(QUESTION, params, use_tqdm=False)[0].outputs[0].text

    whole = text()
    assert text(stop=[whole[-1] + "@"]) == whole


def test_a_text_prompt_may_come_in_vllms_forms():
    llm = LLM("storyteller")
    params = SamplingParams(temperature=0.0, max_tokens=1)
    [plain] = llm.generate(QUESTION, params, use_tqdm=False)
    ids = plain.prompt_token_ids
    for form in ({"prompt": QUESTION}, {"prompt": QUESTION, "prompt_token_ids": ids}):
        [output] = llm.generate(form, params, use_tqdm=False)
        assert (output.prompt, output.prompt_token_ids) == (QUESTION, ids)


def test_streamed_pieces_add_up_to_the_text():
    llm = LLM("storyteller")
    texts = [output.outputs[0].text for _, output in llm.stream(QUESTION, GREEDY)]
    assert len(texts) > 5
    assert all(late.startswith(early) for early, late in pairwise(texts))


def test_small_and_large_pools_give_the_same_stories():
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=60, ignore_eos=True)
    prompts = ["Once upon a time", "Once upon a time Theo", "Once upon a time Mia the owl"] * 3
    ample = LLM("storyteller").generate(prompts, params, use_tqdm=False)
    for preemption in ("recompute", "swap"):
        llm = LLM("storyteller", num_blocks=14, preemption=preemption, parts=Parts().checked())
        starved = llm.generate(prompts, params, use_tqdm=False)
        assert [o.outputs[0].text for o in starved] == [o.outputs[0].text for o in ample]
        assert sum(o.metrics.num_preemptions for o in starved) > 0
