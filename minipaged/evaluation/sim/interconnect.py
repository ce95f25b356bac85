"""How long GPUs that share a model take to exchange data in a step.

Tensor parallelism as in Megatron-LM: every GPU holds some heads and some columns of each matrix,
executes the same step on them (section 4.6), and adds up its results with those of the others:

    all-reduce   [tokens, hidden_size]             of the embedding, whose vocabulary is split
    all-reduce   [tokens, hidden_size], twice      per layer: after attention and after the MLP
    gather       [rows, vocab_size / num_gpus]     of the logits, from each GPU

A collective takes a fixed latency, and the time that a ring needs to move its bytes. In a decode
step the latency is most of it: 60 tokens of OPT-66B are 1.1 MB, which 4 A100s add up in 6 us.
"""

from dataclasses import dataclass

# The control message of each step, from the scheduler to the workers (section 4.6). Assumed: the
# paper gives no time for it. The servers of the paper's figures have `fitted.SYNC_SECONDS` instead.
CONTROL_SECONDS = 0.2e-3


@dataclass(frozen=True)
class Link:
    """What connects the GPUs of a server.

    Args:
        bandwidth: bytes per second that a GPU sends, while it receives as many.
        latency: seconds per collective before its bytes count: its kernel, and the steps of the
            ring that wait for each other.
    """

    bandwidth: float
    latency: float

    def all_reduce(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds until every GPU has the sum of all GPUs' tensors of `num_bytes` each.

        A ring sends each part round twice: once to add it up, once to hand out the sum.
        """
        return self.latency + 2 * (num_gpus - 1) / num_gpus * num_bytes / self.bandwidth

    def gather(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds until one GPU has a tensor of `num_bytes`, of which each GPU had a slice."""
        return self.latency + (num_gpus - 1) / num_gpus * num_bytes / self.bandwidth


# Bandwidths are published: half of what data sheets add up over both directions. Latencies are from
# the model by which NCCL chooses algorithms (its src/graph/tuning.cc): a ring of 4 GPUs takes
# 10 + 6 x 1.9 = 21 us over NVLink (protocol LL128), and 8.4 + 6 x 5.7 = 43 us over PCIe (Simple).
# One number for all sizes: for 2 and 8 GPUs, NVLink's would be 14 and 37 us.
NVLINK_SECONDS, PCIE_SECONDS = 20e-6, 40e-6
NVLINK_3 = Link(300e9, NVLINK_SECONDS)
NVLINK_4 = Link(450e9, NVLINK_SECONDS)
NVLINK_5 = Link(900e9, NVLINK_SECONDS)
PCIE_4 = Link(32e9, PCIE_SECONDS)
