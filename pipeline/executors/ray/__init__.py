"""Run on a Ray cluster. Workers fill shards, and exchange rows through files."""
