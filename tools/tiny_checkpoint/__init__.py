"""Trains the small checkpoint that the wheel carries, on clips that are drawn while it trains."""
