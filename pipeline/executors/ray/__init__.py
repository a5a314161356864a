"""Run on a Ray cluster. Workers fill shards, which are dataset folders."""
