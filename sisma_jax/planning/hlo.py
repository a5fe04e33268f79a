"""The HLO of a compiled program as protocol buffers: the form in which XLA exports it with all of its fields.

JAX's objects for HLO tell neither an instruction's shape nor what it calls, and no package that we use has XLA's
`hlo.proto` and `xla_data.proto`. So the fields that `collectives.py` reads are declared here, by their numbers there.
"""

import functools
import math
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto
from google.protobuf.message import Message

# By message: each field's number and type. A star marks a list.
_MESSAGES = {
    "Module": {"computations": (3, "Computation*"), "entry_computation_id": (6, "int64")},
    "Computation": {
        "name": (1, "string"),
        "instructions": (2, "Instruction*"),
        "id": (5, "int64"),
        "root_id": (6, "int64"),
    },
    "Instruction": {
        "opcode": (2, "string"),
        "shape": (3, "Shape"),
        "literal": (8, "Literal"),
        "tuple_index": (13, "int64"),
        "id": (35, "int64"),
        "operand_ids": (36, "int64*"),
        "called_computation_ids": (38, "int64*"),
        "backend_config": (43, "bytes"),
        "comparison_direction": (63, "string"),
        "frontend_attributes": (68, "Attributes"),
        "listed_groups": (87, "ListedGroups"),
        "iota_groups": (92, "IotaGroups"),
        "mesh_groups": (93, "MeshGroups"),
    },
    "Shape": {"element_type": (2, "int32"), "dimensions": (3, "int64*"), "tuple_shapes": (4, "Shape*")},
    "Literal": {"s32s": (4, "int32*"), "s64s": (5, "int64*"), "u32s": (6, "uint32*")},
    "Attributes": {"map": (1, "Attribute*")},
    "Attribute": {"key": (1, "string"), "value": (2, "string")},
    "ListedGroups": {"groups": (1, "Group*")},
    "Group": {"ids": (1, "int64*")},
    "IotaGroups": {"group_size": (2, "int64")},
    "MeshGroups": {"mesh": (1, "Mesh"), "axes": (2, "AxisRef*")},
    "Mesh": {"axes": (1, "Axis*")},
    "Axis": {"size": (2, "int64")},
    "AxisRef": {"index": (1, "int64"), "part": (2, "AxisPart")},
    "AxisPart": {"size": (2, "int64")},
}

# Bytes of an entry, by the numbers of `PrimitiveType`: pred, s8 to s64, u8 to u64, f16, f32, f64, c64, bf16, c128.
_ENTRY_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 2, 8: 4, 9: 8, 10: 2, 11: 4, 12: 8, 15: 8, 16: 2, 18: 16}


def read(module: Any) -> Message:
    """Returns the message of a module, such as `compiled.runtime_executable().hlo_modules()` lists."""
    return _module_class().FromString(module.as_serialized_hlo_module_proto())


@functools.cache
def _module_class() -> type[Message]:
    file = descriptor_pb2.FileDescriptorProto(name="hlo.proto", package="hlo", syntax="proto3")
    for message, fields in _MESSAGES.items():
        declared = file.message_type.add(name=message)
        for name, (number, written) in fields.items():
            kind = written.removesuffix("*")
            declared.field.add(
                name=name,
                number=number,
                label=FieldDescriptorProto.LABEL_REPEATED if kind != written else FieldDescriptorProto.LABEL_OPTIONAL,
                type=FieldDescriptorProto.Type.Value(f"TYPE_{'MESSAGE' if kind in _MESSAGES else kind.upper()}"),
                type_name=f".hlo.{kind}" if kind in _MESSAGES else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("hlo.Module"))


def shape_bytes(shape: Message) -> int:
    """Returns the bytes of an array's entries, or of all arrays of a tuple; without padding."""
    if shape.tuple_shapes:
        return sum(map(shape_bytes, shape.tuple_shapes))
    return math.prod(shape.dimensions) * _ENTRY_BYTES[shape.element_type]


def group_size(instruction: Message) -> int:
    """Returns how many devices a collective operation takes together, whichever way it names them."""
    if instruction.listed_groups.groups:
        return len(instruction.listed_groups.groups[0].ids)
    if instruction.mesh_groups.axes:
        sizes = [axis.size for axis in instruction.mesh_groups.mesh.axes]
        return math.prod(axis.part.size or sizes[axis.index] for axis in instruction.mesh_groups.axes)
    if instruction.iota_groups.group_size:
        return instruction.iota_groups.group_size
    raise NotImplementedError(f"this version of XLA names the devices of an {instruction.opcode} in an unknown way")


def integer(instruction: Message) -> int | None:
    """Returns the value of an integer constant; None for anything else."""
    literal = instruction.literal
    return next(iter([*literal.s32s, *literal.s64s, *literal.u32s]), None)


def attribute(instruction: Message, key: str) -> str | None:
    """Returns a frontend attribute; None if the instruction does not have it."""
    return next((entry.value for entry in instruction.frontend_attributes.map if entry.key == key), None)
