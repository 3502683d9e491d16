"""The stage graph: units and their ledger, the local runner, and the train stage that puts a training together."""
