"""Paged attention on a GPU: Triton kernels, one per file with the function that launches it.

Read them in this order:

    naive_decode   one program per query and head, one block at a time: the paper's Figure 5
    launch         the arguments that every launcher passes to its kernel
    tile           the step that both fast kernels repeat: queries attend to one tile of keys
    unpack         8-bit keys and values, for tensor cores that multiply 16 bits
    shapes         how large the tiles are
    decode         one query per sequence: memory-bound, split over the GPU
    splits         the number of splits, and the kernel that merges their results
    prefill        many queries per sequence: compute-bound, one tile of queries per program
    store_kv       writes new keys and values to their slots; a variant applies RoPE first
    add_rms_norm   adds a layer's result to its input, and normalises the sum
    silu_and_mul   the gate of a feed-forward
    copy_blocks    copy-on-write and swapping, all layers in one launch
    backend        implements the common attention interface with these kernels
    machine        checks where the kernels can run, and explains where they cannot

The paper names three kernels of its own (section 5.1): fused reshape and block write (`store_kv`),
fused block read and attention (`decode`, of which `naive_decode` is the plain form), and fused
block copy (`copy_blocks`). It computed prompts with an attention kernel without blocks; chunked
prefill and cached prefixes, which came later, need `prefill`.

If you have never read a Triton kernel:

    kernel[grid](...)     launches one program per position of the grid. All run the same code,
                          concurrently and in no defined order; tl.program_id(0) is the position
    p + tl.arange(0, 16)  a tensor argument is the address of its first element, so this is a tile
                          of 16 addresses; [:, None] and [None, :] make it a column or a row
    tl.load(..., mask=m)  reads the elements at these addresses; where m is False, the result is
                          `other`. Tile sizes are powers of two, so masks cut off the rest
    NAME: tl.constexpr    a compile-time constant; each value compiles another kernel. Common
                          properties of plain arguments (equal to 1, divisible by 16) are compiled
                          in too, unless the argument is listed in do_not_specialize
    num_warps             warps (of 32 threads) per program
    num_stages            iterations of a loop that overlap: loads of later iterations run during
                          the work of earlier ones (unless a load's address is loaded in the same
                          iteration)

Without a GPU, Triton interprets the same code in Python, tile by tile with NumPy. That is slow, but
every index can be checked on a laptop.

All kernels address the pool in the same way. They receive one layer's keys (or values) and number
the *cells* in it; a cell holds one token's key of one head:

    block   = block_table[position // block_size]
    cell    = (block * kv_heads + kv_head) * block_size + position % block_size
    element = cell * head_dim + i            the i-th element of that key

Indices are 64-bit: one layer's keys may take more than 4 GiB, which is 2^31 elements in half
precision.
"""
