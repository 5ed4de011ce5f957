"""Dropped models and adapters on disk, and loading them again."""
