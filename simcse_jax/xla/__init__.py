"""Compiled programs: their text, collectives, work and FLOPs, and the hardware they are compiled for."""
