"""One file a kind of storage. Only `pipeline.storage` imports these."""
