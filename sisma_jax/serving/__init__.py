"""The HTTP server: docs/http_api.md is its contract.

    bytes ─► bodies ─► fields ─► calls ─► batching ─► calls ─► responses
             limits    types    images    device     images

`app` routes, `security` and `observing` wrap every request, and `server` owns sockets and signals. Nothing here is
imported by the rest of the package, except by the command `serve`.
"""
