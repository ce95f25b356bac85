"""Several servers behind one address: a router, a load to judge it by, and its HTTP side."""
