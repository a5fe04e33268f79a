"""The fields of requests: names, types, ranges and texts, stated once for parsing, `/v1/classes` and OpenAPI."""

import base64
import binascii
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from sisma_jax.config import Sampling, Solver
from sisma_jax.schema import SEED
from sisma_jax.serving.bodies import Text, Upload
from sisma_jax.serving.limits import Limits
from sisma_jax.serving.problems import Problem

SETTINGS = tuple(field.name for field in dataclasses.fields(Sampling) if field.name not in ("batch_size", "seed"))
"""Settings of `Sampling` that a request may give."""

_EXPECTED = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "a string",
    "integers": "a list of whole numbers",
    "mask": "base64 of a PNG file, or a list of rows of integers",
    "photo": "base64 of a PNG, JPEG or WebP file",
}


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a request.

    Attributes:
      name: of the field.
      kind: a key of the types: "integer", "number", "boolean", "string", "integers", "mask", "photo".
      about: what it means, in one line.
      low: smallest value.
      high: largest value.
      choices: values of a string.
      is_required: whether it must be given.
      most: entries of a list.
    """

    name: str
    kind: str
    about: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] | None = None
    is_required: bool = False
    most: int | None = None

    @property
    def is_image(self) -> bool:
        """Whether the value is an image, which a file part may give."""
        return self.kind in ("mask", "photo")

    def parse(self, value: Any) -> Any:
        """Returns the value of the field, with images as `Upload` or lists.

        Args:
          value: `Upload`, `Text`, or a value of JSON.

        Raises:
          Problem: the value has another type, or is out of range.
        """
        if self.is_image:
            return self._image(value)
        if isinstance(value, Upload):
            raise Problem(422, f"{self.name!r} must be {_EXPECTED[self.kind]}, got a file; send it as a text part.")
        if isinstance(value, Text):
            value = self._from_text(value)
        if not self._has_type(value):
            raise Problem(422, f"{self.name!r} must be {_EXPECTED[self.kind]}, got {_short(value)}.")
        if self.most is not None and len(value) > self.most:
            raise Problem(422, f"{self.name!r} has {len(value)} entries; the limit is {self.most}.")
        for number in value if isinstance(value, list) else [value]:
            self._check(number)
        return float(value) if isinstance(value, int) and self.kind == "number" else value

    def _image(self, value: Any) -> Any:
        if isinstance(value, Upload) or (isinstance(value, list) and self.kind == "mask"):
            return value
        if not isinstance(value, str) or isinstance(value, Text):
            wanted = "a file part" if isinstance(value, Text) else _EXPECTED[self.kind]
            raise Problem(422, f"{self.name!r} must be {wanted}, got {_short(value)}.")
        try:
            return Upload(base64.b64decode(value.encode("ascii"), validate=True))
        except (binascii.Error, ValueError):
            raise Problem(400, f"{self.name!r} is not base64 in the standard alphabet.") from None

    def _from_text(self, text: Text) -> Any:
        if self.kind == "string":
            return str(text)
        try:
            value = json.loads(f"[{text}]", parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise Problem(422, f"{self.name!r} must be {_EXPECTED[self.kind]}, got {_short(str(text))}.") from None
        return value if self.kind == "integers" else value[0] if len(value) == 1 else value

    def _has_type(self, value: Any) -> bool:
        if self.kind == "integers":
            return isinstance(value, list) and all(type(one) is int for one in value)
        types = {"integer": (int,), "number": (int, float), "boolean": (bool,), "string": (str,)}[self.kind]
        return type(value) in types

    def _check(self, value: Any) -> None:
        if self.choices is not None and value not in self.choices:
            raise Problem(422, f"{self.name!r} must be one of {', '.join(self.choices)}, got {_short(value)}.")
        low, high = self.low, self.high
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            raise Problem(422, f"{self.name!r} must be in [{low:g}, {high:g}], got {_short(value)}.")

    def schema(self) -> dict[str, Any]:
        """Returns the JSON schema of the value in a JSON body."""
        if self.kind == "mask":
            rows = {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}
            schema: dict[str, Any] = {"anyOf": [{"type": "string", "contentEncoding": "base64"}, rows]}
        elif self.kind == "photo":
            schema = {"type": "string", "contentEncoding": "base64"}
        elif self.kind == "integers":
            schema = {"type": "array", "items": self._bounds({"type": "integer"}), "maxItems": self.most}
        else:
            schema = self._bounds({"type": self.kind})
        if self.choices is not None:
            schema["enum"] = list(self.choices)
        return {**schema, "description": self.about}

    def _bounds(self, schema: dict[str, Any]) -> dict[str, Any]:
        for key, bound in (("minimum", self.low), ("maximum", self.high)):
            if bound is not None:
                schema[key] = bound
        return schema


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _short(value: Any) -> str:
    shown = json.dumps(value, default=str) if not isinstance(value, list | dict) else type(value).__name__
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def setting_fields(limits: Limits) -> tuple[Field, ...]:
    """Returns the fields of the settings of the sampler, from the ranges of `Sampling`."""
    hints, fields = get_type_hints(Sampling), []
    for field in dataclasses.fields(Sampling):
        if field.name not in SETTINGS:
            continue
        hint, within = hints[field.name], field.metadata["within"]
        if get_origin(hint) is not None:
            fields.append(Field(field.name, "string", "ODE solver.", choices=get_args(Solver)))
        else:
            kind = "integer" if hint is int else "number"
            high = limits.max_steps if field.name == "steps" else within.high
            fields.append(Field(field.name, kind, _ABOUT[field.name], within.low, high))
    return tuple(fields)


_ABOUT = {
    "steps": "Number of solver steps.",
    "shift": "Time shift; above 1: smaller steps near noise.",
    "guidance": "Classifier-free guidance scale; 1: none.",
    "guidance_low": "Time at which guidance starts.",
    "guidance_high": "Time at which guidance ends.",
    "guidance_rescale": "How far guided predictions are rescaled to the unguided standard deviation.",
}


def sample_fields(limits: Limits, class_sets: Sequence[str]) -> tuple[Field, ...]:
    """Returns the fields of `POST /v1/sample`."""
    return (
        Field("mask", "mask", "The mask.", is_required=True),
        *_common_fields(limits, class_sets),
        Field("every", "integer", "For a stream: an image after every so many steps.", 1, limits.max_steps),
    )


def edit_fields(limits: Limits, class_sets: Sequence[str]) -> tuple[Field, ...]:
    """Returns the fields of `POST /v1/edit`."""
    return (
        Field("image", "photo", "The photograph.", is_required=True),
        Field("mask", "mask", "The edited mask.", is_required=True),
        Field("image_mask", "mask", "The mask before it was edited."),
        Field("region", "mask", "The region to generate, in place of image_mask."),
        Field("margin", "number", "Width of the blended band, in pixels of the model's resolution.", 0, 4096),
        Field("square", "integers", "[top, left, side] of the part to generate, in pixels.", 0, 1 << 20, most=3),
        *_common_fields(limits, class_sets),
    )


def segment_fields() -> tuple[Field, ...]:
    """Returns the fields of `POST /v1/segment`."""
    return (
        Field("photo", "photo", "The photograph.", is_required=True),
        Field("whole", "boolean", "The mask of the whole photograph."),
    )


def _common_fields(limits: Limits, class_sets: Sequence[str]) -> tuple[Field, ...]:
    return (
        Field("classes", "string", "Class set of the mask.", choices=tuple(class_sets)),
        Field("num_samples", "integer", "Images to sample.", 1, limits.max_samples),
        Field("seed", "integer", "Seed of the noise.", SEED.low, SEED.high),
        Field(
            "seeds",
            "integers",
            "One image per seed, in place of seed and num_samples.",
            SEED.low,
            SEED.high,
            most=limits.max_samples,
        ),
        *setting_fields(limits),
    )


def parse(given: Mapping[str, Any], fields: Sequence[Field]) -> dict[str, Any]:
    """Returns the parsed values of the fields that are given.

    Args:
      given: values by name.
      fields: that the request may have.

    Raises:
      Problem: a field is unknown, missing, has another type or is out of range.
    """
    known = {field.name: field for field in fields}
    if unknown := [name for name in given if name not in known]:
        raise Problem(422, f"{unknown[0][:100]!r} is no field; the fields are {', '.join(known)}.")
    for field in fields:
        if field.is_required and given.get(field.name) is None:
            raise Problem(422, f"{field.name!r} is missing: {field.about}")
    return {name: known[name].parse(value) for name, value in given.items() if value is not None}
