"""Words of a command line into a dataclass of options, by tyro; what its help says of each knob."""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastrot import entry, paths

if TYPE_CHECKING:  # each parser imports tyro: a sentence says where it is missing
    from tyro import constructors

T = TypeVar("T")


def first(metavar: str) -> dict[str, str]:
    """Metadata of a field that stands without its name, as the command's first word."""
    return {"first": metavar}


def parse(kind: type[T], argv: list[str] | None, prog: str, **more: Any) -> T:
    """The options in `argv`. Raises SystemExit for --help and for what cannot be parsed, told once by rank 0."""
    import tyro

    with entry.told_once():
        return tyro.cli(kind, args=paths.words(argv), prog=prog, registry=rules(), **more)


def choose(what: str, known: Collection[str], got: str) -> str:
    """A sentence for a name that is not known, with the nearest that is."""
    near = difflib.get_close_matches(got, known, n=1)
    way = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
    return f"{what} {got!r}: {way}"


def rules() -> "constructors.ConstructorRegistry":
    """As tyro's own, but a knob that may be None reads `--knob INT`; its comment says what None means.

    `--knob None` takes back what a preset or a config.yaml set.
    """
    from tyro import constructors

    ours = constructors.ConstructorRegistry()
    ours.primitive_rule(_optional)
    ours.struct_rule(functools.partial(_options, asked=[]))
    return ours


def _optional(info: "constructors.PrimitiveTypeInfo") -> Any:
    from tyro import constructors

    kinds = typing.get_args(info.type)
    if len(kinds) != 2 or kinds[1] is not type(None):
        return None
    inner = constructors.PrimitiveTypeInfo.make(kinds[0], info.markers)
    spec: Any = constructors.ConstructorRegistry.get_primitive_spec(inner)
    return dataclasses.replace(
        spec,
        instance_from_str=lambda w: None if w == ["None"] else spec.instance_from_str(w),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda v: ["None"] if v is None else spec.str_from_instance(v),
    )


def _options(info: "constructors.StructTypeInfo", asked: list[Any]) -> Any:
    """`asked`: not empty while tyro's own rules are asked, which stand behind ours."""
    import tyro

    if asked or not dataclasses.is_dataclass(info.type):
        return None
    asked.append(info)
    try:
        spec: Any = tyro.constructors.ConstructorRegistry.get_struct_spec(info)
    finally:
        asked.clear()
    named = {field.name: field.metadata for field in dataclasses.fields(info.type)}
    fields = []
    for field in spec.fields:
        kind, metavar = field.type, named[field.name].get("first")
        if kind == bool | None:  # --knob and --no-knob
            kind = Annotated[kind, tyro.conf.DisallowNone]
        hint = "" if field.default is None else None
        kind = Annotated[kind, tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)]
        if metavar:
            kind = tyro.conf.Positional[kind]
        fields.append(dataclasses.replace(field, type=kind))
    return dataclasses.replace(spec, fields=tuple(fields))
