"""The same run on a cluster: the data in shards, a Ray worker for each, and group-bys that go through files."""
