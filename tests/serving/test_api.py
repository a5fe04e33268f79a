"""Every endpoint of a real server: results, forms of requests and responses, and that results are those of `pipe`."""

import base64
import concurrent.futures
import json

import httpx
import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

from sisma_jax.data.photo_files import decode_photo
from sisma_jax.diffusion.solvers import SOLVERS
from tests.serving.running import mask_png, pixels, png

PNG = {"Content-Type": "image/png"}
PHOTO = np.random.default_rng(5).integers(256, size=(24, 20, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pipe(weights):
    import sisma_jax

    # One device, as the server has; the tests' own process has eight.
    mesh = jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "seq"), (jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    return sisma_jax.load(weights, mesh=mesh)


@pytest.fixture(scope="module")
def document(server):
    return server.client().get("/openapi.json").json()


def events(response):
    """The events of a stream: (name, value)."""
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    pairs = [block.split("\n") for block in blocks]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


def decoded(texts):
    return np.stack([pixels(base64.b64decode(text)) for text in texts])


def require_documented(document, response, path, method="post"):
    """The status, the type and the JSON of a response are those of the OpenAPI document."""
    documented = document["paths"][path][method]["responses"]
    assert str(response.status_code) in documented, response.text
    kind = response.headers["content-type"].split(";")[0]
    content = documented[str(response.status_code)]["content"]
    assert kind in content, (kind, response.text)
    if kind.endswith("json"):
        schema = {**content[kind]["schema"], "components": document["components"]}
        jsonschema.validate(response.json(), schema)


def test_the_three_forms_of_a_request_and_of_a_response_give_one_face(client, document):
    mask = mask_png(1)
    face = client.post("/v1/sample?seed=7&steps=3", content=mask, headers=PNG)
    fields = {"seed": 7, "steps": 3}
    as_json = {**fields, "mask": base64.b64encode(mask).decode()}
    as_rows = {**fields, "mask": pixels(mask).tolist()}
    others = [
        client.post("/v1/sample", json=as_json),
        client.post("/v1/sample", json=as_rows),
        client.post("/v1/sample", data=fields, files={"mask": ("../../etc/passwd", mask)}),
    ]
    for response in (face, *others):
        assert response.headers["content-type"] == "image/png"
        assert response.content == face.content
        require_documented(document, response, "/v1/sample")
    result = client.post("/v1/sample", json=as_json, headers={"Accept": "application/json"})
    require_documented(document, result, "/v1/sample")
    np.testing.assert_array_equal(decoded(result.json()["images"])[0], pixels(face.content))
    parts = client.post("/v1/sample", json={**as_json, "num_samples": 2}, headers={"Accept": "multipart/mixed"})
    boundary = parts.headers["content-type"].split("boundary=")[1].encode()
    bodies = [part.split(b"\r\n\r\n", 1)[1][:-2] for part in parts.content.split(b"--" + boundary)[1:-1]]
    assert len(bodies) == 2
    np.testing.assert_array_equal(pixels(bodies[0]), pixels(face.content))
    assert face.headers["x-seeds"] == "7"
    assert "queue;dur=" in face.headers["server-timing"]


def test_classes_and_document_and_health(client, document, pipe):
    classes = client.get("/v1/classes")
    value, own = classes.json(), pipe.config.data.classes
    assert value["names"] == list(own.names)
    assert value["colors"] == [list(color) for color in own.colors]
    assert value["mirrored"] == [list(pair) for pair in own.mirrored]
    assert (value["resolution"], value["segment"], value["step"]) == (16, True, 4)
    assert value["defaults"]["steps"] == pipe.config.sample.steps
    assert value["limits"]["steps"] == [1, 1000]
    assert value["limits"]["solver"] == list(SOLVERS)
    assert client.get("/v1/classes", headers={"If-None-Match": classes.headers["etag"]}).status_code == 304
    assert document["openapi"] == "3.1.0"
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    assert client.head("/healthz").status_code == 200


def test_every_documented_field_is_accepted_and_no_other(client, document):
    """The document is checked against the implementation: types, ranges, and names."""
    body = document["paths"]["/v1/sample"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    base = {"mask": pixels(mask_png()).tolist(), "steps": 1}
    for name, schema in body["properties"].items():
        if name in ("mask", "seeds"):
            continue
        values = schema.get("enum") or [schema["minimum"], schema["maximum"]]
        for value in values[:2]:
            request = base | {"guidance_high": 1, name: value}
            assert client.post("/v1/sample", json=request, headers={"Accept": "application/json"}).status_code == 200, (
                name,
                value,
            )
        outside = ["no such value"] if "enum" in schema else [schema["minimum"] - 1, schema["maximum"] + 1, "1", None]
        for value in outside[:3]:
            response = client.post("/v1/sample", json={**base, name: value})
            assert response.status_code == 422, (name, value)
            assert name in response.json()["error"]
            require_documented(document, response, "/v1/sample")
    assert client.post("/v1/sample", json={**base, "unknown": 1}).status_code == 422


def require_face(image, pipe, mask, key, **settings):
    """The face has the bits of the pipeline in a batch of some size; on some CPUs, these round differently."""
    for size in (1, 2, 4):  # those of the server
        faces = pipe(mask, key=jnp.stack([key] * size), num_samples=size, **settings)
        if (faces == image).all(axis=(1, 2, 3)).any():
            return
    np.testing.assert_array_equal(image, faces[0])
    pytest.fail("the face differs from those of all batch sizes")


@pytest.mark.slow
@pytest.mark.optimized
def test_faces_are_bit_identical_to_those_of_the_pipeline_whatever_shares_their_batch(server, pipe):
    """Many requests at once, with different masks, seeds and numbers of images, so that batches of all sizes form."""
    settings = {"steps": 12, "guidance": 2.0}

    def ask(i):
        with server.client() as client:
            request = {"mask": pixels(mask_png(i)).tolist(), "seed": i, "num_samples": 1 + i % 3, **settings}
            return client.post("/v1/sample", json=request, headers={"Accept": "application/json"}).json()["images"]

    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        results = list(threads.map(ask, range(24)))
    for i, result in enumerate(results):
        faces = decoded(result)
        assert len(faces) == 1 + i % 3
        for j, face in enumerate(faces):
            key = jax.random.fold_in(jax.random.key(i), j)
            require_face(face, pipe, pixels(mask_png(i)), key, **settings)
    batches, images = server.metric("sisma_batch_images_count"), server.metric("sisma_batch_images_sum")
    assert images > batches, "no two requests shared a batch"


@pytest.mark.slow
@pytest.mark.optimized
def test_seeds_give_the_faces_of_their_own_keys(client, pipe):
    seeds, mask = [4, 2**32 - 1, 4], pixels(mask_png(2))
    request = {"mask": mask.tolist(), "seeds": seeds}
    result = client.post("/v1/sample", json=request).json()
    assert result["seeds"] == seeds
    faces = decoded(result["images"])
    assert len(faces) == len(seeds)
    for face, seed in zip(faces, seeds, strict=True):
        require_face(face, pipe, mask, jax.random.fold_in(jax.random.key(seed), 0))


def test_a_stream_shows_the_steps_and_ends_with_the_face(client, document):
    request = {"mask": pixels(mask_png()).tolist(), "seed": 3, "steps": 5, "num_samples": 2}
    stream = client.post("/v1/sample", json={**request, "every": 2}, headers={"Accept": "text/event-stream"})
    require_documented(document, stream, "/v1/sample")
    names, values = zip(*events(stream), strict=True)
    assert names[0] == "start"
    assert names[-1] == "done"
    assert set(names[1:-1]) <= {"step"}
    assert [value["step"] for value in values[1:-1]] == sorted({value["step"] for value in values[1:-1]} & {2, 4})
    assert values[0]["settings"]["steps"] == 5
    plain = client.post("/v1/sample", json=request, headers={"Accept": "application/json"}).json()
    assert values[-1] == plain
    too_many = client.post("/v1/sample", json={**request, "num_samples": 5}, headers={"Accept": "text/event-stream"})
    assert too_many.status_code == 422


def test_masks_of_another_class_set_are_converted(client):
    names = client.get("/v1/classes").json()
    assert "face_parsing_pytorch" in names["class_sets"]
    rows = np.ones((16, 16), int)
    other = client.post("/v1/sample", json={"mask": rows.tolist(), "classes": "face_parsing_pytorch"})
    own = client.post("/v1/sample", json={"mask": rows.tolist()})
    assert other.status_code == own.status_code == 200
    assert client.post("/v1/sample", json={"mask": rows.tolist(), "classes": "../lapa"}).status_code == 422


def test_an_edit_changes_nothing_outside_of_the_region(client, document):
    region = np.zeros((24, 20), np.uint8)
    region[8:14, 6:12] = 255
    files = {"image": png(PHOTO), "mask": png(np.ones((24, 20), np.uint8)), "region": png(region)}
    response = client.post("/v1/edit", files=files, data={"margin": 0, "square": "2,0,20", "seed": 1, "steps": 2})
    require_documented(document, response, "/v1/edit")
    edited = pixels(response.content)
    assert edited.shape == PHOTO.shape
    changed = (edited != PHOTO).any(axis=-1)
    assert changed.any()
    assert not changed[region == 0].any()
    several = client.post("/v1/edit", files=files, data={"num_samples": 3, "steps": 2})
    assert several.json()["width"] == 20
    assert len(several.json()["images"]) == 3


def test_an_edit_keeps_bit_depth_and_alpha_channel(client):
    import cv2

    deep = np.random.default_rng(1).integers(65536, size=(16, 16, 4), dtype=np.uint16)
    photo = cv2.imencode(".png", deep)[1].tobytes()
    files = {"image": photo, "mask": png(np.ones((16, 16), np.uint8)), "image_mask": png(np.zeros((16, 16), np.uint8))}
    edited = decode_photo(client.post("/v1/edit", files=files, data={"steps": 1}).content, "edited")
    assert edited.pixels.dtype == np.uint16
    np.testing.assert_array_equal(edited.alpha, deep[..., 3])


def test_a_photograph_is_segmented(client, document):
    whole = client.post("/v1/segment?whole=true", content=png(PHOTO), headers=PNG)
    assert pixels(whole.content).shape == (24, 20)
    square = client.post("/v1/segment", files={"photo": png(PHOTO)}, headers={"Accept": "application/json"})
    require_documented(document, square, "/v1/segment")
    assert (square.json()["width"], square.json()["height"]) == (20, 20)
    assert pixels(whole.content).max() < 19


def test_requests_are_counted_and_logged_with_their_ids(server, client):
    name = 'sisma_requests_total{method="POST",route="sample",status="200"}'
    before = server.metric(name)
    headers = {**PNG, "X-Request-Id": "my-request.1"}
    response = client.post("/v1/sample?seed=99", content=mask_png(), headers=headers)
    assert response.headers["x-request-id"] == "my-request.1"
    assert server.metric(name) == before + 1
    [line] = [json.loads(line) for line in server.log if "my-request.1" in line and '"message": "request"' in line]
    assert (line["route"], line["method"], line["status"], line["images"]) == ("sample", "POST", 200, 1)
    assert "99" not in json.dumps({name: value for name, value in line.items() if name not in ("time", "duration_ms")})
    bad = client.get("/healthz", headers={"X-Request-Id": "no good"}).headers["x-request-id"]
    assert bad != "no good"
    assert len(bad) == 32


def test_no_request_compiles_a_program(server, client):
    """Other steps, solvers and guidance scales take no time to compile: the log has no line, and steps are fast."""
    for settings in ({"steps": 17}, {"steps": 33, "solver": "heun"}, {"steps": 9, "guidance": 3.25, "shift": 2}):
        response = client.post("/v1/sample", json={"mask": pixels(mask_png()).tolist(), **settings})
        assert response.status_code == 200
    assert server.metric("sisma_programs") == server.metric("sisma_programs_at_start") > 0


def test_the_python_client_of_the_documents_works(server):
    import re

    from tests.serving.running import ROOT

    text = (ROOT / "docs/http_api.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope = {}
    exec(code, scope)
    faces = scope["sample"](server.url, mask_png(), seeds=[1, 2], steps=2)
    assert [pixels(face).shape for face in faces] == [(16, 16, 3)] * 2
    with pytest.raises(httpx.HTTPStatusError):
        scope["sample"](server.url, b"", seeds=[1], steps=2)
