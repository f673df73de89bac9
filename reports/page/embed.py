"""JSON inside the page: how it is put there, and how the claims' part of a finished page is replaced."""

import json
import re
from typing import Any

PAGE, CLAIMS_FILE = "page.html", "claims.json"
_CLAIMS_PART = re.compile(r'(<script type="application/json" id="claims">)[^<]*(</script>)')


def embed(value: Any) -> str:
    """JSON that may stand inside a script element: without "<" there is neither an end tag nor a comment in it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def embed_text(text: str) -> str:
    """JSON again, without what only Python reads (NaN and infinities become null)."""
    return embed(json.loads(text, parse_constant=lambda _: None))


def with_claims(page: str, claims: str) -> str:
    """The same page with these claims (the JSON of ``winnow-report claims``) in place of its own."""
    return _CLAIMS_PART.sub(lambda found: found[1] + embed_text(claims) + found[2], page)
