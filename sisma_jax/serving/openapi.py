"""The OpenAPI 3.1 document, from the fields of the routes."""

from collections.abc import Mapping, Sequence
from typing import Any

from sisma_jax.serving.bodies import IMAGE_TYPES
from sisma_jax.serving.fields import SETTINGS, Field
from sisma_jax.serving.problems import MEDIA_TYPE

_ABOUT = {
    "sample": "Samples faces for a mask.",
    "edit": "Edits a photograph.",
    "segment": "Predicts the mask of a photograph.",
}
_ERRORS = {
    "400": "The body or a header is malformed.",
    "401": "The API key is missing or wrong.",
    "403": "A page of another site sent the request.",
    "406": "Accept names no form of the response.",
    "408": "The body did not arrive in time.",
    "409": "A newer request with the same X-Stream-Id superseded this one.",
    "413": "The body or an image is too large.",
    "415": "The body or an image has another format.",
    "421": "The header Host names another host.",
    "422": "A field is missing, unknown or out of range, or an image is no mask of the classes.",
    "429": "The queue is full.",
    "500": "The request failed.",
    "503": "The server is starting or stopping.",
    "504": "The result was not ready in time.",
}
_BINARY = {"schema": {"type": "string", "contentMediaType": "image/png"}}
_PNG_TEXT = {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"}
_SIZE = {"width": {"type": "integer"}, "height": {"type": "integer"}}


def document(fields: Mapping[str, Sequence[Field]]) -> dict[str, Any]:
    """Returns the document.

    Args:
      fields: of the routes `sample`, `edit` and `segment`.
    """
    return {
        "openapi": "3.1.0",
        "info": {"title": "sisma_jax", "version": "1", "license": {"name": "Apache-2.0"}},
        "paths": {
            "/v1/sample": {"post": _post("sample", fields["sample"], "mask")},
            "/v1/edit": {"post": _post("edit", fields["edit"], None)},
            "/v1/segment": {"post": _post("segment", fields["segment"], "photo")},
            "/v1/classes": {"get": _get("classes", "Classes, resolution, default settings and limits.", ["401"])},
            "/openapi.json": {"get": _get("openapi", "This document.")},
            "/healthz": {"get": _get("healthz", "Whether the process lives.")},
            "/readyz": {"get": _get("readyz", "Whether the server accepts work.", ["503"], is_problem=False)},
            "/metrics": {"get": _get("metrics", "Prometheus metrics.", ["401"], kind="text/plain")},
        },
        "components": {
            "schemas": {"Problem": _PROBLEM, "Images": _IMAGES, "Mask": _MASK},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "parameters": {
                "streamId": _header("X-Stream-Id", "A newer request with the same id supersedes older ones."),
                "requestId": _header("X-Request-Id", "Id of the request, which is returned and logged."),
            },
        },
        "security": [{}, {"key": []}],
    }


_PROBLEM = {
    "type": "object",
    "properties": {
        "error": {"type": "string"},
        "status": {"type": "integer"},
        "title": {"type": "string"},
        "request_id": {"type": "string"},
    },
    "required": ["error", "status", "title", "request_id"],
}
_IMAGES = {
    "type": "object",
    "properties": {
        "images": {"type": "array", "items": _PNG_TEXT},
        "seeds": {"type": "array", "items": {"type": "integer"}},
        **_SIZE,
        "settings": {"type": "object", "required": list(SETTINGS)},
    },
    "required": ["images", "seeds", "width", "height", "settings"],
}
_MASK = {
    "type": "object",
    "properties": {"mask": _PNG_TEXT, **_SIZE},
    "required": ["mask", "width", "height"],
}


def _header(name: str, about: str) -> dict[str, Any]:
    schema = {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"}
    return {"name": name, "in": "header", "description": about, "schema": schema}


def _post(name: str, fields: Sequence[Field], image: str | None) -> dict[str, Any]:
    required = [field.name for field in fields if field.is_required]
    json_schema = {
        "type": "object",
        "properties": {field.name: field.schema() for field in fields},
        "required": required,
        "additionalProperties": False,
    }
    parts = {field.name: _part(field) for field in fields}
    content: dict[str, Any] = {
        "application/json": {"schema": json_schema},
        "multipart/form-data": {"schema": {**json_schema, "properties": parts}},
    }
    parameters = [{"$ref": f"#/components/parameters/{one}"} for one in ("streamId", "requestId")]
    if image is not None:
        kinds = IMAGE_TYPES if image == "photo" else ("image/png",)
        content |= {kind: {"schema": {"type": "string", "contentMediaType": kind}} for kind in kinds}
        parameters += [
            {
                "name": field.name,
                "in": "query",
                "description": f"{field.about} Only with an image as body.",
                "schema": field.schema(),
                "style": "form",
                "explode": False,
            }
            for field in fields
            if not field.is_image
        ]
    form = "Mask" if name == "segment" else "Images"
    results: dict[str, Any] = {
        "image/png": _BINARY,
        "application/json": {"schema": {"$ref": f"#/components/schemas/{form}"}},
    }
    if name != "segment":
        results["multipart/mixed"] = {"schema": {"type": "string"}}
    if name == "sample":
        results["text/event-stream"] = {"schema": {"type": "string"}}
    errors = {**_ERRORS, "404": "This model has no face parser."} if name == "segment" else _ERRORS
    return {
        "operationId": name,
        "summary": _ABOUT[name],
        "parameters": parameters,
        "requestBody": {"required": True, "content": content},
        "responses": {
            "200": {"description": "The result.", "content": results},
            **{status: _problem(about) for status, about in sorted(errors.items())},
        },
    }


def _part(field: Field) -> dict[str, Any]:
    if field.is_image:
        return {"type": "string", "contentMediaType": "image/png", "description": field.about}
    if field.kind == "integers":
        return {"type": "string", "description": f"{field.about} Numbers with commas between them."}
    return field.schema()


def _problem(about: str) -> dict[str, Any]:
    return {"description": about, "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}}


def _get(
    name: str, about: str, errors: Sequence[str] = (), *, is_problem: bool = True, kind: str = "application/json"
) -> dict[str, Any]:
    result = {"content": {kind: {"schema": {"type": "string" if kind == "text/plain" else "object"}}}}
    failed = {
        status: _problem(_ERRORS[status]) if is_problem else {"description": "Not ready.", **result}
        for status in errors
    }
    failed.setdefault("421", _problem(_ERRORS["421"]))
    return {
        "operationId": name,
        "summary": about,
        "responses": {"200": {"description": "The result.", **result}, **failed},
    }
