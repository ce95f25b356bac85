"""The briefs of the teaching labs, tutorials/labs/NN.md, as pages of the site."""

import re
from pathlib import Path

from site_builder.errors import CannotBuild
from site_builder.markdown import expanded

FOLDER = "tutorials/labs"
INDEX = """\
# Labs

In a lab you write a part of the engine: a file with some bodies taken out, tests that say what is
missing, and at the end a language model that runs on what you wrote.

```sh
pip install -e ".[labs]"
minipaged lab list
minipaged lab start 1
minipaged lab check 1
```

"""


def lab_files(root: Path) -> dict[str, bytes]:
    """Path below docs/ -> content: a page for each brief, and one that lists them."""
    files: dict[str, bytes] = {}
    titles: list[str] = []
    for brief in sorted((root / FOLDER).glob("[0-9]*.md")):
        text = brief.read_text(encoding="utf-8")
        title = re.match(r"# (.+)", text)
        if title is None:
            raise CannotBuild(f"{FOLDER}/{brief.name}: a brief begins with its `# title`.")
        titles.append(f"- [{title[1].strip()}]({brief.name})")
        page = f"{FOLDER}/{brief.name}"
        files[page] = expanded(text, root, page).encode()
    if files:
        files[f"{FOLDER}/index.md"] = (INDEX + "\n".join(titles) + "\n").encode()
    return files
