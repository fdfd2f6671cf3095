"""Fault-tolerant execution of chunked work on Ray: plan, placement, retries, resume."""
