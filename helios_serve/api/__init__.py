"""The surfaces that clients talk to. Starts without model code; requests become `types.VideoRequest` in `convert`."""
