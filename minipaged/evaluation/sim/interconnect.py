"""The communication time of a step on several GPUs.

Tensor parallelism is as in Megatron-LM: every GPU has some heads and some columns of each matrix,
executes the same step on them (section 4.6), and sums its results with those of the others:

    all-reduce   [tokens, hidden_size]             of the embedding, whose vocabulary is split
    all-reduce   [tokens, hidden_size], twice      per layer: after attention and after the MLP
    gather       [rows, vocab_size / num_gpus]     of the logits, from each GPU

A collective takes a fixed latency plus the time that a ring needs to transfer its bytes. In a
decode step, latency dominates: 60 tokens of OPT-66B are 1.1 MB, which 4 A100s sum in 6 us.
"""

from dataclasses import dataclass

# The control message of each step, from the scheduler to the workers (section 4.6). Assumed: the
# paper gives no time for it. The servers of the paper's figures have `fitted.SYNC_SECONDS` instead.
CONTROL_SECONDS = 0.2e-3


@dataclass(frozen=True)
class Link:
    """The connection between the GPUs of a server.

    Args:
        bandwidth: bytes per second that a GPU sends while it receives as many.
        latency: fixed seconds per collective: its kernel launch, and the dependent steps of the
            ring.
    """

    bandwidth: float
    latency: float

    def all_reduce(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds until every GPU has the sum of all GPUs' tensors of `num_bytes` each.

        A ring passes each part around twice: once to sum it, once to distribute the sum.
        """
        return self.latency + 2 * (num_gpus - 1) / num_gpus * num_bytes / self.bandwidth

    def gather(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds to gather a tensor of `num_bytes` on one GPU, from one slice per GPU."""
        return self.latency + (num_gpus - 1) / num_gpus * num_bytes / self.bandwidth


# Bandwidths are published: half of the data sheets' sum of both directions. Latencies are from
# NCCL's model for choosing algorithms (its src/graph/tuning.cc): a ring of 4 GPUs takes
# 10 + 6 x 1.9 = 21 us over NVLink (protocol LL128), and 8.4 + 6 x 5.7 = 43 us over PCIe (Simple).
# One number for all sizes: for 2 and 8 GPUs, NVLink's would be 14 and 37 us.
NVLINK_SECONDS, PCIE_SECONDS = 20e-6, 40e-6
NVLINK_3 = Link(300e9, NVLINK_SECONDS)
NVLINK_4 = Link(450e9, NVLINK_SECONDS)
NVLINK_5 = Link(900e9, NVLINK_SECONDS)
PCIE_4 = Link(32e9, PCIE_SECONDS)
