"""Datasets on disk: folders, versions, manifests, cards."""
