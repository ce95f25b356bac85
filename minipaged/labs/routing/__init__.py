"""Several servers with one address: a router, a load that measures it, and an HTTP server."""
