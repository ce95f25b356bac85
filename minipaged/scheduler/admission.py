"""What can never run is refused at the door, with what to change; see `FCFSScheduler.add`."""

from minipaged.config import EngineConfig
from minipaged.errors import InvalidRequest, PromptTooLong
from minipaged.memory import Memory
from minipaged.sequence import SequenceGroup


def reject_what_can_never_run(group: SequenceGroup, memory: Memory, config: EngineConfig) -> None:
    """Raise PromptTooLong or InvalidRequest for a group that no wait would ever let run."""
    length = group.sequences[0].num_tokens
    if length >= config.max_model_len:
        over = length - config.max_model_len + 1
        raise PromptTooLong(
            f"the prompt has {length} tokens, and prompt and output together may have "
            f"{config.max_model_len} (max_model_len). Shorten the prompt by {over} "
            f"{'token' if over == 1 else 'tokens'}, or raise max_model_len if the model allows."
        )
    if not memory.fits(group):
        raise PromptTooLong(memory.explain_rejection(group))
    if group.num_batch_slots > config.max_num_seqs:
        raise InvalidRequest(
            f"the request asks for {group.num_batch_slots} sequences at once (n, best_of or "
            f"beam_width), but max_num_seqs is {config.max_num_seqs}: ask for fewer, or raise "
            f"max_num_seqs to {group.num_batch_slots}."
        )
