"""Shipped divergences."""
