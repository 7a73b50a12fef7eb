"""Images in tar shards, read where they lie: which shards there are, their headers, the index of them, the source."""
