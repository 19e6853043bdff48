"""Figures and analyses of runs."""
