"""The protocol buffers of the gRPC surface: the source, and what `make proto` generates from it."""
