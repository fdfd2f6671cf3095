"""Help pages, reference of all keys and shell completion, made from the configuration models."""

from __future__ import annotations

import importlib
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from imgcls.config import (
    Section,
    find_section,
    find_section_type,
    iter_fields,
    iter_sections,
    list_choices,
    to_option,
)

Shell = Literal["bash", "zsh", "fish"]


@dataclass(frozen=True)
class Command:
    """A command: what it is for, its configuration and its function by dotted name, an example.

    example: runs after `imgcls demo`, in a clone of the repository
    workers: what the workers do that import torch, if Ray starts any
    """

    summary: str
    config: str
    function: str
    example: str
    workers: Literal["labeling", "training"] | None = None

    def load_model(self) -> type[Section]:
        """Import the configuration model, but not the command's function."""
        model: type[Section] = _import_name(self.config)
        return model

    def load_function(self) -> Callable[[Any], object]:
        """Import the function that runs the command."""
        function: Callable[[Any], object] = _import_name(self.function)
        return function


def _import_name(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Key:
    """One configuration key as the help page shows it.

    name:      in dotted form, with dashes
    section:   the dotted name of the section that it belongs to; "" for a key of the model itself
    choices:   the words that it takes, where they are listed
    shorthand: the shorter option that sets the same key, such as `manifest` for `manifest.path`
    """

    name: str
    type: str
    default: str
    meaning: str
    section: str
    choices: tuple[str, ...]
    shorthand: str | None

    @property
    def is_required(self) -> bool:
        return self.default == "required"


def list_keys(model: type[Section]) -> list[Key]:
    """Every key that may be set, in the order of declaration."""
    short: dict[str, str] = {}
    for name, _, section in iter_sections(model):
        if section.shorthand is not None:
            short[f"{name}.{section.shorthand}"] = name
    found = []
    for key, field, owner in iter_fields(model):
        if key == owner:
            continue
        default = f"default {_show(field.get_default(call_default_factory=True))}"
        if field.is_required():
            optional = _optional_owner(model, key)
            default = "required" if optional is None else f"required where {optional} is given"
        found.append(
            Key(
                name=to_option(key),
                type=_type_name(field.annotation),
                default=default,
                meaning=" ".join((field.description or "").split()),
                section=to_option(key.rpartition(".")[0]),
                choices=tuple(list_choices(field.annotation)),
                shorthand=to_option(short[key]) if key in short else None,
            )
        )
    return found


def format_help(
    model: type[Section],
    *,
    prog: str,
    description: str = "",
    example: str = "",
    width: int | None = None,
) -> str:
    """The `--help` page: required keys, then the others by section, wrapped to `width` columns.

    width: the width of the terminal, at most 100, if None
    """
    width = min(shutil.get_terminal_size().columns, 100) if width is None else width
    keys = list_keys(model)
    unnamed = "".join(f"{_unnamed_word(name)} " for name in model.positional)
    lines = [f"usage: {prog} {unnamed}[--config FILE.yaml] [--KEY VALUE ...]", ""]
    if description:
        lines += [*textwrap.wrap(description, width), ""]
    if example:
        lines += ["example:", *_wrap_command(example, width), ""]
    lines += [
        "Settings files:",
        "  --config FILE.yaml  (repeatable)",
        *_indent(
            "Read settings from a file. Later files and the command line take precedence.", width
        ),
        "  --print-config",
        "      Print the resolved settings as YAML and exit.",
    ]
    required = [key for key in keys if key.is_required]
    if required:
        lines += ["", "Required:", *_format_keys(required, width)]
    titles = {
        to_option(name): field.description or section.__doc__ or ""
        for name, field, section in iter_sections(model)
    }
    rest = [key for key in keys if not key.is_required]
    for section in sorted({key.section: None for key in rest}, key=bool):  # the model's own first
        title = _first_paragraph(titles.get(section))
        heading = f"{section}: {title}" if section else "Options:"
        group = [key for key in rest if key.section == section]
        lines += ["", *textwrap.wrap(heading, width), *_format_keys(group, width)]
    return "\n".join(lines)


def _format_keys(keys: Iterable[Key], width: int) -> Iterator[str]:
    for key in keys:
        yield f"  --{key.name} {key.type}  ({key.default})"
        meaning = key.meaning
        if key.shorthand is not None:
            meaning = f"{meaning} Short form: --{key.shorthand} {key.type}".strip()
        yield from _indent(meaning, width)


def _indent(text: str, width: int) -> list[str]:
    indent = " " * 6
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _wrap_command(command: str, width: int) -> list[str]:
    """A command on several lines that a shell reads as one."""
    lines = textwrap.wrap(
        command, width - 4, break_long_words=False, break_on_hyphens=False, subsequent_indent="  "
    )
    return [f"  {line} \\" for line in lines[:-1]] + [f"  {line}" for line in lines[-1:]]


def _unnamed_word(key: str) -> str:
    return key.rpartition(".")[2].upper()


def _optional_owner(model: type[Section], key: str) -> str | None:
    """The innermost section that a key stands in and that may be left out."""
    parts = key.split(".")
    section: type[Section] | None = model
    owner = None
    for depth, part in enumerate(parts[:-1], 1):
        section, optional = find_section(section, part)
        if optional:
            owner = ".".join(parts[:depth])
    return owner


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        names = [_type_name(a) for a in typing.get_args(annotation) if a is not type(None)]
        return "|".join(dict.fromkeys(names))
    if origin in (list, tuple):
        return "LIST"
    if origin is dict:
        return "MAP"
    return {str: "TEXT", int: "INT", float: "NUMBER", bool: "true|false"}.get(annotation, "VALUE")


def render_reference(commands: Mapping[str, Command]) -> str:
    """docs/reference.md: every key of every command, as Markdown.

    The keys of a section that several commands have, such as `storage`, are listed once, and a
    command whose configuration extends that of another lists its own keys only.
    """
    models = {name: command.load_model() for name, command in commands.items()}
    bases = {name: _find_base(model, models) for name, model in models.items()}
    users = _find_users({name: model for name, model in models.items() if bases[name] is None})
    shared = {section for section, names in users.items() if len(names) > 1}
    lines = [
        "# Reference",
        "",
        "Every key of every command. A key is given as `--key VALUE`, in a YAML file (`--config`), "
        "or to the function in Python. A key without a default is required. This page is "
        "generated by `imgcls reference`.",
        "",
    ]
    summaries = ((_link_command(name), command.summary) for name, command in commands.items())
    lines += _format_rows(("command", "purpose"), summaries)
    for name, command in commands.items():
        base = bases[name]
        lines += ["", f"## imgcls {name}", ""]
        lines += [f"{command.summary[0].upper()}{command.summary[1:]}.", ""]
        lines += [f"    {command.example}", ""]
        lines += [] if base is None else [f"All keys of {_link_command(base)}, and:", ""]
        lines += _format_model(models[name], shared, models[base] if base else None)
    lines += ["", "## Shared keys", "", "Keys that several commands have, by section."]
    for section in sorted(shared, key=_title):
        used = ", ".join(_link_command(name) for name in users[section])
        bare = section.shorthand and f" A value of the section itself sets `{section.shorthand}`."
        lines += ["", f"### {_title(section)}", "", _first_paragraph(section.__doc__), ""]
        lines += [f"In: {used}.{bare or ''}", "", *_format_model(section, shared)]
    return "\n".join(lines) + "\n"


def _find_base(model: type[Section], models: Mapping[str, type[Section]]) -> str | None:
    """The command whose configuration a model extends."""
    names = {each: name for name, each in models.items()}
    return next((names[each] for each in model.__mro__[1:] if each in names), None)


def _find_users(models: Mapping[str, type[Section]]) -> dict[type[Section], list[str]]:
    """Sections by type, with the commands that have them."""
    users: dict[type[Section], list[str]] = {}
    for name, model in models.items():
        for section in dict.fromkeys(section for _, _, section in iter_sections(model)):
            users.setdefault(section, []).append(name)
    return users


def _format_model(
    model: type[Section], shared: Collection[type[Section]], base: type[Section] | None = None
) -> list[str]:
    """The table of a model's keys, required ones first; a shared section has one row.

    base: a model whose keys are left out
    """
    linked = {
        to_option(name): _format_section(model, name, field, section)
        for name, field, section in iter_sections(model)
        if section in shared
    }
    inherited = {key.name for key in list_keys(base)} if base is not None else set()
    rows: dict[str, Sequence[str]] = {}
    for key in list_keys(model):
        if key.name in inherited:
            continue
        outer = next((name for name in linked if f"{key.section}.".startswith(f"{name}.")), None)
        if outer is not None:
            rows[outer] = linked[outer]
        else:
            short = f" Short form: `{key.shorthand}`." if key.shorthand is not None else ""
            default = key.default.removeprefix("default ")
            rows[key.name] = (f"`{key.name}`", key.type, default, f"{key.meaning}{short}".strip())
    ordered = sorted(rows.values(), key=lambda row: row[2] != "required")
    return _format_rows(("key", "type", "default", "meaning"), ordered)


def _format_section(
    model: type[Section], name: str, field: FieldInfo, section: type[Section]
) -> Sequence[str]:
    """The row of a section: its name, a link to its keys, default and meaning."""
    title = _title(section)
    kind = f"[{title}](#{title.lower().replace(' ', '-')})"
    if section.shorthand is not None:
        kind = f"{_type_name(section.model_fields[section.shorthand].annotation)} or {kind}"
    default = "none" if field.default is None else ""
    if field.is_required():
        optional = _optional_owner(model, name)
        default = "required" if optional is None else f"required where {optional} is given"
    meaning = _first_paragraph(field.description or section.__doc__)
    return f"`{to_option(name)}`", kind, default, meaning


def _title(section: type[Section]) -> str:
    """`Label table keys` of LabelTableConfig."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", section.__name__.removesuffix("Config"))
    return f"{words.capitalize()} keys"


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())


def _link_command(name: str) -> str:
    return f"[`imgcls {name}`](#imgcls-{name.replace(' ', '-')})"


def _format_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_format_row(*cells) for cells in (header, ("---",) * len(header), *rows)]


def _format_row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def render_completion(commands: Mapping[str, Command], shell: Shell) -> str:
    """A script that completes commands, keys and listed values of keys in a shell."""
    if shell == "fish":
        return "\n".join(_fish_lines(commands)) + "\n"
    bash = "\n".join(_bash_lines(commands)) + "\n"
    return f"autoload -U +X bashcompinit && bashcompinit\n{bash}" if shell == "zsh" else bash


def list_groups(commands: Iterable[str]) -> list[str]:
    """The first words of commands of two words, such as `manifest`."""
    return list(dict.fromkeys(name.split()[0] for name in commands if " " in name))


def _first_words(commands: Mapping[str, Command]) -> dict[str, list[str]]:
    """What may follow `imgcls` (key "") and a group of commands."""
    words = {"": list(dict.fromkeys(name.split()[0] for name in commands))}
    for group in list_groups(commands):
        words[group] = [name.split()[1] for name in commands if name.startswith(f"{group} ")]
    return words


def _bash_lines(commands: Mapping[str, Command]) -> Iterator[str]:
    words = _first_words(commands)
    groups = "|".join(list_groups(commands))
    yield "_imgcls() {"
    yield '  local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"'
    yield '  local command="${COMP_WORDS[1]}" words="" at=1'
    yield f'  case "$command" in {groups}) command="$command ${{COMP_WORDS[2]}}"; at=2 ;; esac'
    yield '  if [ "$COMP_CWORD" -le "$at" ]; then'
    yield '    case "$COMP_CWORD:${COMP_WORDS[1]}" in'
    for group in list_groups(commands):
        yield f'      2:{group}) words="{" ".join(words[group])}" ;;'
    yield f'      *) words="{" ".join(words[""])}" ;;'
    yield "    esac"
    yield '    COMPREPLY=($(compgen -W "$words" -- "$current")); return'
    yield "  fi"
    yield '  case "$command" in'
    for name, command in commands.items():
        keys = list_keys(command.load_model())
        options = " ".join(f"--{option}" for option in _options(keys))
        yield f'    "{name}") words="{options}"'
        yield '      case "$previous" in'
        for key in keys:
            if key.choices:
                yield f'        --{key.name}) words="{" ".join(key.choices)}" ;;'
        yield "        --*=*) ;;"
        yield "      esac ;;"
    yield "  esac"
    yield '  COMPREPLY=($(compgen -W "$words" -- "$current"))'
    yield "}"
    yield "complete -o default -F _imgcls imgcls"


def _fish_lines(commands: Mapping[str, Command]) -> Iterator[str]:
    words = _first_words(commands)
    yield "complete -c imgcls -f -n __fish_use_subcommand -a " + _quote(" ".join(words[""]))
    for group in list_groups(commands):
        chosen = " ".join(words[group])
        seen = f"__fish_seen_subcommand_from {group}; and not __fish_seen_subcommand_from {chosen}"
        yield f"complete -c imgcls -f -n {_quote(seen)} -a {_quote(chosen)}"
    for name, command in commands.items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        meanings = {key.name: key for key in list_keys(command.load_model())}
        for option in _options(meanings.values()):
            key = meanings.get(option)
            values = f" -a {_quote(' '.join(key.choices))}" if key and key.choices else ""
            meaning = f" -d {_quote(key.meaning)}" if key and key.meaning else ""
            yield f"complete -c imgcls -n {_quote(seen)} -l {option} -r{values}{meaning}"


def _options(keys: Iterable[Key]) -> Iterator[str]:
    for key in keys:
        if key.shorthand is not None:
            yield key.shorthand
        yield key.name
    yield from ("config", "print-config", "help")


def _quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def render_stub(functions: Mapping[str, Command], exports: Mapping[str, tuple[str, str]]) -> str:
    """imgcls/__init__.pyi: the signatures that type checkers and editors see.

    functions: by public name; their keys become keyword arguments
    exports:   other public names: module and attribute
    """
    types_needed: dict[str, set[str]] = {"collections.abc": {"Mapping"}, "os": {"PathLike"}}
    body: list[str] = []
    for name, command in functions.items():
        model = command.load_model()
        result = typing.get_type_hints(command.load_function())["return"]
        source, returned = (_type_source(each, types_needed) for each in (model, result))
        body += ["", "@overload", f"def {name}(config: {source}, /) -> {returned}: ..."]
        body += ["@overload", f"def {name}(", "    *,"]
        fields = model.model_fields.items()
        for key, field in sorted(fields, key=lambda item: not item[1].is_required()):
            source = _argument_source(field, types_needed)
            body.append(f"    {key}: {source}{'' if field.is_required() else ' = ...'},")
        body.append(f") -> {returned}: ...")
    for name, (module, attribute) in exports.items():
        types_needed.setdefault(module, set()).add(f"{attribute} as {name}")
    lines = [
        "# Generated by `imgcls reference --format stub`. Do not edit.",
        "from typing import Literal, overload",
        "",
        *(
            f"from {module} import {', '.join(sorted(names))}"
            for module, names in sorted(types_needed.items())
            if module != "builtins"
        ),
        "",
        "__version__: str",
        "LAZY_EXPORTS: dict[str, tuple[str, str]]",
        "__all__: list[str]",
        *body,
    ]
    return "\n".join(lines) + "\n"


def _argument_source(field: FieldInfo, needed: dict[str, set[str]]) -> str:
    """The type of a keyword argument: that of the field, and what is converted to it."""
    section = find_section_type(field.annotation)
    parts = [_type_source(field.annotation, needed)]
    if section is not None:
        parts.append("Mapping[str, object]")
    if section is not None and section.shorthand is not None:
        parts.append("str")
    if any(isinstance(each, BeforeValidator) for each in field.metadata):
        parts.append("str")
    source = " | ".join(dict.fromkeys(" | ".join(parts).split(" | ")))
    return f"{source} | PathLike[str]" if "str" in source.split(" | ") else source


def _type_source(annotation: Any, needed: dict[str, set[str]]) -> str:
    """A type as Python source; its name is noted for the import."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is types.NoneType:
        return "None"
    if origin is typing.Annotated:
        return _type_source(arguments[0], needed)
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_source(argument, needed) for argument in arguments)
    if annotation is Any:
        return "object"
    if annotation is Ellipsis:
        return "..."
    if origin is not None:
        inner = ", ".join(_type_source(argument, needed) for argument in arguments)
        return f"{_type_source(origin, needed)}[{inner}]"
    needed.setdefault(annotation.__module__, set()).add(annotation.__name__)
    name: str = annotation.__name__
    return name
