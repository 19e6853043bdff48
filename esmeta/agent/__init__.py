"""Agents: embedding -> memory -> heads over the axes P and B, whoever trains them."""
