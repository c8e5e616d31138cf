"""Statistics, and the machine on which something was measured."""
