"""Long random runs that look for a mismatch: any calls, any engines, faults at any point."""
