"""Load, latency and throughput, measured from where the caller stands.

Knows HTTP and what a client can see of a video; knows nothing of the engine. A number here was observed by this
process, or is named as the server's own.
"""
