"""Several servers with one address: a router, a load to judge it by, and its HTTP side."""
