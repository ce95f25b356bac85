"""Options: each is declared once, and everything else about it is derived from there."""

import ast
import inspect
import pydoc
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from minipaged import LLM
from minipaged.attention.backend import BACKENDS, TRITON_BACKENDS
from minipaged.attention.kv_cache import KV_DTYPES
from minipaged.cli.main import app
from minipaged.cli.options import in_words_of_the_shell
from minipaged.config import OPTIONS, EngineConfig
from minipaged.engine.arg_utils import OPTIONS_OF_LLM, LLMArgs
from minipaged.errors import InvalidOption
from minipaged.memory.baselines.contiguous import CONTIGUOUS
from minipaged.memory.baselines.virtual import VIRTUAL
from minipaged.models.loader import DTYPES
from minipaged.utils.options import option, options_of, takes
from minipaged.utils.vllm_options import NONE_MEANS_DEFAULT

PACKAGE = Path(inspect.getfile(LLM)).parent
SOURCES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for path in PACKAGE.rglob("*.py")
    if "labs/tests" not in path.as_posix() and path.name != "config.py"
}

# What a command sets itself instead of asking for it.
NOT_A_FLAG = {"demo": {"model"}, "generate": set(), "chat": set()}


def commands() -> dict[str, dict[str, typer.core.TyperOption]]:
    """The options of every command by name; those of a group as "bench sharing"."""
    found: dict[str, dict] = {}

    def walk(command, words: list[str]) -> None:
        found[" ".join(words)] = {param.name: param for param in command.params}
        for name, below in getattr(command, "commands", {}).items():
            walk(below, [*words, name])

    walk(typer.main.get_command(app), [])
    return found


# ---- declared once -------------------------------------------------------------------------------


def named_defaults(tree: ast.AST) -> list[tuple[str, object]]:
    """Names of parameters and fields, with their defaults where these are literals."""
    pairs: list[tuple[str, ast.expr | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            positional = node.args.posonlyargs + node.args.args
            defaults = node.args.defaults
            pairs += zip([a.arg for a in positional[-len(defaults) :]], defaults, strict=False)
            pairs += zip([a.arg for a in node.args.kwonlyargs], node.args.kw_defaults, strict=True)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            pairs.append((node.target.id, node.value))
    return [(name, value.value) for name, value in pairs if isinstance(value, ast.Constant)]


def test_no_default_is_written_down_a_second_time():
    repeated = [
        f"{path.relative_to(PACKAGE)}: {name}={default!r}"
        for path, tree in SOURCES.items()
        for name, default in named_defaults(tree)
        if name in vars_of_the_scheduler() and default == OPTIONS[name].default
    ]
    assert not repeated, "take the default from EngineArgs"


def vars_of_the_scheduler() -> set[str]:
    """Options whose names mean nothing else anywhere. `None` is no default that can be repeated."""
    own = {each.name for each in fields(EngineConfig)} | {"gpu_memory_utilization"}
    return {name for name in own if OPTIONS[name].default is not None}


def test_no_help_text_is_written_down_a_second_time():
    texts = {each.help for each in OPTIONS.values()}
    repeated = [
        f"{path.relative_to(PACKAGE)}: {node.value}"
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in texts
    ]
    assert not repeated, "use engine_flag"


def test_no_command_describes_an_engine_option_in_its_own_words():
    names = {each.name for each in fields(EngineConfig)}
    for command, params in commands().items():
        for name in names & params.keys():
            expected = in_words_of_the_shell(OPTIONS[name].description, OPTIONS)
            assert params[name].help == expected, f"{command}: {name}"


def test_a_config_takes_its_defaults_from_the_declarations():
    for each in fields(EngineConfig):
        declared = OPTIONS[each.name].default
        if isinstance(each.default, int | float | str) and declared is not None:
            assert each.default == declared


@pytest.mark.parametrize(
    ("name", "implemented"),
    [
        ("memory", {"paged", *CONTIGUOUS, *VIRTUAL}),
        ("attention_backend", {"auto", *BACKENDS, *TRITON_BACKENDS}),
        ("dtype", {"auto", *DTYPES}),
        ("kv_cache_dtype", {"auto", *KV_DTYPES}),
    ],
)
def test_the_declared_choices_are_those_that_are_implemented(name, implemented):
    assert set(OPTIONS[name].choices) == implemented


# ---- derived -------------------------------------------------------------------------------------


def test_the_signature_of_llm_shows_every_option_with_its_default():
    parameters = inspect.signature(LLM).parameters
    assert list(parameters) == list(OPTIONS_OF_LLM)
    assert {name: each.default for name, each in parameters.items()} == {
        name: each.default for name, each in OPTIONS_OF_LLM.items()
    }


def test_the_help_of_llm_describes_every_option():
    page = " ".join(pydoc.plain(pydoc.render_doc(LLM)).replace("|", " ").split())
    for name, each in OPTIONS_OF_LLM.items():
        assert f"{name}: {' '.join(each.description.split())}" in page


@pytest.mark.parametrize("command", list(NOT_A_FLAG))
def test_every_option_is_a_flag_or_deliberately_not(command):
    params = commands()[command]
    assert set(OPTIONS) - params.keys() == NOT_A_FLAG[command]
    for name in OPTIONS.keys() & params.keys():
        assert params[name].opts[0] == "--" + name.replace("_", "-")
        if command != "demo":  # which has a smaller pool and shorter steps, to be watched
            assert params[name].default == OPTIONS[name].default


def test_messages_name_flags_on_the_command_line():
    names = {"block_size", "memory", "enable_prefix_caching"}
    said = "block_size is 0, memory='virtual', enable_prefix_caching=True, no memory is left."
    assert in_words_of_the_shell(said, names) == (
        "--block-size is 0, --memory virtual, --enable-prefix-caching, no memory is left."
    )


# ---- checked -------------------------------------------------------------------------------------

WRONG = {int: "four", float: "half", bool: "no", str: 3}


@pytest.mark.parametrize("name", OPTIONS_OF_LLM)
def test_a_value_of_a_wrong_kind_is_refused_by_name(name):
    declared = OPTIONS_OF_LLM[name]
    wrong = WRONG.get(declared.type, 3)
    for value in (wrong, object()):
        with pytest.raises(InvalidOption, match=rf"{name} is ") as refusal:
            LLMArgs(**{name: value})
        assert refusal.value.param == name
    if declared.may_be_none or name in NONE_MEANS_DEFAULT:
        assert LLMArgs(**{name: None}) == LLMArgs()
    else:
        with pytest.raises(InvalidOption, match=f"{name} is None"):
            LLMArgs(**{name: None})


@pytest.mark.parametrize(
    "name", [n for n, each in OPTIONS_OF_LLM.items() if each.at_least is not None]
)
def test_a_value_outside_its_limits_is_refused_by_name(name):
    declared = OPTIONS_OF_LLM[name]
    step = 1 if declared.type is int else 0.001
    outside = [declared.at_least - step]
    outside += [declared.at_most + step] if declared.at_most is not None else []
    for value in outside:
        with pytest.raises(InvalidOption, match=name):
            LLMArgs(**{name: value})
    LLMArgs(**{name: declared.at_least})


@pytest.mark.parametrize(
    ("misspelt", "closest"),
    [
        ("blocksize", "block_size"),
        ("max_seqs", "max_num_seqs"),
        ("dytpe", "dtype"),
    ],
)
def test_a_misspelt_option_is_refused_with_the_closest_name(misspelt, closest):
    with pytest.raises(InvalidOption, match=f"'{misspelt}': did you mean '{closest}"):
        LLM(**{misspelt: 8})


def test_an_unrecognisable_option_is_refused_with_all_names():
    with pytest.raises(InvalidOption, match="choose one of model, device"):
        LLM(zzz=8)


def test_a_function_that_takes_options_is_called_with_all_of_them():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Sizes:
        width: int = option(3, "Width.", at_least=1, kw_only=False)
        height: int | None = option(None, "Height.")

    class Box:
        @takes(Sizes)
        def __init__(self, sizes: Sizes) -> None:
            """A box."""
            self.sizes = sizes

    assert Box(4, height=5).sizes == Sizes(4, height=5)
    assert Box().sizes == Sizes()
    assert str(inspect.signature(Box)) == "(width: int = 3, *, height: int | None = None)"
    assert "width: Width." in Box.__init__.__doc__
    assert options_of(Sizes)["height"].may_be_none
