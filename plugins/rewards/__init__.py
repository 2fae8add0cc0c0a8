"""Shipped rewards."""
