"""What schemathesis must know beside the document: lines of JSON, and which hand not to bite."""

import json
import os

import schemathesis

OWN_TENANT = "dev"
SPARE_TENANT = "acme"
OWN_API_KEY = os.environ["KEYFOLD_OWN_API_KEY"]


@schemathesis.serializer("application/x-ndjson")
def lines(ctx, value):
    items = value if isinstance(value, list) else [value]
    return "".join(json.dumps(item) + "\n" for item in items).encode("utf-8", "surrogatepass")


@schemathesis.deserializer("application/x-ndjson")
def from_lines(ctx, response):
    """The schema is that of a line: the last one stands for all."""
    lines = [line for line in response.content.splitlines() if line.strip()]
    return json.loads(lines[-1]) if lines else {}


@schemathesis.deserializer("application/octet-stream")
def from_octets(ctx, response):
    return response.content.decode("latin-1")


@schemathesis.hook
def before_call(ctx, case, kwargs):
    """A run that revokes its own credential, or shreds the tenant that it encrypts for, tests nothing after that."""
    parameters = case.path_parameters or {}
    changes = case.method in ("PUT", "DELETE") or case.path.endswith("/shred")
    if changes and parameters.get("tenant") == OWN_TENANT:
        parameters["tenant"] = SPARE_TENANT
    if parameters.get("id") == OWN_API_KEY:
        parameters["id"] = "A" * len(OWN_API_KEY)
