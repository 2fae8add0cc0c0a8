"""Tests of ablation."""
