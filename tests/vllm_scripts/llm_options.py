"""Arguments of LLM that scripts pass."""

import sys

from vllm import LLM, SamplingParams

llm = LLM(
    model=sys.argv[1],
    tokenizer=sys.argv[1],
    tokenizer_mode="auto",
    trust_remote_code=True,
    tensor_parallel_size=1,
    dtype="float32",
    quantization=None,
    revision=None,
    seed=0,
    gpu_memory_utilization=0.5,
    enforce_eager=True,
    max_model_len=128,
    max_num_seqs=4,
    max_num_batched_tokens=None,
    enable_chunked_prefill=True,
    num_gpu_blocks_override=64,
    load_format="auto",
    download_dir=None,
    generation_config="auto",
    disable_log_stats=True,
    hf_overrides={},
)
assert llm.get_default_sampling_params() == SamplingParams()
outputs = llm.generate("Once upon a time", use_tqdm=False)  # by the default parameters
assert len(outputs[0].outputs[0].token_ids) <= 16
assert llm.llm_engine.get_num_unfinished_requests() == 0

bare = LLM(model=sys.argv[1], skip_tokenizer_init=True, max_model_len=128)
params = SamplingParams(temperature=0.0, max_tokens=3, detokenize=False)
[output] = bare.generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)
assert len(output.outputs[0].token_ids) == 3
assert output.outputs[0].text == ""
