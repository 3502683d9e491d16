"""Tables of shards: the index, readers, the order of training, the feed, and image decode and crop."""
