"""Puts the chapters, their openings and the fonts of formulas into the wheel (see pyproject.toml).

An installed `minipaged learn` reads them from `minipaged/assets`. A checkout, also with
`pip install -e .`, has them where they are.
"""

from pathlib import Path
from typing import Any

from setuptools.command.build_py import build_py

THIS_FILE = "tutorials/in_the_wheel.py"  # from the project's folder, in which a build runs
FONTS = "Main-Regular Main-Bold. Math-Italic Size? AMS".split()  # those of the pages
FILES = {  # folder of the wheel: files of the checkout
    "minipaged/assets/tutorials": ["tutorials/[0-9]*.py", "tutorials/drawing.py"],
    "minipaged/assets/tutorials/openings": ["tutorials/openings/*.svg"],
    "minipaged/assets/tutorials/labs": ["tutorials/labs/*.md"],
    "minipaged/assets/katex": ["docs/vendor/katex/katex.min.*", "docs/vendor/katex/LICENSE"],
    "minipaged/assets/katex/fonts": [f"docs/vendor/katex/fonts/KaTeX_{name}*" for name in FONTS],
}


class BuildWithChapters(build_py):
    """setuptools' step that copies the package, and these files with it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._copies():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_source_files(self) -> list[str]:
        """Also for an sdist, from which a wheel can be built."""
        return [*super().get_source_files(), THIS_FILE, *(source for source, _ in self._copies())]

    def get_outputs(self, include_bytecode: Any = True) -> list[str]:
        ours = [] if self.editable_mode else [target for _, target in self._copies()]
        return [*super().get_outputs(include_bytecode), *ours]

    def _copies(self) -> list[tuple[str, str]]:
        return [
            (str(source), str(Path(self.build_lib) / folder / source.name))
            for folder, patterns in FILES.items()
            for pattern in patterns
            for source in sorted(Path().glob(pattern))
        ]
