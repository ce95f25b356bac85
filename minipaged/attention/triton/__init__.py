"""Paged attention on a GPU: Triton kernels, one per file with the function that launches it.

Read them in this order:

    naive_decode   a program a query and head, a block at a time: the paper's Figure 5
    launch         what every launcher tells its kernel about the pool
    tile           the step that both fast kernels repeat: queries meet one tile of keys
    decode         one query per sequence: memory-bound, split over the GPU
    splits         into how many pieces, and how their results become one
    prefill        many queries a sequence: compute-bound, one tile of queries a program
    store_kv       new keys and values into their slots; a variant turns them by RoPE first
    copy_blocks    copy-on-write and swapping, all layers in one launch
    backend        gives them the interface of every other attention here
    machine        where they can run, and why not elsewhere

The paper names three kernels of its own (section 5.1): fused reshape and block write (`store_kv`),
fused block read and attention (`decode`, of which `naive_decode` is the plain form), and fused
block copy (`copy_blocks`). Its prompts went through an attention that knew no blocks; chunked
prefill and cached prefixes came later and need `prefill`.

If you have never read a Triton kernel:

    kernel[grid](...)     launches as many programs as the grid has places, each with the same text,
                          side by side and in no order; tl.program_id(0) is a program's own place
    p + tl.arange(0, 16)  a tensor argument is the address of its first number, and this is a tile
                          of 16 addresses; [:, None] and [None, :] make it rows or columns
    tl.load(..., mask=m)  reads the numbers at such addresses, but for those where m is False, which
                          become `other`; a tile's sizes are powers of two, so masks trim the rest
    NAME: tl.constexpr    is known when the kernel is compiled; each other value is another kernel.
                          Common traits of plain arguments (it is 1, or divisible by 16) are built
                          in, too, unless they are listed as do_not_specialize
    num_warps             how many times 32 threads share a program's work
    num_stages            how many rounds of a loop overlap: loads of later ones with work of others
                          (not loads whose address is loaded in the same round)

Without a GPU the same text is interpreted by Triton in plain Python, tile by tile with NumPy: slow,
but every index can be checked on a laptop.

All kernels find what they read of the pool in the same way. They see one layer's keys (or values),
and number the *cells* in it, each the place of one token's key of one head:

    block   = block_table[position // block_size]
    cell    = (block * kv_heads + kv_head) * block_size + position % block_size
    number  = cell * head_dim + i            the i-th number of that key

in 64 bits: one layer's keys may take more than 4 GiB, which is 2^31 numbers in half precision.
"""
