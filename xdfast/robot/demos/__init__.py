"""Demonstrations: our format, and readers for those of others; nothing here imports torch."""
