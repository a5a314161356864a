"""Datasets on disk: folders, versions, manifests and cards."""
