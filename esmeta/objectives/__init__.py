"""What theta is worth: one module per value of ``--objective``."""
