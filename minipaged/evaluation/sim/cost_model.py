"""How long a step takes: a roofline, and the host beside it.

    host       STEP_SECONDS + SEQUENCE_SECONDS for each sequence that decodes     fitted
    weights    read once, or multiplied with every token, whichever takes longer
    keys       of every sequence that decodes, read once
    prompts    attention of their tokens among each other

No operation reaches what a GPU can do at its best. The shares below are assumed, not fitted.
"""

from dataclasses import dataclass

from minipaged.evaluation.sim.catalogue import Deployment
from minipaged.evaluation.sim.fitted import SEQUENCE_SECONDS, STEP_SECONDS
from minipaged.scheduler.output import SchedulerOutput

OF_BANDWIDTH_FOR_WEIGHTS = 0.8
OF_BANDWIDTH_FOR_KEYS = 0.7
OF_FLOPS = 0.55
OF_FLOPS_IN_ATTENTION = 0.275
HOST_LINK = 16e9  # bytes a second between GPU and host: PCIe 4, as in reality
COPY_LAUNCH = 3e-6  # seconds to begin one copy of one block in one layer, keys or values


@dataclass(frozen=True)
class CostModel:
    """Seconds of a step on a server, and the parts of them.

    Args:
        server: the model and where it runs.
        step_seconds: what the host needs for a step.
        sequence_seconds: what it needs besides for each sequence that decodes.
        kv_factor: how much longer it takes to read keys; the paged kernel's price, for instance.
    """

    server: Deployment
    step_seconds: float = STEP_SECONDS
    sequence_seconds: float = SEQUENCE_SECONDS
    kv_factor: float = 1.0

    def host(self, num_decodes: int) -> float:
        """Of the processor, and of GPUs that wait for each other."""
        seconds = self.step_seconds + self.server.sync_seconds
        return seconds + self.sequence_seconds * num_decodes

    def weights(self, num_tokens: int) -> float:
        """To read all weights, or to multiply them with so many tokens."""
        model, server = self.server.model, self.server
        reading = model.weight_bytes / (server.bandwidth * OF_BANDWIDTH_FOR_WEIGHTS)
        return max(reading, 2 * model.num_params * num_tokens / (server.flops * OF_FLOPS))

    def keys(self, num_tokens: int) -> float:
        """To read keys and values of so many tokens."""
        num_bytes = num_tokens * self.server.model.kv_bytes_per_token
        return self.kv_factor * num_bytes / (self.server.bandwidth * OF_BANDWIDTH_FOR_KEYS)

    def prompts(self, num_pairs: float) -> float:
        """Attention of prompts: for so many pairs of a query and a key that it sees."""
        model = self.server.model
        operations = 4 * model.num_heads * model.head_dim * model.num_layers * num_pairs
        return operations / (self.server.flops * OF_FLOPS_IN_ATTENTION)

    def swap(self, num_blocks: int, block_size: int) -> float:
        """To move blocks between GPU and host; small blocks are many small copies (section 7.3)."""
        model = self.server.model
        num_bytes = num_blocks * block_size * model.kv_bytes_per_token
        launches = num_blocks * 2 * model.num_layers
        return num_bytes / (HOST_LINK * self.server.num_gpus) + launches * COPY_LAUNCH

    def copies(self, num_blocks: int, block_size: int) -> float:
        """To copy blocks on the GPU: each is read and written."""
        num_bytes = 2 * num_blocks * block_size * self.server.model.kv_bytes_per_token
        return num_bytes / self.server.bandwidth

    def step(
        self, num_decodes: int, num_keys: int, num_prompt_tokens: int, num_pairs: float
    ) -> float:
        """A whole step, without moved blocks."""
        return (
            self.host(num_decodes)
            + self.weights(num_decodes + num_prompt_tokens)
            + self.keys(num_keys)
            + self.prompts(num_pairs)
        )

    def of_step(self, decision: SchedulerOutput, block_size: int) -> float:
        """The step that a scheduler planned, with the blocks that it moves."""
        num_decodes = num_keys = num_prompt_tokens = 0
        num_pairs = 0.0
        for _, seq, num_new, _ in decision.sequences:
            context = seq.num_computed_tokens
            if num_new == 1:
                num_decodes += 1
                num_keys += context + 1
            else:
                num_prompt_tokens += num_new
                num_pairs += num_new * (context + num_new / 2)
        seconds = self.step(num_decodes, num_keys, num_prompt_tokens, num_pairs)
        if decision.copies:
            seconds += self.copies(len(decision.copies), block_size)
        if decision.swap_in or decision.swap_out:
            seconds += self.swap(len(decision.swap_in) + len(decision.swap_out), block_size)
        return seconds
