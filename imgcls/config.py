"""Configuration loader: defaults < YAML file < command line, validated into frozen pydantic models.

Unknown keys are refused with the nearest valid key, all problems are reported together, keys are
dotted paths, and the environment is never read. The sections are in the `config.py` of each
package, or next to code that imports nothing heavy.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from imgcls.errors import ConfigError
from imgcls.formatting import find_new_name, format_choices

S = TypeVar("S", bound="Section")


def names(value: Any) -> Any:
    """`camera,site` as on a command line, or a list."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(names)]

UnitFloat = Annotated[float, Field(ge=0.0, le=1.0)]
"""A share or a probability."""


class Section(BaseModel):
    """A frozen group of settings; a docstring below each field is its help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
        validate_default=True,
    )
    shorthand: ClassVar[str | None] = None
    """The field that a bare value sets: `--manifest FILE` is `--manifest.path FILE`."""
    positional: ClassVar[tuple[str, ...]] = ()
    """Fields that may be given without their name, in this order: `imgcls compare A B`."""

    @model_validator(mode="before")
    @classmethod
    def _expand_shorthand(cls, value: Any) -> Any:
        if cls.shorthand is not None and isinstance(value, (str, int, float)):
            return {cls.shorthand: str(value)}
        return value

    @model_validator(mode="after")
    def _refuse_empty_text(self) -> Self:
        """An empty path would be the current folder, as of `--output "$OUT"` without OUT."""
        for name, field in type(self).model_fields.items():
            if getattr(self, name) == "" and (field.is_required() or name == "output"):
                raise ValueError(f"{name}: is empty; pass a value")
        return self


def load(model: type[S], argv: Sequence[str]) -> S:
    """Build `model` from the command line `argv`.

    `--config FILE.yaml` may be given several times, later files winning; every other option is a
    dotted key of the model (`--optim.lr 1e-3`, `--optim.lr=1e-3`, `--scores`, `--no-scores`,
    `--embeddings float16`, `--options.width 8` into a map, `--against A B` into a list), or the
    model's positional ones without a key. `--print-config` prints the settings and raises
    SystemExit(0).

    Raises
    ------
    ConfigError
        Lists every problem with its dotted path, and has the settings that could be read.
    """
    problems: list[str] = []
    files, overrides, print_config = _parse(model, argv, problems)
    tree: dict[str, Any] = {}
    for file in files:
        try:
            _merge(model, tree, _read_yaml(file, problems))
        except ConfigError as error:
            problems.append(f"--config {file}: {error}")
    for parts, value in overrides:
        _set(model, tree, parts, value)
    config = _validated(model, tree, problems)
    if print_config:
        print(dump(config), end="")
        raise SystemExit(0)
    return config


def build(model: type[S], settings: Mapping[str, Any]) -> S:
    """Build `model` in Python, from nested settings or dotted keys: `{"optim.lr": 1e-3}`.

    Raises
    ------
    ConfigError
        Lists every problem with its dotted path.
    """
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        _set(model, tree, _split_key(model, key), value)
    return _validated(model, tree, [])


def requested(model: type[S], config: object, settings: Mapping[str, Any], call: str) -> S:
    """The configuration of a call from Python: one that is built already, or keys.

    call: an example of it, such as `evaluate(predictions="out")`
    Raises ConfigError when both are given, or something else than a configuration.
    """
    if config is None:
        return build(model, {key: _plain(key, value) for key, value in settings.items()})
    name = call.partition("(")[0]
    if not isinstance(config, model):
        raise ConfigError(
            f"{name}: the first argument is {config!r:.60}; pass keys by name, such as {call}, or "
            f"a {model.__name__}"
        )
    if settings:
        raise ConfigError(
            f"{name}: got a {model.__name__} and the keys {', '.join(settings)}; pass one of both"
        )
    return config


def _plain(key: str, value: Any) -> Any:
    """Paths as text, NumPy numbers as Python's; raises ConfigError for tables."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, BaseModel):
        return value
    if isinstance(value, Mapping):
        return {name: _plain(f"{key}.{name}", each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(key, each) for each in value]
    if getattr(value, "shape", None) == ():  # a number of NumPy or torch
        return value.item()
    if hasattr(value, "columns") or hasattr(value, "shape") or hasattr(value, "__next__"):
        raise ConfigError(
            f"{key}: is a {type(value).__name__}; write it to a CSV or Parquet file and pass the "
            "path of that, or pass a list of values where the key takes one"
        )
    return value


def _validated(model: type[S], tree: Mapping[str, Any], problems: list[str]) -> S:
    config = None
    try:
        config = model.model_validate(tree)
    except ValidationError as error:
        problems = [*problems, *_explain(model, error)]
    if problems or config is None:
        lines = "\n".join(f"  {problem}" for problem in problems)
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"the configuration has {count}:\n{lines}", tree)
    return config


def dump(config: Section) -> str:
    """The configuration as YAML that `load` reads back to the same model."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def to_option(key: str) -> str:
    """A key as a command line writes it, with dashes."""
    return key.replace("_", "-")


def _iter_types(annotation: Any) -> Iterator[Any]:
    """The types of an annotation: `list[int] | Literal["x"] | None` is list, Literal, NoneType."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        yield from _iter_types(arguments[0])
    elif origin in (typing.Union, types.UnionType):
        yield from itertools.chain.from_iterable(map(_iter_types, arguments))
    else:
        yield origin or annotation


def find_section_type(annotation: Any) -> type[Section] | None:
    """The Section class in an annotation such as `Section` or `Section | None`."""
    for each in _iter_types(annotation):
        if isinstance(each, type) and issubclass(each, Section):
            return each
    return None


def iter_sections(
    model: type[Section], prefix: str = ""
) -> Iterator[tuple[str, FieldInfo, type[Section]]]:
    """Every section at any depth: its dotted name, the field that holds it, and its type."""
    for name, field in model.model_fields.items():
        section = find_section_type(field.annotation)
        if section is not None:
            yield f"{prefix}{name}", field, section
            yield from iter_sections(section, f"{prefix}{name}.")


def iter_fields(
    model: type[Section], prefix: str = ""
) -> Iterator[tuple[str, FieldInfo, str | None]]:
    """Every settable (dotted key, field, owner), own ones first; sections with a shorthand too."""
    own = inspect.get_annotations(model)
    for name, field in sorted(model.model_fields.items(), key=lambda item: item[0] not in own):
        key = f"{prefix}{name}"
        section = find_section_type(field.annotation)
        if section is None:
            yield key, field, None
            continue
        if section.shorthand is not None:
            yield key, field, key
        yield from iter_fields(section, f"{key}.")


def _is_bool(annotation: Any) -> bool:
    return bool in _iter_types(annotation)


def _is_list(annotation: Any) -> bool:
    return not {list, tuple}.isdisjoint(_iter_types(annotation))


def _split_key(model: type[Section], key: str) -> list[str]:
    """The parts of a dotted key: names of fields, in which dashes are read as underscores.

    A key in a map of text, such as the name of a class, is one part, as it is; not in a map of any
    values, whose keys are names of arguments.
    """
    name, _, rest = key.partition(".")
    name = name.replace("-", "_")
    section, _ = find_section(model, name)
    if section is not None and rest:
        return [name, *_split_key(section, rest)]
    kind = model.model_fields[name].annotation if name in model.model_fields else None
    maps = [each for each in (kind, *typing.get_args(kind)) if typing.get_origin(each) is dict]
    if rest and maps and typing.get_args(maps[0])[0] is str and Any not in typing.get_args(maps[0]):
        return [name, rest]
    return [name, *rest.replace("-", "_").split(".")] if rest else [name]


def _parse(
    model: type[Section], argv: Sequence[str], problems: list[str]
) -> tuple[list[str], list[tuple[list[str], Any]], bool]:
    """Split the command line into files, (parts of a key, value) pairs and `--print-config`."""
    fields = {key: field for key, field, _ in iter_fields(model)}
    files: list[str] = []
    overrides: list[tuple[list[str], Any]] = []
    print_config = False
    unnamed = list(model.positional)
    position = 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        if argument == "--print-config":
            print_config = True
            continue
        if not argument.startswith("--") or argument == "--":
            if unnamed:
                overrides.append(([unnamed.pop(0)], argument))
            else:
                problems.append(f"{argument!r}: options are written --KEY VALUE")
            continue
        name, equals, value = argument[2:].partition("=")
        parts = _split_key(model, name)
        key = ".".join(parts)
        field = fields.get(key)
        if not equals:
            following = argv[position] if position < len(argv) else None
            takes_none = following is None or _is_option(following)
            if field is not None and _is_bool(field.annotation):
                choices = _choices(field)
                words = {"true", "false", "null", "none", *choices}
                # a wrong choice is refused with the right ones
                is_value = choices and not takes_none and not unnamed
                if following is not None and (is_value or following.lower() in words):
                    value, position = following, position + 1
                else:
                    value = "true"
            elif field is None and _is_negated(key, fields):
                parts, value = key[3:].split("."), "false"
            elif takes_none:
                known = field is not None or key == "config" or key.partition(".")[0] in fields
                problems.append(f"--{name}: needs a value" if known else _unknown(model, key))
                continue
            else:
                value, position = typing.cast(str, following), position + 1
        unnamed = [each for each in unnamed if each not in (key, key.partition(".")[0])]
        if key == "config":
            files.append(value)
        elif field is not None and _is_list(field.annotation) and not equals:
            more = list(itertools.takewhile(lambda word: not _is_option(word), argv[position:]))
            position += len(more)
            overrides.append((parts, [value, *more] if more else _value(value, field)))
        else:
            overrides.append((parts, value if value in _choices(field) else _value(value, field)))
    return files, overrides, print_config


def _choices(field: FieldInfo | None) -> set[str]:
    """The words that a field takes; `none` may be one of them."""
    if field is None:
        return set()
    section = find_section_type(field.annotation)
    if section is not None and section.shorthand is not None:
        return _choices(section.model_fields[section.shorthand])
    return set(list_choices(field.annotation))


def list_choices(annotation: Any) -> Iterator[str]:
    for argument in typing.get_args(annotation):
        if typing.get_origin(annotation) is typing.Literal:
            yield str(argument)
        else:
            yield from list_choices(argument)


def _is_negated(key: str, fields: Mapping[str, FieldInfo]) -> bool:
    field = fields.get(key.removeprefix("no_")) if key.startswith("no_") else None
    return field is not None and _is_bool(field.annotation)


def _is_option(argument: str) -> bool:
    return argument.startswith("--") and len(argument) > 2


def _value(text: str, field: FieldInfo | None) -> Any:
    """Lists, maps and null are read as YAML; anything else stays text for pydantic to coerce.

    A field of text keeps all text, such as `{date}`; null where it may be null.
    """
    kinds = {Any} if field is None else set(_iter_types(field.annotation))
    is_text = str in kinds and kinds <= {str, type(None), typing.Literal}
    if text in ("null", "none", "None") and not (is_text and type(None) not in kinds):
        return None
    return _yaml_or_text(text) if text[:1] in ("[", "{") and not is_text else text


def _yaml_or_text(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: e.g. February 30
        return text


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is set twice in a map, of which YAML's own loader keeps the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines and name != "<<":
                raise ConfigError(
                    f"line {line}: {name!r} is already set in line {lines[name]}; merge the two, "
                    "or remove one"
                )
            lines[name] = line
        return node


def _read_yaml(file: str, problems: list[str]) -> Mapping[str, Any]:
    try:
        with open(file, encoding="utf-8") as stream:
            content = yaml.load(stream, _UniqueKeyLoader)
        if content is None or isinstance(content, dict):
            return content or {}
        problem = f"expected keys and values, found {type(content).__name__}"
    except OSError as error:
        problem = f"{error.strerror or error}; give the path of a YAML file"
    except ConfigError as error:
        problem = str(error)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = f"not YAML: {' '.join(str(error).split())}"
    except ValueError as error:  # e.g. February 30
        problem = f"a date or number is invalid: {error}; correct it, or put it in quotes"
    problems.append(f"--config {file}: {problem}")
    return {}


def _merge(model: type[Section] | None, tree: dict[str, Any], update: Mapping[Any, Any]) -> None:
    """Lay a YAML tree over another: section by section, anything else as a whole."""
    keys: dict[str, Any] = {}
    for raw, value in update.items():
        name = "on" if raw is True else str(raw)  # YAML 1.1 reads a bare key `on` as true
        name = name if model is None else name.replace("-", "_")
        if keys.setdefault(name, raw) != raw:
            raise ConfigError(f"{name}: is set as {keys[name]!r} and as {raw!r}; remove one")
        section, optional = find_section(model, name)
        if section is None:
            tree[name] = value
            continue
        if not isinstance(value, Mapping) and value is not None and section.shorthand is not None:
            value = {section.shorthand: value}
        if isinstance(value, Mapping):
            branch = tree.get(name)
            tree[name] = branch if isinstance(branch, dict) else {}
            _merge(section, tree[name], value)
        elif value is not None or optional:
            tree[name] = value  # else a heading with nothing below it, which sets nothing


def _set(
    model: type[Section] | None, tree: dict[str, Any], parts: Sequence[str], value: Any
) -> None:
    """Put the value of one dotted key into the tree; inside a map it is read as YAML."""
    name, *rest = parts
    if not rest:
        _merge(model, tree, {name: value})
        return
    section, _ = find_section(model, name)
    branch = tree.get(name)
    if section is None and isinstance(value, str):
        value = _yaml_or_text(value)
    elif section is not None and branch is not None and not isinstance(branch, dict):
        return  # a file gave the section a bare value; that problem is reported
    tree[name] = branch if isinstance(branch, dict) else {}
    _set(section, tree[name], rest, value)


def find_section(model: type[Section] | None, name: str) -> tuple[type[Section] | None, bool]:
    """The Section that a field holds, if it does, and whether it may be null."""
    field = model.model_fields.get(name) if model is not None else None
    if field is None:
        return None, False
    return find_section_type(field.annotation), not isinstance(field.annotation, type)


def _explain(model: type[Section], error: ValidationError) -> list[str]:
    """The problems of pydantic's error, which has one for each type of a union."""
    fields = ((key, {*_iter_types(field.annotation)}) for key, field, _ in iter_fields(model))
    unions = {key for key, kinds in fields if len(kinds - {type(None)}) > 1}
    groups: dict[str, list[tuple[str, ErrorDetails]]] = {}
    for item in error.errors(include_url=False):
        parts = [str(part) for part in item["loc"] if part != "[key]"]
        keys = itertools.accumulate(parts[:-1], "{}.{}".format)
        union = next((key for key in keys if key in unions), None)
        if union is not None:
            del parts[union.count(".") + 1]  # the type, such as "dict[str,float]"
        path = ".".join(parts)
        groups.setdefault(union or path, []).append((path, item))
    problems: list[str] = []
    for key, items in groups.items():
        # of a union, the problems of a value that has one of its types
        skipped = ("_type", "_parsing", "literal_error") if key in unions else ()
        own = [each for each in items if each[0] != key or not each[1]["type"].endswith(skipped)]
        if own:
            problems += [line for path, item in own for line in _explain_item(model, path, item)]
        else:
            choices = format_choices(item for _, item in items)
            problems.append(f"{key}: Input should be {choices}; found {items[0][1]['input']!r}")
    return problems


def _explain_item(model: type[Section], path: str, item: ErrorDetails) -> list[str]:
    if item["type"] == "extra_forbidden":
        return [_unknown(model, key) for key in _keys_below(path, item["input"])]
    if item["type"] == "missing":
        return [f"{path}: is required; give --{to_option(path)} VALUE"]
    if item["type"] == "value_error":
        return [f"{path}: {item['ctx']['error']}" if path else str(item["ctx"]["error"])]
    return [f"{path}: {item['msg']}; found {item['input']!r}"]


def _keys_below(path: str, value: Any) -> list[str]:
    if not isinstance(value, Mapping) or not value:
        return [path]
    return [key for name, below in value.items() for key in _keys_below(f"{path}.{name}", below)]


def _unknown(model: type[Section], path: str) -> str:
    """Name an unknown key and its new name, or the nearest valid ones."""
    valid = [key for key, _, _ in iter_fields(model)]
    sections = sorted({key.rpartition(".")[0] for key in valid} - {""})
    renamed = find_new_name(path)
    if renamed in valid or renamed in sections:
        return f"{path}: was renamed; use {renamed}"
    near = difflib.get_close_matches(path, valid + sections, n=2, cutoff=0.7)
    last = path.rpartition(".")[2]
    near += [key for key in valid if key.rpartition(".")[2] == last]
    if not near:
        by_last = {key.rpartition(".")[2]: key for key in valid}
        near = [by_last[m] for m in difflib.get_close_matches(last, by_last, n=2, cutoff=0.7)]
    hint = " or ".join(dict.fromkeys(near))
    remedy = f"did you mean {hint}?" if hint else "see --help for the valid keys"
    return f"{path}: unknown key; {remedy}"
