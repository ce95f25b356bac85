"""The GPU kernels, in Triton: one kernel and its launcher a file. Read them in this order.

    naive_decode   a program a query and head, a block at a time: the paper's Figure 5
    tile           the step that both fast kernels repeat: queries meet one tile of keys
    decode         one query a sequence: memory-bound, split over the GPU, merged afterwards
    prefill        many queries a sequence: compute-bound, one tile of queries a program
    store_kv       new keys and values into their slots; a variant turns them by RoPE first
    copy_blocks    copy-on-write and swapping, all layers in one launch
    backend        puts them behind the contract of every other attention here
    machine        where they can run, and why not elsewhere

The paper names three kernels of its own (section 5.1): fused reshape and block write (`store_kv`),
fused block read and attention (`decode`, of which `naive_decode` is the plain form), and fused
block copy (`copy_blocks`). Its prompts went through an attention that knew no blocks; chunked
prefill and cached prefixes came later and need `prefill`.

A kernel's text describes one *program*; a launch runs a grid of them side by side, in no order that
one may count on. Without a GPU the same text is interpreted by Triton in plain Python, tile by tile
with NumPy: slow, but every index can be checked on a laptop.

Everything that a kernel reads of the pool is found the same way. A *cell* is the place of one token
and one key head, numbered through the whole pool:

    cell    = (block * kv_heads + kv_head) * block_size + position % block_size
    number  = cell * head_dim + i            the i-th number of that key or value
    block   = block_table[position // block_size]

In numbers of 64 bits: a pool of 2^31 numbers is 4 GiB in half precision, and GPUs have more.
"""
