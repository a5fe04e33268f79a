"""The files of the page: names, types and tags. Without a server and a model."""

import asyncio

import pytest
from starlette.requests import Request

from sisma_jax.serving.page import Page, _read
from sisma_jax.serving.problems import Problem
from sisma_jax.serving.security import PAGE_POLICY


@pytest.fixture
def page(tmp_path):
    (tmp_path / "fonts").mkdir()
    (tmp_path / "index.html").write_text("<title>Faces</title>")
    (tmp_path / "fonts" / "a.mjs").write_text("export {}")
    return Page(dict(_read(tmp_path, "")))


def get(page, name=None, **headers):
    pairs = [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()]
    scope = {"type": "http", "headers": pairs, "path_params": {} if name is None else {"name": name}}
    return asyncio.run(page.serve(Request(scope)))


def test_files_have_their_content_type_policy_and_tag(page):
    start = get(page)
    assert start.body == b"<title>Faces</title>"
    assert start.headers["content-type"].startswith("text/html")
    assert start.headers["content-security-policy"] == PAGE_POLICY
    script = get(page, "fonts/a.mjs")
    assert script.headers["content-type"].startswith("text/javascript")
    assert script.headers["etag"] != start.headers["etag"]
    assert get(page, if_none_match=start.headers["etag"]).status_code == 304
    assert get(page, if_none_match=script.headers["etag"]).status_code == 200


@pytest.mark.parametrize(
    "name", ["", "a.mjs", "fonts", "fonts/", "../index.html", "fonts/../index.html", "/index.html"]
)
def test_other_names_are_not_found(page, name):
    with pytest.raises(Problem) as caught:
        get(page, name)
    assert caught.value.status == 404
