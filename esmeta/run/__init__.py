"""A run: what its commands do, its configuration, its files and its clock."""
