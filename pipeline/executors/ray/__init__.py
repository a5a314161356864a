"""Run on a Ray cluster: the data is cut into shards, which Ray workers fill and exchange through files."""
