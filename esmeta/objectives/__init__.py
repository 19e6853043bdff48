"""Objectives: what a meta-parameter vector is worth. One module per value of ``--objective``."""
