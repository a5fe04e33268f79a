"""Reads the HLO of a compiled program from its serialized protocol buffer.

JAX's Python objects for HLO do not provide the shape of an instruction or the computations that it calls, and no
dependency of this project contains XLA's `hlo.proto` and `xla_data.proto`. The classes below therefore declare the
fields that `collectives.py` reads. Their names may differ from those in XLA's files; their numbers and types may not.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Sequence
from typing import Annotated, Protocol

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto
from google.protobuf.message import Message


@dataclasses.dataclass(frozen=True)
class _Field:
    """The number of a field, and its type: a scalar type of protocol buffers, or the name of a class below."""

    number: int
    kind: str


class Shape(Protocol):
    """The element type and dimensions of an array, or the shapes in a tuple."""

    element_type: Annotated[int, _Field(2, "int32")]
    dimensions: Annotated[Sequence[int], _Field(3, "int64")]
    tuple_shapes: Annotated["Sequence[Shape]", _Field(4, "Shape")]


class Literal(Protocol):
    """The value of a constant; only the integer types that a loop counter may have."""

    s32s: Annotated[Sequence[int], _Field(4, "int32")]
    s64s: Annotated[Sequence[int], _Field(5, "int64")]
    u32s: Annotated[Sequence[int], _Field(6, "uint32")]


class Attribute(Protocol):
    """One entry of a map from strings to strings."""

    key: Annotated[str, _Field(1, "string")]
    value: Annotated[str, _Field(2, "string")]


class Attributes(Protocol):
    """The frontend attributes of an instruction."""

    map: Annotated[Sequence[Attribute], _Field(1, "Attribute")]


class Group(Protocol):
    """Devices that run one collective operation together."""

    ids: Annotated[Sequence[int], _Field(1, "int64")]


class ListedGroups(Protocol):
    """All groups of a collective operation, as lists of devices."""

    groups: Annotated[Sequence[Group], _Field(1, "Group")]


class IotaGroups(Protocol):
    """Groups of equal size, as a reshaped and transposed range of devices."""

    group_size: Annotated[int, _Field(2, "int64")]


class Axis(Protocol):
    """An axis of a device mesh."""

    size: Annotated[int, _Field(2, "int64")]


class Mesh(Protocol):
    """A device mesh."""

    axes: Annotated[Sequence[Axis], _Field(1, "Axis")]


class AxisPart(Protocol):
    """A part of a mesh axis; its size is 0 if the axis is used as a whole."""

    size: Annotated[int, _Field(2, "int64")]


class AxisRef(Protocol):
    """The index of a mesh axis, and the part of it that is used."""

    index: Annotated[int, _Field(1, "int64")]
    part: Annotated[AxisPart, _Field(2, "AxisPart")]


class MeshGroups(Protocol):
    """Groups that consist of the devices along some axes of a mesh."""

    mesh: Annotated[Mesh, _Field(1, "Mesh")]
    axes: Annotated[Sequence[AxisRef], _Field(2, "AxisRef")]


class Instruction(Protocol):
    """One instruction. Fields that its opcode does not use are empty or zero."""

    opcode: Annotated[str, _Field(2, "string")]
    shape: Annotated[Shape, _Field(3, "Shape")]
    literal: Annotated[Literal, _Field(8, "Literal")]
    tuple_index: Annotated[int, _Field(13, "int64")]
    id: Annotated[int, _Field(35, "int64")]
    operand_ids: Annotated[Sequence[int], _Field(36, "int64")]
    called_computation_ids: Annotated[Sequence[int], _Field(38, "int64")]
    backend_config: Annotated[bytes, _Field(43, "bytes")]
    comparison_direction: Annotated[str, _Field(63, "string")]
    frontend_attributes: Annotated[Attributes, _Field(68, "Attributes")]
    listed_groups: Annotated[ListedGroups, _Field(87, "ListedGroups")]
    iota_groups: Annotated[IotaGroups, _Field(92, "IotaGroups")]
    mesh_groups: Annotated[MeshGroups, _Field(93, "MeshGroups")]


class Computation(Protocol):
    """A function: the entry point, the body of a loop, a branch, a fusion."""

    name: Annotated[str, _Field(1, "string")]
    instructions: Annotated[Sequence[Instruction], _Field(2, "Instruction")]
    id: Annotated[int, _Field(5, "int64")]
    root_id: Annotated[int, _Field(6, "int64")]


class Module(Protocol):
    """The program of one device."""

    computations: Annotated[Sequence[Computation], _Field(3, "Computation")]
    entry_computation_id: Annotated[int, _Field(6, "int64")]


_MESSAGES = (
    Module,
    Computation,
    Instruction,
    Shape,
    Literal,
    Attributes,
    Attribute,
    ListedGroups,
    Group,
    IotaGroups,
    MeshGroups,
    Mesh,
    Axis,
    AxisRef,
    AxisPart,
)

# Bytes per element, by the numbers of `PrimitiveType`: pred, s8 to s64, u8 to u64, f16, f32, f64, c64, bf16, c128.
_ELEMENT_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 2, 8: 4, 9: 8, 10: 2, 11: 4, 12: 8, 15: 8, 16: 2, 18: 16}


class SerializableModule(Protocol):
    """What is used of jaxlib's `HloModule`."""

    def as_serialized_hlo_module_proto(self) -> bytes:
        """Returns the module as a serialized `HloModuleProto`."""
        ...


def read(module: SerializableModule) -> Module:
    """Returns the fields of a module, one of `compiled.runtime_executable().hlo_modules()`."""
    message = _module_class().FromString(module.as_serialized_hlo_module_proto())
    # The message's class is created at run time, so only a cast can state its type.
    return typing.cast("Module", typing.cast("object", message))


@functools.cache
def _module_class() -> type[Message]:
    """The class of messages of type Module, created from the declarations above."""
    file = descriptor_pb2.FileDescriptorProto(name="hlo.proto", package="hlo", syntax="proto3")
    messages = {message.__name__ for message in _MESSAGES}
    for message in _MESSAGES:
        declared = file.message_type.add(name=message.__name__)
        for name, annotation in typing.get_type_hints(message, include_extras=True).items():
            of, field = typing.get_args(annotation)
            is_message, is_list = field.kind in messages, typing.get_origin(of) is Sequence
            declared.field.add(
                name=name,
                number=field.number,
                label=FieldDescriptorProto.LABEL_REPEATED if is_list else FieldDescriptorProto.LABEL_OPTIONAL,
                type=FieldDescriptorProto.Type.Value(f"TYPE_{'MESSAGE' if is_message else field.kind.upper()}"),
                type_name=f".hlo.{field.kind}" if is_message else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("hlo.Module"))


def shape_bytes(shape: Shape) -> int:
    """Returns the bytes of an array, or of all arrays of a tuple, without padding."""
    if shape.tuple_shapes:
        return sum(map(shape_bytes, shape.tuple_shapes))
    return math.prod(shape.dimensions) * _ELEMENT_BYTES[shape.element_type]


def group_size(instruction: Instruction) -> int:
    """Returns the number of devices in each group of a collective operation, from any of XLA's three notations.

    Raises:
      NotImplementedError: the groups are in a notation that is not known here.
    """
    if instruction.listed_groups.groups:
        return len(instruction.listed_groups.groups[0].ids)
    if instruction.mesh_groups.axes:
        sizes = [axis.size for axis in instruction.mesh_groups.mesh.axes]
        return math.prod(axis.part.size or sizes[axis.index] for axis in instruction.mesh_groups.axes)
    if instruction.iota_groups.group_size:
        return instruction.iota_groups.group_size
    raise NotImplementedError(
        f"the {instruction.opcode} instruction has no device groups in a known field; add the field that this version "
        "of XLA uses to sisma_jax/planning/hlo.py"
    )


def integer(instruction: Instruction) -> int | None:
    """Returns the value of a constant of type s32, s64 or u32; None for other instructions."""
    literal = instruction.literal
    return next(iter([*literal.s32s, *literal.s64s, *literal.u32s]), None)


def attribute(instruction: Instruction, key: str) -> str | None:
    """Returns the frontend attribute `key`; None if the instruction does not have it."""
    return next((entry.value for entry in instruction.frontend_attributes.map if entry.key == key), None)
