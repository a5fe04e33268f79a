"""The form of a response, by the header Accept (RFC 9110, section 12.5.1)."""

from collections.abc import Sequence

from starlette.datastructures import Headers

from sisma_jax.serving.problems import Problem


def chosen(headers: Headers, forms: Sequence[str]) -> str:
    """Returns the form that the client prefers, or "any" if it accepts all.

    Args:
      headers: of the request.
      forms: media types that the route sends, the first of equally preferred ones is taken.

    Raises:
      Problem: the client accepts none of them (406), or the header is malformed (400).
    """
    given = headers.get("accept", "*/*")
    ranges: dict[str, float] = {}
    for part in given.split(","):
        name, *parameters = (word.strip().lower() for word in part.split(";"))
        quality = next((word[2:] for word in parameters if word.startswith("q=")), "1")
        try:
            ranges[name] = float(quality)
        except ValueError:
            raise Problem(400, f"the header Accept is malformed: {part[:100]!r}.") from None
    wanted = [(_quality(form, ranges), -i, form) for i, form in enumerate(forms)]
    best, _, form = max(wanted)
    if not best > 0:
        raise Problem(406, f"Accept names none of the forms of the response: {', '.join(forms)}.")
    is_any = form not in ranges and f"{form.split('/')[0]}/*" not in ranges
    return "any" if is_any else form


def _quality(form: str, ranges: dict[str, float]) -> float:
    kind = form.split("/")[0]
    return next((ranges[name] for name in (form, f"{kind}/*", "*/*") if name in ranges), 0.0)
