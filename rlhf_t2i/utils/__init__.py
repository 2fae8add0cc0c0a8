"""Plumbing without knowledge of the project: files, manifests, statistics, number formats."""
