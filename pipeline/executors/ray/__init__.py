"""Run on a Ray cluster: workers fill shards and exchange rows through files."""
