"""Two chapters that run in milliseconds, in a folder such as tutorials/."""

from pathlib import Path

FIRST = """\
# %% [markdown]
# # 3. Adding & counting
#
# **Needs** chapter 2 · **Time** 5 minutes
# · **Lab** [1](labs/01.md)
#
# It adds numbers. It counts, too.
#
# ![What "3" < 4 shows.](openings/03.svg)
#
# The sum is $a_1 + b_1 * c_1$, `$no$ formula`, and [the next chapter](04_second.md) has more. See
# [lab 1](labs/01.md), [the code](../minipaged/llm.py#L3) and [a page](../gone.md).
#
# @@ minipaged.memory.block_table.BlockTable.slot
#
# <details markdown="1"><summary>Answer</summary>
#
# *Folded.*
#
# </details>
#
# ```mermaid
# flowchart LR
#   a["text & ids"] -->|tokenizer| b(ids) --> c
#   c <-->|HTTP| a
# ```

# %%
import inspect
import os
from pathlib import Path

with Path(os.environ["RUNS"]).open("a") as runs:
    runs.write("ran\\n")


def double(x):
    return 2 * x


print("<b>", inspect.getsource(double))
double(21)

# %%
class Shown:
    def _repr_html_(self):
        return "<iframe></iframe>"


Shown()
"""
SECOND = """\
# %% [markdown]
# # 4. The second
#
# It fails.
#
# **Time** 3 minutes

# %%
1 / 0

# %%
print("never")
"""
OPENING = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 240">
<title>What it shows.</title>
<g class="ground"><style>svg{color:#000}</style><rect width="480" height="240"/></g>
<text x="1" y="9">one_label_of_it</text>
</svg>
"""


def make_chapters(folder: Path) -> Path:
    """A folder of two chapters, drawing.py and a lab's brief. The first appends to $RUNS."""
    files = {
        "03_first.py": FIRST,
        "04_second.py": SECOND,
        "drawing.py": "",
        "openings/03.svg": OPENING,
        "labs/01.md": "# Lab 1: count\n\nRead [chapter 3](../03_first.md).\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder
