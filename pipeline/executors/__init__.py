"""Executors: run the stages in one process or on a cluster."""
