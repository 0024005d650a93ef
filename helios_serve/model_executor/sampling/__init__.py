"""Samplers: pure functions of (x, flow, schedule, step) over precomputed tables."""
