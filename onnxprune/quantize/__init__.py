"""Fewer bits for weights and activations: 16-bit floats, and 8-bit integers as Q/DQ."""
