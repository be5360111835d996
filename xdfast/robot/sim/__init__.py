"""Simulators behind one interface; nothing here imports torch."""
