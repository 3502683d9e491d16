"""Tools around tables of shards: image sources, fetching, encoding, inspection."""
