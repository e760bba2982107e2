"""The command line of a schema: a frozen dataclass, flat or of groups, whose fields are the flags.

tyro makes the help and the record; what the user typed is checked here first, so that every mistake
is one line that names the flag and the way out, and tyro never has to complain. Ranges and
cross-field rules: core/check.py. The verbs: megalite/__main__.py.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import json
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from megalite.core.check_values import check_fields, check_value, flag, kinds_of, unknown
from megalite.core.config import FILE_NAME, Config, PathText, run_directory
from megalite.core.errors import UserError

T = TypeVar("T")
Tables = Mapping[str, Mapping[str, Any]]
Recipes = Mapping[str, Callable[[], Any]]

START_HELP = {
    "config": "Begin with the settings of this run directory or config.json.",
    "recipe": "Begin with a whole run that has a name.",
    "model": "Take the shape of a published model.",
}
NO_NAMES: Mapping[str, Any] = MappingProxyType({})
LOOKS_LIKE = 0.69  # similarity from which a neighbour is worth naming


@dataclass(frozen=True)
class Option:
    """One field as the command line sees it."""

    name: str
    hint: Any
    default: Any
    is_positional: bool
    owner: type

    @property
    def label(self) -> str:
        return self.name.upper() if self.is_positional else flag(self.name)

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def is_switch(self) -> bool:
        return kinds_of(self.hint)[0] == (bool,)


def parse(
    argv: Sequence[str],
    schema: type[T],
    *,
    models: Tables = NO_NAMES,
    recipes: Recipes = NO_NAMES,
    prog: str,
) -> T:
    """The record that these arguments describe.

    A Config also takes --config, --recipe and --model; later wins: recipe or config file (where
    there is neither, the model of the run that --init-from names), then model, then flags. Raises
    UserError with one line; --help prints and raises SystemExit(0).
    """
    full: Any = schema
    if issubclass(schema, Config):
        full = _with_start(schema, models=models, recipes=recipes)
    options = {option.name: option for option in options_of(full)}
    before_separator = list(argv)[: list(argv).index("--")] if "--" in argv else argv
    if {"-h", "--help"} & set(before_separator):
        _call_tyro(full, ["--help"], prog=prog, default=_default_of(full))
    typed = _scan(argv, options, prog=prog)
    for name, token in typed.items():
        if isinstance(token, str):
            typed[name] = _checked(options[name], token, models=models, recipes=recipes)
    for option in options.values():
        if option.is_required and option.name not in typed:
            raise UserError(f"{option.label}: is required (see {prog} --help)")
    default = _default_of(full)
    if issubclass(schema, Config):
        base = _start_from(schema, typed, models=models, recipes=recipes)
        default = dataclasses.replace(default, **_groups(base))
    made = _call_tyro(full, _spelled_out(typed, options), prog=prog, default=default)
    return schema(**_groups(made, of=schema))


# -- the schema --------------------------------------------------------------------------------


def options_of(schema: type) -> list[Option]:
    """The fields of a schema and of its groups, flat and in order."""
    found: list[Option] = []
    hints = get_type_hints(schema, include_extras=True)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found += options_of(hint)
            continue
        marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        is_positional = tyro.conf.Positional in marks
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found.append(Option(field.name, hint, default, is_positional, schema))
    return found


def field_docs(schema: type) -> dict[str, str]:
    """The docstring under each field of a dataclass: its help text."""
    source = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(source, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, text in zip(source.body, source.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=doc)):
                docs[name] = str(doc)
    return docs


def _with_start(schema: type, *, models: Tables, recipes: Recipes) -> type:
    """The schema and, as its first group, the flags that say where a run begins."""
    fields: list[Any] = []
    for name, table in (("config", None), ("recipe", recipes), ("model", models)):
        kind = PathText if table is None else Literal[tuple(table)] if table else str
        about = tyro.conf.arg(help=START_HELP[name])
        fields.append((name, Annotated[kind | None, about], None))
    start = make_dataclass("Start", fields, frozen=True, kw_only=True)
    start.__doc__ = "Where the settings come from; flags win over all of these."
    groups: list[Any] = [("start", start, dataclasses.field(default_factory=start))]
    hints = get_type_hints(schema, include_extras=True)
    for field in dataclasses.fields(schema):
        groups.append(
            (field.name, hints[field.name], dataclasses.field(default_factory=hints[field.name]))
        )
    full = make_dataclass(schema.__name__, groups, frozen=True, kw_only=True)
    full.__doc__ = schema.__doc__
    return full


def _default_of(schema: type) -> Any:
    """The record of all defaults, or tyro's mark for none where a field has no default."""
    if any(option.is_required for option in options_of(schema)):
        return tyro.MISSING_NONPROP
    return schema()


def _groups(record: Any, *, of: type | None = None) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(of or record)}


# -- what was typed ----------------------------------------------------------------------------


def _scan(argv: Sequence[str], options: Mapping[str, Option], *, prog: str) -> dict[str, Any]:
    """Each option's text (True or False for a switch), without a look at what the text means."""
    waiting = [option for option in options.values() if option.is_positional]
    typed: dict[str, Any] = {}
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if token == "--" or not token.startswith("-") or token == "-":
            free = tokens if token == "--" else [token]
            for text in free:
                if not waiting:
                    raise UserError(f"unexpected argument {text!r} (see {prog} --help)")
                typed[waiting.pop(0).name] = text
            if token == "--":
                break
            continue
        word, equals, value = token.partition("=")
        name, switch_to = _name_of(word, options)
        option = options[name]
        if name in typed:
            raise UserError(f"{option.label}: given twice")
        if option.is_switch:
            if equals:
                raise UserError(
                    f"{option.label}: takes no value (use {flag(name)} or {flag('no_' + name)})"
                )
            typed[name] = switch_to
            continue
        if not equals:
            if not tokens or tokens[0].startswith("--"):
                raise UserError(f"{option.label}: needs a value")
            value = tokens.pop(0)
        typed[name] = value
    return typed


def _name_of(word: str, options: Mapping[str, Option]) -> tuple[str, bool]:
    """The field that a flag names, and False if it is the --no- form of a switch."""
    name = word.removeprefix("--").replace("-", "_")
    if word.startswith("--"):
        if name in options and not options[name].is_positional:
            return name, True
        negated = name.removeprefix("no_")
        if negated != name and negated in options and options[negated].is_switch:
            return negated, False
    close = nearest_option(word, options)
    if close is not None:
        raise UserError(f"unknown option {word} (did you mean {flag(close)}?)")
    if any(option.is_positional for option in options.values()):
        raise UserError(f"unknown option {word} (put -- before text that begins with -)")
    raise UserError(f"unknown option {word} (--help lists them all)")


def nearest_option(word: str, options: Mapping[str, Option]) -> str | None:
    """The option whose flag, or whose help text's first words, look most like `word`."""
    wanted = word.lower().strip("-").replace("_", "-").removeprefix("no-")
    docs: dict[str, str] = {}
    for owner in {option.owner for option in options.values()}:
        docs |= START_HELP if owner.__name__ == "Start" else field_docs(owner)
    best, best_score = None, LOOKS_LIKE
    for name, option in options.items():
        if option.is_positional:
            continue
        own = flag(name)[2:]
        words = re.findall(r"[a-z0-9]+", docs.get(name, "").lower())[:4]
        phrases = {"-".join(words[i:j]) for j in range(len(words) + 1) for i in range(j)}
        # A little less for help texts: of two equal likenesses the flag's own name is meant.
        scores = [0.95 * _likeness(wanted, phrase) for phrase in phrases]
        scores.append(_likeness(wanted, own))
        if set(wanted.split("-")) <= set(own.split("-")):
            scores.append(0.96)  # --layers: a part of the name
        if max(scores) > best_score:
            best, best_score = name, max(scores)
    return best


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _checked(option: Option, token: str, *, models: Tables, recipes: Recipes) -> str:
    """The text as tyro shall have it. Raises UserError unless it is a legal value of the option."""
    if token == "" and option.default != "":
        raise UserError(f"{option.label}: must not be empty")
    if option.owner.__name__ == "Start" and option.name != "config":
        table: Mapping[str, Any] = models if option.name == "model" else recipes
        if token not in table:
            raise UserError(unknown(option.label, token, table))
    is_path = Path in kinds_of(option.hint)[0] or _is_path_text(option.hint)
    if is_path:
        token = os.path.expanduser(token)
    shown = token if len(token) <= 60 else token[:57] + "..."
    check_value(
        option.name, _read(token, option.hint), option.hint, label=f"{option.label} {shown}"
    )
    return token


def _is_path_text(hint: Any) -> bool:
    return hint == PathText or any(_is_path_text(part) for part in get_args(hint))


def _read(token: str, hint: Any) -> Any:
    """The value of a text; the text itself where it is none, for check_value to refuse."""
    kinds, may_be_none = kinds_of(hint)
    if may_be_none and token == "None":
        return None
    kind = kinds[0]
    if get_origin(kind) is Literal:
        return {str(v): v for v in get_args(kind)}.get(token, token)
    try:
        if get_origin(kind) is tuple:
            return tuple(get_args(kind)[0](part) for part in token.split(","))
        return kind(token)
    except ValueError:
        return token


# -- where a run begins ------------------------------------------------------------------------


def _start_from(schema: Any, typed: Mapping[str, Any], *, models: Tables, recipes: Recipes) -> Any:
    """The Config that the start flags describe, before the other flags."""
    if "config" in typed and "recipe" in typed:
        raise UserError("--recipe: not together with --config (both are a whole run)")
    base = schema()
    if "recipe" in typed:
        base = recipes[typed["recipe"]]()
    if "config" in typed:
        base = _read_config(schema, "config", Path(typed["config"]))
    elif "init_from" in typed and "recipe" not in typed:
        run = run_directory(Path(typed["init_from"]))
        if (run / FILE_NAME).is_file():
            base = dataclasses.replace(base, model=_read_config(schema, "init_from", run).model)
    if "model" in typed:
        base = dataclasses.replace(base, model=type(base.model)(**models[typed["model"]]))
    return base


def _read_config(schema: Any, name: str, path: Path) -> Any:
    if path.is_dir():
        path = path / FILE_NAME
    try:
        made = schema.from_dict(json.loads(path.read_text(encoding="utf-8")))
        for group in _groups(made).values():
            check_fields(group)
        return made
    except UserError as error:
        raise UserError(f"{flag(name)} {path}: {error}") from None
    except OSError as error:
        raise UserError(f"{flag(name)} {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested to break us
        raise UserError(f"{flag(name)} {path}: not JSON ({error})") from None


# -- tyro --------------------------------------------------------------------------------------


def _spelled_out(typed: Mapping[str, Any], options: Mapping[str, Option]) -> list[str]:
    """The arguments in the one form that tyro cannot read in two ways."""
    args: list[str] = []
    for name, token in typed.items():
        if options[name].is_switch:
            args.append(flag(name) if token else flag("no_" + name))
        elif not options[name].is_positional:
            args.append(f"{flag(name)}={token}")
    free = [typed[o.name] for o in options.values() if o.is_positional and o.name in typed]
    return [*args, "--", *free] if free else args


def _call_tyro(schema: Any, args: list[str], *, prog: str, default: Any) -> Any:
    marks = (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalMetavarFromFieldName)
    call = functools.partial(
        tyro.cli, schema, prog=prog, default=default, config=marks, registry=_readers()
    )
    if args == ["--help"]:
        call(args=args)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return call(args=args)
    except SystemExit:
        # Every text passed _checked, so this is a schema that tyro reads otherwise than we do.
        text = " ".join(re.sub(r"[^\x20-\x7e]", " ", said.getvalue()).split())
        raise UserError(f"cannot read the arguments: {text}") from None


def _readers() -> tyro.constructors.ConstructorRegistry:
    """Have tyro read every field by `_read`: one meaning of a text, and 3,3,2,2 as one word."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def reader(info: Any) -> Any:
        kinds, may_be_none = kinds_of(info.type)
        if not kinds or (get_origin(kinds[0]) is None and kinds[0] not in (int, float, str, Path)):
            return None  # switches and groups are tyro's own
        kind = kinds[0]
        if get_origin(kind) is Literal:
            metavar = "{" + ",".join(str(v) for v in get_args(kind)) + "}"
        elif get_origin(kind) is tuple:
            metavar = get_args(kind)[0].__name__.upper() + ",..."
        else:
            metavar = kind.__name__.upper()
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=lambda words: _read(words[0], info.type),
            is_instance=lambda value: value is not None or may_be_none,
            str_from_instance=lambda value: [
                ",".join(str(v) for v in value) if isinstance(value, tuple) else str(value)
            ],
        )

    return registry
