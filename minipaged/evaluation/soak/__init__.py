"""Long random runs that search for mismatches: random calls, random engines, injected faults."""
