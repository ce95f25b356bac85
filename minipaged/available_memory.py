"""How much memory there is: of the machine, and of a GPU as it stands."""

import os

import torch

GIB = 1024**3


def physical_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_gpu_memory(gpu: torch.device) -> int:
    """Bytes that nobody uses, and those that torch keeps after they were used."""
    kept = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    return torch.cuda.mem_get_info(gpu)[0] + kept
