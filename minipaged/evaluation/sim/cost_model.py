"""The duration of a step: a roofline, plus host time.

    host       STEP_SECONDS + SEQUENCE_SECONDS for each sequence that decodes     fitted
    weights    read once or multiplied by every token, whichever takes longer
    keys       of every decoding sequence, read once
    prompts    attention among their tokens
    links      all-reduces and a gather, if several GPUs share the model (`interconnect`)

No operation reaches a GPU's peak. The fractions below are assumed, not fitted. Links have none:
messages are small, so latency dominates a collective.
"""

from dataclasses import dataclass

from minipaged.evaluation.sim.catalogue import Deployment
from minipaged.evaluation.sim.fitted import SEQUENCE_SECONDS, STEP_SECONDS
from minipaged.scheduler.output import SchedulerOutput

OF_BANDWIDTH_FOR_WEIGHTS = 0.8
OF_BANDWIDTH_FOR_KEYS = 0.7
OF_FLOPS = 0.55
OF_FLOPS_IN_ATTENTION = 0.275
HOST_LINK = 16e9  # bytes per second between GPU and host: PCIe 4, in practice
COPY_LAUNCH = 3e-6  # seconds to start one copy of one block in one layer, keys or values


@dataclass(frozen=True)
class CostModel:
    """Seconds of a step on a server, in total and by part.

    Args:
        server: the model and its GPUs.
        step_seconds: host time per step.
        sequence_seconds: additional host time per decoding sequence.
        kv_factor: factor on the time to read keys, for example the cost of the paged kernel.
    """

    server: Deployment
    step_seconds: float = STEP_SECONDS
    sequence_seconds: float = SEQUENCE_SECONDS
    kv_factor: float = 1.0

    def host(self, num_decodes: int) -> float:
        """Host time, and the time that workers wait for its message and for each other."""
        seconds = self.step_seconds + self.server.sync_seconds
        return seconds + self.sequence_seconds * num_decodes

    def weights(self, num_tokens: int) -> float:
        """Seconds to read all weights, or to multiply them by the tokens, whichever is longer."""
        model, server = self.server.model, self.server
        reading = model.weight_bytes / (server.bandwidth * OF_BANDWIDTH_FOR_WEIGHTS)
        return max(reading, 2 * model.num_params * num_tokens / (server.flops * OF_FLOPS))

    def keys(self, num_tokens: int) -> float:
        """Seconds to read the keys and values of these tokens."""
        num_bytes = num_tokens * self.server.model.kv_bytes_per_token
        return self.kv_factor * num_bytes / (self.server.bandwidth * OF_BANDWIDTH_FOR_KEYS)

    def prompts(self, num_pairs: float) -> float:
        """Seconds for the attention of prompts, by the number of (query, visible key) pairs."""
        model = self.server.model
        operations = 4 * model.num_heads * model.head_dim * model.num_layers * num_pairs
        return operations / (self.server.flops * OF_FLOPS_IN_ATTENTION)

    def communication(self, num_tokens: int, num_rows: int) -> float:
        """Seconds to sum results and gather logits over all GPUs; 0 for one GPU (section 4.6).

        Args:
            num_tokens: all tokens of the step, whose hidden states are summed.
            num_rows: rows of logits in the step.
        """
        model, link, num_gpus = self.server.model, self.server.gpu.link, self.server.num_gpus
        if num_gpus == 1:
            return 0.0
        hidden_states = 2 * num_tokens * model.hidden_size
        all_reduces = (1 + 2 * model.num_layers) * link.all_reduce(hidden_states, num_gpus)
        return all_reduces + link.gather(2 * num_rows * model.vocab_size, num_gpus)

    def swap(self, num_blocks: int, block_size: int) -> float:
        """Seconds to swap blocks; small blocks need many small copies (section 7.3)."""
        model = self.server.model
        num_bytes = num_blocks * block_size * model.kv_bytes_per_token
        launches = num_blocks * 2 * model.num_layers
        return num_bytes / (HOST_LINK * self.server.num_gpus) + launches * COPY_LAUNCH

    def copies(self, num_blocks: int, block_size: int) -> float:
        """Seconds to copy blocks on the GPU: each is read and written."""
        num_bytes = 2 * num_blocks * block_size * self.server.model.kv_bytes_per_token
        return num_bytes / self.server.bandwidth

    def step(
        self,
        num_decodes: int,
        num_keys: int,
        num_prompt_tokens: int,
        num_pairs: float,
        num_prompts: int = 0,
    ) -> float:
        """Seconds of a step without swapped or copied blocks; `num_prompts` prompts end in it."""
        num_tokens = num_decodes + num_prompt_tokens
        return (
            self.host(num_decodes)
            + self.weights(num_tokens)
            + self.keys(num_keys)
            + self.prompts(num_pairs)
            + self.communication(num_tokens, num_decodes + num_prompts)
        )

    def of_step(self, decision: SchedulerOutput, block_size: int) -> float:
        """Seconds of a scheduler's step, including the blocks that it moves."""
        num_decodes = num_keys = num_prompt_tokens = num_prompts = 0
        num_pairs = 0.0
        for _, seq, num_new, samples in decision.sequences:
            context = seq.num_computed_tokens
            if num_new == 1:
                num_decodes += 1
                num_keys += context + 1
            else:
                num_prompt_tokens += num_new
                num_pairs += num_new * (context + num_new / 2)
                num_prompts += samples
        seconds = self.step(num_decodes, num_keys, num_prompt_tokens, num_pairs, num_prompts)
        if decision.copies:
            seconds += self.copies(len(decision.copies), block_size)
        if decision.swap_in or decision.swap_out:
            seconds += self.swap(len(decision.swap_in) + len(decision.swap_out), block_size)
        return seconds
